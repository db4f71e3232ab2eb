"""What the kernel tests share: weights packed from drawn values, activations rounded in torch as the kernels round
them, products in double precision with a bound on what float32 may add to them, and memory with guards around it."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pytest
import torch

from ciuic_runtime.models.layout import GROUP, matrix_nbytes
from ciuic_runtime.ops.native import kernels
from ciuic_runtime.ops.packing import pack, unpack

native: Any = kernels()
SETS: list[str] = [] if native is None else native.instruction_sets()
TILED = ["w4g128-t16", "w8g128-t16"]
LAYOUTS = [*TILED, "bf16-rows", "f32-rows"]
PRECISE = {"w4g128-t16": "w8g128-t16"}  # what goes with a layout where precision matters, as in models/layout.py
THREADS = [1, 2, 3, 5]
GUARD = 64  # values on either side
SENTINEL = 12345.678
EPS = 2.0**-24  # of one rounding to float32

every_set = pytest.mark.parametrize("isa", SETS)
native_only = pytest.mark.skipif(native is None, reason="the native kernels are not built here")


def examples(count: int) -> int:
    """How many to draw or repeat: as many in the gate, ten times that in the long search."""
    return count * 10 if os.environ.get("HYPOTHESIS_PROFILE") == "search" else count


@lru_cache
def pool(threads: int) -> Any:
    return native.ThreadPool(threads, [])


@lru_cache
def operators(isa: str, threads: int = 1) -> Any:
    return native.Operators(isa, pool(threads))


# Before the interpreter takes modules apart, so that the binding finds nothing left over.
atexit.register(pool.cache_clear)
atexit.register(operators.cache_clear)


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=rng(seed))


def activations(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Rows of very different sizes, each with a few values that stand out, as activations have them."""
    generator = rng(seed)
    x = torch.randn(rows, columns, generator=generator)
    x *= torch.where(torch.rand(rows, columns, generator=generator) < 0.02, 8.0, 1.0)
    return x * 2.0 ** torch.randint(-6, 7, (rows, 1), generator=generator)


@dataclass(frozen=True)
class Weight:
    """Matrices [count, rows, columns] as a kernel reads them, and the values that they stand for."""

    layout: str
    values: torch.Tensor  # float32 [count, rows, columns]
    packed: torch.Tensor  # uint8
    matrix: Any

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.values[i]

    @property
    def columns(self) -> int:
        return self.values.shape[2]


def weight_of(layout: str, values: torch.Tensor) -> Weight:
    """values [rows, columns] or [count, rows, columns], rounded by packing."""
    stack = values if values.dim() == 3 else values[None]
    count, rows, columns = stack.shape
    each = matrix_nbytes(layout, rows, columns)
    packed = torch.empty(count * each, dtype=torch.uint8)
    parts = [packed[i * each : (i + 1) * each] for i in range(count)]
    for part, matrix in zip(parts, stack, strict=True):
        pack(matrix.contiguous(), layout, part, "drawn")
    restored = torch.stack([unpack(part, layout, rows, columns) for part in parts])
    return Weight(layout, restored, packed, native.Matrix(layout, count, rows, columns, packed.data_ptr()))


def weight(layout: str, rows: int, columns: int, seed: int, count: int = 1) -> Weight:
    return weight_of(layout, randn(count, rows, columns, seed=seed) * columns**-0.5)


def as_read(layout: str, x: torch.Tensor) -> torch.Tensor:
    """Activations [..., columns] in double precision as a product with a matrix of that layout uses them.

    Tiles: int8 per row and group of 128, q = round(x * (127 / largest)), ties to even, scale = largest / 127, all in
    float32; whatever is not finite makes its row and group not a number."""
    if layout == "f32-rows":
        return x.float().double()
    if layout == "bf16-rows":
        return x.float().bfloat16().double()
    columns = x.shape[-1]
    groups = torch.nn.functional.pad(x.float(), (0, -columns % GROUP)).unflatten(-1, (-1, GROUP))
    largest = groups.abs().amax(-1, keepdim=True)
    bad = ~groups.isfinite().all(-1, keepdim=True)
    # A quotient rounded once: torch takes `127.0 / x` for 127 times the rounded reciprocal.
    q = (groups * torch.full_like(largest, 127.0).div(largest)).round()
    values = torch.where(largest < 1e-30, 0.0, q.double() * (largest / 127.0).double())
    values = torch.where(bad, float("nan"), values)
    return values.flatten(-2)[..., :columns]


def product(layout: str, w: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., columns] times w [rows, columns] in double precision, and how far float32 sums in any of the kernels'
    orders may lie from it."""
    read, wide, columns = as_read(layout, x), w.double(), x.shape[-1]
    # Tiles: exact within a group, then a product of scales and an addition per group. Rows: partial sums over pairs
    # of columns, in the worst case one after the other.
    roundings = -(-columns // GROUP) + 3 if layout in TILED else columns / 2 + 8
    bound = read.abs() @ wide.abs().T * (roundings * EPS)
    return read @ wide.T, bound + 1e-36


def linear(w: Weight, x: torch.Tensor, i: int = 0) -> torch.Tensor:
    return product(w.layout, w[i], x)[0]


def one_step(layout: str, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """How much a product changes where one activation is rounded to the neighbouring value: at most, per row."""
    largest = x.abs().amax(-1, keepdim=True).double()
    step = {"f32-rows": 0.0, "bf16-rows": 2.0**-8}.get(layout, 1 / 127)
    return largest * step * float(w.abs().max())


@dataclass(frozen=True)
class Guarded:
    """A tensor with guards before and behind it."""

    memory: torch.Tensor
    value: torch.Tensor

    def check(self) -> torch.Tensor:
        """The tensor, after seeing that nothing was written beside it."""
        n = self.value.numel()
        outside = torch.cat([self.memory[:GUARD], self.memory[GUARD + n :]])
        assert (outside == outside.new_tensor(SENTINEL)).all(), "written beside the output"
        return self.value


def guarded(*shape: int, fill: float = float("nan"), dtype: torch.dtype = torch.float32) -> Guarded:
    n = int(torch.Size(shape).numel())
    memory = torch.full((n + 2 * GUARD,), SENTINEL).to(dtype)
    value = memory[GUARD : GUARD + n].view(shape)
    value.fill_(fill)
    return Guarded(memory, value)


def address(x: torch.Tensor | None) -> int:
    if x is None:
        return 0
    assert x.is_contiguous()
    return x.data_ptr()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, so that NaN equals itself and 0 is not -0."""
    as_int = {4: torch.int32, 2: torch.int16, 8: torch.int64}[a.element_size()]
    return a.shape == b.shape and torch.equal(a.contiguous().view(as_int), b.contiguous().view(as_int))


def assert_within(got: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor, what: str) -> None:
    """|got - expected| <= bound, value by value."""
    error = (got.double() - expected).abs()
    worst = (error / bound).nan_to_num(nan=float("inf"))
    at = int(worst.argmax())
    assert worst.flatten()[at] <= 1, (
        f"{what}: {got.flatten()[at]:.9g} where {expected.flatten()[at]:.9g} is right, "
        f"{worst.flatten()[at]:.3g} times what rounding allows, at {at} of {tuple(got.shape)}"
    )


def ways(threads: list[int] = THREADS) -> Iterator[tuple[str, Any]]:
    """Operators of every instruction set on every number of threads."""
    for isa in SETS:
        for n in threads:
            yield f"{isa}, {n} threads", operators(isa, n)
