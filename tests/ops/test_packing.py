"""The packing kernel against its torch reference, bit for bit over generated shapes and values; and what the layout
promises: the largest value comes out exact, every other within half a step, nothing that is not finite gets in."""

from __future__ import annotations

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.models.layout import GROUP, TILE_ROWS, matrix_nbytes
from ciuic_runtime.ops.native import kernels
from ciuic_runtime.ops.packing import pack, pack_reference, unpack, unpack_reference

module = importlib.import_module("ciuic_runtime.ops.packing")
LAYOUTS = ["w4g128-t16", "w8g128-t16", "bf16-rows", "f32-rows"]
TILED = LAYOUTS[:2]
DTYPES = [torch.bfloat16, torch.float32]
ZERO = {"w4g128-t16": 0x88, "w8g128-t16": 0x80}
native_only = pytest.mark.skipif(kernels() is None, reason="the native kernels are not built here")


def packed(weight: torch.Tensor, layout: str) -> torch.Tensor:
    into = torch.full((matrix_nbytes(layout, *weight.shape),), 0xA5, dtype=torch.uint8)
    pack(weight, layout, into, "some.weight")
    return into


def made(rows: int, columns: int, kind: str, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator)
    if kind == "ties":  # equal magnitudes of both signs, and values half way between two steps
        values = torch.randint(-8, 9, (rows, columns), generator=generator) / 4
    if kind == "tiny":  # scales that are subnormal in float16, or vanish
        values *= 10.0 ** torch.randint(-9, -3, (rows, 1), generator=generator)
    if kind == "large":
        values *= 10.0 ** torch.randint(0, 4, (rows, 1), generator=generator)
    if kind == "sparse":
        values *= torch.rand(rows, columns, generator=generator) < 0.01
    return values


@native_only
@given(
    st.integers(1, 40), st.integers(1, 300), st.sampled_from(LAYOUTS), st.sampled_from(DTYPES),
    st.sampled_from(["normal", "ties", "tiny", "large", "sparse"]), st.integers(0, 1000),
)  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_kernel_and_reference_give_the_same_bits(
    rows: int, columns: int, layout: str, dtype: torch.dtype, kind: str, seed: int
) -> None:
    weight = made(rows, columns, kind, seed).to(dtype)
    got, expected = packed(weight, layout), pack_reference(weight, layout)
    assert expected is not None
    assert torch.equal(got, expected)
    restored = unpack(got, layout, rows, columns)
    assert torch.equal(restored, unpack_reference(got, layout, rows, columns))


@native_only
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_instruction_set_gives_the_same_bits(layout: str, dtype: torch.dtype) -> None:
    native = kernels()
    assert native is not None
    sets = native.pack_instruction_sets()
    assert sets[-1] == "portable"
    for kind in ("normal", "ties", "tiny", "large", "sparse"):
        weight = made(37, 300, kind, 8).to(dtype).contiguous()
        expected, source = packed(weight, layout), {torch.bfloat16: "bf16", torch.float32: "f32"}[dtype]
        restored = unpack(expected, layout, 37, 300)
        for isa in sets:
            into, back = torch.empty_like(expected), torch.empty(37, 300)
            assert native.pack_matrix(layout, weight.data_ptr(), source, 37, 300, into.data_ptr(), isa)
            native.unpack_matrix(layout, into.data_ptr(), 37, 300, back.data_ptr(), isa)
            assert torch.equal(into, expected), isa
            assert torch.equal(back, restored), isa
    with pytest.raises(ValueError, match="does not pack with mmx"):
        native.pack_matrix(layout, 0, "bf16", 0, 0, 0, "mmx")


@pytest.mark.parametrize("layout", TILED)
@pytest.mark.parametrize("shape", [(1, 1), (16, 128), (17, 129), (64, 1408), (5, 64)], ids=str)
def test_values_come_back_within_half_a_step(shape: tuple[int, int], layout: str) -> None:
    weight = made(*shape, "normal", 1)
    restored = unpack(packed(weight, layout), layout, *shape)
    steps = 8 if layout == "w4g128-t16" else 127
    for start in range(0, shape[1], GROUP):
        group, got = weight[:, start : start + GROUP], restored[:, start : start + GROUP]
        largest = group.abs().amax(1, keepdim=True)
        # The end of the range opposite to the largest value has no step of its own for 4 bits: 7, not 8.
        clamped = (group * -group.gather(1, group.abs().argmax(1, keepdim=True)).sign()) > largest * 7.5 / 8
        error = (group - got).abs()
        assert (error <= largest / steps * (0.5 + 4e-3 * steps)).logical_or(clamped).all()
        assert (error <= largest / steps * 1.01).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_value_is_exact(dtype: torch.dtype) -> None:
    """As far as float16 holds its scale: powers of two, of either sign, come back as they were."""
    weight = made(20, 256, "normal", 2).clamp(-3, 3)
    weight[:, 5], weight[:, 200] = 4.0, -8.0
    restored = unpack(packed(weight.to(dtype), "w4g128-t16"), "w4g128-t16", 20, 256)
    assert (restored[:, 5] == 4.0).all()
    assert (restored[:, 200] == -8.0).all()


