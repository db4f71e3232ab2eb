"""What of a model is in this process while it runs: devices, pages, the cache, and the executor that uses them.
Knows a schedule, whole or of one stage; requests are the engine's business."""

from __future__ import annotations

import resource
from collections.abc import Callable, Mapping, Sequence
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
from ciuic_runtime.schedulers.recording import PageCounts
from ciuic_runtime.schedulers.schedule import Schedule

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

    @property
    def recorder(self) -> Recorder:
        """What is known here of the passes that ended."""

    @property
    def ended(self) -> bool:
        """Whether no pass can run any more, whatever is tried."""

    def check(self) -> None:
        """While no pass runs: raises CiuicError where none can any more."""

    @property
    def notes(self) -> Sequence[str]:
        """What befell the passes that were recorded."""

    def gather(self, wait: bool = False) -> None:
        """Has the recorder know what other processes recorded: all of it if it may `wait`, else what was asked for the
        last time. In the thread that runs passes, between two of them."""

    def keep_newest(self, most: int) -> None:
        """So many events are kept from now on."""

    def page_counts(self) -> Mapping[str, PageCounts]:
        """Of pages that are moved between tiers."""

    def expert_uses(self) -> Mapping[str, Sequence[int]]:
        """By task: tokens that used each expert. Of routers that choose in the host's memory."""

    def ray_dashboard(self) -> str | None:
        """The address of Ray's own, of a cluster that has one."""

    def clear_trace(self) -> None:
        """Forgets all of that."""

    def peak_memory_bytes(self) -> dict[str, int]: ...

    def warm_up(self) -> None: ...

    def recover(self, lost: StageLost) -> Setup:
        """Makes good a loss; what is carried out from now on. What was cached is gone."""

    def replanned(self) -> Setup | None:
        """Between passes: what is carried out from now on, where more nodes are there for it; what was cached is gone
        then."""

    def close(self) -> None: ...


class LocalHost:
    ended = False

    def __init__(
        self, model: Model, graph: TaskGraph, schedule: Schedule, checkpoint: Checkpoint, num_blocks: int,
        config: RuntimeConfig, kernels: str, threads: int, replaced: Replacements | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:  # fmt: skip
        """Loads the graph's pages. `kernels` and `threads` as they were found for `config`."""
        self.recorder: Recorder = Recorder()
        self.notes: Sequence[str] = ()
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

    def check(self) -> None:
        """It cannot be lost."""

    def gather(self, wait: bool = False) -> None:
        """It is all here."""

    def keep_newest(self, most: int) -> None:
        self.recorder.most = most

    def page_counts(self) -> dict[str, PageCounts]:
        return self.memory.page_counts() if self.memory is not None else {}

    def ray_dashboard(self) -> None:
        return None

    def expert_uses(self) -> dict[str, list[int]]:
        return {task: uses.counts() for task, uses in self.executor.expert_uses.items()}

    def clear_trace(self) -> None:
        for uses in self.executor.expert_uses.values():
            uses.clear()
        if self.memory is None:
            self.recorder.clear()
            return
        with self.memory.alone():
            self.recorder.clear()
            self.memory.report.clear()
            self.memory.clear_counts(self.recorder.begin)

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
        self.clear_trace()

    def recover(self, lost: StageLost) -> Setup:
        raise lost  # there is one process here

    def replanned(self) -> Setup | None:
        return None

    def close(self) -> None:
        self.executor.close()
