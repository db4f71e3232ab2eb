"""How a page lies in memory in each format: its parts, their layouts, offsets and sizes; the same on disk as in a slot.
Knows shapes, not values, and loads no torch; kernels and `pack` follow what is written here.

Layouts of a matrix [rows, columns] (columns are summed over):

- `w4g128-t16`, `w8g128-t16`: tiles of 16 rows. Columns are padded with zeros to whole groups of 128, rows to whole
  tiles. A tile is, for every group, its weights, and then, for every group, 16 scales in float16 (one per row), the
  scales padded to a multiple of 64 bytes. value = scale x (stored - zero), zero being 8 or 128.
  Within a group the 128 columns are taken four at a time (a quad): for 8 bits, quad j is 64 bytes, byte 4r + i holding
  row r, column 4j + i. For 4 bits, 64 bytes hold two quads: the low half of byte 4r + i is row r, column 8j + i, the
  high half column 8j + 4 + i.
- `bf16-rows`, `f32-rows`: row after row, as in a checkpoint. A vector is one row.

A stack [count, rows, columns] is `count` matrices one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from ciuic_runtime.models.spec import ModelSpec
from ciuic_runtime.models.tensors import TensorSpec, tensors_by_page

LAYOUT_VERSION = 1
PACKED_FORMATS = ("int4", "int8")
KERNEL_FORMATS = (*PACKED_FORMATS, "bfloat16")  # what native kernels compute; float32 is torch's
GROUP, TILE_ROWS = 128, 16
PART_ALIGN, PAGE_ALIGN = 64, 4096  # bytes
_BITS = {"w4g128-t16": 4, "w8g128-t16": 8}
_ROW_BYTES = {"bf16-rows": 2, "f32-rows": 4}


@dataclass(frozen=True, slots=True)
class Part:
    """One matrix, stack or vector of a page. `role` is the forward pass's name for it."""

    role: str
    layout: str
    shape: tuple[int, ...]  # (columns,), (rows, columns) or (count, rows, columns), before padding
    offset: int  # bytes from the start of the page
    nbytes: int

    @property
    def matrix(self) -> tuple[int, int, int]:
        """count, rows, columns."""
        count, rows, columns = (1,) * (3 - len(self.shape)) + self.shape
        return count, rows, columns


@dataclass(frozen=True, slots=True)
class PageLayout:
    parts: tuple[Part, ...]
    nbytes: int  # a multiple of PAGE_ALIGN

    def part(self, role: str) -> Part:
        return next(p for p in self.parts if p.role == role)


def matrix_nbytes(layout: str, rows: int, columns: int) -> int:
    if layout in _ROW_BYTES:
        return rows * columns * _ROW_BYTES[layout]
    groups = -(-columns // GROUP)
    tile = groups * GROUP * TILE_ROWS * _BITS[layout] // 8 + _up(groups * TILE_ROWS * 2, PART_ALIGN)
    return -(-rows // TILE_ROWS) * tile


@lru_cache(maxsize=1 << 16)
def page_layout(spec: ModelSpec, page: str, format: str) -> PageLayout:
    """The parts of a page in `format` (int4, int8 or bfloat16), each at a multiple of 64 bytes."""
    parts, end = [], 0
    for role, layout, shape in _parts(spec, page, format):
        count, rows, columns = (1,) * (3 - len(shape)) + shape
        nbytes = count * matrix_nbytes(layout, rows, columns)
        parts.append(Part(role, layout, shape, end, nbytes))
        end = _up(end + nbytes, PART_ALIGN)
    return PageLayout(tuple(parts), _up(end, PAGE_ALIGN))


def _parts(spec: ModelSpec, page: str, format: str) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    for tensor in tensors_by_page(spec)[page]:
        if tensor.role == "kv_b_proj":
            yield from _kv_b(spec, format)
        else:
            yield tensor.role, _layout(tensor, format), tensor.shape
    if page == "embedding" and spec.tied_embeddings and format in PACKED_FORMATS:
        yield "head", _precise(format), (spec.vocab_size, spec.hidden_size)  # in bfloat16 the table itself


def _kv_b(spec: ModelSpec, format: str) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """MLA's expansion, by head: keys as [nope, rank] for prompts and turned round for the absorbed form; values."""
    mla, heads = spec.mla, spec.num_heads
    assert mla is not None
    yield "k_b", _precise(format), (heads, mla.nope_dim, mla.kv_rank)
    yield "k_b_absorbed", _precise(format), (heads, mla.kv_rank, mla.nope_dim)
    yield "v_b", _precise(format), (heads, mla.value_dim, mla.kv_rank)


def _layout(tensor: TensorSpec, format: str) -> str:
    """What a tensor is held in: the bulk in the format, what is small or sensitive more precisely."""
    if not tensor.is_matrix or tensor.role == "gate":
        return "f32-rows"  # norms, biases and the router: little to save, and routing sits on thresholds
    if tensor.page == "embedding":
        return "bf16-rows"  # one row is read per token
    if tensor.page == "head" or tensor.role in ("kv_a_proj_with_mqa", "k_proj", "v_proj"):
        return _precise(format)  # small, and every later token reads what they make: they hurt most per byte
    return {"int4": "w4g128-t16", "int8": "w8g128-t16", "bfloat16": "bf16-rows"}[format]


def _precise(format: str) -> str:
    return "bf16-rows" if format == "bfloat16" else "w8g128-t16"


def num_values(part: Part) -> int:
    return prod(part.shape)


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
