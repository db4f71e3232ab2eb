"""What routers chose is counted alike by the lists of small passes and by the arrays of large ones."""

from __future__ import annotations

from collections import Counter

import torch
from hypothesis import given
from hypothesis import strategies as st

from ciuic_runtime.engine.expert_uses import FEW, ExpertUses, different

EXPERTS = 12


@given(st.lists(st.integers(1, 3 * FEW), min_size=1, max_size=5), st.integers(1, EXPERTS), st.integers(0, 1 << 30))
def test_uses_are_those_of_all_passes(passes: list[int], k: int, seed: int) -> None:
    generator, uses, expected = torch.Generator().manual_seed(seed), ExpertUses(EXPERTS), Counter[int]()
    for tokens in passes:
        ids = torch.rand(tokens, EXPERTS, generator=generator).argsort(dim=1)[:, :k].contiguous()
        chosen = Counter(ids.flatten().tolist())
        found = uses.add(ids)
        assert found == different(ids)
        assert len(found) == len(chosen)
        assert set(found) == set(chosen)
        expected += chosen
    assert uses.counts() == [expected[e] for e in range(EXPERTS)]
    uses.clear()
    assert uses.counts() == [0] * EXPERTS
