"""The three calls of a mixture of experts by the native kernels of every instruction set: the router picks what the
reference picks, experts fill their own rows wherever their pages lie, and rows are added in the router's order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_cases import (
    EPS,
    LAYOUTS,
    PRECISE,
    SETS,
    THREADS,
    Weight,
    activations,
    address,
    assert_within,
    every_set,
    examples,
    guarded,
    native,
    native_only,
    operators,
    randn,
    rng,
    same_bits,
    ways,
    weight_of,
)
from test_linear_kernels import mlp_of, run_mlp

from ciuic_runtime.models.spec import MoeSpec
from ciuic_runtime.ops.moe import combine, experts, route

pytestmark = native_only
HIDDEN = 70
BAD = [float("nan"), float("inf"), float("-inf")]


# Route


@dataclass(frozen=True)
class Router:
    moe: MoeSpec
    weight: Weight  # [experts, hidden]
    bias: torch.Tensor | None

    @property
    def params(self) -> Any:
        moe = self.moe
        return native.RouteParams(
            experts=moe.num_experts, per_token=moe.experts_per_token, groups=moe.num_groups,
            groups_per_token=moe.groups_per_token, sigmoid=moe.scoring == "sigmoid",
            group_top2=moe.method == "noaux_tc", limited=moe.method != "greedy" and moe.num_groups > 1,
            normalise=moe.normalise, scaling=moe.scaling,
        )  # fmt: skip

    def run(self, ops: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows, k = x.shape[0], self.moe.experts_per_token
        ids, weights = guarded(rows, k, fill=-1, dtype=torch.int64), guarded(rows, k)
        where = (address(x), rows, address(ids.value), address(weights.value))
        ops.route(self.params, self.weight.matrix, address(self.bias), *where)
        return ids.check(), weights.check()


def moe_of(
    scoring: str, method: str, groups: int, per: int, size: int, k: int, normalise: bool, scale: float
) -> MoeSpec:
    return MoeSpec(
        num_experts=groups * size, experts_per_token=k, num_shared=0, intermediate_size=4, scoring=scoring,
        method=method, num_groups=groups, groups_per_token=per, normalise=normalise, scaling=scale, first_dense=0,
        layer_freq=1,
    )  # fmt: skip


@st.composite
def routers(draw: st.DrawFn) -> Router:
    scoring, method = draw(
        st.sampled_from(
            [("sigmoid", "noaux_tc"), ("softmax", "greedy"), ("softmax", "group_limited_greedy"), ("sigmoid", "greedy")]
        )
    )
    groups = 1 if method == "greedy" else draw(st.integers(1, 8))
    size = draw(st.integers(1, 9) if groups > 1 else st.sampled_from([1, 3, 16, 64, 100]))
    per = draw(st.integers(1, groups))
    k = draw(st.integers(1, min(per * size, 9)))
    moe = moe_of(scoring, method, groups, per, size, k, draw(st.booleans()), draw(st.sampled_from([1.0, 2.5])))
    seed = draw(st.integers(0, 99))
    # Steps of 1/64: logits are exact in float32 whatever the order of addition, so that near-ties are true ties.
    weight = (randn(moe.num_experts, HIDDEN, seed=seed) * 16).round() / 64
    bias = randn(moe.num_experts, seed=seed + 1) * 0.2 if method == "noaux_tc" else None
    return Router(moe, weight_of(draw(st.sampled_from(["f32-rows", "bf16-rows"])), weight), bias)


def grid(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Activations in steps of 1/16, which bf16 holds too."""
    return (randn(rows, columns, seed=seed) * 16).round().clamp(-100, 100) / 16


