"""The native forward pass with operators of the user's inside: a task that holds one is run in its parts, what is left
of it still by kernels. Knows the parts of such tasks; all others are those of `native_forward.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ciuic_runtime.memory.kv_cache import KVCache
from ciuic_runtime.models.forward import router
from ciuic_runtime.models.layout import PageLayout
from ciuic_runtime.models.native_forward import (
    CombineFunction,
    ExpertsFunction,
    NativeForward,
    NativePass,
    SlotExpertsFunction,
    TaskFunction,
    keeping,
)
from ciuic_runtime.models.native_pages import NativePage, page_of_block
from ciuic_runtime.models.spec import ModelSpec
from ciuic_runtime.ops.custom import Replacements
from ciuic_runtime.ops.moe import combine
from ciuic_runtime.ops.rms_norm import rms_norm
from ciuic_runtime.schedulers.graph import Task


class ComposedForward(NativeForward):
    """Makes the function of each task, with `replaced` in the places they are registered for."""

    def __init__(self, spec: ModelSpec, cache: KVCache, operators: Any, replaced: Replacements) -> None:
        super().__init__(spec, cache, operators)
        self.replaced = replaced

    def function(self, task: Task, page: NativePage) -> TaskFunction:
        moe = self.spec.moe
        if task.kind == "router" and moe and ("route" in self.replaced or moe.scoring in self.replaced):
            return self._composed_router(task, page)
        if task.kind == "norm" and "rms_norm" in self.replaced:
            return self._composed_norm(task, page)
        if task.kind in ("mlp", "shared_experts") and "silu" in self.replaced:
            return self._composed_mlp(task, page)
        return super().function(task, page)

    def experts(self, task: Task, pages: Mapping[int, NativePage]) -> ExpertsFunction:
        if "silu" not in self.replaced:
            return super().experts(task, pages)
        hidden = self.spec.hidden_size
        gated = {e: self._gated(task, page) for e, page in pages.items()}

        def experts(p: NativePass, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            k, flat = ids.shape[1], ids.flatten()
            out = self.buffers.get("expert_rows", p.rows * k, hidden)
            for e in torch.unique(flat).tolist():
                if e in gated:
                    where = (flat == e).nonzero().flatten()
                    out[where] = gated[e](x[where // k], None)
            return out

        return experts

    def experts_in_slots(self, task: Task, layout: PageLayout) -> SlotExpertsFunction:
        if "silu" not in self.replaced:
            return super().experts_in_slots(task, layout)

        def experts(
            p: NativePass, x: torch.Tensor, ids: torch.Tensor, slots: Mapping[int, torch.Tensor]
        ) -> torch.Tensor:
            pages = {e: page_of_block(layout, slot) for e, slot in slots.items()}
            return self.experts(task, pages)(p, x, ids)

        return experts

    def combine(self, task: Task) -> CombineFunction:
        if "combine" not in self.replaced:
            return super().combine(task)
        weighted = self.replaced.function("combine", combine, task.name)

        def combined(
            p: NativePass, rows: torch.Tensor, weights: torch.Tensor, added: Sequence[torch.Tensor]
        ) -> torch.Tensor:
            out = self.buffers.get("residual.0", p.rows, self.spec.hidden_size)
            total = weighted(rows.view(*weights.shape, -1), weights)
            for value in added:
                total = total + value
            return out.copy_(total)

        return combined

    def _composed_router(self, task: Task, page: NativePage) -> TaskFunction:
        """Logits by the kernel, scores and choice as `ops/moe.py` has them."""
        moe = self.spec.moe
        assert moe is not None
        gate, bias = page.matrix("gate"), page.tensor("e_score_correction_bias")
        chosen, run = router(self.replaced, moe, task.name), self.operators.linear

        def route(p: NativePass, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logits = self.buffers.get("router_logits", p.rows, moe.num_experts)
            run(gate, 0, x.data_ptr(), p.rows, 0, logits.data_ptr())
            ids, weights = chosen(logits, bias, moe)
            return ids.contiguous(), weights.contiguous()

        return keeping(page, route)

    def _composed_norm(self, task: Task, page: NativePage) -> TaskFunction:
        weight, eps = page.tensor("weight"), self.spec.rms_norm_eps
        norm = self.replaced.function("rms_norm", rms_norm, task.name)
        last = task.layer is None

        def composed_norm(p: NativePass, x: torch.Tensor) -> torch.Tensor:
            wanted = x[p.selected] if last and p.selected is not None else x
            normed: torch.Tensor = norm(wanted, weight, eps)
            return normed

        return composed_norm

    def _composed_mlp(self, task: Task, page: NativePage) -> TaskFunction:
        name, gated = "residual.0" if task.kind == "mlp" else "shared", self._gated(task, page)

        def mlp(p: NativePass, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
            return self.buffers.get(name, p.rows, self.spec.hidden_size).copy_(gated(x, residual))

        return mlp

    def _gated(self, task: Task, page: NativePage) -> Any:
        """(x, residual or None) -> down(silu(gate(x)) * up(x)) + residual."""
        gate, up, down = (self._linear(page, role) for role in ("gate_proj", "up_proj", "down_proj"))
        silu = self.replaced.function("silu", F.silu, task.name)
        return lambda x, residual: down((silu(gate(x)) * up(x)).contiguous(), residual)

    def _linear(self, page: NativePage, role: str) -> Any:
        matrix, bias, run = page.matrix(role), page.address(f"{role}_bias"), self.operators.linear
        rows_out = page.shape(role)[0]

        def linear(x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
            out = torch.empty(x.shape[0], rows_out)
            run(matrix, bias, x.data_ptr(), x.shape[0], 0 if residual is None else residual.data_ptr(), out.data_ptr())
            return out

        return keeping(page, linear)
