"""Products, MLPs, norms and embeddings by the native kernels of every instruction set: right within the rounding of
their format; a row's bits are its own, whoever shares the call; what is not a number is never hidden."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_cases import (
    EPS,
    LAYOUTS,
    PRECISE,
    SETS,
    THREADS,
    TILED,
    Weight,
    activations,
    address,
    assert_within,
    every_set,
    examples,
    guarded,
    native,
    native_only,
    one_step,
    operators,
    product,
    randn,
    same_bits,
    ways,
    weight,
    weight_of,
)

from ciuic_runtime.models.layout import GROUP
from ciuic_runtime.ops.rms_norm import rms_norm_reference

pytestmark = native_only
BAD = [float("nan"), float("inf"), float("-inf")]
rows_of = st.one_of(st.integers(1, 17), st.sampled_from([40, 127, 128, 129, 150]))
columns_of = st.one_of(st.integers(1, 300), st.sampled_from([127, 128, 129, 255, 256, 257, 512]))
outputs_of = st.one_of(st.integers(1, 40), st.sampled_from([127, 128, 129, 255, 256, 257, 300]))


def run_linear(
    ops: Any, w: Weight, x: torch.Tensor, bias: torch.Tensor | None = None, residual: torch.Tensor | None = None
) -> torch.Tensor:
    out = guarded(x.shape[0], w.values.shape[1])
    ops.linear(w.matrix, address(bias), address(x), x.shape[0], address(residual), address(out.value))
    return out.check()


@given(rows_of, columns_of, outputs_of, st.booleans(), st.sampled_from(["none", "other", "itself"]), st.integers(0, 99))
@settings(max_examples=examples(40), deadline=None)
@example(300, 200, 150, True, "itself", 1)
@example(130, 384, 200, False, "none", 2)
@example(150, 129, 17, True, "none", 3)
def test_linear(rows: int, columns: int, outputs: int, biased: bool, residual: str, seed: int) -> None:
    x = activations(rows, columns, seed)
    bias = randn(outputs, seed=seed + 1) if biased else None
    added = None if residual == "none" else randn(rows, outputs, seed=seed + 2)
    kept = x.clone()
    for layout in LAYOUTS:
        w = weight(layout, outputs, columns, seed + 3)
        expected, bound = product(layout, w[0], x)
        for term in (bias, added):
            if term is not None:
                expected = expected + term.double()
                bound = bound + 2 * EPS * (expected.abs() + term.abs().double())
        for isa in SETS:
            if added is None or residual == "other":
                got = run_linear(operators(isa), w, x, bias, added)
            else:
                out = guarded(rows, outputs)
                out.value.copy_(added)
                where = address(out.value)
                operators(isa).linear(w.matrix, address(bias), address(x), rows, where, where)
                got = out.check()
            assert_within(got, expected, bound, f"{layout} by {isa}")
    assert torch.equal(x, kept), "the input was written to"


@given(rows_of, columns_of, outputs_of, st.sampled_from(LAYOUTS), st.booleans(), st.integers(0, 99))
@settings(max_examples=examples(20), deadline=None)
@example(300, 130, 300, "w4g128-t16", True, 1)
@example(40, 257, 300, "w8g128-t16", False, 2)
@example(17, 300, 600, "bf16-rows", True, 3)
def test_a_rows_bits_do_not_depend_on_its_company_or_on_threads(
    rows: int, columns: int, outputs: int, layout: str, biased: bool, seed: int
) -> None:
    x, w = activations(rows, columns, seed), weight(layout, outputs, columns, seed + 3)
    bias = randn(outputs, seed=seed + 1) if biased else None
    some = range(rows) if rows <= 17 else sorted({0, 1, 63, 127, 128, 129, rows // 2, rows - 1} & set(range(rows)))
    for isa in SETS:
        whole = run_linear(operators(isa), w, x, bias)
        for threads in THREADS[1:]:
            assert same_bits(run_linear(operators(isa, threads), w, x, bias), whole), f"{isa}, {threads} threads"
        for row in some:
            alone = run_linear(operators(isa), w, x[row : row + 1], bias)
            assert same_bits(alone, whole[row : row + 1]), f"row {row} of {rows} by {isa}"
        cut = rows // 3
        parts = [run_linear(operators(isa), w, part, bias) for part in (x[:cut], x[cut:]) if len(part)]
        assert same_bits(torch.cat(parts), whole), f"rows in two calls by {isa}"


def test_instruction_sets_agree_on_integer_sums() -> None:
    """With one group there is one rounding per output: every set has the same bits."""
    for layout in TILED:
        for seed, rows in enumerate((1, 2, 3, 4, 17, 40)):
            w, x = weight(layout, 50, 100, seed), activations(rows, 100, seed)
            all_sets = [run_linear(operators(isa), w, x) for isa in SETS]
            assert all(same_bits(got, all_sets[0]) for got in all_sets)


@every_set
def test_activations_are_rounded_to_nearest_and_ties_to_even(isa: str) -> None:
    """The identity shows what became of each activation: scale x round(x / scale)."""
    w = weight_of("w8g128-t16", torch.eye(GROUP) * 127)
    half = torch.arange(-63.5, 64.5, 1.0)
    half[0] = 127.0  # so that the scale is 1 and every other value is a tie
    for rows in (1, 5, 20):
        got = run_linear(operators(isa), w, half.repeat(rows, 1)) / 127
        assert torch.equal(got, half.round().repeat(rows, 1))


@every_set
def test_rounding_beside_a_tie_costs_no_more_than_half_a_step(isa: str) -> None:
    """x * (127 / largest) in float32 may fall on the other side of a tie than x / (largest / 127) does: both are then
    half a step away, to within float32's own rounding."""
    w = weight_of("w8g128-t16", torch.eye(GROUP) * 127)
    x = activations(400, GROUP, 1)
    largest = x.abs().amax(1, keepdim=True)
    steps = torch.randint(-126, 127, x.shape, generator=torch.Generator().manual_seed(2)) + 0.5
    keep = x.abs() == largest
    x = torch.where(keep, x, (steps.double() * largest.double() / 127).float())
    got = run_linear(operators(isa), w, x).double() / 127
    error = (got - x.double()).abs() / (largest.double() / 127)
    assert error.max() <= 0.5 + 127 * 4 * EPS
    other = (x / (largest / 127)).round()
    assert (got / (largest.double() / 127) - other.double()).abs().max() > 0.9, "no value fell on the other side"


