"""What runs where: the decision that is read by people, saved as JSON, edited, and executed to the letter.
Knows how it is checked against a graph; how it was decided is the policies' business."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from ciuic_runtime.devices.errors import InvalidInput, OutOfMemory
from ciuic_runtime.devices.files import write_whole
from ciuic_runtime.devices.spec import Topology
from ciuic_runtime.devices.toml import topology_from_dict, topology_to_dict
from ciuic_runtime.devices.units import format_bytes
from ciuic_runtime.schedulers.graph import Task, TaskGraph
from ciuic_runtime.schedulers.workload import Goal, Workload, parse_goal

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Assignment:
    """One row of a schedule: a task, or one routed expert of a task group."""

    task: str  # layers.3.attention, layers.3.experts.17
    device: str  # computes it
    home: str  # stores its weights
    nbytes: int  # at home; 0 where another row on that device holds the same page (tied embeddings)


@dataclass(frozen=True, slots=True)
class ModelSummary:
    name: str
    format: str
    parameters: int
    active_parameters: int


@dataclass(frozen=True, slots=True)
class Prediction:
    first_token_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    range: tuple[float, float]  # of decode_tokens_per_s
    bound_by: str  # "memory of cpu": what the decode step spends most of its time on
    memory_bytes: Mapping[str, int]  # by device: weights, cache and working memory
    basis: Literal["measured", "estimated", "mixed"]
    seconds_per_token: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # phase -> kind of task -> s


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plan that was considered, also when it lost or does not fit."""

    name: str
    feasible: bool
    decode_tokens_per_s: float | None = None
    prefill_tokens_per_s: float | None = None
    why_not: str = ""  # "" for the chosen one


