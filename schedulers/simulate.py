"""Carries a schedule out on paper: the steps of a workload, one task after the other, timed by the cost model.
Knows the order in which the local executor works (one task at a time, copies before the task that needs them)."""

from __future__ import annotations

from collections.abc import Iterable

from ciuic_runtime.schedulers.cost import CostModel
from ciuic_runtime.schedulers.graph import Step, Task, TaskGraph
from ciuic_runtime.schedulers.schedule import Schedule
from ciuic_runtime.schedulers.trace import Event, StepInfo, Trace
from ciuic_runtime.schedulers.workload import Workload


def workload_steps(graph: TaskGraph, workload: Workload) -> list[Step]:
    """The passes that the engine makes: prompts in chunks, then one decode step per further token."""
    steps = []
    for batch, start, tokens in prefill_chunks(workload, graph.prefill_chunk):
        steps.append(Step.prefill(tokens, batch, start))
    steps += [Step.decode(workload.prompt_tokens + i, workload.batch) for i in range(1, workload.max_tokens)]
    return steps


def prefill_chunks(workload: Workload, chunk: int) -> list[tuple[int, int, int]]:
    """(sequences, start, tokens of each) of every prefill pass, prompts taken one after the other."""
    whole = max(1, chunk // workload.prompt_tokens)
    if workload.prompt_tokens <= chunk:
        sizes = [whole] * (workload.batch // whole) + ([workload.batch % whole] if workload.batch % whole else [])
        return [(size, 0, workload.prompt_tokens) for size in sizes]
    starts = range(0, workload.prompt_tokens, chunk)
    return [(1, s, min(chunk, workload.prompt_tokens - s)) for _ in range(workload.batch) for s in starts]


def simulate(schedule: Schedule, graph: TaskGraph, cost: CostModel, steps: Iterable[Step] | None = None) -> Trace:
    """The trace that the schedule is forecast to leave; for a workload, or for the steps that are given."""
    clock = _Clock(schedule, graph, cost)
    for step in workload_steps(graph, schedule.workload) if steps is None else steps:
        clock.run(step)
    notes = tuple(f"{d.name} is simulated" for d in schedule.topology.devices if d.simulated)
    return Trace(tuple(clock.events), tuple(clock.infos), "simulated", schedule.devices_used(), notes)


class _Clock:
    """Time passing over the events of one simulated run."""

    def __init__(self, schedule: Schedule, graph: TaskGraph, cost: CostModel) -> None:
        self.schedule, self.graph, self.cost = schedule, graph, cost
        self.now = 0.0
        self.events: list[Event] = []
        self.infos: list[StepInfo] = []
        self.where: dict[str, set[str]] = {}  # task -> devices that hold its output in this step

    def run(self, step: Step) -> None:
        start, self.where = self.now, {}
        for task in self.graph:
            if task.num_experts:
                self._experts(task, step)
            else:
                self._one(task, step)
        self.infos.append(StepInfo(step.phase, step.tokens, step.sequences, start, self.now))

    def _one(self, task: Task, step: Step) -> None:
        device = self.schedule.device_of(task.name)
        self._fetch(task.after, device, step)
        self._compute(task, device, step, 1.0)
        self.where[task.name] = {device}

    def _experts(self, task: Task, step: Step) -> None:
        """Each device computes its experts; their rows are combined where the router runs."""
        home = self.schedule.device_of(task.name)
        devices = self.schedule.expert_devices(task)
        popularity = task.popularity or (1.0,) * task.num_experts
        for device in dict.fromkeys(devices):
            share = sum(p for p, d in zip(popularity, devices, strict=True) if d == device) / sum(popularity)
            self._fetch(task.after[:1], device, step)
            self._compute(task, device, step, share)
            rows = step.tokens * task.experts_per_token * share
            self._copy(task.name, device, home, rows * task.output_bytes_per_token, step)
        self._fetch(task.after[1:], home, step)
        self.where[task.name] = {home}

    def _fetch(self, names: tuple[str, ...], device: str, step: Step) -> None:
        for name in names:
            if device not in self.where[name]:
                source = self.schedule.device_of(name)
                task = self.graph.by_name[name]
                rows = step.sequences if task.work(step.phase).per_sequence else step.tokens
                nbytes = task.output_bytes_per_token * rows
                self._copy(name, source, device, nbytes, step)
                self.where[name].add(device)

    def _copy(self, name: str, src: str, dst: str, nbytes: float, step: Step) -> None:
        if src != dst and nbytes > 0:
            self._advance(name, f"{src} -> {dst}", self.cost.transfer(src, dst, nbytes), step, "copy", int(nbytes))

    def _compute(self, task: Task, device: str, step: Step, share: float) -> None:
        cost = self.cost.task(task, self.schedule.topology.device(device), step, share)
        self._advance(task.name, device, cost.seconds, step, "compute", 0)

    def _advance(self, name: str, lane: str, seconds: float, step: Step, kind: str, nbytes: int) -> None:
        end = self.now + seconds
        self.events.append(Event(name, lane, self.now, end, len(self.infos), step.phase, kind, nbytes))  # type: ignore[arg-type]
        self.now = end
