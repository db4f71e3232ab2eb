"""A model on a cluster: its stages where the schedule has them, and what is done when some are lost.
Knows the plan and how to make another one; passes go through `runner.py`."""

from __future__ import annotations

import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ciuic_runtime.cluster.asking import Mailbox, name_of_this_run
from ciuic_runtime.cluster.growth import Choice, nodes_used
from ciuic_runtime.cluster.head import Head
from ciuic_runtime.cluster.losses import Losses
from ciuic_runtime.cluster.newcomers import Newcomers
from ciuic_runtime.cluster.runner import PlacedStage, RayRunner
from ciuic_runtime.cluster.seats import NoRoom
from ciuic_runtime.cluster.stage_worker import StagePlan
from ciuic_runtime.cluster.watch import Watch
from ciuic_runtime.devices.errors import CiuicError, InvalidInput, OutOfMemory
from ciuic_runtime.devices.ray_nodes import NODE_ID, machine_of, node_ids
from ciuic_runtime.devices.ray_session import dashboard_address, import_ray, join
from ciuic_runtime.engine.config import RuntimeConfig
from ciuic_runtime.engine.engine import StageLost
from ciuic_runtime.engine.recorder import Recorder
from ciuic_runtime.engine.setup import Setup
from ciuic_runtime.memory.hierarchy import MemoryHierarchy
from ciuic_runtime.models.batch import Chunk
from ciuic_runtime.schedulers.graph import Phase, Step
from ciuic_runtime.schedulers.memory import node_of
from ciuic_runtime.schedulers.pipeline import stage_threads
from ciuic_runtime.schedulers.policies.mixing import PassTimes
from ciuic_runtime.schedulers.recording import PageCounts
from ciuic_runtime.schedulers.schedule import Schedule
from ciuic_runtime.schedulers.stages import Stage, stages_of
from ciuic_runtime.schedulers.workload import Workload

log = logging.getLogger("ciuic")

MOST_LOSSES = 50  # of all nodes in an hour; then something else is wrong
CHANCES = 2  # for a node to start a stage again after a loss, in an hour


