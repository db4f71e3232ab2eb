"""The weights in a GGUF file, under the names and in the layout of a Hugging Face checkpoint.
Reads every quantisation that the `gguf` package can dequantise; what the fields mean, `gguf_config.py` knows."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from math import prod
from pathlib import Path

import gguf
import numpy as np
import torch

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.models.gguf_config import gguf_config
from ciuic_runtime.models.gguf_file import GgufFile, GgufTensor, open_gguf
from ciuic_runtime.models.gguf_names import Source, find_source
from ciuic_runtime.models.mapping import forget, read_ahead
from ciuic_runtime.models.spec import ModelSpec
from ciuic_runtime.models.tensors import TensorSpec, tensors

_Type = gguf.GGMLQuantizationType
_PLAIN = {_Type.F32: torch.float32, _Type.F16: torch.float16, _Type.BF16: torch.bfloat16}
_CHUNK = 1 << 22  # values dequantised at a time: bounds the float32 copy beside the result
_ROW = 2048  # values; the gguf package works on 16 rows at a time, and narrow ones take it twice as long


def read_gguf_spec(path: str | Path) -> ModelSpec:
    """What the model in the file is; no weights are read."""
    return _spec(open_gguf(path))


class GgufCheckpoint:
    """A `Checkpoint` over one GGUF file, or over all parts of a split one."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        files = open_gguf(path)
        self.spec = _spec(files)
        self._files = {name: file for file in files for name in file.tensors}
        for tensor in tensors(self.spec):
            self._check(tensor)

    @property
    def files(self) -> set[Path]:
        return {file.path for file in self._files.values()}

    @property
    def nbytes(self) -> int:
        names = {name for tensor in tensors(self.spec) for name, _ in self._source(tensor).parts}
        return sum(self._stored(name).nbytes for name in names)

    def load(self, tensor: TensorSpec, dtype: torch.dtype) -> torch.Tensor:
        source = self._source(tensor)
        parts = [self._read(name, source.expert, dtype) for name, _ in source.parts]
        if len(parts) == 2:
            return _join_kv_b(*parts).reshape(tensor.shape)
        if source.permuted_heads:
            return _restore_rows(parts[0], source.permuted_heads).reshape(tensor.shape)
        return parts[0].reshape(tensor.shape)

    def is_mapped(self, tensor: TensorSpec, dtype: torch.dtype) -> bool:
        source = self._source(tensor)
        name = source.parts[0][0]
        return len(source.parts) == 1 and not source.permuted_heads and _PLAIN.get(self._stored(name).type) == dtype

    def prefetch(self, tensor: TensorSpec) -> None:
        for file, begin, end in self._ranges(tensor):
            read_ahead(file.path, begin, end)

    def release(self, tensor: TensorSpec) -> None:
        for file, begin, end in self._ranges(tensor):
            forget(file.data, begin, end)

    def close(self) -> None:
        """Forgets the file; it stays mapped for as long as tensors loaded from it live."""
        self._files.clear()

    def _ranges(self, tensor: TensorSpec) -> Iterator[tuple[GgufFile, int, int]]:
        """Where the tensor's bytes lie: file, begin and end."""
        source = self._source(tensor)
        for name, _ in source.parts:
            stored = self._stored(name)
            each = stored.nbytes if source.expert is None else stored.nbytes // stored.shape[0]
            begin = stored.offset + (source.expert or 0) * each
            yield self._files[name], begin, begin + each

    def _stored(self, name: str) -> GgufTensor:
        return self._files[name].tensors[name]

    def _source(self, tensor: TensorSpec) -> Source:
        source = find_source(self.spec, tensor.name, tensor.shape, self._files)
        for name, _ in source.parts:
            if name not in self._files:
                raise InvalidInput(
                    f"{self.path} has no tensor {name} (for {tensor.name}); the file is incomplete or of another model"
                )
        return source

    def _check(self, tensor: TensorSpec) -> None:
        for name, shape in self._source(tensor).parts:
            stored = self._stored(name)
            if stored.shape != shape:
                raise InvalidInput(f"{self.path}: {name} has shape {stored.shape}, the model's fields ask for {shape}")
            if not _can_dequantise(stored.type):
                raise InvalidInput(
                    f"{self.path}: {name} is stored as {stored.type_name}, which the gguf package cannot dequantise; "
                    "take a file in another quantisation, such as Q4_K_M or Q8_0"
                )

    def _read(self, name: str, expert: int | None, dtype: torch.dtype) -> torch.Tensor:
        """The stored tensor, or one expert of it, in `dtype`; a view where the file holds that type."""
        stored = self._stored(name)
        raw, shape = self._files[name].raw(stored), stored.shape
        if expert is not None:
            raw, shape = raw.reshape(shape[0], -1)[expert], shape[1:]
        if (plain := _PLAIN.get(stored.type)) is not None:
            return torch.from_numpy(raw).view(plain).reshape(shape).to(dtype)
        return _dequantise(raw, stored.type, shape, dtype)


def _spec(files: list[GgufFile]) -> ModelSpec:
    from ciuic_runtime.models.config import read_config

    first = files[0]
    name = first.fields.get("general.name")
    return read_config(gguf_config(files), name=name if isinstance(name, str) and name else first.path.stem)


@cache
def _can_dequantise(kind: int) -> bool:
    if kind not in gguf.GGML_QUANT_SIZES:
        return False
    if kind in _PLAIN:
        return True
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[_Type(kind)][1]), np.uint8), _Type(kind))
    except NotImplementedError:
        return False
    return True


def _dequantise(
    raw: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], kind: int, shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """Piece by piece, so that no float32 copy of the whole exists beside a half-precision result."""
    count = prod(shape)
    width = shape[-1] if count % _ROW else _ROW  # a multiple of every block size; rows mean nothing to blocks
    rows = count // width
    raw = raw.reshape(rows, -1)
    result = torch.empty((rows, width), dtype=dtype)
    step = max(1, _CHUNK // width)
    for row in range(0, rows, step):
        values = gguf.quants.dequantize(raw[row : row + step], _Type(kind))
        result[row : row + step] = torch.from_numpy(values)
    return result.reshape(shape)


def _restore_rows(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama's query and key rows: the file pairs (0, 1), (2, 3), ..., the model (0, d/2), (1, d/2 + 1), ..."""
    rest = weight.shape[1:]
    return weight.reshape(heads, -1, 2, *rest).transpose(1, 2).reshape(weight.shape)


def _join_kv_b(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """[heads, kv_rank, nope] and [heads, value, kv_rank] -> per head the rows of the keys, then those of the values."""
    return torch.cat([keys.transpose(1, 2), values], dim=1)
