"""A model on a cluster: its stages where the schedule has them, and what is done when some are lost.
Knows the plan and how to make another one; passes go through `runner.py`."""

from __future__ import annotations

import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ciuic_runtime.cluster.runner import PlacedStage, RayRunner
from ciuic_runtime.cluster.stage_worker import StagePlan
from ciuic_runtime.devices.errors import CiuicError, InvalidInput, OutOfMemory
from ciuic_runtime.devices.ray_nodes import NODE_ID
from ciuic_runtime.devices.ray_session import import_ray, join
from ciuic_runtime.engine.config import RuntimeConfig
from ciuic_runtime.engine.engine import StageLost
from ciuic_runtime.engine.setup import Setup
from ciuic_runtime.memory.hierarchy import MemoryHierarchy
from ciuic_runtime.models.batch import Chunk
from ciuic_runtime.schedulers.graph import Phase, Step
from ciuic_runtime.schedulers.memory import node_of
from ciuic_runtime.schedulers.pipeline import stage_threads
from ciuic_runtime.schedulers.policies.mixing import PassTimes
from ciuic_runtime.schedulers.schedule import Schedule
from ciuic_runtime.schedulers.stages import Stage, stages_of
from ciuic_runtime.schedulers.trace import Trace

log = logging.getLogger("ciuic")

MOST_LOSSES = 50  # in the life of a model; then something else is wrong
CHANCES = 2  # for a node to start a stage again after a loss