@every_set
@pytest.mark.parametrize("layout", LAYOUTS)
def test_extreme_activations(isa: str, layout: str) -> None:
    """Zeros, values so small that a group counts as zero, subnormal ones, and the largest that there are."""
    w = weight(layout, 20, 200, 1)
    x = randn(6, 200, seed=2)
    x[0] = 0
    x[1] *= 1e-31
    x[2] *= 1e-40
    x[3] *= 1e-28
    x[4] *= 1e36
    x[5, 128:] = 0
    expected, bound = product(layout, w[0], x)
    bound = bound + (x.abs().double() @ w[0].abs().double().T) * 1e-3 * (x.abs().amax(1, keepdim=True) < 1e-30)
    assert_within(run_linear(operators(isa), w, x), expected, bound, layout)


@every_set
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_not_finite_shows_in_its_rows_only(isa: str, layout: str) -> None:
    for rows in (1, 3, 4, 20, 130):
        w, x = weight(layout, 40, 300, rows), activations(rows, 300, rows)
        clean = run_linear(operators(isa, 2), w, x)
        for k, bad in enumerate(BAD):
            x_bad, row = x.clone(), rows * (k + 1) // 4
            x_bad[row, [0, 130, 299][k]] = bad
            got = run_linear(operators(isa, 2), w, x_bad)
            assert not got[row].isfinite().any(), f"{bad} in row {row} of {rows} was hidden"
            others = torch.arange(rows) != row
            assert same_bits(got[others], clean[others]), f"{bad} in row {row} of {rows} spread"


@every_set
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bad", BAD)
def test_weights_that_are_not_finite_show_in_their_outputs_only(isa: str, layout: str, bad: float) -> None:
    """Packing refuses such weights, but memory can be damaged. Tiles hold them in a scale."""
    outputs, columns, broken = 40, 300, 18
    for rows in (1, 3, 5, 20, 130):
        w, x = weight(layout, outputs, columns, rows), activations(rows, columns, rows)
        x[0] = 0
        clean = run_linear(operators(isa), w, x)
        damage(w.packed, layout, outputs, columns, broken, bad)
        got = run_linear(operators(isa), w, x)
        others = torch.arange(outputs) != broken
        assert not got[:, broken].isfinite().any()
        assert same_bits(got[:, others], clean[:, others])


