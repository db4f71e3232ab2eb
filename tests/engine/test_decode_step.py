"""What a step of decoding costs beside the kernels: how often it calls them, and that it asks for no memory."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ciuic_runtime.devices.spec import Topology
from ciuic_runtime.engine import executor
from ciuic_runtime.engine.llm import LLM
from ciuic_runtime.engine.sampling import SamplingParams
from ciuic_runtime.ops.native import kernels

pytestmark = pytest.mark.skipif(kernels() is None, reason="the native kernels are not built here")

MOST_CALLS_PER_LAYER = 10


class Counting:
    """Kernels that count their calls by operator."""

    def __init__(self, operators: Any, calls: Counter[str]) -> None:
        self._operators, self._calls = operators, calls

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._operators, name)
        if not callable(value):
            return value

        def counted(*args: Any) -> Any:
            self._calls[name] += 1
            return value(*args)

        return counted


class TorchCalls(TorchDispatchMode):
    """Torch's operations below it that made memory of their own (a view or the same tensor again is none)."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        if not isinstance(result, torch.Tensor) or result.untyped_storage().data_ptr() not in given:
            self.names.append(str(func))
        return result


@pytest.mark.parametrize("sequences", [1, 3])
@pytest.mark.parametrize("form", ["int4", "bfloat16"])
def test_a_step_of_decoding_calls_kernels_few_times_and_allocates_nothing(
    form: str, sequences: int, tiny_v3: Path, here: Topology, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[str] = Counter()
    made: list[Any] = []
    real_operators, real_step = executor.operators, executor.LocalExecutor.step

    def counting_operators(*args: Any) -> Counting:
        made.append(real_operators(*args))
        return Counting(made[-1], calls)

    steps: list[tuple[Counter[str], list[str], int]] = []

    def watched_step(self: Any, batch: Any, phase: str, sampler: Any = None) -> torch.Tensor:
        calls.clear()
        with TorchCalls() as torch_calls:
            logits = real_step(self, batch, phase)
        if sampler is not None:
            sampler(logits)
        if phase == "decode":
            held = sum(o.workspace_nbytes for o in made) + sum(f.buffers.nbytes for f in self.forwards.values())
            steps.append((Counter(calls), torch_calls.names, held))
        return logits

    monkeypatch.setattr(executor, "operators", counting_operators)
    monkeypatch.setattr(executor.LocalExecutor, "step", watched_step)
    llm = LLM(tiny_v3, devices=here, dtype=form, max_num_seqs=4)
    llm.generate([[1, 2, 3]] * sequences, SamplingParams(max_tokens=6, ignore_eos=True))

    layers = llm.model.spec.num_layers
    assert len(steps) == 6  # one to warm up, five that were asked for
    for called, of_torch, held in steps[2:]:  # the first of those makes room
        assert not of_torch, of_torch
        assert held == steps[1][2]
        per_layer = (called.total() - called["embed"] - called["linear"] - 1) / layers  # the head, the last norm
        assert called["embed"] == called["linear"] == 1
        assert 0 < per_layer <= MOST_CALLS_PER_LAYER, called
