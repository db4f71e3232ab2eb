"""Chooses among all candidate plans, under one cost model, for the stated goal and workload; keeps the losers.
What a plan costs is the simulator's word, what is allowed is the user's rules' and the devices' memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from ciuic_runtime.devices.errors import CiuicError, InvalidInput, OutOfMemory
from ciuic_runtime.devices.spec import DeviceSpec, Topology
from ciuic_runtime.devices.units import format_bytes, parse_bytes
from ciuic_runtime.schedulers.cost import Calibration, CostModel
from ciuic_runtime.schedulers.graph import Layer, Step, Task, TaskGraph
from ciuic_runtime.schedulers.placement import Placement
from ciuic_runtime.schedulers.policies.trivial import all_on, by_speed, fastest_first, split_by_speed
from ciuic_runtime.schedulers.schedule import (
    Assignment,
    Candidate,
    Prediction,
    Schedule,
    memory_need,
    rows_of,
)
from ciuic_runtime.schedulers.simulate import prefill_chunks, simulate
from ciuic_runtime.schedulers.trace import Trace
from ciuic_runtime.schedulers.workload import Goal, Workload, parse_goal

Policy = Callable[[TaskGraph, Topology, CostModel], Schedule]
_registered: dict[str, Policy] = {}


def policy(name: str) -> Callable[[Policy], Policy]:
    """Decorator: the function joins the planner's candidates under this name."""

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
    why_not: str  # "" if it fits

    def seconds(self, goal: Goal) -> float:
        """What the goal minimises: the first token, or the whole workload."""
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
        graph = task.graph if isinstance(task, Layer) else graph or self._graph
        if graph is None:
            raise InvalidInput("add_task of a single task needs its graph: add_task(task, device, graph=model.graph)")
        if self._graph is not None and graph is not self._graph:
            raise InvalidInput(
                f"this scheduler already has tasks of {self._graph.name}; use another one for {graph.name}"
            )
        self._graph = graph
        if isinstance(device, DeviceSpec):
            self._devices[device.name] = device
        name = device.name if isinstance(device, DeviceSpec) else device
        for member in task.tasks if isinstance(task, Layer) else (task,):
            self._exact.update(dict.fromkeys((row for row, _ in rows_of(member)), name))

    def schedule(self, graph: TaskGraph | None = None) -> Schedule:
        """The best feasible candidate. Raises OutOfMemory, with the figures, where none fits."""
        graph = graph or self._graph
        if graph is None:
            raise InvalidInput("nothing to schedule: add_task a model's layers, or pass a graph")
        goal, topology = parse_goal(self.goal), self._budgeted()
        cost = CostModel(topology, graph.format, self.calibration, self.workload)
        fixed = {**self.placement.resolve(graph, topology), **self._exact}
        scored: list[_Scored] = []
        broken: list[Candidate] = []
        for name, candidate in self._candidates(topology, cost).items():
            try:
                scored.append(_score(_with_fixed(candidate(graph, topology, cost), graph, fixed, name), graph, cost))
            except CiuicError as error:
                broken.append(Candidate(name, False, why_not=str(error)))
        return _choose(_distinct(scored), broken, goal, cost.calibration.model_error)

    def _candidates(self, topology: Topology, cost: CostModel) -> dict[str, Policy]:
        """Simplest first: that one wins where forecasts do not tell them apart."""
        found: dict[str, Policy] = {}
        for device in by_speed(topology, cost):
            found[f"all on {device.name}"] = lambda g, t, c, name=device.name: all_on(name, g, t, c)  # type: ignore[misc]
        if len(topology.compute_devices) > 1:
            found["fastest first"] = fastest_first
            found["split by speed"] = split_by_speed
        return {**found, **_registered}

    def _budgeted(self) -> Topology:
        """The topology with every device's memory cut down to the user's budget."""
        topology = self.topology or Topology(tuple(self._devices.values()))
        budgets = {topology.device(name).name: parse_bytes(size) for name, size in self.memory.items()}
        if not topology.compute_devices:
            raise InvalidInput(
                "no device here can compute; " + "; ".join(f"{d.name}: {d.why_not_usable}" for d in topology.devices)
            )
        for name in self._exact.values():
            topology.device(name)
        return replace(topology, devices=tuple(_limit(d, budgets.get(d.name)) for d in topology.devices))


