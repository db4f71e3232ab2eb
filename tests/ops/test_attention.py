"""Attention of each form against the written-out one over generated shapes, and the absorbed form of MLA against the
expanded one: no cache, whole sequence, double precision."""

from __future__ import annotations

import pytest
import torch

from ciuic_runtime.ops import attention
from ciuic_runtime.ops.attention import attend, causal_mask, mla_absorbed, mla_expanded

# heads, kv_heads, query rows, context
SHAPES = [(1, 1, 1, 1), (4, 4, 5, 5), (4, 2, 7, 40), (6, 1, 1, 33), (3, 3, 64, 64), (8, 2, 3, 200), (2, 1, 130, 131)]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def by_formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Row by row and head by head; the queries are the last of the positions."""
    n, heads, context = q.shape[0], q.shape[1], k.shape[0]
    out = torch.empty(n, heads, v.shape[2], dtype=torch.float64)
    for i in range(n):
        seen = context - n + i + 1
        for h in range(heads):
            kv = h // (heads // k.shape[1])
            scores = k[:seen, kv].double() @ q[i, h].double() * scale
            out[i, h] = scores.softmax(0) @ v[:seen, kv].double()
    return out


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_grouped_query_attention(shape: tuple[int, int, int, int]) -> None:
    heads, kv_heads, n, context = shape
    q, k, v = randn(n, heads, 12), randn(context, kv_heads, 12, seed=1), randn(context, kv_heads, 10, seed=2)
    got = attend(q, k, v, 0.3)
    assert got.shape == (n, heads, 10)
    torch.testing.assert_close(got.double(), by_formula(q, k, v, 0.3), rtol=1e-4, atol=1e-5)


def test_rows_beyond_one_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = randn(50, 2, 8), randn(70, 2, 8, seed=1), randn(70, 2, 8, seed=2)
    whole = attend(q, k, v, 0.3)
    for rows in (1, 7, 49, 50):
        monkeypatch.setattr(attention, "QUERY_ROWS", rows)
        torch.testing.assert_close(attend(q, k, v, 0.3), whole, rtol=1e-5, atol=1e-6)


# heads, nope, rope, value, kv_rank, rows, context
MLA = [
    (1, 4, 2, 4, 6, 1, 1),
    (4, 16, 8, 20, 32, 9, 9),
    (3, 5, 4, 3, 8, 6, 50),
    (2, 8, 8, 24, 12, 1, 77),
    (16, 8, 4, 8, 16, 33, 130),
]


@pytest.mark.parametrize("shape", MLA, ids=str)
def test_both_forms_of_latent_attention(shape: tuple[int, ...]) -> None:
    heads, nope, rope, value, rank, n, context = shape
    q_nope, q_rope = randn(n, heads, nope), randn(n, heads, rope, seed=1)
    cache, kv_b = randn(context, rank + rope, seed=2), randn(heads * (nope + value), rank, seed=3) * rank**-0.5
    wide = (cache[:, :rank].double() @ kv_b.double().T).view(context, heads, nope + value)
    rotated = cache[:, None, rank:].double().expand(-1, heads, -1)
    k, v = torch.cat([wide[..., :nope], rotated], dim=-1), wide[..., nope:]
    expected = by_formula(torch.cat([q_nope, q_rope], dim=-1), k, v, 0.25)
    for form in (mla_expanded, mla_absorbed):
        got = form(q_nope, q_rope, cache, kv_b, 0.25)
        assert got.shape == (n, heads, value), form.__name__
        torch.testing.assert_close(got.double(), expected, rtol=2e-4, atol=2e-5)


def test_forms_agree_in_bfloat16() -> None:
    q_nope, q_rope = randn(5, 4, 16).bfloat16(), randn(5, 4, 8, seed=1).bfloat16()
    cache, kv_b = randn(60, 40, seed=2).bfloat16(), (randn(4 * 32, 32, seed=3) * 32**-0.5).bfloat16()
    expanded, absorbed = (f(q_nope, q_rope, cache, kv_b, 0.2) for f in (mla_expanded, mla_absorbed))
    assert expanded.dtype == absorbed.dtype == torch.bfloat16
    torch.testing.assert_close(expanded.float(), absorbed.float(), rtol=0.05, atol=0.03)


def test_causal_mask() -> None:
    assert causal_mask(2, 4, 2, torch.device("cpu")).tolist() == [[True, True, True, False], [True] * 4]
