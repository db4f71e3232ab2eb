"""Cache policies on recorded routing: Belady against brute force, and what is chosen against the best fixed set."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.schedulers.policies.cache import CACHE_POLICIES
from ciuic_runtime.schedulers.replay import Routing, belady, replay


def routing(tokens: int, zipf: float, layers: int = 3, num_experts: int = 32, k: int = 4, seed: int = 0) -> Routing:
    """Every token draws k different experts in each layer; the r-th most popular with a weight of r^-zipf."""
    random = np.random.default_rng(seed)
    weights = np.arange(1, num_experts + 1, dtype=float) ** -zipf
    ids = np.empty((tokens, layers, k), np.int32)
    for i in range(layers):
        names = random.permutation(num_experts)
        keys = random.exponential(size=(tokens, num_experts)) / weights  # the k smallest: drawn without replacement
        ids[:, i] = names[np.argsort(keys, axis=1)[:, :k]]
    return Routing("drawn", tuple(range(layers)), num_experts, ids, np.arange(tokens, dtype=np.int32), 10, 100)


def best_by_trying(order: list[int], capacity: int) -> int:
    """Most hits of any sequence of evictions, from the best content to begin with."""
    most = 0
    for start in itertools.combinations(sorted(set(order)), min(capacity, len(set(order)))):
        states = {frozenset(start): 0}
        for page in order:
            following: dict[frozenset[int], int] = {}
            for held, hits in states.items():
                if page in held:
                    options = [(held, hits + 1)]
                elif len(held) < capacity:
                    options = [(held | {page}, hits)]
                else:
                    options = [(held - {out} | {page}, hits) for out in held]
                for content, total in options:
                    following[content] = max(following.get(content, 0), total)
            states = following
        most = max(most, *states.values())
    return most


@pytest.mark.parametrize("seed", range(12))
def test_belady_is_the_best_of_all_evictions(seed: int) -> None:
    drawn = routing(8, 0.3 * (seed % 3), layers=1, num_experts=6, k=2, seed=seed)
    order = [page for _, _, used in drawn.uses() for page in used]
    for capacity in (2, 3, 4):
        assert round(belady(drawn, capacity) * len(order)) == best_by_trying(order, capacity)


@pytest.mark.parametrize("zipf", [0.0, 0.6, 1.2])
def test_the_chosen_policy_is_within_a_point_of_the_best_fixed_set_that_can_be_known(zipf: float) -> None:
    drawn = routing(1200, zipf)
    found = replay(drawn, 100 + 10 * 40)  # 40 of 96 experts
    best = max(s.hit_rate for s in found.scores)
    assert found.chosen_score.hit_rate >= best - 0.01
    learnt = next(s.hit_rate for s in found.scores if s.policy == "popularity")
    assert found.chosen_score.hit_rate >= learnt - 0.01
    assert found.belady.hit_rate >= found.stationary.hit_rate >= learnt
    if zipf == 0.0:
        assert found.chosen_score.hit_rate == pytest.approx(40 / 96, abs=0.02)


def test_every_policy_is_scored_and_what_is_missed_is_counted_in_bytes() -> None:
    found = replay(routing(64, 0.6), 100 + 10 * 20)
    assert {s.policy for s in found.scores} == set(CACHE_POLICIES)
    score = found.chosen_score
    assert score.bytes_per_token == pytest.approx((1 - score.hit_rate) * 3 * 4 * 10)
    whole = replay(routing(64, 0.6), 100 + 10 * 96)
    assert whole.capacity == whole.experts == 96
    assert whole.belady.hit_rate == 1.0


def test_too_little_memory_and_too_short_recordings_are_refused() -> None:
    with pytest.raises(InvalidInput, match="no room for an expert"):
        replay(routing(64, 0.6), 105)
    with pytest.raises(InvalidInput, match="record more"):
        replay(routing(4, 0.6), 1000)
