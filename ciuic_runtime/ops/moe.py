"""Mixture of experts as three calls, in plain torch: `route` picks experts, `experts` computes the rows of those that
are here, `combine` adds each token's rows in the router's order."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

from ciuic_runtime.models.spec import MoeSpec

Elementwise = Callable[[torch.Tensor], torch.Tensor]


def swiglu(x: torch.Tensor, w: Mapping[str, torch.Tensor], silu: Elementwise = F.silu) -> torch.Tensor:
    """down(silu(gate(x)) * up(x)): x [tokens, hidden] -> [tokens, hidden]."""
    gate = F.linear(x, w["gate_proj"], w.get("gate_proj_bias"))
    up = F.linear(x, w["up_proj"], w.get("up_proj_bias"))
    return F.linear(silu(gate) * up, w["down_proj"], w.get("down_proj_bias"))


def route(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, moe: MoeSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [tokens, hidden] -> expert ids [tokens, k] int64, most wanted first, and their weights [tokens, k] float32."""
    return choose(router_logits(x, weight), bias, moe)


def router_logits(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """float32 [tokens, experts]."""
    return F.linear(x.float(), weight.float())


def choose(
    logits: torch.Tensor, bias: torch.Tensor | None, moe: MoeSpec, score: Elementwise | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts that logits [tokens, experts] speak for, as `route` gives them."""
    return select((score or SCORES[moe.scoring])(logits), bias, moe)


def softmax(logits: torch.Tensor) -> torch.Tensor:
    return logits.softmax(dim=-1)


SCORES: Mapping[str, Elementwise] = {"softmax": softmax, "sigmoid": torch.sigmoid}


def select(scores: torch.Tensor, bias: torch.Tensor | None, moe: MoeSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """scores [tokens, experts] -> ids and weights of the chosen.

    The selection bias takes part in choosing, never in weighting (DeepSeek-V3, section 2.1.2)."""
    wanted = scores if bias is None else scores + bias
    if moe.method != "greedy" and moe.num_groups > 1:
        wanted = _within_best_groups(wanted, moe)
    ids = wanted.topk(moe.experts_per_token, dim=-1).indices
    weights = scores.gather(1, ids)
    if moe.normalise:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return ids, weights * moe.scaling


def _within_best_groups(wanted: torch.Tensor, moe: MoeSpec) -> torch.Tensor:
    """Only experts of each token's best groups stay eligible. A group counts by its best expert (V2) or by the sum of
    its best two (V3)."""
    groups = wanted.view(wanted.shape[0], moe.num_groups, -1)
    if moe.method == "noaux_tc":
        score = groups.topk(min(2, groups.shape[-1]), dim=-1).values.sum(dim=-1)
    else:
        score = groups.amax(dim=-1)
    best = score.topk(moe.groups_per_token, dim=-1).indices
    closed = torch.ones_like(score, dtype=torch.bool).scatter_(1, best, False)
    return groups.masked_fill(closed[..., None], float("-inf")).view_as(wanted)


def experts(
    x: torch.Tensor, ids: torch.Tensor, weights: Mapping[int, Mapping[str, torch.Tensor]], rows: torch.Tensor,
    silu: Elementwise = F.silu,
) -> None:  # fmt: skip
    """Fills rows [tokens x k, hidden] for every (token, k) whose expert is in `weights`; leaves the others alone."""
    k = ids.shape[1]
    flat = ids.flatten()
    for expert in torch.unique(flat).tolist():
        if expert in weights:
            where = (flat == expert).nonzero().flatten()
            rows[where] = swiglu(x[where // k], weights[expert], silu)


def combine(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """rows [tokens x k, hidden] (or [tokens, k, hidden]), weights [tokens, k] -> [tokens, hidden]: weighted rows added
    in the router's order."""
    tokens, k = weights.shape
    by_token = rows.view(tokens, k, -1)
    total = by_token[:, 0].float() * weights[:, :1]
    for i in range(1, k):
        total += by_token[:, i].float() * weights[:, i : i + 1]
    return total.to(rows.dtype)
