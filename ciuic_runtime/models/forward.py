"""The forward pass, task by task: for each kind of task, the function that computes it from its weights and inputs.
Knows the equations of the model families; which device runs a task, and in what order, is the executor's business."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from ciuic_runtime.memory.kv_cache import KVCache
from ciuic_runtime.models.batch import Batch
from ciuic_runtime.models.spec import ModelSpec, MoeSpec
from ciuic_runtime.ops.attention import attend, mla_absorbed, mla_expanded
from ciuic_runtime.ops.custom import Replacements
from ciuic_runtime.ops.moe import SCORES, choose, combine, experts, router_logits, swiglu
from ciuic_runtime.ops.rms_norm import rms_norm
from ciuic_runtime.ops.rope import apply_rope, rope_frequencies, rope_table, softmax_scale
from ciuic_runtime.schedulers.graph import Task

Weights = Mapping[str, torch.Tensor]  # role -> tensor, of one page

# The norms inside MLA keep this epsilon whatever rms_norm_eps says, as in DeepSeek's own code.
MLA_NORM_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class Pass:
    """A batch on one device, with what all its layers share."""

    batch: Batch
    cos: torch.Tensor  # [tokens, 1, rope_dim / 2]
    sin: torch.Tensor


TaskFunction = Callable[..., Any]  # (Pass, *inputs) -> output
ExpertsFunction = Callable[[Pass, torch.Tensor, torch.Tensor], torch.Tensor]  # x, expert ids -> rows
CombineFunction = Callable[[Pass, torch.Tensor, torch.Tensor, Sequence[torch.Tensor]], torch.Tensor]


def router(replaced: Replacements, moe: MoeSpec, task: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """(logits, bias, moe) -> expert ids and weights, with the user's operators where there are some."""
    score = replaced.function(moe.scoring, SCORES[moe.scoring], task)
    return replaced.function("route", partial(choose, score=score), task)


