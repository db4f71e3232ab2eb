"""A schedule while a policy makes it: rows placed so far, and the room left on each device.
Knows the user's rules, which a policy cannot overrule; whether the result fits is asked of the schedule."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache

from ciuic_runtime.devices.spec import Topology
from ciuic_runtime.schedulers.assignment import Assignment, ModelSummary
from ciuic_runtime.schedulers.graph import Task, TaskGraph
from ciuic_runtime.schedulers.memory import capacity
from ciuic_runtime.schedulers.schedule import Schedule
from ciuic_runtime.schedulers.workload import Workload

Fixed = Mapping[str, str]  # row -> device, by the user's rules
NOTHING: Fixed = {}


class ScheduleDraft:
    def __init__(self, graph: TaskGraph, topology: Topology, workload: Workload, fixed: Fixed = NOTHING) -> None:
        self.graph, self.topology, self.workload = graph, topology, workload
        working = graph.working_bytes(workload.batch, workload.prompt_tokens, workload.context)
        self.room = {d.name: capacity(d) - working for d in topology.compute_devices}  # bytes left
        self.where: dict[str, str] = {}
        self._held: set[tuple[str, str]] = set()  # (page, device), of pages that several rows share
        self._fixed: Fixed = NOTHING
        for row, device in fixed.items():
            self.put(row, device)
        self._fixed = fixed

    def need(self, tasks: Iterable[Task], device: str) -> float:
        """Bytes that placing what no rule fixed of `tasks` on `device` takes, its share of the KV cache included."""
        return sum(
            sum(self.row_need(row, device) for row, _ in task.rows if row not in self._fixed)
            if self._one_by_one(task) else self._whole(task)
            for task in tasks
        )  # fmt: skip

    def row_need(self, row: str, device: str) -> float:
        page, task = self.graph.rows[row], self.graph.by_name.get(row)
        cache = task.kv_bytes_per_token * self.workload.cache_tokens if task else 0.0
        return cache + (0 if (page.name, device) in self._held else page.nbytes)

    def fits(self, tasks: Iterable[Task], device: str) -> bool:
        return self.need(tasks, device) <= self.room[device]

    def place(self, task: Task, device: str) -> None:
        """Puts all of a task that no rule fixed, whether it fits or not; that is for `check_memory` to say."""
        if self._one_by_one(task):
            for row, _ in task.rows:
                self.put(row, device)
            return
        self.room[device] = self.room.get(device, 0.0) - self._whole(task)
        self.where.update((row, device) for row, _ in task.rows)

    def put(self, row: str, device: str) -> None:
        """Puts a task, or one routed expert (layers.3.experts.17), unless a rule fixed it."""
        if row in self._fixed:
            return
        self.room[device] = self.room.get(device, 0.0) - self.row_need(row, device)
        if (page := self.graph.rows[row].name) in self.graph.shared_pages:
            self._held.add((page, device))
        self.where[row] = device

    def _one_by_one(self, task: Task) -> bool:
        """Whether rules or shared pages tell some of its rows from others."""
        return bool(self._fixed) or task.pages[0].name in self.graph.shared_pages

    def _whole(self, task: Task) -> float:
        return task.nbytes + task.kv_bytes_per_token * self.workload.cache_tokens

    def freeze(self, policy: str) -> Schedule:
        return schedule_of(self.graph, self.topology, self.workload, self.where, policy)


@lru_cache(maxsize=1 << 17)
def _row(task: str, device: str, nbytes: int) -> Assignment:
    """Candidates have most of their rows in common, of large models tens of thousands."""
    return Assignment(task, device, device, nbytes)


def schedule_of(
    graph: TaskGraph, topology: Topology, workload: Workload, where: Mapping[str, str], policy: str
) -> Schedule:
    """The schedule that puts each row where `where` says; rows it does not name are left out."""
    held: set[tuple[str, str]] = set()
    rows, shared = [], graph.shared_pages
    for row, page in graph.rows.items():
        if (device := where.get(row)) is None:
            continue
        nbytes = page.nbytes
        if page.name in shared:
            nbytes = 0 if (page.name, device) in held else nbytes
            held.add((page.name, device))
        rows.append(_row(row, device, nbytes))
    model = ModelSummary(graph.name, graph.format, graph.parameters, graph.active_parameters)
    return Schedule(model, workload, topology, tuple(rows), policy)
