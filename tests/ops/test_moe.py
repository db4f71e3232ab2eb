"""Routing against written-out loops, and experts and combining with every way of spreading them."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ciuic_runtime.models.spec import MoeSpec
from ciuic_runtime.ops.moe import combine, experts, route, swiglu

HIDDEN = 6


def moe_spec(**changes: Any) -> MoeSpec:
    values = {
        "num_experts": 8, "experts_per_token": 3, "num_shared": 0, "intermediate_size": 4, "scoring": "sigmoid",
        "method": "noaux_tc", "num_groups": 4, "groups_per_token": 2, "normalise": True, "scaling": 2.5,
        "first_dense": 0, "layer_freq": 1,
    }  # fmt: skip
    return MoeSpec(**(values | changes))


def by_loops(scores: list[float], bias: list[float], moe: MoeSpec) -> dict[int, float]:
    """One token: expert -> weight, as the papers write it, with lists and sorting only."""
    wanted = [s + b for s, b in zip(scores, bias, strict=True)]
    size = moe.num_experts // moe.num_groups
    groups = [list(range(g * size, g * size + size)) for g in range(moe.num_groups)]
    if moe.method == "noaux_tc":
        value = [sum(sorted((wanted[e] for e in g), reverse=True)[:2]) for g in groups]
    else:
        value = [max(wanted[e] for e in g) for g in groups]
    open_groups = sorted(range(moe.num_groups), key=lambda g: -value[g])[: moe.groups_per_token]
    allowed = list(range(moe.num_experts)) if moe.method == "greedy" else [e for g in open_groups for e in groups[g]]
    chosen = sorted(allowed, key=lambda e: -wanted[e])[: moe.experts_per_token]
    total = sum(scores[e] for e in chosen) if moe.normalise else 1.0
    return {e: scores[e] / total * moe.scaling for e in chosen}


def scores_of(logits: list[float], scoring: str) -> list[float]:
    if scoring == "sigmoid":
        return [1 / (1 + math.exp(-x)) for x in logits]
    top = max(logits)
    powers = [math.exp(x - top) for x in logits]
    return [p / sum(powers) for p in powers]


SPECS = [
    moe_spec(
        scoring=scoring, method=method, num_groups=groups, groups_per_token=per, normalise=normalise,
        num_experts=12, experts_per_token=k,
    )
    for scoring, method in (("sigmoid", "noaux_tc"), ("softmax", "greedy"), ("softmax", "group_limited_greedy"))
    for groups, per in ((1, 1), (4, 2), (3, 3), (6, 1))
    for normalise in (True, False)
    for k in (1, 2, 4)
    if k <= 12 // groups * per and (method != "greedy" or groups == 1)
]  # fmt: skip


@pytest.mark.parametrize("moe", SPECS, ids=lambda m: f"{m.method}-{m.num_groups}-{m.experts_per_token}-{m.normalise}")
def test_route_is_the_written_out_one(moe: MoeSpec) -> None:
    generator = torch.Generator().manual_seed(moe.num_groups)
    x = torch.randn(40, HIDDEN, generator=generator)
    weight = torch.randn(12, HIDDEN, generator=generator)
    bias = torch.randn(12, generator=generator) * 0.1 if moe.method == "noaux_tc" else None
    ids, weights = route(x, weight, bias, moe)
    assert ids.dtype == torch.int64
    assert weights.dtype == torch.float32
    logits = (x.double() @ weight.double().T).tolist()
    for row in range(len(x)):
        expected = by_loops(scores_of(logits[row], moe.scoring), [0.0] * 12 if bias is None else bias.tolist(), moe)
        got = dict(zip(ids[row].tolist(), weights[row].tolist(), strict=True))
        assert got == pytest.approx(expected, rel=1e-4)
    assert ids.unique().numel() > 6 or moe.experts_per_token == 1


def test_most_wanted_expert_comes_first() -> None:
    x = torch.randn(30, HIDDEN, generator=torch.Generator().manual_seed(5))
    weight = torch.randn(8, HIDDEN, generator=torch.Generator().manual_seed(6))
    _, weights = route(x, weight, None, moe_spec(scoring="softmax", method="greedy"))
    assert (weights[:, :-1] >= weights[:, 1:]).all()


def test_the_bias_chooses_but_does_not_weigh() -> None:
    moe = moe_spec(num_groups=1, groups_per_token=1, experts_per_token=1, normalise=False, scaling=1.0)
    x, weight = torch.ones(1, HIDDEN), torch.zeros(8, HIDDEN)
    bias = torch.zeros(8)
    bias[5] = 0.1
    ids, weights = route(x, weight, bias, moe)
    assert ids.tolist() == [[5]]
    assert weights.tolist() == [[0.5]]


def test_closed_groups_stay_closed_when_everything_wanted_is_negative() -> None:
    """With a strongly negative bias a masked score of 0 would win; closed groups must not."""
    moe = moe_spec(groups_per_token=1, experts_per_token=2)
    x = torch.randn(20, HIDDEN, generator=torch.Generator().manual_seed(7))
    weight = torch.randn(8, HIDDEN, generator=torch.Generator().manual_seed(8))
    ids, _ = route(x, weight, torch.full((8,), -5.0), moe)
    assert (ids[:, 0] // 2 == ids[:, 1] // 2).all()


def test_ties_give_distinct_experts_of_open_groups() -> None:
    """All scores equal: any choice is right, but never the same expert twice, and never more groups than allowed."""
    for method, scoring in (("noaux_tc", "sigmoid"), ("group_limited_greedy", "softmax")):
        ids, weights = route(
            torch.ones(9, HIDDEN), torch.zeros(8, HIDDEN), None, moe_spec(method=method, scoring=scoring)
        )
        for row in ids.tolist():
            assert len(set(row)) == 3
            assert len({e // 2 for e in row}) <= 2
        torch.testing.assert_close(weights, torch.full_like(weights, 2.5 / 3))


def made(num_experts: int, width: int = 4, dtype: torch.dtype = torch.float32) -> dict[int, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(num_experts)
    shapes = {"gate_proj": (width, HIDDEN), "up_proj": (width, HIDDEN), "down_proj": (HIDDEN, width)}
    return {
        e: {role: torch.randn(shape, generator=generator).to(dtype) for role, shape in shapes.items()}
        for e in range(num_experts)
    }


def expert_by_formula(x: torch.Tensor, w: dict[str, torch.Tensor]) -> torch.Tensor:
    gate, up = w["gate_proj"].double() @ x.double(), w["up_proj"].double() @ x.double()
    return w["down_proj"].double() @ (gate / (1 + (-gate).exp()) * up)


def test_swiglu_with_biases() -> None:
    w = made(1)[0]
    w |= {"gate_proj_bias": torch.full((4,), 0.5), "up_proj_bias": -torch.ones(4), "down_proj_bias": torch.ones(HIDDEN)}
    x = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(1))
    gate, up = x @ w["gate_proj"].T + 0.5, x @ w["up_proj"].T - 1
    torch.testing.assert_close(swiglu(x, w), (gate * gate.sigmoid() * up) @ w["down_proj"].T + 1)


ROUTES = {
    "all on one expert": [[2], [2], [2], [2]],
    "some experts empty": [[0, 3], [3, 0], [0, 3], [0, 3]],
    "one token": [[1, 4, 2]],
    "every expert once": [[0, 1], [2, 3], [4, 0]],
}


@pytest.mark.parametrize("name", ROUTES)
def test_experts_fill_their_rows(name: str) -> None:
    ids, weights = torch.tensor(ROUTES[name]), made(5)
    x = torch.randn(len(ids), HIDDEN, generator=torch.Generator().manual_seed(2))
    rows = torch.full((ids.numel(), HIDDEN), float("nan"))
    experts(x, ids, weights, rows)
    for n, expert in enumerate(ids.flatten().tolist()):
        expected = expert_by_formula(x[n // ids.shape[1]], weights[expert])
        torch.testing.assert_close(rows[n].double(), expected, rtol=1e-4, atol=1e-5)


@given(st.data())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_split_over_any_mappings_gives_the_same_bits(data: st.DataObject) -> None:
    tokens, k, count = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 3)), 5
    picks = st.permutations(range(count)).map(lambda p: p[:k])
    ids = torch.tensor(data.draw(st.lists(picks, min_size=tokens, max_size=tokens)))
    homes = data.draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))
    weights = made(count)
    x = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens))
    whole, parts = torch.full((2, tokens * k, HIDDEN), float("nan")).unbind(0)
    experts(x, ids, weights, whole)
    for home in data.draw(st.permutations(range(3))):
        experts(x, ids, {e: weights[e] for e in range(count) if homes[e] == home}, parts)
    assert torch.equal(whole, parts)
    assert not whole.isnan().any()


def test_rows_of_absent_experts_are_left_alone() -> None:
    ids = torch.tensor([[0, 1], [1, 2]])
    rows = torch.full((4, HIDDEN), 7.0)
    experts(torch.randn(2, HIDDEN), ids, {1: made(3)[1]}, rows)
    assert (rows[[0, 3]] == 7).all()
    assert (rows[[1, 2]] != 7).any(dim=1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_combine_adds_in_the_routers_order(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    rows = torch.randn(5 * 4, HIDDEN, generator=generator).to(dtype)
    weights = torch.rand(5, 4, generator=generator)
    got = combine(rows, weights)
    assert got.dtype == dtype
    for token in range(5):
        total = rows[token * 4].float() * weights[token, 0]
        for k in range(1, 4):
            total = total + rows[token * 4 + k].float() * weights[token, k]
        assert torch.equal(got[token], total.to(dtype))


def test_combine_of_one_expert_and_of_large_values_that_cancel() -> None:
    rows = torch.tensor([[1e30], [-1e30], [1.0]])
    assert combine(rows, torch.ones(1, 3)).tolist() == [[1.0]]
    orders = {float(combine(rows[list(p)], torch.ones(1, 3))) for p in itertools.permutations(range(3))}
    assert orders == {0.0, 1.0}, "the order of addition must show"
    assert combine(rows[:1], torch.tensor([[0.5]])).tolist() == [[pytest.approx(5e29)]]
