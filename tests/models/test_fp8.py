"""FP8 blocks against the written-out formula, one block after the other."""

from __future__ import annotations

import pytest
import torch

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.models import fp8
from ciuic_runtime.models.fp8 import dequantise, e4m3_to_float32, quantise, scale_shape


def by_formula(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """The reference; transformers cannot be one, it divides 192 rows with two scales into blocks of 96."""
    result = torch.empty(weight.shape)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            here = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            result[here] = weight[here].to(torch.float32) * scale[i, j]
    return result.to(dtype)


def random_fp8(shape: tuple[int, int], block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(shape[0] * 1000 + shape[1])
    weight = torch.randn(shape, generator=generator).mul(20).to(torch.float8_e4m3fn)
    return weight, torch.rand(scale_shape(shape, block), generator=generator) + 0.01


# 576 rows and 5 rows of scales is V3's kv_a_proj_with_mqa.
SHAPES = [(1, 1), (128, 128), (256, 384), (576, 256), (192, 192), (130, 257), (127, 129), (7, 300), (300, 7)]


@pytest.fixture(params=["kernel", "reference"], autouse=True)
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "reference":
        monkeypatch.setattr(fp8, "kernels", lambda: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantise_is_the_formula_bit_by_bit(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, scale = random_fp8(shape, (128, 128))
    result = dequantise(weight, scale, (128, 128), dtype)
    assert result.dtype == dtype
    assert torch.equal(result, by_formula(weight, scale, (128, 128), dtype))


@pytest.mark.parametrize("block", [(1, 1), (32, 64), (64, 128), (1000, 1000), (1, 128)])
def test_other_block_sizes(block: tuple[int, int]) -> None:
    weight, scale = random_fp8((100, 200), block)
    assert torch.equal(dequantise(weight, scale, block, torch.float32), by_formula(weight, scale, block, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_byte_times_scales_of_every_size(dtype: torch.dtype) -> None:
    """Subnormal values, results that round, overflow and vanish, and NaN."""
    weight = torch.arange(256, dtype=torch.uint8).repeat(9, 1).view(torch.float8_e4m3fn)
    scale = torch.tensor([1.0, 3.3, 1e-3, 1e-30, 1e-39, 1e-44, 3e38, 0.0, -1.7])[:, None]
    got = dequantise(weight, scale, (1, 256), dtype)
    expected = by_formula(weight, scale, (1, 256), dtype)
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.nan_to_num(7.0).view(torch.uint8), expected.nan_to_num(7.0).view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_into_part_of_a_larger_matrix(dtype: torch.dtype) -> None:
    weight, scale = random_fp8((6, 40), (4, 16))
    whole = torch.full((10, 40), 9.0, dtype=dtype)
    dequantise(weight, scale, (4, 16), dtype, into=whole[2:8])
    assert torch.equal(whole[2:8], by_formula(weight, scale, (4, 16), dtype))
    assert (whole[:2] == 9).all()
    assert (whole[8:] == 9).all()
    wide = torch.full((6, 50), 9.0, dtype=dtype)
    dequantise(weight, scale, (4, 16), dtype, into=wide[:, :40])
    assert torch.equal(wide[:, :40], whole[2:8])
    assert (wide[:, 40:] == 9).all()


def test_bfloat16_scales() -> None:
    weight, scale = random_fp8((130, 130), (128, 128))
    low = scale.bfloat16()
    result = dequantise(weight, low, (128, 128), torch.float32)
    assert torch.equal(result, by_formula(weight, low.float(), (128, 128), torch.float32))


def test_table_is_torchs_conversion_for_every_byte() -> None:
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    ours, theirs = e4m3_to_float32(values), values.to(torch.float32)
    assert ours.isnan().tolist() == theirs.isnan().tolist() == [i in (127, 255) for i in range(256)]
    assert torch.equal(ours.nan_to_num(9e9), theirs.nan_to_num(9e9))
    transposed = e4m3_to_float32(values[:64].view(8, 8).t())  # not contiguous
    assert torch.equal(transposed, theirs[:64].view(8, 8).t())


@pytest.mark.parametrize("scale", [(1, 2), (2, 1), (3, 2), (2, 3), (4, 1)])
def test_scales_of_the_wrong_shape(scale: tuple[int, int]) -> None:
    weight, _ = random_fp8((200, 200), (128, 128))
    with pytest.raises(InvalidInput, match=r"shape \[\d, \d\] do not fit .*\[200, 200\].*need \[2, 2\]"):
        dequantise(weight, torch.ones(scale), (128, 128), torch.float32)


@pytest.mark.parametrize("shape", [(128, 128), (130, 257), (5, 5)])
def test_quantise_loses_no_more_than_half_a_step(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    stored, scale = quantise(weight, (128, 128))
    back = dequantise(stored, scale, (128, 128), torch.float32)
    # Three bits of mantissa: relative 2^-4; below e4m3's normal range (2^-6 of scale) absolute.
    allowed = torch.maximum(weight.abs() * 2**-4, scale.max() * 2**-10)
    assert bool(((back - weight).abs() <= allowed * 1.001).all())
    assert stored.to(torch.float32).abs().max() == 448


def test_quantising_zeros_gives_zeros() -> None:
    stored, scale = quantise(torch.zeros(3, 130), (128, 128))
    assert torch.equal(dequantise(stored, scale, (128, 128), torch.bfloat16), torch.zeros(3, 130, dtype=torch.bfloat16))
