"""Chooses among all candidate plans, under one cost model, for the stated goal and workload; keeps the losers.
What a plan costs is the simulator's word, what is allowed is the user's rules' and the devices' memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from ciuic_runtime.devices.errors import CiuicError, InvalidInput, OutOfMemory
from ciuic_runtime.devices.spec import DeviceSpec, Topology
from ciuic_runtime.devices.units import format_bytes
from ciuic_runtime.schedulers.assignment import Candidate, Prediction
from ciuic_runtime.schedulers.calibration import Calibration
from ciuic_runtime.schedulers.cost import CostModel
from ciuic_runtime.schedulers.draft import Fixed, schedule_of
from ciuic_runtime.schedulers.graph import Layer, Task, TaskGraph
from ciuic_runtime.schedulers.memory import capacity, limit_memory
from ciuic_runtime.schedulers.placement import Placement
from ciuic_runtime.schedulers.policies.paged import paged_on
from ciuic_runtime.schedulers.policies.pipeline import pipeline_latency, pipeline_throughput
from ciuic_runtime.schedulers.policies.popularity import experts_by_popularity
from ciuic_runtime.schedulers.policies.tiering import tiering
from ciuic_runtime.schedulers.policies.trivial import all_on, by_speed, fastest_first, split_by_speed
from ciuic_runtime.schedulers.predict import predict
from ciuic_runtime.schedulers.schedule import Schedule
from ciuic_runtime.schedulers.workload import Goal, Workload, parse_goal

Policy = Callable[[TaskGraph, Topology, CostModel], Schedule]
RuledPolicy = Callable[[TaskGraph, Topology, CostModel, Fixed], Schedule]  # keeps to the user's rules by itself
_registered: dict[str, Policy] = {}
CORE: dict[str, RuledPolicy] = {
    "pipeline for latency": pipeline_latency,
    "pipeline for throughput": pipeline_throughput,
    "experts by popularity": experts_by_popularity,
    "tiering": tiering,
}
PAGED_FORMATS = ("int4", "int8", "bfloat16")  # whose pages are the same on disk as in memory


def policy(name: str) -> Callable[[Policy], Policy]:
    """Decorator: the function joins the planner's candidates under this name.

    The user's rules are laid over what it returns; if it raises, it is a candidate that is not feasible."""
    if name in ("fastest first", "split by speed", "by hand", *CORE) or name.startswith("all on "):
        raise InvalidInput(f"policy {name!r}: that is the name of a built-in plan; choose another one")

    def register(function: Policy) -> Policy:
        _registered[name] = function
        return function

    return register


def forget_policy(name: str) -> None:
    """Takes a registered policy out of the planner's candidates again."""
    _registered.pop(name, None)


@dataclass(frozen=True, slots=True)
class _Scored:
    schedule: Schedule
    prediction: Prediction
    trivial: bool
    why_not: str  # "" if it fits

    def seconds(self, goal: Goal) -> float:
        """What the goal minimises: the first token, or the whole workload (whose batch is given, so that latency and
        throughput ask for the same)."""
        if goal == "first-token":
            return self.prediction.first_token_s
        work = self.schedule.workload
        return self.prediction.first_token_s + (work.max_tokens - 1) * work.batch / self.prediction.decode_tokens_per_s