@dataclass(frozen=True)
class Schedule:
    model: ModelSummary
    workload: Workload
    topology: Topology
    assignments: tuple[Assignment, ...]
    policy: str = "by hand"
    goal: Goal = "latency"
    predicted: Prediction | None = None
    candidates: tuple[Candidate, ...] = ()
    notes: tuple[str, ...] = field(default_factory=tuple)

    def __hash__(self) -> int:
        return id(self)

    @cached_property
    def rows(self) -> dict[str, Assignment]:
        return {row.task: row for row in self.assignments}

    def device_of(self, task: str) -> str:
        """Where a task runs; for a group of routed experts, where their results are combined: with the router."""
        name = task.removesuffix(".experts") + ".router" if task.endswith(".experts") else task
        if name not in self.rows:
            raise InvalidInput(f"the schedule of {self.model.name} has no task {task}")
        return self.rows[name].device

    def expert_devices(self, task: Task) -> tuple[str, ...]:
        """The device of each routed expert of a task group, in the order of the experts."""
        return tuple(self.rows[page.name].device for page in task.pages)

    def devices_used(self) -> tuple[str, ...]:
        used = {row.device for row in self.assignments}
        return tuple(d.name for d in self.topology.devices if d.name in used)

    def weight_bytes(self) -> dict[str, int]:
        """Bytes of weights by the device that stores them."""
        total: dict[str, int] = {}
        for row in self.assignments:
            total[row.home] = total.get(row.home, 0) + row.nbytes
        return total

    def validate(self, graph: TaskGraph) -> None:
        """Raises InvalidInput unless the schedule covers exactly the graph's tasks on devices that can compute.

        That what is assigned also fits is asked by `check_memory`."""
        needed = set(row_names(graph))
        if missing := needed - self.rows.keys():
            raise InvalidInput(f"the schedule leaves {_some(missing)} of {graph.name} without a device")
        if extra := self.rows.keys() - needed:
            raise InvalidInput(
                f"the schedule names {_some(extra)}, which {graph.name} does not have; was it made for {self.model.name}?"
            )
        if len(self.rows) != len(self.assignments):
            raise InvalidInput("the schedule assigns a task twice; replicas of a page are not supported yet")
        for row in self.assignments:
            device = self.topology.device(row.device)
            if not device.can_compute or not device.usable:
                raise InvalidInput(
                    f"{row.task} is placed on {row.device}, which cannot compute: {device.why_not_usable or device.kind}"
                )
            if row.home != row.device:
                raise InvalidInput(
                    f"{row.task} is stored on {row.home} and computed on {row.device}; "
                    "paging between tiers is not supported yet, store it where it is computed"
                )

    def check_memory(self, graph: TaskGraph, workload: Workload | None = None) -> None:
        """Raises OutOfMemory, with the figures, if some device cannot hold what it is given."""
        for name, need in memory_need(self, graph, workload or self.workload).items():
            capacity = self.topology.device(name).memory_bytes
            if need > capacity:
                raise OutOfMemory(does_not_fit(self, graph, workload or self.workload, name, need, capacity))

    def explain(self, name: str) -> str:
        """Why a task or page is where it is, in one line."""
        rows = [row for row in self.assignments if row.task == name or row.task.startswith(name + ".")]
        if not rows:
            raise InvalidInput(f"the schedule of {self.model.name} has nothing named {name}")
        devices = sorted({row.device for row in rows})
        size = format_bytes(sum(row.nbytes for row in rows))
        beaten = [f"{c.name} ({c.why_not})" for c in self.candidates if c.why_not]
        over = f"; preferred over {', '.join(beaten)}" if beaten else ""
        return f"{name}: {size} on {', '.join(devices)}, placed by {self.policy}{over}"

    def with_topology(self, topology: Topology) -> Schedule:
        return replace(self, topology=topology)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object that `ciuic plan --json` prints."""
        predicted = asdict(self.predicted) if self.predicted else None
        if predicted:
            predicted["range"] = list(predicted["range"])
        return {
            "schema_version": SCHEMA_VERSION,
            "workload": asdict(self.workload),
            "goal": self.goal,
            "policy": self.policy,
            "model": asdict(self.model),
            **{("devices" if k == "device" else "links"): v for k, v in topology_to_dict(self.topology).items()},
            "assignments": [
                {"task": r.task, "device": r.device, "home": r.home, "bytes": r.nbytes} for r in self.assignments
            ],
            "predicted": predicted,
            "candidates": [asdict(c) for c in self.candidates],
            "notes": list(self.notes),
        }

    def to_json(self, path: str | Path | None = None) -> str:
        text = json.dumps(self.to_dict(), indent=1)
        if path is not None:
            write_whole(path, text + "\n")
        return text

    @staticmethod
    def from_dict(data: Any, source: str = "the schedule") -> Schedule:
        """Raises InvalidInput for anything that `to_dict` would not have written."""
        try:
            if data["schema_version"] != SCHEMA_VERSION:
                raise InvalidInput(
                    f"{source} has schema_version {data['schema_version']!r}; this version reads {SCHEMA_VERSION}"
                )
            predicted = data["predicted"]
            return Schedule(
                model=ModelSummary(**data["model"]),
                workload=Workload(**data["workload"]),
                goal=parse_goal(data["goal"]),
                policy=str(data["policy"]),
                topology=topology_from_dict({"device": data["devices"], "link": data.get("links", [])}, source),
                assignments=tuple(_row(r, source) for r in data["assignments"]),
                predicted=Prediction(**{**predicted, "range": tuple(predicted["range"])}) if predicted else None,
                candidates=tuple(Candidate(**c) for c in data["candidates"]),
                notes=tuple(data["notes"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise InvalidInput(f"{source} is not a schedule as `ciuic plan --save` writes it: {error!r}") from error

    @staticmethod
    def from_json(path: str | Path) -> Schedule:
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise InvalidInput(f"cannot read schedule {path}: {error.strerror}") from error
        except ValueError as error:
            raise InvalidInput(f"schedule {path} is not JSON: {error}") from error
        return Schedule.from_dict(data, f"schedule {path}")


class ScheduleDraft:
    """A schedule while a policy makes it: tasks placed so far, and the room left on each device."""

    def __init__(self, graph: TaskGraph, topology: Topology, workload: Workload) -> None:
        self.graph, self.topology, self.workload = graph, topology, workload
        self.rows: dict[str, Assignment] = {}
        self.room = {d.name: float(d.memory_bytes) for d in topology.compute_devices}
        self._pages: set[tuple[str, str]] = set()  # (page, device)

    def need(self, task: Task, device: str) -> float:
        """Bytes that placing `task` on `device` takes, its share of the KV cache included."""
        pages = sum(p.nbytes for p in task.pages if (p.name, device) not in self._pages)
        return pages + task.kv_bytes_per_token * self.workload.batch * self.workload.context

    def fits(self, task: Task, device: str) -> bool:
        return self.need(task, device) <= self.room[device]

    def place(self, task: Task, device: str) -> None:
        """Puts all of a task, whether it fits or not; that is for `check_memory` to say."""
        for name, page in rows_of(task):
            self._put(name, page.name, page.nbytes, device)
        self.room[device] -= task.kv_bytes_per_token * self.workload.batch * self.workload.context

    def place_expert(self, task: Task, expert: int, device: str) -> None:
        page = task.pages[expert]
        self._put(page.name, page.name, page.nbytes, device)

    def _put(self, row: str, page: str, nbytes: int, device: str) -> None:
        held = 0 if (page, device) in self._pages else nbytes
        self._pages.add((page, device))
        self.room[device] = self.room.get(device, 0.0) - held
        self.rows[row] = Assignment(row, device, device, held)

    def freeze(self, policy: str) -> Schedule:
        order = {name: i for i, name in enumerate(row_names(self.graph))}
        rows = sorted(self.rows.values(), key=lambda r: order[r.task])
        return Schedule(summary(self.graph), self.workload, self.topology, tuple(rows), policy)


def rows_of(task: Task) -> list[tuple[str, Any]]:
    """(row name, page) of a task: one row, or one per routed expert."""
    if task.num_experts:
        return [(page.name, page) for page in task.pages]
    assert len(task.pages) == 1, f"{task.name} has {len(task.pages)} pages"
    return [(task.name, task.pages[0])]


def row_names(graph: TaskGraph) -> list[str]:
    return [name for task in graph for name, _ in rows_of(task)]


def summary(graph: TaskGraph) -> ModelSummary:
    return ModelSummary(graph.name, graph.format, graph.parameters, graph.active_parameters)


def memory_need(schedule: Schedule, graph: TaskGraph, workload: Workload) -> dict[str, int]:
    """Bytes by device: weights, the KV cache of the whole workload, and working memory where anything is computed."""
    need = {name: float(nbytes) for name, nbytes in schedule.weight_bytes().items()}
    for task in graph:
        if task.kv_bytes_per_token:
            device = schedule.device_of(task.name)
            need[device] += task.kv_bytes_per_token * workload.batch * workload.context
    for name in schedule.devices_used():
        need[name] += graph.working_bytes(workload.batch, workload.prompt_tokens, workload.context)
    return {name: int(nbytes) for name, nbytes in need.items()}


def does_not_fit(
    schedule: Schedule, graph: TaskGraph, workload: Workload, device: str, need: float, capacity: float
) -> str:
    weights = schedule.weight_bytes().get(device, 0)
    what = (
        f"{graph.name} needs {format_bytes(need)} on {device} ({format_bytes(weights)} weights in {graph.format}, the rest "
        f"cache and working memory for {workload.batch} x {workload.context} tokens) and {format_bytes(capacity)} can be used there"
    )
    if weights < capacity:
        return f"{what}; try a shorter context, a smaller batch, or more memory (--memory {device}=...)"
    return f"{what}; try a smaller model or more memory, or place part of it on another device"


def _row(row: dict[str, Any], source: str) -> Assignment:
    if not isinstance(row["bytes"], int) or not all(isinstance(row[k], str) for k in ("task", "device", "home")):
        raise InvalidInput(
            f"{source}: assignment {row!r} must have text for task, device, home and a whole number of bytes"
        )
    return Assignment(row["task"], row["device"], row["home"], row["bytes"])


def _some(names: set[str]) -> str:
    first = ", ".join(sorted(names)[:3])
    return first if len(names) <= 3 else f"{first} and {len(names) - 3} more"
