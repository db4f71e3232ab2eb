"""Attention of one sequence over its cache, in plain torch: grouped-query, and MLA in both its forms.
Expanded MLA (for prompts) rebuilds keys and values from the latents; absorbed MLA (for generated tokens) never does."""

from __future__ import annotations

import torch
import torch.nn.functional as F

# How many query rows meet the whole context at once: bounds the score matrix at [heads, QUERY_ROWS, context].
QUERY_ROWS = 256


def causal_mask(rows: int, context: int, first: int, device: torch.device) -> torch.Tensor:
    """[rows, context] bool: row i, at position first + i, attends positions up to its own."""
    ends = torch.arange(first, first + rows, device=device)[:, None]
    return torch.arange(context, device=device)[None, :] <= ends


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """q [n, heads, d], k [c, kv_heads, d], v [c, kv_heads, dv] -> [n, heads, dv]; q are the last n of c positions."""
    n, context = q.shape[0], k.shape[0]
    keys, values = k.transpose(0, 1)[None], v.transpose(0, 1)[None]
    gqa = q.shape[1] != k.shape[1]
    out = []
    for at in range(0, n, QUERY_ROWS):
        rows = q[at : at + QUERY_ROWS].transpose(0, 1)[None]
        first = context - n + at
        mask = None if n == 1 else causal_mask(rows.shape[2], context, first, q.device)
        out.append(F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=scale, enable_gqa=gqa))
    return torch.cat(out, dim=2)[0].transpose(0, 1)


def mla_expanded(
    q_nope: torch.Tensor, q_rope: torch.Tensor, cache: torch.Tensor, kv_b: torch.Tensor, scale: float
) -> torch.Tensor:
    """q_nope [n, heads, nope], q_rope [n, heads, rope], cache [c, kv_rank + rope] (normalised latent, rotated key),
    kv_b [heads x (nope + value), kv_rank] -> [n, heads, value]. DeepSeek-V2, equations 9 to 19."""
    heads, nope, rank = q_nope.shape[1], q_nope.shape[2], kv_b.shape[1]
    latent, k_rope = cache[:, :rank], cache[:, rank:]
    expanded = F.linear(latent, kv_b).view(cache.shape[0], heads, -1)
    k_nope, v = expanded[..., :nope], expanded[..., nope:]
    k = torch.cat([k_nope, k_rope[:, None, :].expand(-1, heads, -1)], dim=-1)
    return attend(torch.cat([q_nope, q_rope], dim=-1), k, v, scale)


def mla_absorbed(
    q_nope: torch.Tensor, q_rope: torch.Tensor, cache: torch.Tensor, kv_b: torch.Tensor, scale: float
) -> torch.Tensor:
    """The same result as `mla_expanded`, with the key expansion absorbed into the query and the value expansion
    applied after attention: every head attends the one latent row per position. DeepSeek-V2, section 2.1.2."""
    n, heads, nope = q_nope.shape
    rank, context = kv_b.shape[1], cache.shape[0]
    absorb = kv_b.view(heads, -1, rank)  # [heads, nope + value, kv_rank]
    q_latent = torch.bmm(q_nope.transpose(0, 1), absorb[:, :nope])  # [heads, n, kv_rank]
    q = torch.cat([q_latent, q_rope.transpose(0, 1)], dim=-1)  # [heads, n, kv_rank + rope]
    scores = torch.matmul(q, cache.T).float() * scale  # [heads, n, context]
    if n > 1:
        scores.masked_fill_(~causal_mask(n, context, context - n, cache.device), float("-inf"))
    weights = scores.softmax(dim=-1).to(cache.dtype)
    o_latent = torch.matmul(weights, cache[:, :rank])  # [heads, n, kv_rank]
    return torch.bmm(o_latent, absorb[:, nope:].transpose(1, 2)).transpose(0, 1)