def predict(schedule: Schedule, graph: TaskGraph, cost: CostModel) -> Prediction:
    """Rates and memory of a schedule, from one simulated prefill and the mean decode step."""
    work = schedule.workload
    chunks = [Step.prefill(n, batch, start) for batch, start, n in prefill_chunks(work, graph.prefill_chunk)]
    prefill = simulate(schedule, graph, cost, chunks)
    decode = simulate(schedule, graph, cost, [work.mean_decode])
    prefill_s, decode_s = prefill.seconds("prefill"), decode.seconds("decode")
    rate, error = work.batch / decode_s, cost.calibration.model_error
    return Prediction(
        first_token_s=prefill_s,
        prefill_tokens_per_s=work.batch * work.prompt_tokens / prefill_s,
        decode_tokens_per_s=rate,
        range=(rate / (1 + error), rate * (1 + error)),
        bound_by=_binding(decode, graph, cost, work.mean_decode),
        memory_bytes=memory_need(schedule, graph, work),
        basis=cost.basis(set(schedule.devices_used())),
        seconds_per_token={
            "prefill": {
                k: s / (work.batch * work.prompt_tokens) for k, s in prefill.seconds_by_kind("prefill").items()
            },
            "decode": {k: s / work.batch for k, s in decode.seconds_by_kind("decode").items()},
        },
    )


def _binding(decode: Trace, graph: TaskGraph, cost: CostModel, step: Step) -> str:
    """The resource that the decode step spends most of its time on."""
    spent: dict[str, float] = {}
    for event in decode.events:
        if event.kind == "copy":
            what = f"link {event.lane}"
        else:
            task, device = graph.by_name[event.task], cost.topology.device(event.lane)
            what = f"{cost.task(task, device, step).bound_by} of {event.lane}"
        spent[what] = spent.get(what, 0.0) + event.seconds
    return max(spent, key=lambda what: spent[what])


def _score(schedule: Schedule, graph: TaskGraph, cost: CostModel) -> _Scored:
    schedule.validate(graph)
    why_not = ""
    try:
        schedule.check_memory(graph)
    except OutOfMemory as error:
        why_not = str(error)
    return _Scored(schedule, predict(schedule, graph, cost), why_not)


def _with_fixed(schedule: Schedule, graph: TaskGraph, fixed: Mapping[str, str], name: str) -> Schedule:
    """The candidate with the user's rules laid over it."""
    pages = {row: page for task in graph for row, page in rows_of(task)}
    held: set[tuple[str, str]] = set()
    rows = []
    for row in schedule.assignments:
        device = fixed.get(row.task, row.device)
        page = pages[row.task]
        rows.append(Assignment(row.task, device, device, 0 if (page.name, device) in held else page.nbytes))
        held.add((page.name, device))
    whole = len(fixed) == len(pages)
    label = "by hand" if whole else f"{name}, rules applied" if fixed else name
    return replace(schedule, assignments=tuple(rows), policy=label)


def _distinct(scored: list[_Scored]) -> list[_Scored]:
    """One of each plan: with every task fixed, all policies give the same one."""
    first: dict[tuple[Assignment, ...], _Scored] = {}
    for one in scored:
        first.setdefault(one.schedule.assignments, one)
    return list(first.values())


def _choose(scored: list[_Scored], broken: list[Candidate], goal: Goal, error: float) -> Schedule:
    fitting = [one for one in scored if not one.why_not]
    if not fitting:
        reasons = [one.why_not for one in scored] + [c.why_not for c in broken]
        raise OutOfMemory(
            reasons[0] if len(set(reasons)) == 1 else "no plan fits: " + " | ".join(dict.fromkeys(reasons))
        )
    best = min(fitting, key=lambda one: one.seconds(goal))
    # A gain inside the model's own error is no reason to leave the simpler plan.
    chosen = next(one for one in fitting if one.seconds(goal) <= best.seconds(goal) * (1 + error))
    notes = []
    if chosen is not best:
        gain = chosen.seconds(goal) / best.seconds(goal) - 1
        notes.append(
            f"{best.schedule.policy} is forecast {gain:.0%} faster, within the model's error of {error:.0%}: "
            f"the simpler plan ({chosen.schedule.policy}) was chosen"
        )
    candidates = [_candidate(one, chosen, goal) for one in scored] + broken
    return replace(
        chosen.schedule, goal=goal, predicted=chosen.prediction, candidates=tuple(candidates), notes=tuple(notes)
    )


def _candidate(one: _Scored, chosen: _Scored, goal: Goal) -> Candidate:
    why_not = one.why_not
    if one is not chosen and not why_not:
        ratio = one.seconds(goal) / chosen.seconds(goal)
        why_not = f"{ratio:.2f}x the time" if ratio >= 1 else f"{1 / ratio - 1:.0%} faster, within the model's error"
    p = one.prediction
    return Candidate(one.schedule.policy, not one.why_not, p.decode_tokens_per_s, p.prefill_tokens_per_s, why_not)


def _limit(device: DeviceSpec, budget: int | None) -> DeviceSpec:
    available = (
        device.memory_bytes if device.memory_free_bytes is None else min(device.memory_bytes, device.memory_free_bytes)
    )
    if budget is None:
        return replace(device, memory_bytes=available)
    if budget > available:
        raise InvalidInput(
            f"--memory {device.name}={format_bytes(budget)} is more than can be used there ({format_bytes(available)}); ask for less"
        )
    return replace(device, memory_bytes=budget)
