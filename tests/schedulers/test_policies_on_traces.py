"""What cache policies make of routing traces: the chosen one is within a point of the best that could be known from the
first half, and none beats Belady's optimum."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from configs import TINY_V3
from hypothesis import given
from hypothesis import strategies as st

from ciuic_runtime.devices.spec import Topology
from ciuic_runtime.models.random_checkpoint import write_random_checkpoint
from ciuic_runtime.schedulers.policies.cache import CACHE_POLICIES
from ciuic_runtime.schedulers.replay import Routing, belady, hit_rate, replay


def drawn(tokens: int, zipf: float, layers: int, num_experts: int, k: int, seed: int = 0, batch: int = 1) -> Routing:
    """Every token draws k different experts in each layer; the r-th most popular with a weight of r^-zipf."""
    random = np.random.default_rng(seed)
    weights = np.arange(1, num_experts + 1, dtype=float) ** -zipf
    ids = np.empty((tokens, layers, k), np.int32)
    for i in range(layers):
        keys = random.exponential(size=(tokens, num_experts)) / weights  # the k smallest: drawn without replacement
        ids[:, i] = random.permutation(num_experts)[np.argsort(keys, axis=1)[:, :k]]
    step = (np.arange(tokens) // batch).astype(np.int32)
    return Routing("drawn", tuple(range(layers)), num_experts, ids, step, 10, 100)


def known_set(routing: Routing, capacity: int) -> float:
    """The hit rate on the second half of always having the `capacity` experts that the first half used most, and room
    for whatever else is used."""
    first, second = routing.halves()
    top = set(np.argsort(-first.popularity().ravel(), kind="stable")[:capacity].tolist())
    order = [page for _, _, used in second.uses() for page in used]
    return sum(page in top for page in order) / len(order)


def assert_within_a_point(routing: Routing, capacity: int) -> None:
    """The chosen policy, against every other and the fixed set that could be known. The experts that a pass uses in one
    layer are in memory together, whatever they are worth, so that a set to compare with has so much less room."""
    found = replay(routing, routing.other_nbytes + capacity * routing.expert_nbytes)
    chosen, working = found.chosen_score.hit_rate, max(len(used) for _, _, used in routing.uses())
    known = known_set(routing, capacity - working)
    what = (
        f"{found.chosen} {chosen:.3f}; {', '.join(f'{s.policy} {s.hit_rate:.3f}' for s in found.scores)}; the set that "
        f"could be known {known:.3f}, by hindsight {found.stationary.hit_rate:.3f}, Belady {found.belady.hit_rate:.3f}"
    )
    assert chosen >= found.scores[0].hit_rate - 0.01, what
    assert chosen >= known - 0.01, what
    assert max(chosen, found.stationary.hit_rate) <= found.belady.hit_rate, what


@pytest.mark.parametrize("zipf", [0.0, 0.6, 1.2])
@pytest.mark.parametrize(("layers", "capacity"), [(4, 64), (4, 128), pytest.param(12, 384, marks=pytest.mark.slow)])
def test_the_chosen_policy_is_within_a_point_of_what_could_be_known(layers: int, capacity: int, zipf: float) -> None:
    assert_within_a_point(drawn(500 if layers == 4 else 2000, zipf, layers, 64, 6, seed=1), capacity)


@pytest.mark.slow
@pytest.mark.parametrize("zipf", [0.0, 0.6, 1.2])
@pytest.mark.parametrize("share", [0.25, 0.5, 0.75, 0.9])
def test_so_it_is_at_the_size_of_a_real_model(share: float, zipf: float) -> None:
    """DeepSeek-V2-Lite: 26 layers of 64 experts, of which a token uses 6."""
    assert_within_a_point(drawn(800, zipf, 26, 64, 6), int(share * 26 * 64))


@pytest.mark.parametrize("batch", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_so_it_is_with_the_routers_of_a_model(batch: int, tmp_path: Path, here: Topology) -> None:
    from ciuic_runtime import LLM, SamplingParams

    config = TINY_V3 | {"n_routed_experts": 32, "num_experts_per_tok": 3, "num_hidden_layers": 5}
    model = write_random_checkpoint(config, tmp_path / "model")
    draw = random.Random(0)
    prompts = [[draw.randrange(256) for _ in range(5)] for _ in range(30)]
    with LLM(model, devices=here, max_model_len=64, max_num_seqs=batch) as llm:
        recorder = llm.record_routing()
        llm.generate(prompts, SamplingParams(max_tokens=25, ignore_eos=True, temperature=1.0, seed=0))
    for share in (0.4, 0.8):
        assert_within_a_point(recorder.routing(), int(share * 4 * 32))


@given(seed=st.integers(0, 2**32 - 1), policy=st.sampled_from(sorted(CACHE_POLICIES)), capacity=st.integers(2, 15))
def test_no_policy_beats_belady_and_belady_grows_with_memory(seed: int, policy: str, capacity: int) -> None:
    routing = drawn(30, seed % 3 * 0.6, layers=2, num_experts=8, k=2, seed=seed)
    first, second = routing.halves()
    assert hit_rate(policy, first, second, capacity) <= belady(second, capacity)
    assert belady(second, capacity - 1) <= belady(second, capacity) <= belady(second, capacity + 1)
    assert hit_rate(policy, routing, second, 16) == belady(second, 16) == 1.0, "what fits whole is read once"


def test_progress_ends_at_its_total() -> None:
    seen: list[tuple[int, int]] = []
    replay(drawn(64, 0.6, 3, 32, 4), 100 + 10 * 20, lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1]
    assert len({total for _, total in seen}) == 1
