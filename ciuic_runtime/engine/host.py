"""What of a model is in this process while it runs: devices, pages, the cache, and the executor that uses them.
Knows a schedule, whole or of one stage; requests are the engine's business."""

from __future__ import annotations

import resource
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from ciuic_runtime.devices.backends import open_backend
from ciuic_runtime.engine.config import RuntimeConfig
from ciuic_runtime.engine.engine import LocalRunner, Runner, StageLost
from ciuic_runtime.engine.executor import LocalExecutor
from ciuic_runtime.engine.recorder import Recorder
from ciuic_runtime.engine.setup import Setup
from ciuic_runtime.memory.hierarchy import MemoryHierarchy
from ciuic_runtime.model import Model
from ciuic_runtime.models.batch import Chunk, make_batch
from ciuic_runtime.models.checkpoint import Checkpoint
from ciuic_runtime.ops.custom import Replacements
from ciuic_runtime.ops.native import REFERENCE
from ciuic_runtime.schedulers.graph import Phase, TaskGraph
from ciuic_runtime.schedulers.memory import memory_need
from ciuic_runtime.schedulers.schedule import Schedule
from ciuic_runtime.schedulers.trace import Trace

DEFAULT_LOOKAHEAD = 2


class Host(Protocol):
    """Where passes run: in this process, or in those of a cluster."""

    @property
    def runner(self) -> Runner: ...

    @property
    def memory(self) -> MemoryHierarchy | None:
        """Of this process."""

    def logits(self, chunks: Sequence[Chunk], phase: Phase) -> torch.Tensor:
        """Of the rows that are wanted of one pass, float32 [rows, vocab]."""

    def num_events(self) -> int: ...

    def clear_trace(self) -> None: ...

    def trace(self, devices: Sequence[str], notes: Sequence[str]) -> Trace: ...

    def peak_memory_bytes(self) -> dict[str, int]: ...

    def warm_up(self) -> None: ...

    def recover(self, lost: StageLost) -> Setup:
        """Makes good a loss; what is carried out from now on. What was cached is gone."""

    def close(self) -> None: ...


class LocalHost:
    def __init__(
        self, model: Model, graph: TaskGraph, schedule: Schedule, checkpoint: Checkpoint, num_blocks: int,
        config: RuntimeConfig, kernels: str, threads: int, replaced: Replacements | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:  # fmt: skip
        """Loads the graph's pages. `kernels` and `threads` as they were found for `config`."""
        self.recorder = Recorder()
        names = schedule.devices_used()
        self.backends = {name: open_backend(schedule.topology.device(name), schedule.topology) for name in names}
        self.memory: MemoryHierarchy | None = self._open_memory(model, graph, schedule, checkpoint, config, kernels)
        asked = DEFAULT_LOOKAHEAD if config.lookahead is None else config.lookahead
        self.executor = LocalExecutor(
            model.spec, graph, schedule, checkpoint, self.backends, num_blocks, self.recorder, progress, kernels,
            threads, replaced, self.memory, schedule.paging.lookahead if schedule.paging else asked,
        )  # fmt: skip
        self.runner: Runner = LocalRunner(self.executor)

    def _open_memory(
        self, model: Model, graph: TaskGraph, schedule: Schedule, checkpoint: Checkpoint, config: RuntimeConfig,
        kernels: str,
    ) -> MemoryHierarchy | None:  # fmt: skip
        """Where pages lie in slots: with native kernels on one CPU, if the checkpoint is packed, must be paged, or the
        user asks for it."""
        used, paging = list(self.backends.values()), schedule.paging
        can = kernels != REFERENCE and len(used) == 1 and used[0].host_memory
        wanted = config.paged if config.paged is not None else bool(model.spec.packed)
        if paging is None and not (can and wanted):
            return None
        name = used[0].spec.name
        need = memory_need(schedule, graph, schedule.workload)[name]
        return MemoryHierarchy(
            checkpoint, memory={name: need.total}, format=model.format, graph=graph,
            cache_policy=(paging.policy if paging else config.cache_policy) or "auto", io_threads=config.io_threads,
            backend=used[0], reserved=need.total - need.weights,
        )  # fmt: skip

    def logits(self, chunks: Sequence[Chunk], phase: Phase) -> torch.Tensor:
        return self.executor.step(make_batch(chunks), phase).clone()

    def num_events(self) -> int:
        return self.recorder.num_events

    def clear_trace(self) -> None:
        self.recorder.clear()
        if self.memory is not None:
            self.memory.report.clear()

    def trace(self, devices: Sequence[str], notes: Sequence[str]) -> Trace:
        return self.recorder.trace(devices, notes)

    def peak_memory_bytes(self) -> dict[str, int]:
        """By device: for CPUs the process's peak resident memory (the system's figure), else what was allocated."""
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {n: resident if b.host_memory else b.memory().peak for n, b in self.backends.items()}

    def warm_up(self) -> None:
        """One prompt pass and one decode pass, so that thread pools and compiled primitives exist before the first
        request; what they leave in the cache is overwritten. Not where pages would have to be read for it."""
        if self.memory is not None and not self.memory.state.whole:
            return
        self.logits([Chunk((0, 0), 0, (0,), prompt=True)], "prefill")
        self.logits([Chunk((0,), 2, (0,), prompt=False)], "decode")
        self.recorder.clear()

    def recover(self, lost: StageLost) -> Setup:
        raise lost  # there is one process here

    def close(self) -> None:
        self.executor.close()
