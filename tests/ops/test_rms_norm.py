"""The native kernel against the torch reference over a list of shapes; a row's bits depend on that row alone."""

from __future__ import annotations

import importlib

import pytest
import torch

from ciuic_runtime.ops.native import kernels
from ciuic_runtime.ops.rms_norm import rms_norm, rms_norm_reference

# The module, not the function of the same name.
module = importlib.import_module("ciuic_runtime.ops.rms_norm")
SIZES = [1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 100, 127, 255, 576, 1000, 1536, 2048, 4095, 4096, 4099]
DTYPES = [torch.float32, torch.bfloat16]
native_only = pytest.mark.skipif(kernels() is None, reason="the native kernels are not built here")


def made(rows: int, size: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed * 10007 + size)
    x = torch.randn(rows, size, generator=generator) * torch.logspace(-3, 3, rows)[:, None]
    return x.to(dtype), (1 + 0.3 * torch.randn(size, generator=generator)).to(dtype)


def by_formula(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """In double precision, rounded where the operator's definition rounds: after normalising, and at the end."""
    wide = x.double()
    normal = (wide / (wide.pow(2).mean(-1, keepdim=True) + eps).sqrt()).to(x.dtype)
    return weight * normal


@native_only
def test_the_kernel_is_what_runs() -> None:
    x, weight = made(2, 33, torch.float32)
    native = kernels()
    assert native is not None
    out = torch.empty_like(x)
    native.rms_norm_f32(x.data_ptr(), weight.data_ptr(), out.data_ptr(), 2, 33, 1e-6)
    assert torch.equal(out, rms_norm(x, weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_agrees_with_the_reference(size: int, dtype: torch.dtype) -> None:
    x, weight = made(9, size, dtype)
    got, reference, truth = (f(x, weight, 1e-6) for f in (rms_norm, rms_norm_reference, by_formula))
    assert got.dtype == dtype
    assert got.shape == x.shape
    if dtype == torch.float32:
        torch.testing.assert_close(got, truth.float(), rtol=2e-6, atol=0)
        torch.testing.assert_close(got, reference, rtol=2e-6, atol=0)
    else:  # the steps round alike: only a sum that lies on a rounding boundary may differ, by one place
        assert (got != reference).float().mean() <= 0.002
        torch.testing.assert_close(got, reference, rtol=2**-7, atol=0)


def test_bfloat16_is_exact_where_the_sum_is() -> None:
    """Squares of small integers add up exactly in any order, so every rounding step can be compared bit by bit."""
    generator = torch.Generator().manual_seed(3)
    for size in (4, 16, 64, 256, 1024):
        x = torch.randint(-8, 9, (50, size), generator=generator).bfloat16()
        weight = torch.randn(size, generator=generator).bfloat16()
        assert torch.equal(
            rms_norm(x, weight, 0.0 if size > 4 else 1e-6), by_formula(x, weight, 0.0 if size > 4 else 1e-6)
        )


@native_only
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 17, 576, 2048, 4099])
def test_a_row_does_not_depend_on_its_neighbours(size: int, dtype: torch.dtype) -> None:
    x, weight = made(33, size, dtype)
    whole = rms_norm(x, weight, 1e-5)
    for rows in (slice(0, 1), slice(5, 7), slice(32, 33), slice(1, 33)):
        assert torch.equal(rms_norm(x[rows].clone(), weight, 1e-5), whole[rows])
    assert torch.equal(rms_norm(x.flip(0), weight, 1e-5), whole.flip(0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_are_not_hidden(dtype: torch.dtype, bad: float) -> None:
    x, weight = made(3, 40, dtype)
    x[1, 39] = bad
    got = rms_norm(x, weight, 1e-6)
    assert got[1, 39].isnan()
    assert torch.equal(got.isnan(), rms_norm_reference(x, weight, 1e-6).isnan())
    assert got[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_and_shapes(dtype: torch.dtype) -> None:
    """Columns of a wider tensor (as MLA's latent is), a transposed one, more dimensions, and no rows at all."""
    x, weight = made(6, 48, dtype)
    expected = rms_norm_reference(x, weight, 1e-6)
    wide = torch.cat([x, x], dim=1)[:, :48]
    assert not wide.is_contiguous()
    for same in (wide, x.t().contiguous().t()):
        torch.testing.assert_close(rms_norm(same, weight, 1e-6), expected, rtol=2**-7, atol=0)
    torch.testing.assert_close(rms_norm(x.view(2, 3, 48), weight, 1e-6).view(6, 48), expected, rtol=2**-7, atol=0)
    assert rms_norm(x[:0], weight, 1e-6).shape == (0, 48)


def test_types_without_a_kernel_use_the_reference() -> None:
    x, weight = made(2, 30, torch.float32)
    half, weight_half = x.half(), weight.half()
    assert torch.equal(rms_norm(half, weight_half, 1e-6), rms_norm_reference(half, weight_half, 1e-6))
    mixed = rms_norm(x.bfloat16(), weight, 1e-6)
    assert torch.equal(mixed, rms_norm_reference(x.bfloat16(), weight, 1e-6))


def test_without_kernels_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "kernels", lambda: None)
    x, weight = made(4, 100, torch.bfloat16)
    assert torch.equal(rms_norm(x, weight, 1e-6), rms_norm_reference(x, weight, 1e-6))
