"""Passes through a chain of stages, each a Ray actor: one call per stage and pass, several passes on their way at once.
Knows which actor is which stage and notices when one is lost; what to do then is `recovery.py`'s business."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ciuic_runtime.cluster.stage_worker import StagePlan, StageWorker
from ciuic_runtime.devices.errors import CiuicError
from ciuic_runtime.engine.batching import Pass
from ciuic_runtime.engine.draw import Draw, Drawn
from ciuic_runtime.engine.engine import StageLost
from ciuic_runtime.models.batch import Chunk
from ciuic_runtime.schedulers.graph import Phase, Step
from ciuic_runtime.schedulers.trace import Event, StepInfo

log = logging.getLogger("ciuic")

LEAST_DEADLINE = 20.0  # s, for a pass; a deadline is as many times its forecast:
PATIENCE = 20.0
START_SECONDS = 600.0  # for a stage to load its weights


@dataclass(frozen=True)
class PlacedStage:
    """A stage, and where Ray is to put it."""

    plan: StagePlan
    node: str  # as the schedule calls it; "" for the only one
    node_id: str | None  # Ray's; None: anywhere
    cores: float  # of those that Ray counts

    def named(self, device: str) -> str:
        return f"{self.node}/{device}" if self.node else device


@dataclass(slots=True)
class _OnItsWay:
    todo: Pass | None
    refs: list[Any]  # by stage
    begun: float
    deadline: float
    step: Step


class RayRunner:
    """`depth` passes at once, so that the stages work at the same time."""

    def __init__(
        self, ray: Any, stages: Sequence[PlacedStage], depth: int, forecast: Callable[[Step], float | None],
        progress: Callable[[int, int], None] | None = None,
    ) -> None:  # fmt: skip
        """Starts the stages and waits until their weights are there. Raises StageLost, and whatever they refuse."""
        self.ray, self.depth, self._forecast = ray, depth, forecast
        self.stages: list[PlacedStage] = []
        self._actors: list[Any] = []
        self._way: deque[_OnItsWay] = deque()
        self.steps: list[tuple[Step, float, float]] = []  # with wall times, s
        self.begin_stages(stages, (), progress)

    def begin_stages(
        self, stages: Sequence[PlacedStage], lost: Collection[int], progress: Callable[[int, int], None] | None = None
    ) -> None:
        """Replaces the stages: those that are the same and not `lost` keep their process and weights. What was on its
        way is forgotten."""
        kept = {s: a for i, (s, a) in enumerate(zip(self.stages, self._actors, strict=True)) if i not in lost}
        self._way.clear()
        for stage, actor in zip(self.stages, self._actors, strict=True):
            if stage not in stages or stage not in kept:
                self._kill(actor)
        worker = self.ray.remote(StageWorker)
        self.stages = list(stages)
        self._actors = [
            kept[s] if s in kept else worker.options(**self._options(s)).remote(s.plan) for s in self.stages
        ]
        try:
            again = [i for i, s in enumerate(self.stages) if s in kept]
            self._wait_until_loaded(again, progress or (lambda done, total: None))
        except StageLost:
            raise  # it can be tried again; those that are there stay
        except BaseException:
            self.close()
            raise

    def _options(self, stage: PlacedStage) -> dict[str, Any]:
        options: dict[str, Any] = {"num_cpus": stage.cores, "max_restarts": 0, "max_task_retries": 0}
        if stage.node_id is not None:
            from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(stage.node_id, soft=False)
        return options

    def _wait_until_loaded(self, kept: Collection[int], progress: Callable[[int, int], None]) -> None:
        ready = {a.clear_trace.remote() if i in kept else a.load.remote(): i for i, a in enumerate(self._actors)}
        limit = time.monotonic() + START_SECONDS
        left = list(ready)
        while left:
            done, left = self.ray.wait(left, num_returns=1, timeout=max(0.0, limit - time.monotonic()))
            if not done:
                raise self._lost(ready[left[0]], f"it was not ready within {START_SECONDS:.0f} s")
            self._get(done[0], ready[done[0]], None)
            progress(len(ready) - len(left), len(ready))

    # Passes

    def begin(self, todo: Pass, draws: Sequence[Draw]) -> None:
        self._send(todo, todo.chunks, todo.phase, draws)

    def end(self) -> tuple[Pass, list[Drawn]]:
        todo, drawn = self._receive()
        assert todo is not None, "this pass had no requests"
        return todo, drawn

    def logits(self, chunks: Sequence[Chunk], phase: Phase) -> torch.Tensor:
        """Of one pass by itself, float32 [rows wanted, vocab]."""
        assert not self._way, "passes are on their way"
        self._send(None, chunks, phase, None)
        _, data = self._receive()
        rows = sum(len(c.token_ids) if c.sample == "all" else int(bool(c.sample)) for c in chunks)
        return torch.frombuffer(bytearray(data), dtype=torch.float32).view(rows, -1)

    def _send(self, todo: Pass | None, chunks: Sequence[Chunk], phase: Phase, draws: Sequence[Draw] | None) -> None:
        """The calls of all stages at once: each waits for what the one before hands on, which goes from node to node
        without coming here."""
        refs: list[Any] = []
        hidden = None
        for actor in self._actors:
            last = actor is self._actors[-1]
            hidden = actor.run.remote(list(chunks), phase, hidden, list(draws) if last and draws is not None else None)
            refs.append(hidden)
        spans = [(c.position, len(c.token_ids)) for c in chunks]
        step = Step.of(phase, spans, sum(bool(c.sample) for c in chunks))
        seconds = self._forecast(step)
        patience = max(LEAST_DEADLINE, PATIENCE * seconds) if seconds else 10 * LEAST_DEADLINE
        now = time.time()
        self._way.append(_OnItsWay(todo, refs, now, now + patience * (len(self._way) + 1), step))

    def _receive(self) -> tuple[Pass | None, Any]:
        one = self._way[0]
        result = self._get(one.refs[-1], len(one.refs) - 1, max(0.0, one.deadline - time.time()), one.refs)
        self._way.popleft()
        self.steps.append((one.step, one.begun, time.time()))
        return one.todo, result

    def _get(self, ref: Any, index: int, seconds: float | None, before: Sequence[Any] = ()) -> Any:
        """What a stage answered; `before` are the calls that it waits for, of all stages in order."""
        exceptions = self.ray.exceptions
        try:
            return self.ray.get(ref, timeout=seconds)
        except exceptions.GetTimeoutError:
            stuck = next((i for i, r in enumerate(before) if not self.ray.wait([r], timeout=0)[0]), index)
            raise self._lost(stuck, f"it did not answer in {seconds:.0f} s") from None
        except (exceptions.RayActorError, exceptions.ObjectLostError) as error:
            raise self._lost(self._culprit(error, index), _first_line(error)) from error
        except exceptions.RayTaskError as error:
            cause = error.cause if isinstance(getattr(error, "cause", None), Exception) else error
            if isinstance(cause, (exceptions.RayActorError, exceptions.ObjectLostError)):
                raise self._lost(self._culprit(cause, index), _first_line(cause)) from error
            if isinstance(cause, CiuicError):
                raise cause from error
            raise CiuicError(f"stage {index}{self._at(index)} failed: {_first_line(cause)}") from error

    def _culprit(self, error: Any, index: int) -> int:
        """The stage that an error is about: what a stage waits for may be lost elsewhere."""
        name = str(getattr(error, "actor_id", "") or "")
        return next((i for i, a in enumerate(self._actors) if name and a._actor_id.hex() == name), index)

    def _lost(self, index: int, why: str) -> StageLost:
        return StageLost(index, self.stages[index].node, why)

    def _at(self, index: int) -> str:
        return f" on {self.stages[index].node}" if self.stages[index].node else ""

    # Beside passes

    def clear_trace(self) -> None:
        self.steps.clear()
        self.ray.get([actor.clear_trace.remote() for actor in self._actors])

    def trace(self) -> tuple[list[Event], list[StepInfo]]:
        """What the stages that are there recorded, on one axis."""
        if not self.steps:
            return [], []
        begin, events = self.steps[0][1], []
        for stage, passes in zip(self.stages, self.ray.get([a.trace.remote() for a in self._actors]), strict=True):
            offset = len(self.steps) - len(passes)  # stages that came later know later passes only
            for number, one in enumerate(passes, offset):
                for e in one:
                    lane = " -> ".join(stage.named(part) for part in e.lane.split(" -> "))
                    lane = e.lane if e.kind == "sample" else lane
                    events.append(
                        Event(e.task, lane, e.start - begin, e.end - begin, number, e.phase, e.kind, e.nbytes)
                    )
        infos = [StepInfo(s.phase, s.tokens, s.sequences, at - begin, end - begin, s) for s, at, end in self.steps]
        return events, infos

    def peak_memory_bytes(self) -> dict[str, int]:
        """By device; of a device that several stages use, the sum."""
        peaks: dict[str, int] = {}
        for stage, found in zip(
            self.stages, self.ray.get([a.peak_memory_bytes.remote() for a in self._actors]), strict=True
        ):
            for device, nbytes in found.items():
                peaks[stage.named(device)] = peaks.get(stage.named(device), 0) + nbytes
        return peaks

    def processes(self) -> list[int]:
        """Of the stages."""
        return list(self.ray.get([actor.pid.remote() for actor in self._actors]))

    def close(self) -> None:
        """Ends the stages' processes."""
        self._way.clear()
        for actor in self._actors:
            self._kill(actor)
        self.stages, self._actors = [], []

    def _kill(self, actor: Any) -> None:
        with contextlib.suppress(Exception):  # it may be gone already
            self.ray.kill(actor)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