@dataclass
class TaskScheduler:
    """Places tasks by exact rules (`add_task`), by patterns (`placement`), and where both are silent by policies."""

    topology: Topology | None = None  # None: the devices that `add_task` names
    goal: str = "latency"
    workload: Workload = field(default_factory=Workload)
    memory: Mapping[str, str | int] = field(default_factory=dict)  # device -> budget
    placement: Placement = field(default_factory=Placement)
    calibration: Calibration = field(default_factory=Calibration)

    def __post_init__(self) -> None:
        self._exact: dict[str, str] = {}
        self._devices: dict[str, DeviceSpec] = {}
        self._graph: TaskGraph | None = None

    def add_task(self, task: Layer | Task, device: DeviceSpec | str, graph: TaskGraph | None = None) -> None:
        """Puts a layer (or a single task of `graph`) exactly there; a later call overrides an earlier one."""
        given: object = task  # what people pass is not always what the signature says
        if not isinstance(given, (Layer, Task)):
            what = type(given).__name__
            raise InvalidInput(f"add_task takes one layer or task at a time, not a {what}; call it for each")
        graph = task.graph if isinstance(task, Layer) else graph or self._graph
        if graph is None:
            raise InvalidInput("add_task of a single task needs its graph: add_task(task, device, graph=model.graph)")
        if isinstance(task, Task) and graph.by_name.get(task.name) != task:
            raise InvalidInput(f"{graph.name} has no such task {task.name}; take tasks from its graph")
        self._belongs(graph)
        self._graph = graph
        if isinstance(device, DeviceSpec):
            self._devices[device.name] = device
        name = device.name if isinstance(device, DeviceSpec) else device
        for member in task.tasks if isinstance(task, Layer) else (task,):
            self._exact.update(dict.fromkeys((row for row, _ in member.rows), name))

    def schedule(self, graph: TaskGraph | None = None) -> Schedule:
        """The best feasible candidate. Raises OutOfMemory, with the figures, where none fits."""
        graph = graph or self._graph
        if graph is None:
            raise InvalidInput("nothing to schedule: add_task a model's layers, or pass a graph")
        self._belongs(graph)
        goal, topology = parse_goal(self.goal), self._budgeted()
        cost = CostModel(topology, graph.format, self.calibration, self.workload)
        fixed = {**self.placement.resolve(graph, topology, self.workload), **self._exact}
        homes = {r: h for r, h in self.placement.homes(graph, topology).items() if r not in self._exact}
        scored, broken = ([], []) if homes else _score_all(graph, topology, cost, fixed)
        if all(one.why_not for one in scored):
            paged = _paged(graph, topology, cost, fixed, homes, self.memory)
            scored += [_score(schedule, graph, cost, trivial=True) for schedule in paged]
        chosen = _choose(scored, broken, goal, self.calibration.model_error)
        return replace(chosen, notes=(*_caveats(graph, self.workload, self.placement), *chosen.notes))

    def _belongs(self, graph: TaskGraph) -> None:
        if self._graph is not None and graph != self._graph:
            raise InvalidInput(
                f"this scheduler already has tasks of {self._graph.name} ({self._graph.format}); "
                f"use another one for {graph.name} ({graph.format})"
            )

    def _budgeted(self) -> Topology:
        """The topology with every device's free memory cut down to the user's budget."""
        if self.topology is None and not self._devices:
            raise InvalidInput("no devices are known; pass a topology, or devices (not their names) to add_task")
        topology = self.topology or Topology(tuple(self._devices.values()))
        able = {d.name for d in topology.compute_devices}
        if not able:
            reasons = "; ".join(f"{d.name}: {d.why_not_usable or d.kind}" for d in topology.devices)
            raise InvalidInput(f"no device here can compute ({reasons}); name others, or see `ciuic doctor`")
        for name in dict.fromkeys(self._exact.values()):
            if topology.device(name).name not in able:
                raise InvalidInput(f"add_task: {name} cannot compute; devices that can are {', '.join(sorted(able))}")
        return limit_memory(topology, self.memory)


def _score_all(
    graph: TaskGraph, topology: Topology, cost: CostModel, fixed: Fixed
) -> tuple[list[_Scored], list[Candidate]]:
    """Every candidate with its forecast, simplest first, and those that could not be made. Of equal plans the first
    is kept: with every task fixed by hand there is only one."""
    plans: dict[str, Policy] = {
        f"all on {d.name}": partial(all_on, fixed=fixed, device=d.name) for d in by_speed(topology, cost)
    }
    if len(topology.compute_devices) > 1:
        plans["fastest first"] = partial(fastest_first, fixed=fixed)
        plans["split by speed"] = partial(split_by_speed, fixed=fixed)
    by_hand = fixed.keys() == graph.rows.keys()
    several = len(topology.compute_devices) > 1
    core: dict[str, Policy] = {name: _ruled(plan, fixed) for name, plan in CORE.items() if several}
    scored: dict[tuple[tuple[str, str], ...], _Scored] = {}
    broken: list[Candidate] = []
    for name, plan in {**plans, **({} if by_hand else {**core, **_registered})}.items():
        label = "by hand" if by_hand else f"{name}, rules applied" if fixed else name
        try:
            schedule = plan(graph, topology, cost)
            if name in _registered:
                schedule = _with_rules(schedule, graph, topology, cost, fixed)
        except Exception as error:
            # A user's policy may raise anything; it must not take the other candidates with it.
            if name not in _registered and not (name in CORE and isinstance(error, OutOfMemory)):
                raise
            broken.append(Candidate(label, False, why_not=_why_none(error, name)))
            continue
        key = tuple((row.device, row.home) for row in schedule.assignments)
        if key not in scored:
            scored[key] = _score(replace(schedule, policy=label), graph, cost, trivial=name in plans)
        elif name in _registered:
            same = scored[key]
            broken.append(_candidate(same, label, f"the same plan as {same.schedule.policy}"))
    return list(scored.values()), broken


def _ruled(plan: RuledPolicy, fixed: Fixed) -> Policy:
    return lambda graph, topology, cost: plan(graph, topology, cost, fixed)


def _why_none(error: Exception, name: str) -> str:
    if name in CORE:
        return str(error)
    reason = str(error) if isinstance(error, CiuicError) else f"{type(error).__name__}: {error}"
    return f"the policy failed: {' '.join(reason.split())}"


