"""One page's packed bytes out of any opened checkpoint, as `layout.py` says they lie, and one tensor back out of them.
Knows which tensor becomes which part; where pages are kept, and what computes with them, it does not know."""

from __future__ import annotations

from collections.abc import Iterator
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
    end = 0
    for part, (name, matrices) in _sources(checkpoint, page, layout):
        into[end : part.offset] = 0
        count, rows, columns = part.matrix
        each = matrix_nbytes(part.layout, rows, columns)
        for i, matrix in enumerate(matrices):
            begin = part.offset + i * each
            pack(matrix, part.layout, into[begin : begin + each], f"{checkpoint.path}: {name}")
        end = part.offset + part.nbytes
        assert end == part.offset + count * each
    into[end:] = 0


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


_Source = tuple[str, Iterator[torch.Tensor]]  # the tensor's name, and its matrices


def _sources(checkpoint: Checkpoint, page: str, layout: PageLayout) -> Iterator[tuple[Part, _Source]]:
    """Each part of the page with what it is packed from; a tensor is loaded when its turn comes."""
    parts = iter(layout.parts)
    for tensor in tensors_by_page(checkpoint.spec)[page]:
        part = next(parts)
        weight = _load(checkpoint, tensor, part)
        if tensor.role == "kv_b_proj":
            split = (part, next(parts), next(parts))
            for piece, matrices in zip(split, _by_head(checkpoint.spec, weight), strict=True):
                yield piece, (tensor.name, matrices)
        else:
            yield part, (tensor.name, iter([weight.view(part.matrix[1:])]))
        if tensor.page == "embedding" and checkpoint.spec.tied_embeddings:
            head = next(parts)
            yield head, (tensor.name, iter([_load(checkpoint, tensor, head)]))
    assert next(parts, None) is None, f"{page} has parts that no tensor fills"


def _load(checkpoint: Checkpoint, tensor: TensorSpec, part: Part) -> torch.Tensor:
    """In bfloat16 where the file holds that or where no more is kept, else in float32, so that it is rounded once."""
    narrow = part.layout == "bf16-rows" or checkpoint.is_mapped(tensor, torch.bfloat16)
    return checkpoint.load(tensor, torch.bfloat16 if narrow else torch.float32)


def _by_head(spec: ModelSpec, weight: torch.Tensor) -> tuple[Iterator[torch.Tensor], ...]:
    """kv_b_proj's rows are, head by head, the keys' and then the values': k_b, k_b_absorbed and v_b."""
    mla = spec.mla
    assert mla is not None
    heads = weight.view(spec.num_heads, mla.nope_dim + mla.value_dim, mla.kv_rank)
    keys, values = heads[:, : mla.nope_dim], heads[:, mla.nope_dim :]
    return iter(keys), (key.t() for key in keys), iter(values)
