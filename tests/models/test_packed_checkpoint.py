"""Packed pages out of every kind of checkpoint stand for that checkpoint's values, within what their bits allow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import gguf_writer as writer
import pytest
import torch
from configs import TINY_V3

from ciuic_runtime.devices.backend import host_buffer
from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.models.checkpoint import Checkpoint, open_checkpoint
from ciuic_runtime.models.config import read_config
from ciuic_runtime.models.layout import page_layout
from ciuic_runtime.models.packed_checkpoint import PackedCheckpoint
from ciuic_runtime.models.pages import fill_page, fill_parts, unpack_part
from ciuic_runtime.models.random_checkpoint import write_random_checkpoint
from ciuic_runtime.models.tensors import tensors, tensors_by_page
from ciuic_runtime.packing import pack

FORMATS = ["int4", "int8", "bfloat16"]
# Of a matrix's norm: steps of a sixteenth and of a 255th of the largest of 128 normal values, rounding to 8 bits.
ERROR = {"w4g128-t16": 0.13, "w8g128-t16": 0.01, "bf16-rows": 0.003, "f32-rows": 0.0}
TIED = {
    "model_type": "llama", "vocab_size": 320, "hidden_size": 80, "intermediate_size": 200, "num_hidden_layers": 2,
    "num_attention_heads": 5, "num_key_value_heads": 5, "tie_word_embeddings": True, "mlp_bias": True,
}  # fmt: skip
V3_GGUF = TINY_V3 | {"hidden_size": 128, "q_lora_rank": 32, "bos_token_id": 318, "eos_token_id": [319]}


def write_gguf(path: Path, config: Mapping[str, Any], quant: gguf.GGMLQuantizationType | None) -> Path:
    generator = torch.Generator().manual_seed(0)
    spec = read_config(config)
    values = {t.name: torch.randn(t.shape, generator=generator).numpy() * 0.1 for t in tensors(spec)}
    writer.write_deepseek2_gguf(path, config, values, split_kv_b=True, quant=quant)
    return path


@pytest.fixture(scope="module", params=["bf16", "f16", "f32", "fp8", "tied", "gguf q8_0", "gguf f32"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    kind, folder = request.param, tmp_path_factory.mktemp("source") / "model"
    if kind.startswith("gguf"):
        quant = gguf.GGMLQuantizationType.Q8_0 if "q8_0" in kind else None
        return open_checkpoint(write_gguf(folder.with_suffix(".gguf"), V3_GGUF, quant))
    dtype = {"f16": "float16", "f32": "float32"}.get(kind, "bfloat16")
    config = TIED if kind == "tied" else TINY_V3
    return open_checkpoint(write_random_checkpoint(config, folder, dtype=dtype, fp8=kind == "fp8"))


def filled(checkpoint: Checkpoint, page: str, format: str) -> torch.Tensor:
    into = host_buffer(page_layout(checkpoint.spec, page, format).nbytes)
    into.fill_(0xA5)
    fill_page(checkpoint, page, format, into)
    return into


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm().clamp(min=1e-9))


@pytest.mark.parametrize("format", FORMATS)
def test_every_part_stands_for_its_tensor(source: Checkpoint, format: str) -> None:
    spec = source.spec
    for page, members in tensors_by_page(spec).items():
        layout, data = page_layout(spec, page, format), filled(source, page, format)
        by_role = {t.role: source.load(t, torch.float32) for t in members}
        if "kv_b_proj" in by_role:
            mla = spec.mla
            assert mla is not None
            heads = by_role["kv_b_proj"].view(spec.num_heads, -1, mla.kv_rank)
            by_role["k_b"] = heads[:, : mla.nope_dim]
            by_role["k_b_absorbed"] = by_role["k_b"].transpose(1, 2)
            by_role["v_b"] = heads[:, mla.nope_dim :]
        for part in layout.parts:
            expected = by_role["weight" if part.role == "head" else part.role]
            got = unpack_part(part, data)
            assert got.shape == expected.shape == part.shape
            assert relative_error(got, expected) <= ERROR[part.layout], (page, part)


@pytest.mark.parametrize("format", FORMATS)
def test_a_packed_folder_is_that_checkpoint(source: Checkpoint, format: str, tmp_path: Path) -> None:
    report = pack(source.path, tmp_path / "packed", format, threads=2)
    packed = open_checkpoint(tmp_path / "packed")
    assert isinstance(packed, PackedCheckpoint)
    assert packed.format == packed.spec.packed == format == report.format
    assert (
        packed.nbytes
        == report.nbytes
        == sum(page_layout(source.spec, page, format).nbytes for page in tensors_by_page(source.spec))
    )
    for page in tensors_by_page(source.spec):
        expected = filled(source, page, format)
        into = host_buffer(expected.numel())
        packed.read_page(page, into)
        assert torch.equal(into, expected), page
        assert torch.equal(filled(packed, page, format), expected), "fill_page of a packed checkpoint reads"
    limit = 0.13 if format == "int4" else 0.01
    for tensor in tensors(source.spec):
        for dtype in (torch.float32, torch.bfloat16):
            got = packed.load(tensor, dtype)
            assert (got.dtype, got.shape) == (dtype, tensor.shape)
            assert not packed.is_mapped(tensor, dtype)
            assert relative_error(got.float(), source.load(tensor, torch.float32)) <= limit, tensor.name
    packed.close()


def test_padding_is_zero(tiny_v3: Path) -> None:
    """So that the same model packed twice is the same bytes."""
    checkpoint = open_checkpoint(tiny_v3)
    for page in ("layers.0.attention", "layers.1.router", "layers.2.experts.3", "final_norm"):
        layout, data = page_layout(checkpoint.spec, page, "int4"), filled(checkpoint, page, "int4")
        ends = [0, *(part.offset + part.nbytes for part in layout.parts)]
        starts = [*(part.offset for part in layout.parts), layout.nbytes]
        assert not any(data[end:start].any() for end, start in zip(ends, starts, strict=True))


def test_some_parts_alone(tiny_v3: Path) -> None:
    checkpoint = open_checkpoint(tiny_v3)
    page = "layers.1.attention"
    layout, whole = page_layout(checkpoint.spec, page, "int8"), filled(checkpoint, page, "int8")
    wanted = {p.role: torch.empty(p.nbytes, dtype=torch.uint8) for p in layout.parts if p.role in ("v_b", "q_a_proj")}
    fill_parts(checkpoint, page, layout, wanted)
    for part in layout.parts:
        if part.role in wanted:
            assert torch.equal(wanted[part.role], whole[part.offset : part.offset + part.nbytes])


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    folder = write_random_checkpoint(TINY_V3, tmp_path / "model")
    checkpoint = open_checkpoint(folder)
    target = next(t for t in tensors(checkpoint.spec) if t.name == "model.layers.2.mlp.experts.5.up_proj.weight")
    begin = checkpoint._stored[target.name].begin  # type: ignore[attr-defined]
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(begin + 2 * (64 * 3 + 7))
        file.write(torch.tensor([float("nan")], dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes())
    message = (
        r"model: model\.layers\.2\.mlp\.experts\.5\.up_proj\.weight cannot be packed as w4.*row 3, column 7 is nan"
    )
    with pytest.raises(InvalidInput, match=message):
        filled(open_checkpoint(folder), "layers.2.experts.5", "int4")
    with pytest.raises(InvalidInput, match=message):
        pack(folder, tmp_path / "out", "int4")
    assert not (tmp_path / "out").exists()


def test_a_packed_checkpoint_has_one_format(tiny_v3: Path, tmp_path: Path) -> None:
    pack(tiny_v3, tmp_path / "out", "int8")
    packed = open_checkpoint(tmp_path / "out")
    with pytest.raises(InvalidInput, match="is packed as int8 and cannot be had as int4"):
        filled(packed, "final_norm", "int4")
    with pytest.raises(InvalidInput, match="is packed already, as int8; give the checkpoint it came from"):
        pack(tmp_path / "out", tmp_path / "again", "int8")