def _paged(
    graph: TaskGraph, topology: Topology, cost: CostModel, fixed: Fixed, homes: Fixed,
    memory: Mapping[str, str | int],
) -> list[Schedule]:  # fmt: skip
    """Plans that read pages from disk while they run, for want of memory, or since rules have them stored there
    (`homes`)."""
    disks, cpus = topology.by_kind("DISK"), [d.name for d in topology.by_kind("CPU") if d.usable]
    disk = next(iter(homes.values()), disks[0].name if disks else "")
    able = [cpu for cpu in cpus if disk and graph.format in PAGED_FORMATS and set(fixed.values()) <= {cpu}]
    plans = []
    for cpu in able:
        given = cpu in memory
        plans.append(paged_on(graph, topology, cost, fixed, device=cpu, disk=disk, budgeted=given, stored=homes))
    if homes and not plans:
        raise InvalidInput(
            f"rules store {next(iter(homes))} and others on {next(iter(homes.values()))}; pages are read from a disk "
            f"while one CPU computes everything, in {', '.join(PAGED_FORMATS)}: compute all of it on one CPU, in one "
            "of these formats, or store it where it is computed"
        )
    return plans


def _with_rules(schedule: object, graph: TaskGraph, topology: Topology, cost: CostModel, fixed: Fixed) -> Schedule:
    """What a policy returned, checked, with the user's rules laid over it."""
    if not isinstance(schedule, Schedule):
        raise InvalidInput(f"it returned {type(schedule).__name__}, not a Schedule")
    schedule.with_topology(topology).validate(graph)
    where = {row.task: row.device for row in schedule.assignments}
    return schedule_of(graph, topology, cost.workload, {**where, **fixed}, schedule.policy)


def _score(schedule: Schedule, graph: TaskGraph, cost: CostModel, trivial: bool) -> _Scored:
    why_not = ""
    try:
        schedule.check_memory(graph)
    except OutOfMemory as error:
        why_not = str(error)
    return _Scored(schedule, predict(schedule, graph, cost), trivial, why_not or schedule.why_not_run)


def _nothing_fits(scored: Sequence[_Scored]) -> OutOfMemory:
    """One line: the only reason, or what all plans have in common and the one that lacks least."""
    topology = scored[0].schedule.topology
    rooms = {d.name: capacity(d) for d in topology.compute_devices}

    def lacking(one: _Scored) -> dict[str, int]:
        return {d: n - rooms[d] for d, n in one.prediction.memory_bytes.items() if n > rooms[d]}

    def lacks(one: _Scored) -> float:
        streams = bool(one.schedule.why_not_run)  # what fits but cannot be run is no answer
        return sum(lacking(one).values()) or (math.inf if streams else 0)

    nearest = min(scored, key=lacks)
    most = max(lacking(nearest), key=lambda d: lacking(nearest)[d], default=next(iter(rooms)))
    need = nearest.prediction.memory_bytes.get(most, 0)
    if len({one.why_not for one in scored}) == 1:
        return OutOfMemory(scored[0].why_not, need=need, capacity=rooms[most])
    each = ", ".join(f"{format_bytes(room)} on {name}" for name, room in rooms.items())
    what = f"none of {len(scored)} plans fits in {each}; nearest is '{nearest.schedule.policy}': {nearest.why_not}"
    return OutOfMemory(what, need=need, capacity=rooms[most])


def _choose(scored: Sequence[_Scored], others: Sequence[Candidate], goal: Goal, error: float) -> Schedule:
    """The fastest trivial plan, unless another is forecast faster by more than the model may be wrong."""
    fitting = [one for one in scored if not one.why_not]
    if not fitting:
        raise _nothing_fits(scored)
    best = min(fitting, key=lambda one: one.seconds(goal))
    trivial = min((one for one in fitting if one.trivial), key=lambda one: one.seconds(goal), default=best)
    gain = trivial.seconds(goal) / best.seconds(goal) - 1
    chosen, notes = best, []
    if best is not trivial and gain <= error:
        chosen = trivial
        notes.append(
            f"{best.schedule.policy} is forecast {gain:.0%} faster, within the model's error of {error:.0%}: "
            f"the simpler plan ({trivial.schedule.policy}) was chosen"
        )
    candidates = [_candidate(one, one.schedule.policy, _why_not(one, chosen, goal)) for one in scored]
    return replace(
        chosen.schedule,
        goal=goal,
        predicted=chosen.prediction,
        candidates=(*candidates, *others),
        notes=tuple(notes),
    )


def _why_not(one: _Scored, chosen: _Scored, goal: Goal) -> str:
    if one is chosen or one.why_not:
        return one.why_not
    ratio = one.seconds(goal) / chosen.seconds(goal)
    return f"{ratio:.2f}x the time" if ratio >= 1 else f"{1 / ratio - 1:.0%} faster, within the model's error"


def _candidate(one: _Scored, name: str, why_not: str) -> Candidate:
    p = one.prediction
    return Candidate(name, not one.why_not, p.decode_tokens_per_s, p.prefill_tokens_per_s, why_not)


def _caveats(graph: TaskGraph, workload: Workload, placement: Placement) -> list[str]:
    """What the plan took for granted and the reader should know."""
    notes = []
    if graph.max_positions and workload.context > graph.max_positions:
        notes.append(
            f"the workload has {workload.context} positions per sequence, {graph.name} was trained for "
            f"{graph.max_positions}; it cannot be run as planned"
        )
    if any(rule.by == "popularity" for rule in placement.rules) and not any(task.popularity for task in graph):
        notes.append("no popularity of experts is known: rules by popularity took them in order")
    return notes
