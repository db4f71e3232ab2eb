"""A schedule while a policy makes it: rows placed so far, and the room left on each device.
Knows the user's rules, which a policy cannot overrule; whether the result fits is asked of the schedule."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

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
        self._held: set[tuple[str, str]] = set()  # (page, device)
        self._fixed: Fixed = NOTHING
        for row, device in fixed.items():
            self.put(row, device)
        self._fixed = fixed

    def need(self, tasks: Iterable[Task], device: str) -> float:
        """Bytes that placing what no rule fixed of `tasks` on `device` takes, its share of the KV cache included."""
        rows = (row for task in tasks for row, _ in task.rows)
        return sum(self.row_need(row, device) for row in rows if row not in self._fixed)

    def row_need(self, row: str, device: str) -> float:
        page, task = self.graph.rows[row], self.graph.by_name.get(row)
        cache = task.kv_bytes_per_token * self.workload.cache_tokens if task else 0.0
        return cache + (0 if (page.name, device) in self._held else page.nbytes)

    def fits(self, tasks: Iterable[Task], device: str) -> bool:
        return self.need(tasks, device) <= self.room[device]

    def place(self, task: Task, device: str) -> None:
        """Puts all of a task that no rule fixed, whether it fits or not; that is for `check_memory` to say."""
        for row, _ in task.rows:
            self.put(row, device)

    def put(self, row: str, device: str) -> None:
        """Puts a task, or one routed expert (layers.3.experts.17), unless a rule fixed it."""
        if row in self._fixed:
            return
        self.room[device] = self.room.get(device, 0.0) - self.row_need(row, device)
        self._held.add((self.graph.rows[row].name, device))
        self.where[row] = device

    def freeze(self, policy: str) -> Schedule:
        return schedule_of(self.graph, self.topology, self.workload, self.where, policy)


def schedule_of(
    graph: TaskGraph, topology: Topology, workload: Workload, where: Mapping[str, str], policy: str
) -> Schedule:
    """The schedule that puts each row where `where` says; rows it does not name are left out."""
    held: set[tuple[str, str]] = set()
    rows = []
    for row, page in graph.rows.items():
        if row in where:
            device = where[row]
            rows.append(Assignment(row, device, device, 0 if (page.name, device) in held else page.nbytes))
            held.add((page.name, device))
    model = ModelSummary(graph.name, graph.format, graph.parameters, graph.active_parameters)
    return Schedule(model, workload, topology, tuple(rows), policy)
