"""The forward pass by native kernels, task by task: one call each, into memory that is used again from pass to pass.
Knows which kernel computes which task; the equations are in `forward.py` and in the kernels themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ciuic_runtime.memory.buffers import Buffers
from ciuic_runtime.memory.kv_cache import KVCache
from ciuic_runtime.models.batch import Batch
from ciuic_runtime.models.forward import MLA_NORM_EPS
from ciuic_runtime.models.layout import PageLayout
from ciuic_runtime.models.native_pages import NativePage, page_of_block
from ciuic_runtime.models.spec import ModelSpec
from ciuic_runtime.ops.native import kernels
from ciuic_runtime.ops.rope import rope_frequencies, rope_table, softmax_scale
from ciuic_runtime.schedulers.graph import Task


@dataclass(frozen=True, slots=True)
class NativePass:
    """A batch as the kernels take it. `selected`: rows whose logits are wanted, None for all."""

    batch: Batch
    rows: int
    native: Any
    selected: torch.Tensor | None


TaskFunction = Callable[..., Any]  # (NativePass, *inputs) -> output
ExpertsFunction = Callable[[NativePass, torch.Tensor, torch.Tensor], torch.Tensor]
SlotExpertsFunction = Callable[[NativePass, torch.Tensor, torch.Tensor, Mapping[int, torch.Tensor]], torch.Tensor]
ReadRows = Callable[[list[int], torch.Tensor], None]  # numbers, uint8 [numbers, bytes of a row] to be filled
CombineFunction = Callable[[NativePass, torch.Tensor, torch.Tensor, Sequence[torch.Tensor]], torch.Tensor]


class NativeForward:
    """Makes the function of each task of one device. Everything handed on is float32.

    What a task hands on is overwritten by the next task of its kind: the residual stream alternates between two
    buffers, since a layer's second half still reads what its first half made."""

    def __init__(self, spec: ModelSpec, cache: KVCache, operators: Any) -> None:
        self.spec, self.cache, self.operators = spec, cache, operators
        module = kernels()
        assert module is not None, "native functions are made where there are kernels"
        self._kernels = module
        self.buffers = Buffers()
        positions = torch.arange(min(spec.max_positions, cache.num_positions))
        inv_freq, factor = rope_frequencies(spec.rope)
        self._cos, self._sin = (t.squeeze(1).contiguous() for t in rope_table(inv_freq, factor, positions))
        self._rope = module.Rope(self._cos.data_ptr(), self._sin.data_ptr(), spec.rope.dim, spec.rope.interleaved)

    def start(self, batch: Batch) -> NativePass:
        rows = batch.num_tokens
        sequences = [(s.start, s.length, s.position, list(s.blocks), s.prompt) for s in batch.sequences]
        native = self._kernels.Batch(rows, batch.positions.data_ptr(), batch.slots.data_ptr(), sequences)
        everybody = batch.sampled_rows.shape[0] == rows
        return NativePass(batch, rows, native, None if everybody else batch.sampled_rows)

    def function(self, task: Task, page: NativePage) -> TaskFunction:
        """The function of a task other than `experts`, whose inputs are the outputs of the tasks it comes after."""
        match task.kind:
            case "embedding":
                return self._embedding(page)
            case "norm":
                return self._norm(page, last=task.layer is None)
            case "attention":
                assert task.layer is not None
                return self._mla(task.layer, page) if self.spec.mla else self._grouped_query(task.layer, page)
            case "mlp" | "shared_experts":
                return self._mlp(page, "residual.0" if task.kind == "mlp" else "shared")
            case "router":
                return self._router(page)
        assert task.kind == "head", task.kind
        return self._head(page)

    def experts(self, task: Task, pages: Mapping[int, NativePage]) -> ExpertsFunction:
        """(token, k) rows [tokens x k, hidden] of those of a layer's experts that are in `pages`."""
        num_experts, hidden, run = task.num_experts, self.spec.hidden_size, self.operators.experts
        addresses = torch.zeros(num_experts, 3, dtype=torch.int64)
        for e, page in pages.items():
            addresses[e] = torch.tensor([page.address(r) for r in ("gate_proj", "up_proj", "down_proj")])
        shape = self._mlp_weights(next(iter(pages.values())))

        def experts(p: NativePass, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            k = ids.shape[1]
            out = self.buffers.get("expert_rows", p.rows * k, hidden)
            run(shape, addresses.data_ptr(), num_experts, x.data_ptr(), ids.data_ptr(), p.rows, k, out.data_ptr())
            return out

        experts.pages = pages  # type: ignore[attr-defined]  # kept alive as long as their addresses are
        return experts

    def experts_in_slots(self, task: Task, layout: PageLayout) -> SlotExpertsFunction:
        """(token, k) rows of those of a layer's experts whose slots are given: expert -> uint8 [nbytes] of its page.
        Rows of others are left as they are, so that experts can be computed as they come."""
        num_experts, hidden, run = task.num_experts, self.spec.hidden_size, self.operators.experts
        offsets = np.array([layout.part(r).offset for r in ("gate_proj", "up_proj", "down_proj")])
        shape: Any = None
        addresses = np.zeros((num_experts, 3), np.int64)
        table = addresses.ctypes.data

        def experts(
            p: NativePass, x: torch.Tensor, ids: torch.Tensor, slots: Mapping[int, torch.Tensor]
        ) -> torch.Tensor:
            nonlocal shape
            if shape is None:
                shape = self._mlp_weights(page_of_block(layout, next(iter(slots.values()))))
            k = ids.shape[1]
            out = self.buffers.get("expert_rows", p.rows * k, hidden)
            here = list(slots)
            addresses[here] = np.array([[slot.data_ptr()] for slot in slots.values()]) + offsets
            run(shape, table, num_experts, x.data_ptr(), ids.data_ptr(), p.rows, k, out.data_ptr())
            addresses[here] = 0
            return out

        return experts

    def combine(self, task: Task) -> CombineFunction:
        """Each token's rows, weighted, in the router's order; then what is added (shared experts, the residual)."""
        hidden, run = self.spec.hidden_size, self.operators.combine

        def combine(
            p: NativePass, rows: torch.Tensor, weights: torch.Tensor, added: Sequence[torch.Tensor]
        ) -> torch.Tensor:
            out = self.buffers.get("residual.0", p.rows, hidden)
            first, second = (*(t.data_ptr() for t in added), 0, 0)[:2]
            k = weights.shape[1]
            run(rows.data_ptr(), weights.data_ptr(), p.rows, k, hidden, first, second, out.data_ptr())
            return out

        return combine

    def _embedding(self, page: NativePage) -> TaskFunction:
        table = page.address("weight")
        return keeping(page, lambda p: self._embed(p, table, p.batch.token_ids))

    def embedding_by_rows(self, read: ReadRows) -> TaskFunction:
        """The embedding of a table that is not in memory: `read` fetches the rows, bfloat16, that are asked for."""

        def embedding(p: NativePass) -> torch.Tensor:
            numbers, places = np.unique(p.batch.token_ids.numpy(), return_inverse=True)
            table = self.buffers.get("embedding_rows", len(numbers), 2 * self.spec.hidden_size, torch.uint8)
            read(numbers.tolist(), table)
            return self._embed(p, table.data_ptr(), torch.from_numpy(places))

        return embedding

    def _embed(self, p: NativePass, table: int, ids: torch.Tensor) -> torch.Tensor:
        """ids: int64 [rows], of rows of the bfloat16 table at that address."""
        hidden = self.spec.hidden_size
        out = self.buffers.get("residual.0", p.rows, hidden)
        self.operators.embed(table, ids.data_ptr(), p.rows, hidden, out.data_ptr())
        return out

    def _norm(self, page: NativePage, last: bool) -> TaskFunction:
        """RMSNorm; the last one takes only the rows whose logits are wanted."""
        weight, hidden, eps = page.address("weight"), self.spec.hidden_size, self.spec.rms_norm_eps
        run, name = self.operators.rms_norm, "final" if last else "normed"

        def norm(p: NativePass, x: torch.Tensor) -> torch.Tensor:
            wanted = x[p.selected] if last and p.selected is not None else x
            out = self.buffers.get(name, wanted.shape[0], hidden)
            run(wanted.data_ptr(), weight, wanted.shape[0], hidden, eps, out.data_ptr())
            return out

        return keeping(page, norm)

    def _head(self, page: NativePage) -> TaskFunction:
        # A packed page of tied embeddings has the head beside the table.
        matrix, vocab = page.matrix("head" if page.address("head") else "weight"), self.spec.vocab_size
        run = self.operators.linear

        def head(p: NativePass, x: torch.Tensor) -> torch.Tensor:
            out = self.buffers.get("logits", x.shape[0], vocab)
            run(matrix, 0, x.data_ptr(), x.shape[0], 0, out.data_ptr())
            return out

        return keeping(page, head)

    def _mlp(self, page: NativePage, out_name: str) -> TaskFunction:
        weights, hidden, run = self._mlp_weights(page), self.spec.hidden_size, self.operators.mlp

        def mlp(p: NativePass, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
            out = self.buffers.get(out_name, p.rows, hidden)
            run(weights, x.data_ptr(), p.rows, 0 if residual is None else residual.data_ptr(), out.data_ptr())
            return out

        return keeping(page, mlp)

    def _mlp_weights(self, page: NativePage) -> Any:
        gate, up, down = (page.matrix(r) for r in ("gate_proj", "up_proj", "down_proj"))
        biases = (page.address(f"{r}_bias") for r in ("gate_proj", "up_proj", "down_proj"))
        return self._kernels.MlpWeights(gate, up, down, *biases)

    def _router(self, page: NativePage) -> TaskFunction:
        moe, run = self.spec.moe, self.operators.route
        assert moe is not None
        gate, bias, k = page.matrix("gate"), page.address("e_score_correction_bias"), moe.experts_per_token
        params = self._kernels.RouteParams(
            experts=moe.num_experts, per_token=k, groups=moe.num_groups, groups_per_token=moe.groups_per_token,
            sigmoid=moe.scoring == "sigmoid", group_top2=moe.method == "noaux_tc",
            limited=moe.method != "greedy" and moe.num_groups > 1, normalise=moe.normalise, scaling=moe.scaling,
        )  # fmt: skip

        def route(p: NativePass, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            ids = self.buffers.get("expert_ids", p.rows, k, torch.int64)
            weights = self.buffers.get("expert_weights", p.rows, k)
            run(params, gate, bias, x.data_ptr(), p.rows, ids.data_ptr(), weights.data_ptr())
            return ids, weights

        return keeping(page, route)

    def _mla(self, layer: int, page: NativePage) -> TaskFunction:
        mla, spec = self.spec.mla, self.spec
        assert mla is not None
        roles = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "k_b", "k_b_absorbed", "v_b", "o_proj")
        vectors = ("q_a_layernorm", "kv_a_layernorm", "q_a_proj_bias", "kv_a_proj_with_mqa_bias", "o_proj_bias")
        weights = self._kernels.MlaWeights(
            (spec.num_heads, mla.nope_dim, mla.rope_dim, mla.value_dim, mla.kv_rank),
            [page.matrix(r) for r in roles], [page.address(r) for r in vectors],
            MLA_NORM_EPS, softmax_scale(spec.rope, mla.qk_dim),
        )  # fmt: skip
        return self._attention(layer, page, self.operators.mla, weights)

    def _grouped_query(self, layer: int, page: NativePage) -> TaskFunction:
        spec, roles = self.spec, ("q_proj", "k_proj", "v_proj", "o_proj")
        weights = self._kernels.GqaWeights(
            (spec.num_heads, spec.num_kv_heads, spec.head_dim),
            [page.matrix(r) for r in roles], [page.address(f"{r}_bias") for r in roles], spec.head_dim**-0.5,
        )  # fmt: skip
        return self._attention(layer, page, self.operators.gqa, weights)

    def _attention(self, layer: int, page: NativePage, run: Any, weights: Any) -> TaskFunction:
        hidden, cache, rope = self.spec.hidden_size, self.cache.memory(layer).data_ptr(), self._rope

        def attention(p: NativePass, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
            out = self.buffers.get("residual.1", p.rows, hidden)
            run(weights, rope, p.native, x.data_ptr(), residual.data_ptr(), cache, out.data_ptr())
            return out

        return keeping(page, attention)


def keeping(page: NativePage, function: TaskFunction) -> TaskFunction:
    """The function, which knows its weights by address only, with the page that keeps them in memory."""
    function.page = page  # type: ignore[attr-defined]
    return function