@given(routers(), st.integers(1, 40), st.integers(0, 99))
@settings(max_examples=examples(40), deadline=None)
def test_route_picks_what_the_reference_picks(router: Router, rows: int, seed: int) -> None:
    x, moe = grid(rows, HIDDEN, seed), router.moe
    expected_ids, expected_weights = route(x, router.weight[0], router.bias, moe)
    logits = x.double() @ router.weight[0].double().T
    scores = logits.sigmoid() if moe.scoring == "sigmoid" else logits.softmax(-1)
    wanted = scores if router.bias is None else scores + router.bias
    for isa in SETS:
        ids, weights = router.run(operators(isa), x)
        assert all(len(set(row)) == len(row) for row in ids.tolist())
        different = (ids != expected_ids).any(1).nonzero().flatten().tolist()
        for row in different:  # only where two candidates are as good as equal
            a, b = wanted[row, ids[row]], wanted[row, expected_ids[row]]
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        chosen = scores.gather(1, ids)
        if moe.normalise:
            chosen = chosen / (chosen.sum(1, keepdim=True) + 1e-20)
        torch.testing.assert_close(weights.double(), chosen * moe.scaling, rtol=1e-5, atol=1e-30)
        same = torch.tensor([row not in different for row in range(rows)])
        torch.testing.assert_close(weights[same], expected_weights[same], rtol=1e-5, atol=1e-30)
        for threads in THREADS[1:]:
            again = router.run(operators(isa, threads), x)
            assert torch.equal(again[0], ids)
            assert same_bits(again[1], weights)
        for row in {0, rows // 2, rows - 1}:
            alone = router.run(operators(isa), x[row : row + 1])
            assert torch.equal(alone[0][0], ids[row])
            assert same_bits(alone[1][0], weights[row])


def test_many_rows_and_256_experts() -> None:
    """DeepSeek-V3's router: 8 groups of 32, the best 4 by the sum of their best two, 8 experts."""
    moe = moe_of("sigmoid", "noaux_tc", 8, 4, 32, 8, True, 2.5)
    router = Router(moe, weight_of("f32-rows", (randn(256, HIDDEN, seed=1) * 8).round() / 64), randn(256, seed=2) * 0.1)
    x = grid(300, HIDDEN, 3)
    expected_ids, expected = route(x, router.weight[0], router.bias, moe)
    for what, ops in ways():
        ids, weights = router.run(ops, x)
        same = (ids == expected_ids).all(1)
        assert same.float().mean() > 0.99, what
        torch.testing.assert_close(weights[same], expected[same], rtol=1e-5, atol=0)


def test_of_equal_experts_the_first_is_taken() -> None:
    for method, scoring in (("noaux_tc", "sigmoid"), ("group_limited_greedy", "softmax"), ("greedy", "softmax")):
        groups = 1 if method == "greedy" else 4
        moe = moe_of(scoring, method, groups, min(2, groups), 8 // groups, 3, True, 2.5)
        router = Router(moe, weight_of("f32-rows", torch.zeros(8, HIDDEN)), None)
        for what, ops in ways([1, 3]):
            ids, weights = router.run(ops, torch.ones(9, HIDDEN))
            assert ids.tolist() == [[0, 1, 2]] * 9, what
            torch.testing.assert_close(weights, torch.full_like(weights, 2.5 / 3))


def test_groups_are_chosen_by_best_or_by_best_two() -> None:
    """Group 0 has the best expert, group 1 the best two: V2 takes the first, V3 the second."""
    logits = torch.tensor([4.0, -9.0, -9.0, 3.0, 3.0, -9.0])
    weight = torch.zeros(6, HIDDEN)
    weight[:, 0] = logits
    x = torch.zeros(2, HIDDEN)
    x[:, 0] = 1
    for method, scoring, expected in (
        ("group_limited_greedy", "softmax", {0, 1}), ("group_limited_greedy", "sigmoid", {0, 1}),
        ("noaux_tc", "sigmoid", {3, 4}),
    ):  # fmt: skip
        router = Router(moe_of(scoring, method, 2, 1, 3, 2, False, 1.0), weight_of("f32-rows", weight), None)
        for what, ops in ways([1]):
            assert set(router.run(ops, x)[0][1].tolist()) == expected, what


def test_closed_groups_stay_closed_when_everything_wanted_is_negative() -> None:
    moe = moe_of("sigmoid", "noaux_tc", 4, 1, 2, 2, True, 1.0)
    router = Router(moe, weight_of("f32-rows", randn(8, HIDDEN, seed=1)), torch.full((8,), -5.0))
    for what, ops in ways([1]):
        ids, weights = router.run(ops, randn(20, HIDDEN, seed=2))
        assert (ids[:, 0] // 2 == ids[:, 1] // 2).all(), what
        torch.testing.assert_close(weights.sum(1), torch.ones(20))


@every_set
@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
@pytest.mark.parametrize("bad", BAD)
def test_what_is_not_finite_makes_a_rows_weights_so_and_leaves_ids_in_range(isa: str, scoring: str, bad: float) -> None:
    """In an activation, in one expert's row of the router, in its bias: the experts' outputs must not come out as
    numbers. Ids stay expert numbers, each once, since memory is read by them."""
    moe = moe_of(scoring, "noaux_tc", 4, 2, 4, 5, True, 2.5)
    weight, bias, x = randn(16, HIDDEN, seed=1), randn(16, seed=2) * 0.1, randn(12, HIDDEN, seed=3)
    clean = Router(moe, weight_of("f32-rows", weight), bias).run(operators(isa), x)
    touched = x.clone()
    touched[7, 40] = bad
    ids, weights = Router(moe, weight_of("f32-rows", weight), bias).run(operators(isa), touched)
    others = torch.arange(12) != 7
    assert not weights[7].isfinite().any()
    assert same_bits(weights[others], clean[1][others])
    assert torch.equal(ids[others], clean[0][others])
    check_ids(ids, 16)
    for expert in (0, 5, 15):
        damaged = weight_of("f32-rows", weight)
        damaged.packed.view(torch.float32).view(16, HIDDEN)[expert, 3] = bad
        ids, weights = Router(moe, damaged, bias).run(operators(isa), x)
        assert not weights.isfinite().any()
        check_ids(ids, 16)
    if bad != bad:  # an infinite bias is an order: always, or never
        ids, weights = Router(moe, weight_of("f32-rows", weight), bias.index_fill(0, torch.tensor(9), bad)).run(
            operators(isa), x
        )
        assert not weights.isfinite().any()
        check_ids(ids, 16)


def check_ids(ids: torch.Tensor, count: int) -> None:
    assert ((ids >= 0) & (ids < count)).all()
    assert all(len(set(row)) == len(row) for row in ids.tolist())


def test_routing_that_cannot_be_is_refused() -> None:
    for values in ((0, 1, 1, 1), (8, 9, 1, 1), (8, 5, 4, 2), (8, 2, 3, 1), (8, 2, 4, 5), (8, 2, 4, 0)):
        with pytest.raises(ValueError, match="experts"):
            native.RouteParams(*values, False, False, True, False, 1.0)


# Experts


class Experts:
    """A layer's experts, each part at an address of its own."""

    def __init__(self, layout: str, count: int, hidden: int, width: int, seed: int, biased: bool = False) -> None:
        self.hidden = hidden
        down = PRECISE.get(layout) if seed % 2 else layout
        self.each = [mlp_of(layout, hidden, width, seed + 10 * e, False, down) for e in range(count)]
        shape = self.each[0]
        self.biases = [randn(n, seed=seed + 7 + i) * 0.3 for i, n in enumerate((width, width))] if biased else []
        matrices = (w.matrix for w in (shape.gate, shape.up, shape.down))
        self.shape = native.MlpWeights(*matrices, *(address(b) for b in self.biases))

    def addresses(self, present: set[int] | None = None) -> torch.Tensor:
        table = torch.zeros(len(self.each), 3, dtype=torch.int64)
        for e, mlp in enumerate(self.each):
            if present is None or e in present:
                table[e] = torch.tensor([w.packed.data_ptr() for w in (mlp.gate, mlp.up, mlp.down)])
        return table

    def run(
        self, ops: Any, x: torch.Tensor, ids: torch.Tensor, table: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        rows = guarded(ids.numel(), self.hidden)
        if out is not None:
            rows.value.copy_(out)
        ops.experts(
            self.shape, address(table), len(self.each), address(x), address(ids), *ids.shape, address(rows.value)
        )
        return rows.check()


def drawn_ids(rows: int, k: int, count: int, seed: int, among: int | None = None) -> torch.Tensor:
    """Each token's experts, different ones, of the first `among`."""
    return torch.stack([torch.randperm(among or count, generator=rng(seed + r))[:k] for r in range(rows)])


@given(
    st.one_of(st.integers(1, 17), st.sampled_from([40, 150])), st.integers(1, 12), st.data(),
    st.sampled_from([1, 16, 70, 127, 128, 129, 200]), st.sampled_from([1, 30, 127, 128, 129, 260]),
    st.sampled_from(LAYOUTS), st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=examples(20), deadline=None)
def test_experts(rows: int, count: int, data: st.DataObject, hidden: int, width: int, layout: str, seed: int) -> None:
    """Each (token, k) row is what the expert's MLP makes of the token by itself, bit for bit; that MLP is held to the
    reference elsewhere, and here once more. Some experts get no token, some are not there: their rows stay."""
    among = data.draw(st.integers(1, count))
    k = data.draw(st.integers(1, min(among, 4)))
    layer = Experts(layout, count, hidden, width, seed)
    x, ids = activations(rows, hidden, seed), drawn_ids(rows, k, count, seed, among)
    present = set(data.draw(st.lists(st.integers(0, count - 1), max_size=count))) if data.draw(st.booleans()) else None
    before = randn(rows * k, hidden, seed=seed)
    here = torch.tensor([present is None or e in present for e in ids.flatten().tolist()])
    for isa in SETS:
        got = layer.run(operators(isa), x, ids, layer.addresses(present), before)
        assert same_bits(got[~here], before[~here]), f"rows of absent experts were touched by {isa}"
        for threads in THREADS[1:]:
            again = layer.run(operators(isa, threads), x, ids, layer.addresses(present), before)
            assert same_bits(again, got), f"{isa}, {threads} threads"
        for n, e in enumerate(ids.flatten().tolist()):
            if here[n] and n % (1 + rows * k // 12) == 0:
                token = x[n // k : n // k + 1]
                assert same_bits(run_mlp(operators(isa), layer.each[e], token)[0], got[n]), f"row {n} by {isa}"
                expected, bound = layer.each[e].reference(token)
                assert_within(got[n : n + 1], expected, bound + 4 * EPS * (expected.abs() + 1), f"{layout} by {isa}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_agree_with_the_plain_reference(layout: str) -> None:
    """ops/moe.py on the unpacked weights, activations unrounded: apart by no more than their rounding."""
    layer = Experts(layout, 6, 200, 140, 3)
    x, ids = randn(33, 200, seed=1), drawn_ids(33, 2, 6, 1)
    weights = {
        e: {"gate_proj": mlp.gate[0], "up_proj": mlp.up[0], "down_proj": mlp.down[0]}
        for e, mlp in enumerate(layer.each)
    }
    expected = torch.empty(66, 200)
    experts(x, ids, weights, expected)
    allowed = {"f32-rows": 1e-5, "bf16-rows": 0.01}.get(layout, 0.02)
    for what, ops in ways([2]):
        error = layer.run(ops, x, ids, layer.addresses()) - expected
        assert error.norm() <= allowed * expected.norm(), what


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [1, 3, 40, 300])
def test_all_tokens_on_one_expert_and_every_split_give_the_same_bits(layout: str, rows: int) -> None:
    layer = Experts(layout, 5, 130, 140, 2, biased=True)
    x = activations(rows, 130, rows)
    one = torch.full((rows, 1), 3)
    mixed = torch.stack([torch.full((rows,), 3), torch.arange(rows) % 3], dim=1).contiguous()
    for isa in SETS:
        whole = layer.run(operators(isa), x, one, layer.addresses())
        assert whole.isfinite().all()
        beside = layer.run(operators(isa, 3), x, mixed, layer.addresses())
        assert same_bits(beside[0::2], whole), f"with other experts beside it, by {isa}"
        halves = torch.full_like(beside, 7.0)
        for present in ({0, 3}, {4}, {1, 2}):  # as pages arrive
            halves = layer.run(operators(isa, 2), x, mixed, layer.addresses(present), halves)
        assert same_bits(halves, beside), f"as experts arrive, by {isa}"
        order = torch.randperm(rows, generator=rng(rows))
        shuffled = layer.run(operators(isa, 2), x[order], mixed[order], layer.addresses())
        assert same_bits(shuffled.view(rows, -1), beside.view(rows, -1)[order]), f"tokens in another order, by {isa}"


@given(st.sampled_from(LAYOUTS), st.integers(1, 20), st.integers(0, 99))
@settings(max_examples=examples(12), deadline=None)
def test_pages_may_lie_anywhere_and_move_between_calls(layout: str, rows: int, seed: int) -> None:
    """The same weights copied to slots in changing order; what lay in a slot before is overwritten in between."""
    count, hidden, width = 6, 100, 130
    layer = Experts(layout, count, hidden, width, seed)
    x, ids = activations(rows, hidden, seed), drawn_ids(rows, 3, count, seed)
    parts = [(m.gate.packed, m.up.packed, m.down.packed) for m in layer.each]
    size = sum(-(-p.numel() // 64) * 64 for p in parts[0])
    slots = torch.empty(count + 1, size, dtype=torch.uint8)
    expected = {isa: layer.run(operators(isa), x, ids, layer.addresses()) for isa in SETS}
    for turn in range(3):
        slots.fill_(0xA5)
        where = torch.randperm(count + 1, generator=rng(seed + turn)).tolist()
        table = torch.zeros(count, 3, dtype=torch.int64)
        got = {isa: torch.full((rows * 3, hidden), float("nan")) for isa in SETS}
        halves = torch.randperm(count, generator=rng(seed - turn)).tolist()
        for now in (halves[:2], halves[2:]):  # null first, then present
            for e in range(count):
                table[e] = 0
                if e in now:
                    at = 0
                    for i, part in enumerate(parts[e]):
                        slots[where[e], at : at + part.numel()] = part
                        table[e, i] = slots[where[e]].data_ptr() + at
                        at += -(-part.numel() // 64) * 64
            for isa in SETS:
                got[isa] = layer.run(operators(isa, 1 + turn), x, ids, table, got[isa])
        for isa in SETS:
            assert same_bits(got[isa], expected[isa]), isa


def test_no_rows_and_no_experts() -> None:
    layer = Experts("w4g128-t16", 3, 70, 30, 1)
    x, before = activations(4, 70, 1), randn(8, 70, seed=2)
    for what, ops in ways([1, 2]):
        assert layer.run(ops, x[:0], torch.empty(0, 2, dtype=torch.int64), layer.addresses()).shape == (0, 70)
        ids = drawn_ids(4, 2, 3, 1)
        assert same_bits(layer.run(ops, x, ids, layer.addresses(set()), before), before), what


@every_set
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bad", BAD)
def test_experts_do_not_hide_what_is_not_finite(isa: str, layout: str, bad: float) -> None:
    layer = Experts(layout, 4, 130, 140, 2)
    x, ids = activations(9, 130, 1), drawn_ids(9, 2, 4, 1)
    clean = layer.run(operators(isa), x, ids, layer.addresses())
    x[5, 129] = bad
    got = layer.run(operators(isa), x, ids, layer.addresses())
    touched = torch.arange(18) // 2 == 5
    assert not got[touched].isfinite().any()
    assert same_bits(got[~touched], clean[~touched])


# Combine


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 200), st.integers(0, 2), st.integers(0, 99))
@settings(max_examples=examples(40), deadline=None)
@example(200, 8, 300, 2, 1)
def test_combine(rows: int, k: int, hidden: int, added: int, seed: int) -> None:
    x, weights = activations(rows * k, hidden, seed), torch.rand(rows, k, generator=rng(seed))
    more = [randn(rows, hidden, seed=seed + 1 + i) for i in range(added)]
    expected = combine(x, weights).double() + sum(m.double() for m in more)
    terms = (x.view(rows, k, -1) * weights[..., None]).abs().sum(1).double() + sum(m.abs().double() for m in more)
    for isa in SETS:
        results = []
        for threads in (1, 3):
            out = guarded(rows, hidden)
            addresses = [*(address(m) for m in more), 0, 0][:2]
            operators(isa, threads).combine(
                address(x), address(weights), rows, k, hidden, *addresses, address(out.value)
            )
            assert_within(out.check(), expected, terms * (2 * k + 4) * EPS + 1e-37, f"{isa}, {threads} threads")
            results.append(out.value)
        assert same_bits(*results)
        if added:  # into the residual itself
            itself = more[0].clone()
            second = address(more[1]) if added > 1 else 0
            operators(isa, 2).combine(
                address(x), address(weights), rows, k, hidden, address(itself), second, address(itself)
            )
            assert same_bits(itself, results[0])
        one = guarded(1, hidden)
        row = rows - 1
        operators(isa).combine(
            address(x[row * k :]), address(weights[row]), 1, k, hidden,
            *([*(address(m[row]) for m in more), 0, 0][:2]), address(one.value),
        )  # fmt: skip
        assert same_bits(one.check()[0], results[0][row])


@every_set
def test_combine_adds_in_the_routers_order(isa: str) -> None:
    rows, weights = torch.tensor([[1e30], [-1e30], [1.0]]), torch.ones(1, 3)
    for order, expected in (((0, 1, 2), 1.0), ((2, 0, 1), 0.0), ((0, 2, 1), 0.0)):
        out, x = torch.empty(1, 1), rows[list(order)].contiguous()
        operators(isa).combine(address(x), address(weights), 1, 3, 1, 0, 0, address(out))
        assert out.item() == expected


@every_set
def test_combine_does_not_hide_what_is_not_finite(isa: str) -> None:
    """An absent weight is no excuse: zero times what is not finite is not a number."""
    x, weights = randn(10, 40, seed=1), torch.rand(5, 2, generator=rng(1))
    weights[2, 1] = 0
    x[5, 7] = float("inf")
    out = guarded(5, 40)
    operators(isa).combine(address(x), address(weights), 5, 2, 40, 0, 0, address(out.value))
    assert out.check().isfinite().logical_not().nonzero().tolist() == [[2, 7]]