class ClusterHost:
    memory: MemoryHierarchy | None = None  # pages are in the stages' processes

    def __init__(
        self, setup: Setup, num_blocks: int, config: RuntimeConfig, progress: Callable[[int, int], None] | None = None
    ) -> None:
        """Joins the cluster, or starts one, and waits until every stage is ready."""
        self._config, self._setup, self._num_blocks, self._progress = config, setup, num_blocks, progress
        if setup.replaced:
            raise InvalidInput("operators of your own run in one process; leave them out, or run without a cluster")
        watched = self._can_be_watched()
        self._own = config.address is None and not import_ray().is_initialized()
        self.ray = join(config.address, config.insecure)
        self._head = Head(self.ray)
        self._notes: list[str] = []
        self._lost_nodes: set[str] = set()
        self._smaller = False  # nodes were lost, and none has joined since
        self._machines: dict[str, str] = {}  # by Ray's id of a node
        self._losses = Losses()  # of stages
        self._newcomers = Newcomers(self.ray)
        self._found: tuple[Setup, Choice] | None = None  # by the watch, for a plan that it looked at
        self._watch: Watch | None = None
        try:
            for node_id in self._node_ids().values():
                self._machine(node_id)
            stages = self._placed(setup.schedule)
            depth = config.micro_batches or len(stages)
            self.runner: RayRunner = RayRunner(self.ray, self._head, stages, depth, self._forecast(), progress)
        except BaseException:
            self._leave()
            raise
        try:
            self._watch = self._watching() if watched else None
        except BaseException:
            self.close()
            raise

    def _forecast(self) -> Callable[[Step], float | None]:
        times: PassTimes | None = self._setup.pass_times()
        return times.of_step if times else lambda step: None

    def _placed(self, schedule: Schedule) -> list[PlacedStage]:
        graph = self._setup.model.graph
        stages = stages_of(schedule, graph, self._setup.config.stages)
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
        here = [n for n in self._head.nodes() if n["Alive"] and node_id in (None, n["NodeID"])]
        offered = max((n["Resources"].get("CPU", 0.0) for n in here), default=0.0)
        setup, config = self._setup, self._config
        plan = StagePlan(
            stage.index, str(Path(setup.model.source).resolve()), setup.model.format, setup.model.prefill_chunk,
            tuple(task.name for task in stage.graph), stage.graph.given, _carried_out(stage.schedule),
            self._num_blocks, setup.kernels, threads, config.cache_policy, config.lookahead, config.io_threads,
            config.paged,
        )  # fmt: skip
        first, last = (stage.schedule.device_of(stage.graph.tasks[i].name) for i in (0, -1))
        cores = min(float(threads), offered / on_node)
        return PlacedStage(plan, stage.node, node_id, cores, first, last, on_node > 1)

    # Losses

    def recover(self, lost: StageLost) -> Setup:
        """Starts what was lost anew, on its node or, where that is gone or has no room, by another plan over what is
        left. Raises OutOfMemory where that cannot hold the model, NoRoom where others use it, ClusterLost where that is
        gone, and the loss itself where there were too many; the stages that are left have ended then."""
        begin = time.perf_counter()
        try:
            found, planned = self._start_again(lost)
        except BaseException:
            self.runner.close()
            raise
        self._fit_runner()
        where = f", planned again in {planned:.2f} s without {', '.join(sorted(self._lost_nodes))}" if planned else ""
        took = time.perf_counter() - begin
        self._notes.append(f"{'; '.join(dict.fromkeys(map(str, found)))}{where}; going on after {took:.2f} s")
        log.warning("%s", self._notes[-1])
        return self._setup

    def _start_again(self, lost: StageLost) -> tuple[list[StageLost], float]:
        """All that was lost until every stage was there, and the seconds that planning took."""
        found, planned, tries = list[StageLost](), 0.0, Counter[int]()
        newest: StageLost | None = lost
        full: NoRoom | None = None
        while True:
            self._head.nodes()
            now = self.runner.take_stock(newest)
            for one in now:
                log.warning("%s", one)
                self._count(one)
            found += now
            seconds = self._plan_without_lost_nodes(lost, full)
            if seconds is None:
                tries.update(one.index for one in now)
            else:
                planned += seconds
                tries.clear()
            if max(tries.values(), default=0) > CHANCES or self._losses.total(time.monotonic()) > MOST_LOSSES:
                raise lost
            try:
                stages = self._placed(self._setup.schedule)
                self.runner.begin_stages(stages, {one.index for one in now}, self._progress)
                return found, planned
            except StageLost as another:
                lost = newest = another
                full = None
            except NoRoom as error:
                if not error.node:
                    raise
                newest, full = None, error
                log.warning("%s", error)

    def _plan_without_lost_nodes(self, lost: StageLost, full: NoRoom | None) -> float | None:
        """Seconds that it took; None where every node that has a stage is there, has room, and has not had its
        chances."""
        setup, alive, ids = self._setup, {n["NodeID"] for n in self._head.nodes() if n["Alive"]}, self._node_ids()
        tired = {node for node, node_id in ids.items() if self._losses_of(node_id) > CHANCES}
        gone = tired | {node for node, node_id in ids.items() if node_id not in alive}
        gone |= {full.node} if full else set()
        if not gone & nodes_used(setup.schedule):
            return None
        if gone >= set(ids):
            raise CiuicError(f"{lost}; no node is left to go on with") from full
        begin = time.perf_counter()
        try:
            self._setup = setup.without_nodes(gone | self._lost_nodes)
        except OutOfMemory as error:
            left = ", ".join(sorted(set(ids) - gone))
            what = f"{lost}; what is left ({left}) cannot hold the model: {error}"
            raise OutOfMemory(what, need=error.need, free=error.free, capacity=error.capacity) from error
        self._lost_nodes |= gone
        self._smaller = True
        return time.perf_counter() - begin

    def _node_ids(self) -> dict[str, str]:
        """Ray's, by the names of the nodes that are known, or that the schedule has."""
        return node_ids(self._setup.schedule.topology) | node_ids(self._setup.topology)

    def _machine(self, node_id: str) -> str:
        """By what its losses are counted: seen while it is there, and kept."""
        if node_id not in self._machines:
            self._machines[node_id] = machine_of(self.ray.nodes(), node_id)
        return self._machines[node_id]

    def _count(self, lost: StageLost) -> None:
        node_id = self._node_ids().get(lost.node)
        self._losses.add(self._machine(node_id) if node_id else lost.node, time.monotonic())

    def _losses_of(self, node_id: str) -> int:
        return self._losses.of(self._machine(node_id), time.monotonic())

    # Nodes that join

    def _can_be_watched(self) -> bool:
        """Whether it is known which of Ray's nodes the plan has."""
        known = self._config.address is not None and bool(node_ids(self._setup.topology))
        if self._config.use_new_nodes and not known:
            raise InvalidInput(
                "new nodes cannot be used beside devices of which it is not known on which of Ray's nodes they are; "
                "take those of DeviceManager.from_ray(address)"
            )
        return known

    def _watching(self) -> Watch:
        ids = node_ids(self._setup.topology)
        mailbox = Mailbox(self.ray, name_of_this_run(), {"model": self._setup.model.spec.name, "nodes": sorted(ids)})
        return Watch(self._look, mailbox, self._config.use_new_nodes)

    def _look(self, asked: bool) -> tuple[bool, str]:
        """In the watch's thread: whether the next pass goes by another plan, and what was seen."""
        if not self._head.answers():
            raise CiuicError("the cluster's head does not answer")
        now, known = self._setup, sorted(node_ids(self._setup.topology))
        if self._found is not None and self._found[0] is now:
            return self._found[1].moves, self._found[1].why  # for the next pass
        choice = self._newcomers.look(now, asked, self._lost_nodes, self._smaller, self._unfit)
        if choice is not None:
            self._found = now, choice
            goes_on = "the next pass goes by it" if choice.moves else "it stays as it is"
            return choice.moves, f"{choice.why}; {goes_on}"
        refused = "".join(f"; {why}" for why in list(self._newcomers.refused.values()))
        return False, f"there is no node that the plan does not know: {', '.join(known)}{refused}"

    def _unfit(self, node_id: str) -> str | None:
        count = self._losses_of(node_id)
        return f"its machine lost {count} stages in the last hour" if count > CHANCES else None

    def replanned(self) -> Setup | None:
        """Moves to the plan that the watch found, if that is still about the one that is carried out. Where that fails,
        what is returned has the schedule before. Raises StageLost where that has lost a stage meanwhile."""
        found, self._found = self._found, None
        if found is None or found[0] is not self._setup:
            return None
        if not found[1].moves:
            self._setup = found[1].setup  # a loss may need what is known now
            return None
        self._head.wait()
        return self._moved(self._setup, found[1])

    def _moved(self, before: Setup, choice: Choice) -> Setup:
        """Where that fails, the plan before goes on, and of the new nodes it knows those that can be used."""
        begin, new = time.perf_counter(), nodes_used(choice.setup.schedule) - nodes_used(before.schedule)
        joined = ", ".join(sorted(new))
        try:
            lost = {one.index for one in self.runner.take_stock()}
            self._setup = choice.setup
            self.runner.begin_stages(self._placed(choice.setup.schedule), lost, self._progress)
            self._smaller = False
            self._notes.append(f"{joined} joined: {choice.why}; going on after {time.perf_counter() - begin:.2f} s")
        except CiuicError as error:
            if isinstance(error, StageLost):
                self._count(error)
            self._notes.append(f"{joined} joined, and could not be used: {error}; going on by the plan before")
            self._setup = self._refused(choice, new, error)
            try:
                again = (error.index,) if isinstance(error, StageLost) else ()
                self.runner.begin_stages(self._placed(before.schedule), again, self._progress)
            except StageLost:
                raise
            except BaseException:
                self.runner.close()
                raise
        self._fit_runner()
        log.warning("%s", self._notes[-1])
        return self._setup

    def _refused(self, choice: Choice, new: Collection[str], error: CiuicError) -> Setup:
        """The schedule before, with those of the new nodes that did not fail: a loss may need them."""
        failed = error.node if isinstance(error, (StageLost, NoRoom)) else ""
        refused = {failed} if failed in new else set() if failed else set(new)
        known = choice.known.topology
        ids = node_ids(known)
        self._newcomers.refused |= {ids[node]: f"{node} failed: {error}" for node in refused}
        left = known.only(d.name for d in known.devices if node_of(d.name) not in refused)
        return replace(choice.known, topology=left)

    def _fit_runner(self) -> None:
        """To the plan that is carried out from now on."""
        self.runner.forecast = self._forecast()
        self.runner.depth = self._config.micro_batches or len(self.runner.stages)

    # What every host does

    def logits(self, chunks: Sequence[Chunk], phase: Phase) -> torch.Tensor:
        return self.runner.logits(chunks, phase)

    @property
    def recorder(self) -> Recorder:
        return self.runner.gathered.recorder

    @property
    def ended(self) -> bool:
        return not self.runner.stages

    def check(self) -> None:
        self.runner.check()

    @property
    def notes(self) -> Sequence[str]:
        return self._notes

    def gather(self, wait: bool = False) -> None:
        self.runner.gather(wait)

    def keep_newest(self, most: int) -> None:
        self.runner.keep_newest(most)

    def page_counts(self) -> dict[str, PageCounts]:
        return self.runner.gathered.page_counts()

    def ray_dashboard(self) -> str | None:
        return dashboard_address(self.ray)

    def expert_uses(self) -> dict[str, list[int]]:
        return self.runner.gathered.expert_uses()

    def clear_trace(self) -> None:
        self._notes.clear()
        self.runner.clear_trace()

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
        """Ends the stages, and the cluster where it was started here; leaves it where its head is gone."""
        if self._watch is not None:
            self._watch.close()
        self.runner.close()
        self._leave()

    def _leave(self) -> None:
        self._head.close()
        if self._own:
            self.ray.shutdown()
        else:
            self._head.leave_if_lost()


def _carried_out(schedule: Schedule) -> str:
    """As JSON, without what makes no difference to the stage: who planned it, and, unless pages are read, for what."""
    work = schedule.workload if schedule.paging else Workload()
    return json.dumps(replace(schedule, policy="", goal="latency", workload=work).to_dict())