def damage(packed: torch.Tensor, layout: str, rows: int, columns: int, row: int, bad: float) -> None:
    if layout not in TILED:
        dtype = torch.bfloat16 if layout == "bf16-rows" else torch.float32
        packed.view(dtype).view(rows, columns)[row, columns // 2] = bad
        return
    groups = -(-columns // GROUP)
    tiles = packed.view(-(-rows // 16), -1)
    weights = groups * GROUP * 16 * (4 if layout == TILED[0] else 8) // 8
    scales = tiles[row // 16, weights : weights + groups * 32].view(torch.float16).view(groups, 16)
    scales[groups - 1, row % 16] = bad


def test_no_rows_at_all() -> None:
    """The last chunk of a prompt alone wants logits, so a product of no rows is an everyday call."""
    for _, ops in ways([1, 3]):
        for layout in LAYOUTS:
            w, down = weight(layout, 200, 130, 1), weight(layout, 130, 200, 2)
            empty = torch.empty(0, 130)
            assert run_linear(ops, w, empty, torch.ones(200)).shape == (0, 200)
            assert run_mlp(ops, Mlp(w, w, down), empty).shape == (0, 130)


# MLP


class Mlp:
    def __init__(self, gate: Weight, up: Weight, down: Weight, *biases: torch.Tensor) -> None:
        self.gate, self.up, self.down, self.biases = gate, up, down, biases
        matrices = (w.matrix for w in (gate, up, down))
        self.native = native.MlpWeights(*matrices, *(address(b) for b in biases))

    def reference(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """In double precision; the bound allows three activations of the inner product to be rounded the other way,
        because what is rounded there is itself a float32 result."""
        (gate, gate_bound), (up, up_bound) = (product(w.layout, w[0], x) for w in (self.gate, self.up))
        if self.biases:
            gate, up = gate + self.biases[0], up + self.biases[1]
        inner = F.silu(gate) * up
        # silu is nowhere steeper than 1.1.
        error = 1.1 * gate_bound * up.abs() + F.silu(gate).abs() * up_bound + 2e-6 * inner.abs()
        expected, bound = product(self.down.layout, self.down[0], inner)
        bound = bound + error @ self.down[0].abs().double().T + 3 * one_step(self.down.layout, inner, self.down[0])
        return (expected + self.biases[2] if self.biases else expected), bound


def mlp_of(layout: str, hidden: int, width: int, seed: int, biased: bool, down: str | None = None) -> Mlp:
    biases = [randn(n, seed=seed + 3 + i) * 0.3 for i, n in enumerate((width, width, hidden))] if biased else []
    gate, up = weight(layout, width, hidden, seed), weight(layout, width, hidden, seed + 1)
    return Mlp(gate, up, weight(down or layout, hidden, width, seed + 2), *biases)


def run_mlp(ops: Any, mlp: Mlp, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
    out = guarded(x.shape[0], mlp.down.values.shape[1])
    ops.mlp(mlp.native, address(x), x.shape[0], address(residual), address(out.value))
    return out.check()


@given(rows_of, columns_of, columns_of, st.booleans(), st.booleans(), st.integers(0, 99))
@settings(max_examples=examples(15), deadline=None)
@example(300, 130, 140, True, True, 1)
def test_mlp(rows: int, hidden: int, width: int, biased: bool, with_residual: bool, seed: int) -> None:
    x = randn(rows, hidden, seed=seed)
    residual = randn(rows, hidden, seed=seed + 9) if with_residual else None
    for layout in LAYOUTS:
        mlp = mlp_of(layout, hidden, width, seed, biased, PRECISE.get(layout))
        expected, bound = mlp.reference(x)
        if residual is not None:
            expected = expected + residual
        bound = bound + 4 * EPS * (expected.abs() + 3)
        for isa in SETS:
            assert_within(run_mlp(operators(isa), mlp, x, residual), expected, bound, f"{layout} by {isa}")


@given(rows_of, columns_of, columns_of, st.sampled_from(LAYOUTS), st.booleans(), st.integers(0, 99))
@settings(max_examples=examples(12), deadline=None)
@example(300, 130, 260, "w4g128-t16", True, 1)
def test_a_rows_bits_are_its_own_in_an_mlp(
    rows: int, hidden: int, width: int, layout: str, biased: bool, seed: int
) -> None:
    x, mlp = activations(rows, hidden, seed), mlp_of(layout, hidden, width, seed, biased)
    residual = randn(rows, hidden, seed=seed + 9)
    for isa in SETS:
        whole = run_mlp(operators(isa), mlp, x, residual)
        for threads in THREADS[1:]:
            assert same_bits(run_mlp(operators(isa, threads), mlp, x, residual), whole), f"{isa}, {threads} threads"
        for row in sorted({0, 1, 2, 3, rows // 2, 127, 128, rows - 1} & set(range(rows))):
            one = slice(row, row + 1)
            assert same_bits(run_mlp(operators(isa), mlp, x[one], residual[one]), whole[one]), f"row {row} by {isa}"
        itself = residual.clone()
        operators(isa, 2).mlp(mlp.native, address(x), rows, address(itself), address(itself))
        assert same_bits(itself, whole), "the residual being the output"


@every_set
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bad", BAD)
def test_what_is_not_finite_passes_through_an_mlp(isa: str, layout: str, bad: float) -> None:
    mlp, x = mlp_of(layout, 150, 140, 1, True), activations(20, 150, 2)
    clean = run_mlp(operators(isa), mlp, x)
    x[7, 149] = bad
    got = run_mlp(operators(isa), mlp, x)
    others = torch.arange(20) != 7
    assert not got[7].isfinite().any()
    assert same_bits(got[others], clean[others])


# Norm and embedding


@given(st.integers(1, 40), st.integers(1, 600), st.integers(0, 99))
@settings(max_examples=examples(30), deadline=None)
def test_rms_norm(rows: int, width: int, seed: int) -> None:
    x, w = activations(rows, width, seed), 1 + 0.3 * randn(width, seed=seed + 1)
    expected = w.double() * x.double() / (x.double().pow(2).mean(1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(rms_norm_reference(x, w, 1e-6).double(), expected, rtol=1e-5, atol=1e-7)
    for isa in SETS:
        alone = []
        for threads in (1, 3):
            out = guarded(rows, width)
            operators(isa, threads).rms_norm(address(x), address(w), rows, width, 1e-6, address(out.value))
            got = out.check()
            assert_within(got, expected, expected.abs() * 2e-6 + 1e-37, f"{isa}, {threads} threads")
            alone.append(got.clone())
        assert same_bits(*alone)
        operators(isa).rms_norm(address(x[-1]), address(w), 1, width, 1e-6, address(out.value))
        assert same_bits(out.value[0], alone[0][-1])
        in_place = x.clone()
        operators(isa, 2).rms_norm(address(in_place), address(w), rows, width, 1e-6, address(in_place))
        assert same_bits(in_place, alone[0])


@every_set
@pytest.mark.parametrize("bad", BAD)
def test_rms_norm_does_not_hide_what_is_not_finite(isa: str, bad: float) -> None:
    x, w = activations(9, 100, 1), torch.ones(100)
    x[4, 99] = bad
    out = guarded(9, 100)
    operators(isa).rms_norm(address(x), address(w), 9, 100, 1e-6, address(out.value))
    assert torch.equal(out.value.isfinite(), rms_norm_reference(x, w, 1e-6).isfinite())
    assert not out.value[4, 99].isfinite()


@given(st.integers(1, 60), st.integers(1, 200), st.integers(0, 9))
@settings(max_examples=examples(15), deadline=None)
def test_embed(rows: int, width: int, seed: int) -> None:
    table = randn(37, width, seed=seed).bfloat16()
    table[3, 0] = float("inf")
    ids = torch.randint(0, 37, (rows,), generator=torch.Generator().manual_seed(seed))
    for what, ops in ways([1, 3]):
        out = guarded(rows, width)
        ops.embed(address(table), address(ids), rows, width, address(out.value))
        assert same_bits(out.check(), table[ids].float()), what
