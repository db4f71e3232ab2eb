"""Matrices into packed bytes and back: the torch reference and the entry points that prefer the kernel (csrc/pack.cpp).
The layouts are those of models/layout.py; both ways of computing give the same bits."""

from __future__ import annotations

import torch

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.models.layout import GROUP, TILE_ROWS, matrix_nbytes
from ciuic_runtime.ops.native import kernels

_SOURCES = {torch.bfloat16: "bf16", torch.float32: "f32"}
_BITS = {"w4g128-t16": 4, "w8g128-t16": 8}
_ROWS = {"bf16-rows": torch.bfloat16, "f32-rows": torch.float32}
_QUAD = 4


def pack(weight: torch.Tensor, layout: str, into: torch.Tensor, name: str) -> None:
    """Fills `into` (uint8 [matrix_nbytes]) from weight [rows, columns], bfloat16 or float32.

    4 bits: a group's value of largest magnitude becomes -8, its scale being rounded to float16 first; 8 bits: it
    becomes 127 or -127. Raises InvalidInput, naming the tensor, for values that are not finite or too large."""
    rows, columns = weight.shape
    _check(into, layout, rows, columns)
    native = kernels()
    if native is None:
        packed = pack_reference(weight, layout)
    else:
        source = weight.contiguous()
        kind, address = _SOURCES[source.dtype], into.data_ptr()
        packed = into if native.pack_matrix(layout, source.data_ptr(), kind, rows, columns, address) else None
    if packed is None:
        raise _unpackable(weight, layout, name)
    if packed is not into:
        into.copy_(packed)


def unpack(packed: torch.Tensor, layout: str, rows: int, columns: int) -> torch.Tensor:
    """The matrix [rows, columns] in float32 that packed bytes stand for."""
    _check(packed, layout, rows, columns)
    native = kernels()
    if native is None:
        return unpack_reference(packed, layout, rows, columns)
    result = torch.empty(rows, columns)
    native.unpack_matrix(layout, packed.data_ptr(), rows, columns, result.data_ptr())
    return result


def pack_reference(weight: torch.Tensor, layout: str) -> torch.Tensor | None:
    """The packed bytes, uint8; None where a value is not finite, or not any more in this layout."""
    if layout in _ROWS:
        rounded = weight.contiguous().to(_ROWS[layout])
        return rounded.view(-1).view(torch.uint8) if rounded.isfinite().all() else None
    bits = _BITS[layout]
    grouped = _grouped(weight.float())  # [tiles, 16, groups, 128]
    scale = _scale(grouped, bits)
    if not (scale.isfinite().all() and grouped.isfinite().all()):
        return None
    zero, most = (8, 7) if bits == 4 else (128, 127)
    inverse = torch.where(scale == 0, 0.0, 1.0 / scale.float())
    q = (grouped * inverse).round().clamp(-8 if bits == 4 else -127, most)
    stored = (q + zero).to(torch.uint8)
    tiles, _, groups, _ = stored.shape
    quads = stored.view(tiles, TILE_ROWS, groups, -1, _QUAD).permute(0, 2, 3, 1, 4)  # [tiles, groups, quads, 16, 4]
    if bits == 4:
        quads = quads[:, :, 0::2] | quads[:, :, 1::2] << 4
    weights = quads.reshape(tiles, -1)
    scales = scale.permute(0, 2, 1, 3).reshape(tiles, -1).view(torch.uint8)
    tile = torch.zeros(tiles, matrix_nbytes(layout, TILE_ROWS, groups * GROUP), dtype=torch.uint8)
    tile[:, : weights.shape[1]] = weights
    tile[:, weights.shape[1] : weights.shape[1] + scales.shape[1]] = scales
    return tile.view(-1)


def unpack_reference(packed: torch.Tensor, layout: str, rows: int, columns: int) -> torch.Tensor:
    if layout in _ROWS:
        return packed.view(_ROWS[layout]).view(rows, columns).float()
    bits = _BITS[layout]
    tiles, groups = -(-rows // TILE_ROWS), -(-columns // GROUP)
    tile = packed.view(tiles, -1)
    end = groups * GROUP * TILE_ROWS * bits // 8
    quads = tile[:, :end].reshape(tiles, groups, -1, TILE_ROWS, _QUAD)
    if bits == 4:
        quads = torch.stack([quads & 15, quads >> 4], dim=3).flatten(2, 3)
    scale = tile[:, end : end + groups * TILE_ROWS * 2].contiguous().view(torch.float16).float()
    q = quads.permute(0, 3, 1, 2, 4).reshape(tiles, TILE_ROWS, groups, GROUP).float() - (8 if bits == 4 else 128)
    values = q * scale.view(tiles, groups, TILE_ROWS).transpose(1, 2).unsqueeze(-1)
    return values.reshape(tiles * TILE_ROWS, groups * GROUP)[:rows, :columns].contiguous()


def _grouped(weight: torch.Tensor) -> torch.Tensor:
    """[rows, columns] padded with zeros -> [tiles, 16, groups, 128]."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % GROUP, 0, -rows % TILE_ROWS))
    return padded.view(-1, TILE_ROWS, padded.shape[1] // GROUP, GROUP)


def _scale(grouped: torch.Tensor, bits: int) -> torch.Tensor:
    """float16 [tiles, 16, groups, 1]; of two values of equal magnitude the negative one counts."""
    most, least = grouped.amax(-1, keepdim=True), grouped.amin(-1, keepdim=True)
    if bits == 4:
        wide = torch.where(most > -least, most, least) / -8
    else:
        wide = torch.maximum(most, -least) / 127
    scale = wide.to(torch.float16)
    return torch.where(scale == 0, torch.zeros_like(scale), scale)  # never -0


def _check(packed: torch.Tensor, layout: str, rows: int, columns: int) -> None:
    nbytes = matrix_nbytes(layout, rows, columns)
    assert packed.dtype == torch.uint8, f"packed bytes are uint8, not {packed.dtype}"
    assert packed.is_contiguous()
    assert packed.numel() == nbytes, f"{layout} {rows} x {columns} takes {nbytes} bytes, not {packed.numel()}"


def _unpackable(weight: torch.Tensor, layout: str, name: str) -> InvalidInput:
    bad = (~weight.isfinite()).nonzero()
    if not len(bad):
        bad = (weight.abs() == weight.abs().max()).nonzero()
    row, column = bad[0].tolist()
    value = float(weight[row, column])
    return InvalidInput(
        f"{name} cannot be packed as {layout}: the value at row {row}, column {column} is {value}; "
        "is the checkpoint damaged? download it again, or run it unpacked"
    )
