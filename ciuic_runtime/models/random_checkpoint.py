"""Writes a checkpoint folder with random weights for a config: for tests, benchmarks and the demo.
It has the form of a real one (config, shards, index, tokenizer), so nothing that reads it needs to know."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.models.config import read_config
from ciuic_runtime.models.fp8 import quantise, scale_shape
from ciuic_runtime.models.spec import ModelSpec
from ciuic_runtime.models.tensors import TensorSpec, tensors

_SPECIALS = {"<bos>": 256, "<eos>": 257, "<pad>": 258}  # after the 256 bytes, each its own id
MIN_VOCAB_SIZE = 260
_STORED = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_UNQUANTISED_PAGES = ("embedding", "head")  # as in DeepSeek-V3, where routers are not quantised either


def write_random_checkpoint(
    config: Mapping[str, Any],
    folder: str | Path,
    seed: int = 0,
    num_shards: int = 1,
    dtype: str = "bfloat16",
    fp8: bool = False,
) -> Path:
    """A Hugging Face checkpoint folder for `config`, with weights that depend on `seed` and tensor names only.

    The written config says `dtype`, the quantisation (`fp8`) and the special tokens of the byte-level tokenizer that
    is written beside it (<bos> 256, <eos> 257, <pad> 258), whatever the given one says about them.
    Tensors are made and written one at a time; files appear whole or not at all, config.json last."""
    folder = Path(folder)
    if dtype not in _STORED:
        raise InvalidInput(f"dtype {dtype!r} is not one of {', '.join(_STORED)}")
    written_config = _written_config(config, dtype, fp8)
    spec = read_config(written_config, folder.name)
    _check_folder(folder)
    plans = list(_plan(spec, dtype))
    shards = _shards(plans, num_shards)
    folder.mkdir(parents=True, exist_ok=True)
    names = _shard_names(len(shards))
    for name, shard in zip(names, shards, strict=True):
        with _whole_file(folder / name) as file:
            _write_shard(file, shard, spec, seed)
    if len(shards) > 1:
        _write_json(folder / "model.safetensors.index.json", _index(names, shards))
    _write_tokenizer(folder, spec)
    _write_json(folder / "config.json", written_config)
    return folder


def _written_config(config: Mapping[str, Any], dtype: str, fp8: bool) -> dict[str, Any]:
    written = {key: value for key, value in config.items() if key not in ("torch_dtype", "quantization_config")}
    vocab_size = written.get("vocab_size")
    if type(vocab_size) is not int or vocab_size < MIN_VOCAB_SIZE:
        raise InvalidInput(
            f"vocab_size is {vocab_size!r}; a random checkpoint's byte-level tokenizer needs {MIN_VOCAB_SIZE} or more"
        )
    if fp8:
        default = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
        }
        written["quantization_config"] = config.get("quantization_config") or default
    written.setdefault("architectures", _ARCHITECTURES.get(str(written.get("model_type")), []))
    special = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    return written | {"dtype": dtype} | special


_FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
_ARCHITECTURES = {
    "deepseek_v2": ["DeepseekV2ForCausalLM"],
    "deepseek_v3": ["DeepseekV3ForCausalLM"],
    "llama": ["LlamaForCausalLM"],
    "qwen2": ["Qwen2ForCausalLM"],
}


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise InvalidInput(f"{folder} is a file; give a folder for the checkpoint")
    taken = [*folder.glob("*.safetensors"), *folder.glob("config.json")]
    if taken:
        raise InvalidInput(f"{folder} already holds a checkpoint ({taken[0].name}); give another folder or empty it")


# What is written where


@dataclass(frozen=True, slots=True)
class _Planned:
    tensor: TensorSpec
    entries: tuple[tuple[str, str, tuple[int, ...], int], ...]  # name, dtype, shape, bytes: the weight and its scales

    @property
    def nbytes(self) -> int:
        return sum(nbytes for *_, nbytes in self.entries)


def _plan(spec: ModelSpec, dtype: str) -> Iterator[_Planned]:
    for tensor in tensors(spec):
        if _is_fp8(spec, tensor):
            assert spec.fp8_block is not None
            scales = scale_shape(tensor.shape, spec.fp8_block)
            scale = (tensor.name + "_scale_inv", "F32", scales, scales[0] * scales[1] * 4)
            yield _Planned(tensor, ((tensor.name, "F8_E4M3", tensor.shape, tensor.num_parameters), scale))
            continue
        stored = "F32" if tensor.role == "e_score_correction_bias" else _STORED[dtype]  # as in DeepSeek-V3
        nbytes = tensor.num_parameters * (4 if stored == "F32" else 2)
        yield _Planned(tensor, ((tensor.name, stored, tensor.shape, nbytes),))


def _is_fp8(spec: ModelSpec, tensor: TensorSpec) -> bool:
    quantised_page = tensor.page not in _UNQUANTISED_PAGES and not tensor.page.endswith(".router")
    return spec.fp8_block is not None and tensor.is_matrix and quantised_page


def _shards(plans: list[_Planned], num_shards: int) -> list[list[_Planned]]:
    """Runs of tensors of about equal bytes, none empty."""
    if not 1 <= num_shards <= len(plans):
        raise InvalidInput(f"num_shards is {num_shards}; it must be from 1 to the number of tensors ({len(plans)})")
    total = sum(plan.nbytes for plan in plans)
    shards: list[list[_Planned]] = [[]]
    done = 0
    for position, plan in enumerate(plans):
        full = done * num_shards >= total * len(shards) or len(plans) - position == num_shards - len(shards)
        if shards[-1] and full and len(shards) < num_shards:
            shards.append([])
        shards[-1].append(plan)
        done += plan.nbytes
    return shards


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]


def _index(names: list[str], shards: list[list[_Planned]]) -> dict[str, Any]:
    weight_map = {
        entry[0]: name for name, shard in zip(names, shards, strict=True) for plan in shard for entry in plan.entries
    }
    return {"metadata": {"total_size": sum(p.nbytes for shard in shards for p in shard)}, "weight_map": weight_map}


@contextmanager
def _whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under its name when everything is written, and leaves nothing behind otherwise."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with _whole_file(path) as file:
        file.write(json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n")


def _write_shard(file: BinaryIO, shard: list[_Planned], spec: ModelSpec, seed: int) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for plan in shard:
        for name, dtype, shape, nbytes in plan.entries:
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + nbytes]}
            position += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for plan in shard:
        weight = _values(plan.tensor, spec, seed)
        if len(plan.entries) == 1:
            _write_tensor(file, weight.to(_TORCH[plan.entries[0][1]]))
            continue
        assert spec.fp8_block is not None
        for part in quantise(weight, spec.fp8_block):
            _write_tensor(file, part)


_TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def _write_tensor(file: BinaryIO, tensor: torch.Tensor) -> None:
    file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


# Values


def _values(tensor: TensorSpec, spec: ModelSpec, seed: int) -> torch.Tensor:
    """Normal values, seeded by the tensor's name, so that they do not depend on sharding or on other tensors."""
    digest = hashlib.sha256(f"{seed}/{tensor.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    values = torch.empty(tensor.shape).normal_(generator=generator)
    return values.mul_(standard_deviation(tensor, spec)).add_(1.0 if _is_norm(tensor) else 0.0)


def _is_norm(tensor: TensorSpec) -> bool:
    return not tensor.is_matrix and (tensor.page.endswith("_norm") or tensor.role.endswith("layernorm"))


def standard_deviation(tensor: TensorSpec, spec: ModelSpec) -> float:
    """Keeps activations near 1: matrices by their input width (0.022 for 2048), what joins the residual less.

    Untied embeddings are as large as a layer's input, so that tokens differ and routers send them apart."""
    if not tensor.is_matrix:
        return 0.1 if _is_norm(tensor) else 0.02
    if tensor.page == "embedding" and not spec.tied_embeddings:
        return 1.0
    joins_residual = tensor.role in ("o_proj", "down_proj")
    return float(tensor.shape[1] ** -0.5 * ((2 * spec.num_layers) ** -0.5 if joins_residual else 1.0))


# Tokenizer


def _write_tokenizer(folder: Path, spec: ModelSpec) -> None:
    """Every byte is a token of its own id, by the byte-level alphabet of GPT-2."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab=_byte_alphabet(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIALS])
    assert {t: tokenizer.token_to_id(t) for t in _SPECIALS} == _SPECIALS
    with _whole_file(folder / "tokenizer.json") as file:
        file.write(tokenizer.to_str(pretty=True).encode())
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": spec.max_positions,
    }
    _write_json(folder / "tokenizer_config.json", settings)


def _byte_alphabet() -> dict[str, int]:
    """Printable Latin-1 characters stand for themselves, the other bytes for characters from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
