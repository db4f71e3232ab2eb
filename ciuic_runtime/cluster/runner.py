"""Passes through a chain of stages, each a Ray actor: one call per stage and pass, several passes on their way at once.
Knows which actor is which stage and notices when one is lost; what to do then is `host.py`'s business."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ciuic_runtime.cluster.gathering import Gathered, StageRecord
from ciuic_runtime.cluster.head import ClusterLost, Head
from ciuic_runtime.cluster.parcels import Call, pack, unpack
from ciuic_runtime.cluster.seats import NoRoom, Seats
from ciuic_runtime.cluster.stage_worker import StagePlan, StageWorker
from ciuic_runtime.devices.errors import CiuicError
from ciuic_runtime.engine.batching import Pass
from ciuic_runtime.engine.draw import Draw, Drawn, draw_all
from ciuic_runtime.engine.engine import StageLost
from ciuic_runtime.models.batch import Chunk
from ciuic_runtime.schedulers.graph import Phase, Step
from ciuic_runtime.schedulers.lanes import HOST

log = logging.getLogger("ciuic")

LEAST_DEADLINE = 20.0  # s, for a pass; a deadline is as many times its forecast:
PATIENCE = 20.0
START_SECONDS = 600.0  # for a stage to load its weights
ALIVE_SECONDS = 1.0  # between looks whether the nodes of stages that load are there
FETCH_SECONDS = 5.0  # for what is ready to come here
HEAD_SECONDS = 5.0  # between looks whether the cluster's head is there, while a stage is waited for

# What Ray raises where a process or a node is gone, or what they held.
LOSSES = (
    "RayActorError", "ObjectLostError", "NodeDiedError", "WorkerCrashedError", "LocalRayletDiedError",
    "OutOfMemoryError", "ActorUnschedulableError", "TaskUnschedulableError",
)  # fmt: skip


@dataclass(frozen=True)
class PlacedStage:
    """A stage, and where Ray is to put it. Two are equal where one process can be either: whatever only the driver
    calls them does not count."""

    plan: StagePlan
    node: str  # as the schedule calls it; "" for the only one
    node_id: str | None  # Ray's; None: anywhere
    cores: float  # of those that Ray counts
    first: str = field(default="cpu", compare=False)  # device that computes its first task, as the stage calls it
    last: str = field(default="cpu", compare=False)  # and its last one
    shares: bool = field(default=False, compare=False)  # its node with other stages

    @property
    def index(self) -> int:
        return self.plan.index

    def lane(self, name: str) -> str:
        """What a lane of the stage's own is called among those of all stages, as `pipeline_of` calls its devices."""
        where = f"{self.node}/stage{self.index}".removeprefix("/") if self.shares else self.node
        if not where or name == HOST:
            return name
        return " -> ".join(f"{where}/{device}" for device in name.split(" -> "))

    def named(self, device: str) -> str:
        return f"{self.node}/{device}" if self.node else device


@dataclass(slots=True)
class _OnItsWay:
    todo: Pass | None
    draws: Sequence[Draw] | None  # that are left to the driver
    refs: list[Any]  # by stage
    number: int  # of those sent
    begun: float  # of this process's clock, s, as is
    deadline: float
    step: Step


