"""One page's packed bytes out of any opened checkpoint, as `layout.py` says they lie, and one tensor back out of them.
Knows which tensor becomes which part; where pages are kept, and what computes with them, it does not know."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, cast

import torch

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.models.layout import PageLayout, Part, matrix_nbytes, page_layout
from ciuic_runtime.models.spec import ModelSpec
from ciuic_runtime.models.tensors import TensorSpec, tensors_by_page
from ciuic_runtime.ops.packing import pack, unpack

if TYPE_CHECKING:
    from ciuic_runtime.models.checkpoint import Checkpoint
    from ciuic_runtime.models.packed_checkpoint import PackedCheckpoint


def fill_page(checkpoint: Checkpoint, page: str, format: str, into: torch.Tensor) -> None:
    """Fills `into` (uint8 [page_layout(...).nbytes], on the host) with the page in `format`, padding included.

    A packed checkpoint gives the page as it is. Many threads may fill pages of one checkpoint at once.
    Raises InvalidInput, naming the tensor, for weights that cannot be packed."""
    layout = page_layout(checkpoint.spec, page, format)
    assert into.numel() == layout.nbytes, f"{page} takes {layout.nbytes} bytes in {format}, not {into.numel()}"
    if checkpoint.spec.packed:
        if checkpoint.spec.packed != format:
            raise InvalidInput(f"{checkpoint.path} is packed as {checkpoint.spec.packed} and cannot be had as {format}")
        cast("PackedCheckpoint", checkpoint).read_page(page, into)
        return
    fill_parts(checkpoint, page, layout, {p.role: into[p.offset : p.offset + p.nbytes] for p in layout.parts})
    end = 0
    for part in layout.parts:
        into[end : part.offset] = 0
        end = part.offset + part.nbytes
    into[end:] = 0


def fill_parts(checkpoint: Checkpoint, page: str, layout: PageLayout, into: Mapping[str, torch.Tensor]) -> None:
    """Fills those parts of a page that are in `into` (role -> uint8 [part.nbytes]) from an unpacked checkpoint."""
    for tensor, parts in _sources(checkpoint.spec, page, layout):
        loaded: dict[torch.dtype, torch.Tensor] = {}
        for part in (p for p in parts if p.role in into):
            dtype = _dtype(checkpoint, tensor, part)
            if dtype not in loaded:
                loaded[dtype] = checkpoint.load(tensor, dtype)
            _fill_part(checkpoint, tensor, part, loaded[dtype], into[part.role])
        if loaded:
            checkpoint.release(tensor)


def _fill_part(
    checkpoint: Checkpoint, tensor: TensorSpec, part: Part, weight: torch.Tensor, into: torch.Tensor
) -> None:
    _, rows, columns = part.matrix
    each = matrix_nbytes(part.layout, rows, columns)
    for i, matrix in enumerate(_matrices(checkpoint.spec, part, weight)):
        pack(matrix, part.layout, into[i * each : (i + 1) * each], f"{checkpoint.path}: {tensor.name}")


def unpack_tensor(spec: ModelSpec, tensor: TensorSpec, format: str, page: torch.Tensor) -> torch.Tensor:
    """The tensor, in float32 and in the shape the spec gives it, that a page's bytes stand for."""
    layout = page_layout(spec, tensor.page, format)
    if tensor.role != "kv_b_proj":
        return unpack_part(layout.part(tensor.role), page).view(tensor.shape)
    keys, values = (unpack_part(layout.part(role), page) for role in ("k_b", "v_b"))
    return torch.cat([keys, values], dim=1).view(tensor.shape)


def unpack_part(part: Part, page: torch.Tensor) -> torch.Tensor:
    """float32, in the part's shape."""
    count, rows, columns = part.matrix
    each = matrix_nbytes(part.layout, rows, columns)
    starts = range(part.offset, part.offset + count * each, each)
    matrices = [unpack(page[begin : begin + each], part.layout, rows, columns) for begin in starts]
    return (torch.stack(matrices) if count > 1 else matrices[0]).view(part.shape)


def _sources(spec: ModelSpec, page: str, layout: PageLayout) -> Iterator[tuple[TensorSpec, tuple[Part, ...]]]:
    """Each tensor of the page with the parts that are made of it."""
    roles = {part.role: part for part in layout.parts}
    for tensor in tensors_by_page(spec)[page]:
        made: tuple[str, ...] = _MADE_OF_KV_B if tensor.role == "kv_b_proj" else (tensor.role,)
        if page == "embedding" and "head" in roles:
            made = (tensor.role, "head")
        yield tensor, tuple(roles.pop(role) for role in made)
    assert not roles, f"{page} has parts that no tensor fills: {', '.join(roles)}"


def _dtype(checkpoint: Checkpoint, tensor: TensorSpec, part: Part) -> torch.dtype:
    """To pack from: bfloat16 where the file holds that or no more is kept, else float32, so that it is rounded once."""
    narrow = part.layout == "bf16-rows" or checkpoint.is_mapped(tensor, torch.bfloat16)
    return torch.bfloat16 if narrow else torch.float32


_MADE_OF_KV_B = ("k_b", "k_b_absorbed", "v_b")


def _matrices(spec: ModelSpec, part: Part, weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """What the part holds of the tensor. kv_b_proj's rows are, head by head, the keys' and then the values'."""
    if part.role not in _MADE_OF_KV_B:
        return iter([weight.view(part.matrix[1:])])
    mla = spec.mla
    assert mla is not None
    heads = weight.view(spec.num_heads, mla.nope_dim + mla.value_dim, mla.kv_rank)
    if part.role == "v_b":
        return iter(heads[:, mla.nope_dim :])
    keys = heads[:, : mla.nope_dim]
    return iter(keys.transpose(1, 2) if part.role == "k_b_absorbed" else keys)