class Forward:
    """Makes the function of each task. `cache` holds the entries of all layers; `replaced` are the user's operators."""

    def __init__(self, spec: ModelSpec, cache: KVCache, replaced: Replacements | None = None) -> None:
        self.spec, self.cache, self.replaced = spec, cache, replaced or Replacements()
        self.inv_freq, self.rope_factor = rope_frequencies(spec.rope)
        # Where a family's own code rounds: V2 turns in float32, the others in the type of the activations. Routers sit
        # on thresholds, so rounding elsewhere picks other experts now and then.
        self.rope_dtype = torch.float32 if spec.family == "deepseek_v2" else cache.dtype
        self._inv_freq_on = {self.inv_freq.device: self.inv_freq}

    def start(self, batch: Batch) -> Pass:
        device = batch.positions.device
        inv_freq = self._inv_freq_on.setdefault(device, self.inv_freq.to(device))
        return Pass(batch, *rope_table(inv_freq, self.rope_factor, batch.positions, self.rope_dtype))

    def function(self, task: Task, w: Weights) -> TaskFunction:
        """The function of a task other than `experts`, whose inputs are the outputs of the tasks it comes after."""
        spec, norm = self.spec, self.replaced.function("rms_norm", rms_norm, task.name)
        silu = self.replaced.function("silu", F.silu, task.name)
        if task.kind == "embedding":
            return lambda p: F.embedding(p.batch.token_ids, w["weight"])
        if task.name == "final_norm":
            return lambda p, x: norm(x[p.batch.sampled_rows], w["weight"], spec.rms_norm_eps)
        if task.kind == "norm":
            return lambda p, x: norm(x, w["weight"], spec.rms_norm_eps)
        if task.kind == "attention":
            assert task.layer is not None
            return self._mla(task.layer, w) if spec.mla else self._grouped_query(task.layer, w)
        if task.kind == "mlp":
            return lambda p, x, residual: residual + swiglu(x, w, silu)
        if task.kind == "shared_experts":
            return lambda p, x: swiglu(x, w, silu)
        if task.kind == "router":
            moe = spec.moe
            assert moe is not None
            chosen = router(self.replaced, moe, task.name)
            return lambda p, x: chosen(router_logits(x, w["gate"]), w.get("e_score_correction_bias"), moe)
        assert task.kind == "head", task.kind
        return lambda p, x: F.linear(x, w["weight"]).float()

    def experts(self, task: Task, weights: Mapping[int, Weights]) -> ExpertsFunction:
        """(token, k) rows [tokens x k, hidden] of those of a layer's experts that are in `weights`."""
        silu = self.replaced.function("silu", F.silu, task.name)

        def rows_of(p: Pass, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            rows = x.new_empty(ids.numel(), x.shape[1])
            experts(x, ids, weights, rows, silu)
            return rows

        return rows_of

    def combine(self, task: Task) -> CombineFunction:
        """Each token's rows, weighted, in the router's order; then what is added (shared experts, the residual)."""

        weighted = self.replaced.function("combine", combine, task.name)

        def combined(p: Pass, rows: torch.Tensor, weights: torch.Tensor, added: Sequence[torch.Tensor]) -> torch.Tensor:
            total: torch.Tensor = weighted(rows.view(*weights.shape, -1), weights)
            for value in added:
                total = total + value
            return total

        return combined

    def _grouped_query(self, layer: int, w: Weights) -> TaskFunction:
        spec, cache = self.spec, self.cache
        heads, kv_heads, dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
        scale = dim**-0.5

        def attention(p: Pass, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
            n = x.shape[0]
            q = F.linear(x, w["q_proj"], w.get("q_proj_bias")).view(n, heads, dim)
            k = F.linear(x, w["k_proj"], w.get("k_proj_bias")).view(n, kv_heads, dim)
            v = F.linear(x, w["v_proj"], w.get("v_proj_bias"))
            q = apply_rope(q, p.cos, p.sin, spec.rope.interleaved)
            k = apply_rope(k, p.cos, p.sin, spec.rope.interleaved)
            cache.write(layer, p.batch.slots, torch.cat([k.flatten(1), v], dim=1))
            out = torch.empty_like(q)
            for s in p.batch.sequences:
                keys, values = cache.read(layer, s.blocks, s.context).view(s.context, 2, kv_heads, dim).unbind(1)
                out[s.rows] = attend(q[s.rows], keys, values, scale)
            return residual + F.linear(out.flatten(1), w["o_proj"], w.get("o_proj_bias"))

        return attention

    def _mla(self, layer: int, w: Weights) -> TaskFunction:
        spec, cache, mla = self.spec, self.cache, self.spec.mla
        assert mla is not None
        heads, nope, rank = spec.num_heads, mla.nope_dim, mla.kv_rank
        scale, pairs = softmax_scale(spec.rope, mla.qk_dim), spec.rope.interleaved

        def attention(p: Pass, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
            n = x.shape[0]
            if mla.q_rank is None:
                q = F.linear(x, w["q_proj"])
            else:
                q_latent = F.linear(x, w["q_a_proj"], w.get("q_a_proj_bias"))
                q = F.linear(rms_norm(q_latent, w["q_a_layernorm"], MLA_NORM_EPS), w["q_b_proj"])
            q = q.view(n, heads, mla.qk_dim)
            q_nope, q_rope = q[..., :nope], apply_rope(q[..., nope:], p.cos, p.sin, pairs)
            kv = F.linear(x, w["kv_a_proj_with_mqa"], w.get("kv_a_proj_with_mqa_bias"))
            latent = rms_norm(kv[:, :rank], w["kv_a_layernorm"], MLA_NORM_EPS)
            k_rope = apply_rope(kv[:, None, rank:], p.cos, p.sin, pairs)[:, 0]
            cache.write(layer, p.batch.slots, torch.cat([latent, k_rope], dim=1))
            out = x.new_empty(n, heads, mla.value_dim)
            for s in p.batch.sequences:
                form = mla_expanded if s.prompt else mla_absorbed
                entries = cache.read(layer, s.blocks, s.context)
                out[s.rows] = form(q_nope[s.rows], q_rope[s.rows], entries, w["kv_b_proj"], scale)
            return residual + F.linear(out.flatten(1), w["o_proj"], w.get("o_proj_bias"))

        return attention
