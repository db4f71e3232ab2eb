"""A Hugging Face checkpoint folder: safetensors files mapped read-only, their tensors handed out as views.
Everything is checked against the config on opening, from headers alone; what tensors mean is not its business."""

from __future__ import annotations

import mmap
import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.models import fp8
from ciuic_runtime.models.config import read_config
from ciuic_runtime.models.config_fields import read_json_object
from ciuic_runtime.models.mapping import forget, read_ahead
from ciuic_runtime.models.safetensors_header import MAX_HEADER_BYTES, StoredTensor, read_header
from ciuic_runtime.models.spec import ModelSpec
from ciuic_runtime.models.tensors import TensorSpec, tensors

_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}
_SPEC_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_SCALE = "_scale_inv"  # model.layers.3.mlp.up_proj.weight_scale_inv
_CHUNK_BYTES = 16 << 20  # converted at a time, so that source and result are never both resident in full


class SafetensorsCheckpoint:
    """Implements `checkpoint.Checkpoint` for a folder with config.json and *.safetensors.

    `left_out` are tensors that the runtime knows and does not need (multi-token prediction, rotary tables, a head
    beside tied embeddings); `ignored` are those that it does not know."""

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder)
        config = self.path / "config.json"
        self.spec: ModelSpec = read_config(config)
        if self.spec.why_not_runnable:
            raise InvalidInput(f"{self.path}: {self.spec.why_not_runnable}")
        stored = _stored_tensors(self.path)
        self._stored = _match(self.path, self.spec, stored)
        used = {id(entry) for entry in self._stored.values()}
        unused = sorted(name for name, entry in stored.items() if id(entry) not in used)
        self.left_out = tuple(name for name in unused if _is_left_out(self.spec, name))
        self.ignored = tuple(name for name in unused if not _is_left_out(self.spec, name))
        raw = read_json_object(config)
        if raw.get("dtype") is None and raw.get("torch_dtype") is None:
            self.spec = replace(self.spec, dtype=self._stored_dtype())
        self._files: dict[Path, _MappedFile] = {}

    @property
    def files(self) -> set[Path]:
        return {entry.file for entry in self._stored.values()}

    @property
    def nbytes(self) -> int:
        """Scales of FP8 weights included; what the model does not need left out."""
        return sum(entry.nbytes for entry in self._stored.values())

    def load(self, tensor: TensorSpec, dtype: torch.dtype) -> torch.Tensor:
        """The tensor in `dtype`: a view of the file if it holds that type, which must not be written to; else fresh
        memory."""
        entry = self._entry(tensor.name)
        if _is_view(entry, dtype):
            return self._file(entry).view(entry)
        if entry.dtype == "F8_E4M3":
            return self._dequantised(tensor, entry, dtype)
        result = torch.empty(entry.shape, dtype=dtype)
        flat = result.view(-1)
        for chunk in _chunks(entry, _CHUNK_BYTES):
            with self._file(entry).passing(chunk) as values:
                first = (chunk.begin - entry.begin) * flat.numel() // entry.nbytes
                flat[first : first + values.numel()] = values
        return result

    def is_mapped(self, tensor: TensorSpec, dtype: torch.dtype) -> bool:
        """Whether `load` gives a view of the file."""
        return _is_view(self._entry(tensor.name), dtype)

    def prefetch(self, tensor: TensorSpec) -> None:
        entry = self._entry(tensor.name)
        read_ahead(entry.file, entry.begin, entry.end)

    def release(self, tensor: TensorSpec) -> None:
        entry = self._entry(tensor.name)
        self._file(entry).forget(entry.begin, entry.end)

    def close(self) -> None:
        """Lets the files go; a mapping lives until the last tensor that looks into it is gone."""
        self._files.clear()

    def _entry(self, name: str) -> StoredTensor:
        try:
            return self._stored[name]
        except KeyError:
            raise InvalidInput(f"{self.path} has no tensor {name!r} that {self.spec.name} consists of") from None

    def _file(self, entry: StoredTensor) -> _MappedFile:
        if entry.file not in self._files:
            self._files[entry.file] = _MappedFile(entry.file)
        return self._files[entry.file]

    def _stored_dtype(self) -> str:
        return _SPEC_DTYPES.get(self._stored["model.embed_tokens.weight"].dtype, "bfloat16")

    def _dequantised(self, tensor: TensorSpec, entry: StoredTensor, dtype: torch.dtype) -> torch.Tensor:
        block = self.spec.fp8_block
        assert block is not None, f"{tensor.name} was accepted as FP8 without a block size"
        stored_scale = self._stored[tensor.name + _SCALE]
        scale = self._file(stored_scale).view(stored_scale)
        result = torch.empty(entry.shape, dtype=dtype)
        rows, columns = entry.shape
        step = max(1, _CHUNK_BYTES // (block[0] * columns)) * block[0]  # rows: whole blocks
        for chunk in _chunks(entry, step * columns):
            first = (chunk.begin - entry.begin) // columns
            last = min(first + step, rows)
            with self._file(entry).passing(chunk) as values:
                scales = scale[first // block[0] : -(-last // block[0])]
                fp8.dequantise(values.view(last - first, columns), scales, block, dtype, into=result[first:last])
        return result


class _MappedFile:
    """One shard, mapped read-only and shared: its pages are the page cache's own, never private copies.

    (A private writable mapping, which torch and safetensors make, counts against the machine's commit limit.)"""

    def __init__(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise InvalidInput(f"{path} cannot be mapped: {error}") from error
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self._path = path

    def view(self, entry: StoredTensor) -> torch.Tensor:
        """The tensor as it lies in the file; a copy where its offset is not a multiple of its element size."""
        if entry.end > self._bytes.numel():
            raise InvalidInput(f"{self._path} has become shorter since it was opened; open the checkpoint again")
        raw = self._bytes[entry.begin : entry.end]
        dtype = _DTYPES[entry.dtype]
        return (raw if entry.begin % dtype.itemsize == 0 else raw.clone()).view(dtype).view(entry.shape)

    def passing(self, entry: StoredTensor) -> _Passing:
        return _Passing(self, entry)

    def forget(self, begin: int, end: int) -> None:
        forget(self._map, begin, end)


class _Passing:
    """A flat view for the length of a `with`, after which the pages read through it stop counting as resident."""

    def __init__(self, file: _MappedFile, entry: StoredTensor) -> None:
        self._file, self._entry = file, entry

    def __enter__(self) -> torch.Tensor:
        return self._file.view(self._entry).view(-1)

    def __exit__(self, *exception: object) -> None:
        self._file.forget(self._entry.begin, self._entry.end)


def _is_view(entry: StoredTensor, dtype: torch.dtype) -> bool:
    return _DTYPES[entry.dtype] == dtype != torch.float8_e4m3fn and entry.begin % dtype.itemsize == 0


def _chunks(entry: StoredTensor, nbytes: int) -> Iterator[StoredTensor]:
    """The stored tensor in flat pieces of `nbytes` and a rest."""
    itemsize = _DTYPES[entry.dtype].itemsize
    for begin in range(entry.begin, entry.end, nbytes):
        end = min(begin + nbytes, entry.end)
        yield replace(entry, shape=((end - begin) // itemsize,), begin=begin, end=end)


# Which files there are


def _stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor in the folder's files, headers checked; raises InvalidInput for a missing or damaged file."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return read_header(single)
    if index.exists():
        return _indexed(folder, index)
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise InvalidInput(_no_weights(folder))
    _check_numbering(folder, shards)
    return _joined(shards)


def _no_weights(folder: Path) -> str:
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    if not pickled:
        return f"{folder} has no *.safetensors files; give a folder with config.json and the weights"
    return (
        f"{folder} has its weights as pickle files only ({pickled[0]}), which can run any code when read and are never "
        "opened here; convert them to safetensors, or download the safetensors version"
    )


def _indexed(folder: Path, index: Path) -> dict[str, StoredTensor]:
    weight_map = read_json_object(index, MAX_HEADER_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InvalidInput(f"{index}: weight_map is missing or not an object that says which file holds which tensor")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors") or file != Path(file).name:
            raise InvalidInput(
                f"{index}: {name!r} lies in {str(file)[:100]!r}, which is not a safetensors file beside it"
            )
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise InvalidInput(f"{folder} lacks {len(missing)} of {len(shards)} shards: {_some(missing)}; download them")
    stored: dict[str, StoredTensor] = {}
    for shard in shards:
        inside = read_header(folder / shard)
        stored |= {name: entry for name, entry in inside.items() if weight_map.get(name, shard) == shard}
    absent = [name for name in weight_map if name not in stored]
    if absent:
        where = folder / weight_map[absent[0]]
        raise InvalidInput(f"{where} lacks tensors that {index.name} says it holds: {_some(absent)}; download it again")
    return stored


def _check_numbering(folder: Path, shards: list[Path]) -> None:
    """Without an index, `x-00002-of-00003.safetensors` still tells how many there should be."""
    numbered = [m for p in shards if (m := re.fullmatch(r"(.*-)(\d{1,9})(-of-)(\d{1,9})(\.safetensors)", p.name))]
    for found in numbered[:1]:
        total, width = int(found[4]), len(found[2])
        if total > 100_000:
            raise InvalidInput(f"{folder / found[0]} says that it is one of {total} shards; it must be misnamed")
        here = {p.name for p in shards}
        names = (f"{found[1]}{i:0{width}}{found[3]}{found[4]}{found[5]}" for i in range(1, total + 1))
        missing = [name for name in names if name not in here]
        if missing:
            raise InvalidInput(f"{folder} lacks {len(missing)} of {total} shards: {_some(missing)}; download them")


def _joined(shards: list[Path]) -> dict[str, StoredTensor]:
    stored: dict[str, StoredTensor] = {}
    for shard in shards:
        inside = read_header(shard)
        twice = sorted(inside.keys() & stored.keys())
        if twice:
            raise InvalidInput(f"{shard} and {stored[twice[0]].file.name} both hold {_some(twice)}; remove one of them")
        stored |= inside
    return stored


def _some(names: list[str]) -> str:
    shown = ", ".join(repr(name)[1:-1][:120] for name in names[:2])
    return shown if len(names) <= 2 else f"{shown} and {len(names) - 2} more"


# Whether they hold the model that the config describes


def _match(folder: Path, spec: ModelSpec, stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The stored tensor for each one the model consists of (and each FP8 scale), by the model's own names."""
    matched: dict[str, StoredTensor] = {}
    missing = []
    for tensor in tensors(spec):
        entry = _find(stored, tensor.name)
        if entry is None:
            missing.append(tensor.name)
            continue
        _check(entry, tensor, spec)
        matched[tensor.name] = entry
        if entry.dtype == "F8_E4M3":
            matched[tensor.name + _SCALE] = _checked_scale(entry, tensor, spec, _find(stored, tensor.name + _SCALE))
    if missing:
        hint = "; is tie_word_embeddings missing in config.json?" if missing == ["lm_head.weight"] else ""
        raise InvalidInput(f"{folder} lacks tensors that its config.json asks for: {_some(missing)}{hint}")
    return matched


def _find(stored: dict[str, StoredTensor], name: str) -> StoredTensor | None:
    """Checkpoints of the bare model leave out the prefix `model.`."""
    return stored.get(name) or stored.get(name.removeprefix("model."))


def _check(entry: StoredTensor, tensor: TensorSpec, spec: ModelSpec) -> None:
    if entry.shape != tensor.shape:
        raise InvalidInput(
            f"{entry.file}: {tensor.name} has shape {list(entry.shape)}, but config.json asks for {list(tensor.shape)}"
        )
    if entry.dtype not in _DTYPES:
        raise InvalidInput(f"{entry.file}: {tensor.name} is {entry.dtype}; weights can be {', '.join(_DTYPES)}")
    if entry.dtype == "F8_E4M3" and not tensor.is_matrix:
        raise InvalidInput(f"{entry.file}: {tensor.name} is F8_E4M3, which only matrices can be")
    if entry.dtype == "F8_E4M3" and spec.fp8_block is None:
        raise InvalidInput(f"{entry.file}: {tensor.name} is F8_E4M3, but config.json has no quantization_config")


def _checked_scale(
    weight: StoredTensor, tensor: TensorSpec, spec: ModelSpec, scale: StoredTensor | None
) -> StoredTensor:
    assert spec.fp8_block is not None
    name = tensor.name + _SCALE
    shape = fp8.scale_shape(tensor.shape, spec.fp8_block)
    if scale is None:
        raise InvalidInput(f"{weight.file}: {tensor.name} is F8_E4M3, but its scales ({name}) are missing")
    if scale.shape != shape:
        raise InvalidInput(
            f"{scale.file}: {name} has shape {list(scale.shape)}, but blocks of {spec.fp8_block[0]} x "
            f"{spec.fp8_block[1]} in a weight of {list(tensor.shape)} ask for {list(shape)}"
        )
    if scale.dtype not in _SPEC_DTYPES:
        raise InvalidInput(f"{scale.file}: {name} is {scale.dtype}; scales can be {', '.join(_SPEC_DTYPES)}")
    return scale


def _is_left_out(spec: ModelSpec, name: str) -> bool:
    if name.endswith("rotary_emb.inv_freq") or (spec.tied_embeddings and name == "lm_head.weight"):
        return True
    layer = re.match(r"(?:model\.)?layers\.(\d{1,9})\.", name)
    mtp = max(spec.num_mtp_layers, 1) if spec.family.startswith("deepseek") else 0
    return layer is not None and spec.num_layers <= int(layer[1]) < spec.num_layers + mtp
