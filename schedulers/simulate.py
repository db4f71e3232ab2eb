"""Carries a schedule out on paper: the steps of a workload, one task after the other, timed by the cost model.
Knows the order in which the local executor works (one task at a time, copies before the task that needs them)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ciuic_runtime.schedulers.assignment import Paging
from ciuic_runtime.schedulers.cost import CostModel
from ciuic_runtime.schedulers.graph import Step, Task, TaskGraph
from ciuic_runtime.schedulers.policies.paged import resident_share
from ciuic_runtime.schedulers.schedule import Schedule
from ciuic_runtime.schedulers.trace import Event, EventKind, StepInfo, Trace
from ciuic_runtime.schedulers.workload import Workload


def workload_steps(graph: TaskGraph, workload: Workload) -> Iterator[Step]:
    """The passes that the engine makes: all prompts in chunks, then one decode step per further token."""
    for i in range(num_prefill_steps(graph, workload)):
        yield prefill_step(graph, workload, i)
    for i in range(1, workload.max_tokens):
        yield Step.decode(workload.prompt_tokens + i, workload.batch)


def num_prefill_steps(graph: TaskGraph, workload: Workload) -> int:
    return -(-workload.batch * workload.prompt_tokens // graph.prefill_chunk)


def prefill_step(graph: TaskGraph, workload: Workload, index: int) -> Step:
    """Pass `index` over the prompts: they are laid end to end and cut into chunks, so one pass may end a prompt and
    begin the next."""
    prompt, at = workload.prompt_tokens, index * graph.prefill_chunk
    end = min(at + graph.prefill_chunk, workload.batch * prompt)
    tokens, sequences, sampled, pairs, positions = end - at, 0, 0, 0.0, 0.0
    while at < end:
        start = at % prompt
        stop = min(prompt, start + end - at)
        sequences, sampled = sequences + 1, sampled + (stop == prompt)
        pairs += (stop - start) * (start + stop + 1) / 2
        positions += stop
        at += stop - start
    return Step("prefill", tokens, sequences, pairs, positions, sampled)


def simulate(schedule: Schedule, graph: TaskGraph, cost: CostModel, steps: Iterable[Step] | None = None) -> Trace:
    """The trace that the schedule is forecast to leave; for its workload, or for the steps that are given."""
    clock = _Clock(schedule, graph, cost)
    for step in workload_steps(graph, schedule.workload) if steps is None else steps:
        clock.run(step)
    used = schedule.devices_used()
    notes = tuple(f"{name} is simulated" for name in used if schedule.topology.device(name).simulated)
    return Trace(tuple(clock.events), tuple(clock.infos), "simulated", used, notes)


class _Clock:
    """Time passing over the events of one simulated run."""

    def __init__(self, schedule: Schedule, graph: TaskGraph, cost: CostModel) -> None:
        self.schedule, self.graph, self.cost = schedule, graph, cost
        self.devices = {d.name: d for d in schedule.topology.devices}
        self.experts = {task.name: _experts_by_device(schedule, task) for task in graph if task.num_experts}
        self.host = next((d for d in schedule.devices_used() if self.devices[d].kind == "CPU"), None)
        self.now = 0.0
        self.events: list[Event] = []
        self.infos: list[StepInfo] = []
        self.where: dict[str, set[str]] = {}  # task -> devices that hold its output in this step
        self.stays, self.routed_stays = resident_share(schedule, graph)
        self.disk_free = 0.0  # when the disk has read what it was asked for so far
        self.asked: list[float] = []  # when each layer with routed experts began, in this step

    def run(self, step: Step) -> None:
        start, self.where, self.asked = self.now, {}, []
        for task in self.graph:
            home = self.schedule.device_of(task.name)
            spread = self.experts.get(task.name, {})
            if spread.keys() <= {home}:
                self._fetch(task.after, home, step)
                seconds = self.cost.task(task, self.devices[home], step).seconds
                if self.schedule.paging is not None:
                    self._page(task, self.schedule.paging, seconds, step)
                self._compute(task, home, seconds, step)
            else:
                self._experts(task, home, spread, step)
            self.where[task.name] = {home}
        if self.host is not None:  # where tokens are sampled
            self._fetch((self.graph.tasks[-1].name,), self.host, step)
        self.infos.append(StepInfo(step.phase, step.tokens, step.sequences, start, self.now))

    def _experts(self, task: Task, home: str, spread: dict[str, list[int]], step: Step) -> None:
        """Each device computes the rows of its experts; they are combined at home, where the router runs."""
        for device, experts in spread.items():
            self._fetch(task.after[:2], device, step)
            self._compute(task, device, self.cost.experts(task, self.devices[device], step, experts).seconds, step)
            rows = step.tokens * task.experts_per_token * task.share(experts)
            self._copy(task.name, device, home, rows * task.output_bytes_per_token, step)
        self._fetch(task.after[1:], home, step)
        self._compute(task, home, self.cost.combine(task, self.devices[home], step).seconds, step)

    def _fetch(self, names: Iterable[str], device: str, step: Step) -> None:
        for name in names:
            if device not in self.where[name]:
                task = self.graph.by_name[name]
                nbytes = task.output_bytes_per_token * task.work(step.phase).rows(step)
                self._copy(name, self.schedule.device_of(name), device, nbytes, step)
                self.where[name].add(device)

    def _page(self, task: Task, paging: Paging, seconds: float, step: Step) -> None:
        """Reads what is not there: routed experts from when they are guessed, `lookahead` layers earlier, other pages
        from the task before, rows of tables when they are needed. What is there computes meanwhile."""
        if task.pages[0].row_nbytes:
            share, asked, nbytes = 0.0, self.now, float(task.work(step.phase).rows(step) * task.pages[0].row_nbytes)
        elif task.num_experts:
            share = self.routed_stays
            nbytes = (1 - share) * task.expected_experts(step.tokens) * task.pages[0].nbytes
            self.asked.append(self.now)
            asked = self.asked[max(0, len(self.asked) - 1 - paging.lookahead)]
        else:
            share, asked = self.stays, self.now
            nbytes = (1 - share) * task.pages[0].nbytes
        if nbytes < 1:
            return
        start = max(self.disk_free, asked)
        self.disk_free = end = start + self.cost.transfer(paging.disk, paging.device, nbytes)
        lane, at = f"{paging.disk} -> {paging.device}", len(self.infos)
        self.events.append(Event(task.name, lane, start, end, at, step.phase, "read", int(nbytes)))
        waits = end - self.now - share * seconds
        if waits > 0:
            self._advance(task.name, paging.device, waits, step, "wait", 0)

    def _copy(self, name: str, src: str, dst: str, nbytes: float, step: Step) -> None:
        if src != dst:
            self._advance(name, f"{src} -> {dst}", self.cost.transfer(src, dst, nbytes), step, "copy", int(nbytes))

    def _compute(self, task: Task, device: str, seconds: float, step: Step) -> None:
        self._advance(task.name, device, seconds, step, "compute", 0)

    def _advance(self, name: str, lane: str, seconds: float, step: Step, kind: EventKind, nbytes: int) -> None:
        end = self.now + seconds
        self.events.append(Event(name, lane, self.now, end, len(self.infos), step.phase, kind, nbytes))
        self.now = end


def _experts_by_device(schedule: Schedule, task: Task) -> dict[str, list[int]]:
    spread: dict[str, list[int]] = {}
    for expert, device in enumerate(schedule.expert_devices(task)):
        spread.setdefault(device, []).append(expert)
    return spread