class ClusterHost:
    memory: MemoryHierarchy | None = None  # pages are in the stages' processes

    def __init__(
        self, setup: Setup, num_blocks: int, config: RuntimeConfig, progress: Callable[[int, int], None] | None = None
    ) -> None:
        """Joins the cluster, or starts one, and waits until every stage is ready."""
        self._config, self._setup, self._num_blocks, self._progress = config, setup, num_blocks, progress
        if setup.replaced:
            raise InvalidInput("operators of your own run in one process; leave them out, or run without a cluster")
        self._own = config.address is None and not import_ray().is_initialized()
        self.ray = join(config.address, config.insecure)
        self._notes: list[str] = []
        self._lost_nodes: set[str] = set()
        self._losses: Counter[str] = Counter()  # of stages, by node
        try:
            stages = self._placed(setup.schedule)
            depth = config.micro_batches or len(stages)
            self.runner: RayRunner = RayRunner(self.ray, stages, depth, self._forecast(), progress)
        except BaseException:
            self._leave()
            raise

    def _forecast(self) -> Callable[[Step], float | None]:
        times: PassTimes | None = self._setup.pass_times()
        return times.of_step if times else lambda step: None

    def _placed(self, schedule: Schedule) -> list[PlacedStage]:
        graph = self._setup.model.graph
        stages = stages_of(schedule, graph, None if self._lost_nodes else self._config.stages)
        on_node = Counter(stage.node for stage in stages)
        return [self._place(stage, on_node[stage.node]) for stage in stages]

    def _place(self, stage: Stage, on_node: int) -> PlacedStage:
        devices = [stage.schedule.topology.device(name) for name in stage.schedule.devices_used()]
        node_id = next((str(d.facts[NODE_ID]) for d in devices if NODE_ID in d.facts), None)
        if stage.node and node_id is None:
            raise InvalidInput(
                f"the schedule has stages on {stage.node}, and it is not known which of Ray's nodes that is; plan with "
                "DeviceManager.from_ray(address), or --address"
            )
        threads = stage_threads(stage, on_node, self._config.threads) or max(1, (os.cpu_count() or 1) // on_node)
        here = [n for n in self.ray.nodes() if n["Alive"] and node_id in (None, n["NodeID"])]
        offered = max((n["Resources"].get("CPU", 0.0) for n in here), default=0.0)
        setup, config = self._setup, self._config
        plan = StagePlan(
            stage.index, str(Path(setup.model.source).resolve()), setup.model.format, setup.model.prefill_chunk,
            tuple(task.name for task in stage.graph), stage.graph.given, json.dumps(stage.schedule.to_dict()),
            self._num_blocks, setup.kernels, threads, config.cache_policy, config.lookahead, config.io_threads,
            config.paged,
        )  # fmt: skip
        return PlacedStage(plan, stage.node, node_id, min(float(threads), offered / on_node))

    # Losses

    def recover(self, lost: StageLost) -> Setup:
        """Starts what was lost anew, on its node or, where that is gone, by another plan over what is left. Raises
        OutOfMemory where that cannot hold the model, and the loss itself where there were too many; the stages that
        are left have ended then."""
        begin = time.perf_counter()
        try:
            found, planned = self._start_again(lost)
        except BaseException:
            self.runner.close()
            raise
        self.runner.forecast = self._forecast()
        where = f", planned again in {planned:.2f} s without {', '.join(sorted(self._lost_nodes))}" if planned else ""
        took = time.perf_counter() - begin
        self._notes.append(f"{'; '.join(dict.fromkeys(map(str, found)))}{where}; going on after {took:.2f} s")
        log.warning("%s", self._notes[-1])
        return self._setup

    def _start_again(self, lost: StageLost) -> tuple[list[StageLost], float]:
        """All that was lost until every stage was there, and the seconds that planning took."""
        found, planned, tries = list[StageLost](), 0.0, Counter[int]()
        while True:
            now = self.runner.take_stock(lost)
            for one in now:
                log.warning("%s", one)
            found += now
            self._losses.update(one.node for one in now)
            seconds = self._plan_without_lost_nodes(lost)
            if seconds is None:
                tries.update(one.index for one in now)
            else:
                planned += seconds
                tries.clear()
            if max(tries.values(), default=0) > CHANCES or self._losses.total() > MOST_LOSSES:
                raise lost
            try:
                stages = self._placed(self._setup.schedule)
                self.runner.begin_stages(stages, {one.index for one in now}, self._progress)
                return found, planned
            except StageLost as another:
                lost = another

    def _plan_without_lost_nodes(self, lost: StageLost) -> float | None:
        """Seconds that it took; None where every node that has a stage is there and has not had its chances."""
        setup, alive = self._setup, {n["NodeID"] for n in self.ray.nodes() if n["Alive"]}
        ids = {node_of(d.name): d.facts[NODE_ID] for d in setup.topology.devices if NODE_ID in d.facts}
        gone = {node for node, node_id in ids.items() if node_id not in alive or self._losses[node] > CHANCES}
        if not gone & {node_of(name) for name in setup.schedule.places_used()}:
            return None
        if gone == set(ids):
            raise CiuicError(f"{lost}; no node is left to go on with")
        begin = time.perf_counter()
        try:
            self._setup = setup.without_nodes(gone | self._lost_nodes)
        except OutOfMemory as error:
            left = ", ".join(sorted(set(ids) - gone))
            what = f"{lost}; what is left ({left}) cannot hold the model: {error}"
            raise OutOfMemory(what, need=error.need, free=error.free, capacity=error.capacity) from error
        self._lost_nodes |= gone
        return time.perf_counter() - begin

    # What every host does

    def logits(self, chunks: Sequence[Chunk], phase: Phase) -> torch.Tensor:
        return self.runner.logits(chunks, phase)

    def num_events(self) -> int:
        return len(self.runner.steps) * len(self._setup.model.graph.tasks)

    def clear_trace(self) -> None:
        self._notes.clear()
        self.runner.clear_trace()

    def trace(self, devices: Sequence[str], notes: Sequence[str]) -> Trace:
        events, infos = self.runner.trace()
        return Trace(tuple(events), tuple(infos), "measured", tuple(devices), (*notes, *self._notes))

    def peak_memory_bytes(self) -> dict[str, int]:
        return self.runner.peak_memory_bytes()

    def warm_up(self) -> None:
        try:
            self.logits([Chunk((0, 0), 0, (0,), prompt=True)], "prefill")
            self.logits([Chunk((0,), 2, (0,), prompt=False)], "decode")
        except BaseException:
            self.close()
            raise
        self.runner.clear_trace()

    def close(self) -> None:
        """Ends the stages, and the cluster where it was started here."""
        self.runner.close()
        self._leave()

    def _leave(self) -> None:
        if self._own:
            self.ray.shutdown()