def test_the_bytes_lie_as_the_layout_says() -> None:
    """Written out from its description, one byte at a time."""
    rows, columns = 18, 130
    weight = made(rows, columns, "normal", 3)
    for layout, zero in (("w4g128-t16", 8), ("w8g128-t16", 128)):
        data, values = packed(weight, layout), unpack(packed(weight, layout), layout, rows, columns)
        tile, group_bytes = data.numel() // 2, GROUP * TILE_ROWS * (4 if zero == 8 else 8) // 8
        for row, column in ((0, 0), (3, 127), (15, 128), (16, 5), (17, 129), (9, 77)):
            group, c, r = column // GROUP, column % GROUP, row % TILE_ROWS
            start = row // TILE_ROWS * tile
            if zero == 8:
                byte = int(data[start + group * group_bytes + c // 8 * 64 + 4 * r + c % 4])
                stored = byte >> 4 if c % 8 >= 4 else byte & 15
            else:
                stored = int(data[start + group * group_bytes + c // 4 * 64 + 4 * r + c % 4])
            at = start + 2 * group_bytes + (group * TILE_ROWS + r) * 2
            scale = float(data[at : at + 2].view(torch.float16))
            assert scale * (stored - zero) == values[row, column]


@pytest.mark.parametrize("layout", TILED)
def test_padding_is_the_zero_point_and_its_scales_are_0(layout: str) -> None:
    data = packed(made(1, 1, "normal", 4), layout)
    group_bytes = GROUP * TILE_ROWS * (4 if layout == "w4g128-t16" else 8) // 8
    assert (data[1:group_bytes] == ZERO[layout]).sum() == group_bytes - 1
    assert not data[group_bytes + 2 :].any()
    zeros = packed(torch.zeros(3, 200), layout)
    assert (zeros[: 2 * group_bytes] == ZERO[layout]).all()
    assert not zeros[2 * group_bytes :].any()


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_refused(
    bad: float, layout: str, reference: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reference:
        monkeypatch.setattr(module, "kernels", lambda: None)
    weight = made(20, 150, "normal", 5)
    weight[17, 140] = bad
    for dtype in DTYPES:
        with pytest.raises(InvalidInput, match=r"some\.weight cannot be packed as .*row 17, column 140"):
            packed(weight.to(dtype), layout)


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize(
    ("layout", "bad", "good"),
    [
        ("w4g128-t16", 65520 * 8.0, 65472 * 8.0),
        ("w8g128-t16", 65520 * 127.0, 65472 * 127.0),
        ("bf16-rows", 3.4e38, 3e38),
    ],
)
def test_scales_beyond_float16_are_refused(
    layout: str, bad: float, good: float, reference: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reference:
        monkeypatch.setattr(module, "kernels", lambda: None)
    weight = torch.zeros(2, 140)
    weight[1, 139] = -bad
    with pytest.raises(InvalidInput, match="row 1, column 139"):
        packed(weight, layout)
    weight[1, 139] = -good
    assert unpack(packed(weight, layout), layout, 2, 140)[1, 139] == pytest.approx(-good, rel=1e-2)


def test_without_kernels_the_reference_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = made(9, 77, "normal", 6)
    expected = packed(weight, "w4g128-t16")
    monkeypatch.setattr(module, "kernels", lambda: None)
    assert torch.equal(packed(weight, "w4g128-t16"), expected)
    assert torch.equal(unpack(expected, "w4g128-t16", 9, 77), unpack_reference(expected, "w4g128-t16", 9, 77))


@native_only
def test_a_transposed_matrix_is_packed_as_it_reads() -> None:
    weight = made(64, 48, "normal", 7)
    assert torch.equal(packed(weight.t(), "w8g128-t16"), packed(weight.t().contiguous(), "w8g128-t16"))


@native_only
def test_an_unknown_layout_is_an_error() -> None:
    native = kernels()
    assert native is not None
    with pytest.raises(ValueError, match="no layout is called w3"):
        native.pack_matrix("w3", 0, "bf16", 0, 0, 0)
    with pytest.raises(ValueError, match="cannot pack from f16"):
        native.pack_matrix("bf16-rows", 0, "f16", 0, 0, 0)
