"""Expected hit rates meet what the cache's state machine does on drawn routing."""

from __future__ import annotations

import math

import numpy as np
import pytest
from test_policies_on_traces import drawn

from ciuic_runtime.schedulers.hits import Array, hit_rates
from ciuic_runtime.schedulers.replay import hit_rate


def expected_misses(uses: Array, rates: Array) -> float:
    """Experts that a pass is expected to have to read."""
    return math.fsum(uses * (1.0 - rates))


POLICIES = ("lfu", "lru", "popularity", "pin")


@pytest.mark.parametrize("policy", POLICIES)
def test_what_fits_is_there(policy: str) -> None:
    uses = np.array([0.5, 0.1, 0.0, 0.9])
    assert hit_rates(uses, 4, policy).tolist() == [1, 1, 1, 1]
    assert hit_rates(uses, 0, policy).tolist() == [0, 0, 0, 0]
    rates = hit_rates(uses, 2.0, policy)
    assert ((rates >= 0) & (rates <= 1)).all()
    assert rates.sum() == pytest.approx(2)


def test_by_hand() -> None:
    uses = np.array([0.5, 0.1, 0.5, 0.9])
    assert hit_rates(uses, 2, "lfu").tolist() == [0.5, 0, 0.5, 1]
    assert hit_rates(uses, 2.5, "pin").tolist() == [1, 1, 0.5, 0]
    assert expected_misses(uses, hit_rates(uses, 2, "lfu")) == pytest.approx(0.25 + 0.1 + 0.25)
    evenly = np.full(10, 0.3)
    for policy in ("lfu", "lru", "popularity"):
        assert hit_rates(evenly, 4, policy) == pytest.approx(np.full(10, 0.4))


@pytest.mark.parametrize("zipf", [0.0, 0.6, 1.2])
@pytest.mark.parametrize("policy", ["lfu", "lru", "popularity"])
def test_they_meet_the_state_machine(policy: str, zipf: float) -> None:
    """Within six points, with half of the experts in memory: those whose turn comes are kept a little more often, and
    those that a layer is using at the moment take room."""
    routing, room = drawn(1500, zipf, 4, 64, 6, seed=2), 128
    first, second = routing.halves()
    happened = hit_rate(policy, first, second, room)
    uses = first.popularity().ravel()
    expected = 1 - expected_misses(uses, hit_rates(uses, room, policy)) / uses.sum()
    assert expected == pytest.approx(happened, abs=0.06)