class RayRunner:
    """`depth` passes at once, so that the stages work at the same time."""

    def __init__(
        self, ray: Any, head: Head, stages: Sequence[PlacedStage], depth: int,
        forecast: Callable[[Step], float | None], progress: Callable[[int, int], None] | None = None,
    ) -> None:  # fmt: skip
        """Starts the stages and waits until their weights are there. Raises StageLost, ClusterLost, and whatever they
        refuse."""
        self.ray, self._head, self.depth, self.forecast = ray, head, depth, forecast
        self.stages: list[PlacedStage] = []
        self._actors: list[Any] = []
        self._seats = Seats(ray)
        self._loads: list[Any] = []  # calls of each stage that bring its weights
        self._way: deque[_OnItsWay] = deque()
        self._most_patience = 0.0  # s, of the passes so far
        self.gathered = Gathered()
        self._sent = 0
        self._asked: tuple[int, list[Any]] | None = None  # what stages recorded before that pass, and their calls
        try:
            self.begin_stages(stages, (), progress)
        except BaseException:
            self.close()
            raise

    def begin_stages(
        self, stages: Sequence[PlacedStage], lost: Collection[int], progress: Callable[[int, int], None] | None = None
    ) -> None:
        """Replaces the stages: those that are the same and not `lost` keep their process and weights. What was on its
        way is forgotten. Raises StageLost or NoRoom, after which it can be tried again: `stages` are those that are
        there, and where a node that had none before has no room, that is all that were not lost."""
        self.abandon()
        self._end(i for i in range(len(self.stages)) if i in lost)
        self._seats.reserve_elsewhere(stages)
        self._end(i for i, stage in enumerate(self.stages) if stage not in stages)
        try:
            self._seats.reserve(stages, self.stages)
        except NoRoom:
            if not self.stages:
                raise
            self._end(range(len(self.stages)))  # they may hold a group of which they need a part only
            self._seats.reserve(stages, ())
        kept = {stage: i for i, stage in enumerate(self.stages)}
        running = [(self._actors[kept[s]], self._loads[kept[s]]) if s in kept else self._start(s) for s in stages]
        self.gathered.renumber({self.stages[i].index: s.index for s in stages if (i := kept.get(s)) is not None})
        self.stages, self._actors, self._loads = list(stages), [a for a, _ in running], [load for _, load in running]
        self._wait_until_loaded(progress or (lambda done, total: None))

    def _end(self, which: Iterable[int]) -> None:
        """Of the stages that are there; what is dead is listed nowhere."""
        for i in sorted(which, reverse=True):
            self._kill(self._actors[i])
            del self.stages[i], self._actors[i], self._loads[i]

    def take_stock(self, lost: StageLost | None = None) -> list[StageLost]:
        """All stages that are lost, one of which may be known to be; what the others recorded so far is kept here."""
        self.abandon()
        found = [lost] if lost else []
        if lost:
            self._kill(self._actors[lost.index])  # others may wait for it
        asked: dict[int, Any] = {}
        self._asked = None
        for i, (actor, load) in enumerate(zip(self._actors, self._loads, strict=True)):
            if not (lost and i == lost.index) and self.ray.wait([load], timeout=0, fetch_local=False)[0]:
                asked[i] = actor.recorded.remote(self.gathered.since, self._sent)
        records: list[StageRecord | None] = [None] * len(self._actors)
        limit = time.monotonic() + max(LEAST_DEADLINE, self._most_patience)
        for i, ref in asked.items():
            try:
                self._get(self._loads[i], i, FETCH_SECONDS)
                records[i] = self._get(ref, i, max(0.0, limit - time.monotonic()))
            except StageLost as another:
                found.append(another)
        self.gathered.take(self._sent, self.stages, records)
        return found

    def _start(self, stage: PlacedStage) -> tuple[Any, Any]:
        actor = self.ray.remote(StageWorker).options(**self._options(stage)).remote(stage.plan)
        load = actor.load.remote()
        if (most := self.gathered.recorder.most) is not None:
            actor.keep_newest.remote(most)
        return actor, load

    def _options(self, stage: PlacedStage) -> dict[str, Any]:
        options: dict[str, Any] = {"num_cpus": stage.cores, "max_restarts": 0, "max_task_retries": 0}
        if (seat := self._seats.strategy(stage)) is not None:
            options["scheduling_strategy"] = seat
        elif stage.node_id is not None:  # which is gone, as Ray will say
            from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(stage.node_id, soft=False)
        return options

    def _wait_until_loaded(self, progress: Callable[[int, int], None]) -> None:
        limit = time.monotonic() + START_SECONDS
        ready = {load: i for i, load in enumerate(self._loads)}
        left = list(ready)
        while left:
            done, left = self.ray.wait(left, num_returns=1, timeout=ALIVE_SECONDS)
            if not done:
                self._check_nodes([ready[load] for load in left])
                if time.monotonic() > limit:
                    raise self._lost(ready[left[0]], f"it was not ready within {START_SECONDS:.0f} s")
                continue
            self._get(done[0], ready[done[0]], None)
            progress(len(ready) - len(left), len(ready))

    def _check_nodes(self, starting: Sequence[int]) -> None:
        """Raises StageLost for a stage whose node is gone: Ray waits for its seat to come back."""
        alive = {n["NodeID"] for n in self._head.nodes() if n["Alive"]}
        for index in starting:
            if self.stages[index].node_id not in (None, *alive):
                raise self._lost(index, "its node is gone")

    # Passes

    def begin(self, todo: Pass, draws: Sequence[Draw]) -> None:
        """Tokens are drawn where the logits are, but guides, whose state is here, draw here."""
        try:
            self._send(todo, todo.chunks, todo.phase, draws, here=any(one.guide is not None for one in draws))
        except BaseException:
            self.abandon()
            raise

    def end(self) -> tuple[Pass, list[Drawn]]:
        one, result = self._receive()
        assert one.todo is not None, "this pass had no requests"
        left = one.draws
        drawn = unpack(result) if left is None else draw_all(left, _logits(result, one.todo.chunks))
        self.gathered.ended(one.number, one.step, one.begun)
        return one.todo, drawn

    def logits(self, chunks: Sequence[Chunk], phase: Phase) -> torch.Tensor:
        """Of one pass by itself, float32 [rows wanted, vocab]."""
        assert not self._way, "passes are on their way"
        self._send(None, chunks, phase, (), here=True)
        one, result = self._receive()
        self.gathered.ended(one.number, one.step, one.begun)
        return _logits(result, chunks)

    def abandon(self) -> None:
        """What is on its way is not waited for; the stages still compute it before what comes then."""
        self._way.clear()

    def _send(
        self, todo: Pass | None, chunks: Sequence[Chunk], phase: Phase, draws: Sequence[Draw], here: bool
    ) -> None:
        """The calls of all stages at once: each waits for what the one before hands on, which goes from node to node
        without coming here. `here`: the last one hands its logits on, too."""
        if not self._actors:
            raise CiuicError("the stages of this model have ended; open it again")
        refs: list[Any] = []
        hidden, call = None, pack(Call(tuple(chunks), phase, self._sent))
        for actor in self._actors:
            wanted = pack(list(draws)) if actor is self._actors[-1] and not here else None
            hidden = actor.run.remote(call, hidden, wanted)
            refs.append(hidden)
        spans = [(c.position, len(c.token_ids)) for c in chunks]
        step = Step.of(phase, spans, sum(bool(c.sample) for c in chunks))
        seconds = self.forecast(step)
        patience = max(LEAST_DEADLINE, PATIENCE * seconds) if seconds else 10 * LEAST_DEADLINE
        patience *= len(self._way) + 1
        self._most_patience = max(self._most_patience, patience)
        left, deadline = (draws if here else None), time.monotonic() + patience
        self._way.append(_OnItsWay(todo, left, refs, self._sent, time.perf_counter(), deadline, step))
        self._sent += 1

    def _receive(self) -> tuple[_OnItsWay, Any]:
        """The pass that began first, and what its last stage answered. If it fails, all that are on their way do."""
        one = self._way[0]
        try:
            seconds = max(FETCH_SECONDS / 5, one.deadline - time.monotonic())
            result = self._get(one.refs[-1], len(one.refs) - 1, seconds, one.refs)
        except BaseException:
            self.abandon()
            raise
        self._way.popleft()
        return one, result

    def _get(self, ref: Any, index: int, seconds: float | None, chain: Sequence[Any] = ()) -> Any:
        """What a stage answered; `chain` are the calls of all stages in order, each waiting for the one before. Raises
        StageLost, what the stage itself raised if that is for people to read, or CiuicError with what it was."""
        try:
            return self._wait_for(ref, seconds)
        except self.ray.exceptions.GetTimeoutError:
            waiting = (i for i, r in enumerate(chain) if not self.ray.wait([r], timeout=0, fetch_local=False)[0])
            raise self._lost(next(waiting, index), f"it did not answer in {seconds:.0f} s") from None
        except self.ray.exceptions.RayError as error:
            index, cause = self._origin(error, index, chain)
            if isinstance(cause, tuple(getattr(self.ray.exceptions, name) for name in LOSSES)):
                raise self._lost(index, _why(cause)) from error
            if isinstance(cause, CiuicError):
                cause.args = (f"stage {index}{self._at(index)}: {cause}",)
                raise cause from error
            raise CiuicError(f"stage {index}{self._at(index)} failed: {type(cause).__name__}: {_why(cause)}") from error

    def _wait_for(self, ref: Any, seconds: float | None) -> Any:
        """Raises GetTimeoutError after so many (None: never), and ClusterLost."""
        left = math.inf if seconds is None else seconds
        while True:
            self.check()
            try:
                return self.ray.get(ref, timeout=min(left, HEAD_SECONDS))
            except self.ray.exceptions.GetTimeoutError:
                left -= HEAD_SECONDS
                if left <= 0:
                    raise

    def check(self) -> None:
        """Costs nothing. Raises ClusterLost, after which no stage is left."""
        try:
            self._head.check()
        except ClusterLost:
            self.close()
            raise

    def _origin(self, error: BaseException, index: int, chain: Sequence[Any]) -> tuple[int, BaseException]:
        """The stage that failed first, and of what: those after it fail because of it."""
        for i, ref in enumerate(chain):
            try:
                self.ray.get(ref, timeout=FETCH_SECONDS)
            except self.ray.exceptions.GetTimeoutError:
                continue
            except self.ray.exceptions.RayError as first:
                index, error = i, first
                break
        while isinstance(error, self.ray.exceptions.RayTaskError) and isinstance(error.cause, Exception):
            error = error.cause
        return index, error

    def _lost(self, index: int, why: str) -> StageLost:
        return StageLost(index, self.stages[index].node, why)

    def _at(self, index: int) -> str:
        return f" on {self.stages[index].node}" if self.stages[index].node else ""

    # Beside passes

    def clear_trace(self) -> None:
        """Stages carry calls out in their order, so nobody waits for this; one that is lost is noticed by a pass."""
        self._asked = None
        self.gathered.clear(self._sent)
        for actor in self._actors:
            actor.clear_trace.remote()

    def keep_newest(self, most: int) -> None:
        """Of events, here and in each stage."""
        self.gathered.recorder.most = most
        for actor in self._actors:
            actor.keep_newest.remote(most)

    def gather(self, wait: bool = False) -> None:
        """Between passes: takes what stages were asked for the last time and have answered, and asks for what came
        since. If it may `wait`, for everything."""
        if self._asked is not None:
            until, refs = self._asked
            if not wait and self.ray.wait(refs, num_returns=len(refs), timeout=0, fetch_local=False)[1]:
                return
            self._asked = None
            self.gathered.take(until, self.stages, self._answers(refs))
        until = self._sent - len(self._way)
        if self._actors and until > self.gathered.since:
            self._asked = until, [actor.recorded.remote(self.gathered.since, until) for actor in self._actors]
            if wait:
                self.gather(wait)

    def peak_memory_bytes(self) -> dict[str, int]:
        """By device; of a device that several stages use, the sum. Of stages that are there."""
        peaks: dict[str, int] = {}
        for stage, found in zip(self.stages, self._ask("peak_memory_bytes"), strict=True):
            for device, nbytes in (found or {}).items():
                peaks[stage.named(device)] = peaks.get(stage.named(device), 0) + nbytes
        return peaks

    def _ask(self, what: str) -> list[Any]:
        """What each stage answers; None of one that is lost, which the next pass will notice, too."""
        return self._answers([getattr(actor, what).remote() for actor in self._actors])

    def _answers(self, refs: Sequence[Any]) -> list[Any]:
        limit, answers = time.monotonic() + max(LEAST_DEADLINE, self._most_patience), []
        for index, ref in enumerate(refs):
            try:
                answers.append(self._get(ref, index, max(0.0, limit - time.monotonic())))
            except StageLost as lost:
                log.warning("%s", lost)
                answers.append(None)
        return answers

    def processes(self) -> list[int]:
        """Of the stages."""
        return [pid for pid in self._ask("pid") if pid is not None]

    def close(self) -> None:
        """Ends the stages' processes; without a head they end by themselves, when this process leaves the cluster."""
        self._way.clear()
        self._asked = None
        if not self._head.lost:
            for actor in self._actors:
                self._kill(actor)
            self._seats.close()
        self.stages, self._actors, self._loads = [], [], []

    def _kill(self, actor: Any) -> None:
        with contextlib.suppress(Exception):  # it may be gone already
            self.ray.kill(actor)


def _logits(data: bytes, chunks: Sequence[Chunk]) -> torch.Tensor:
    """Float32 [rows wanted, vocab]."""
    rows = sum(len(c.token_ids) if c.sample == "all" else int(bool(c.sample)) for c in chunks)
    return torch.frombuffer(bytearray(data), dtype=torch.float32).view(rows, -1) if data else torch.empty(0, 0)


def _why(error: BaseException) -> str:
    """Of Ray's many lines the sentence that says it; else the first one."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    said = next((line for line in lines if line.startswith("The actor") and " because " in line), lines[0])
    return said.split(". ")[0].strip()
