"""What runs where: the decision that is read by people, saved as JSON, edited, and executed to the letter.
Knows how it is checked against a graph; how it was decided is the policies' business."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.devices.files import write_whole
from ciuic_runtime.devices.spec import Topology
from ciuic_runtime.devices.units import format_bytes
from ciuic_runtime.schedulers import memory, schedule_html, schedule_json, schedule_text
from ciuic_runtime.schedulers.assignment import Assignment, Candidate, ModelSummary, Paging, Prediction
from ciuic_runtime.schedulers.graph import Task, TaskGraph
from ciuic_runtime.schedulers.trace import Trace
from ciuic_runtime.schedulers.workload import Goal, Workload


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
    notes: tuple[str, ...] = ()
    paging: Paging | None = None  # None: no CPU reads pages from a disk while it computes

    def __str__(self) -> str:
        return schedule_text.schedule_text(self)

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
        """Those that compute."""
        used = {row.device for row in self.assignments}
        return tuple(d.name for d in self.topology.devices if d.name in used)

    def places_used(self) -> tuple[str, ...]:
        """Devices that compute or store."""
        used = {name for row in self.assignments for name in (row.device, row.home)}
        return tuple(d.name for d in self.topology.devices if d.name in used)

    @property
    def why_not_run(self) -> str:
        """What no executor of this version carries out; "" for what can be run."""
        streamed = next((row for row in self.assignments if row.home != row.device), None)
        if streamed is None or (self.paging and self.devices_used() == (self.paging.device,)):
            return ""
        way = f"{streamed.home} to {streamed.device}"
        return f"it streams weights from {way} in every pass, which this version plans and simulates but does not run"

    def weight_bytes(self) -> dict[str, int]:
        """Bytes of weights by the device that stores them."""
        total: dict[str, int] = {}
        for row in self.assignments:
            total[row.home] = total.get(row.home, 0) + row.nbytes
        return total

    def validate(self, graph: TaskGraph) -> None:
        """Raises InvalidInput unless the schedule covers exactly the graph's tasks on devices that can compute.

        That what is assigned also fits is asked by `check_memory`."""
        if missing := graph.rows.keys() - self.rows.keys():
            raise InvalidInput(
                f"the schedule leaves {_some(missing)} of {graph.name} without a device; give each task one"
            )
        if extra := self.rows.keys() - graph.rows.keys():
            raise InvalidInput(
                f"the schedule names {_some(extra)}, which {graph.name} does not have; "
                f"was it made for {self.model.name}?"
            )
        if len(self.rows) != len(self.assignments):
            twice = [task for task, count in Counter(row.task for row in self.assignments).items() if count > 1]
            raise InvalidInput(f"the schedule assigns {_some(twice)} twice; replicas of a page are not supported yet")
        for where in {(row.device, row.home) for row in self.assignments}:
            if problem := self._problem(*where):
                first = next(row.task for row in self.assignments if (row.device, row.home) == where)
                raise InvalidInput(f"{first} is {problem}")

    def _problem(self, device: str, home: str) -> str:
        """Why nothing can be computed on `device` with its weights at `home`; "" if it can."""
        spec = self.topology.device(device)
        if not spec.can_compute or not spec.usable:
            able, why = ", ".join(d.name for d in self.topology.compute_devices), spec.why_not_usable or spec.kind
            return f"placed on {device}, which cannot compute: {why}; devices that can: {able or 'none'}"
        if home == device:
            return ""
        stored, origin = f"stored on {home} and computed on {device}", self.topology.device(home)
        if spec.kind == "CPU" and origin.kind == "DISK":
            if self.paging is None:
                return f"{stored}; paging is not planned here, store it where it is computed"
            if (device, home) != (self.paging.device, self.paging.disk):
                between = f"{self.paging.disk} and {self.paging.device}"
                return f"{stored}; paging is between {between} only, store it where it is computed"
        elif not origin.usable:
            return f"{stored}; {home} cannot be used: {origin.why_not_usable or origin.kind}"
        elif not memory.can_stream(self.topology, home, device):
            return f"{stored}; no way from {home} is known: declare a link, or store it where it is computed"
        return ""

    def check_memory(self, graph: TaskGraph, workload: Workload | None = None) -> None:
        """Raises OutOfMemory, with the figures, if some device cannot hold what it is given."""
        self.validate(graph)
        memory.check_memory(self, graph, workload or self.workload)

    def explain(self, name: str) -> str:
        """Why a task or page is where it is, in one line."""
        rows = [row for row in self.assignments if row.task == name or row.task.startswith(name + ".")]
        if not rows:
            raise InvalidInput(
                f"the schedule of {self.model.name} has nothing named {name}; names are like {_examples(self.rows)}"
            )
        devices = sorted({row.device for row in rows})
        size = format_bytes(sum(row.nbytes for row in rows))
        beaten = [f"{c.name} ({c.why_not})" for c in self.candidates if c.why_not and c.feasible]
        only = "; no other plan was possible" if self.candidates else ""
        over = f"; preferred over {', '.join(beaten)}" if beaten else only
        return f"{name}: {size} on {', '.join(devices)}, placed by {self.policy}{over}"

    def with_topology(self, topology: Topology) -> Schedule:
        return replace(self, topology=topology)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object that `ciuic plan --json` prints."""
        return schedule_json.schedule_to_dict(self)

    def to_json(self, path: str | Path | None = None) -> str:
        text = json.dumps(self.to_dict(), indent=1)
        if path is not None:
            write_whole(path, text + "\n")
        return text

    def to_html(
        self, path: str | Path, forecast: Trace | None = None, actual: Trace | None = None,
        graph: TaskGraph | None = None,
    ) -> None:  # fmt: skip
        """One page that opens anywhere, with its traces as a chart; `graph` tells the KV cache from working memory."""
        write_whole(path, schedule_html.schedule_html(self, forecast, actual, graph).encode("utf-8", "replace"))

    @staticmethod
    def from_dict(data: Any, source: str = "the schedule") -> Schedule:
        """Raises InvalidInput for anything that `to_dict` would not have written."""
        return Schedule(**schedule_json.read_schedule(data, source))

    @staticmethod
    def from_json(path: str | Path) -> Schedule:
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise InvalidInput(f"cannot read schedule {path}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise InvalidInput(f"schedule {path} is not JSON: {error}") from error
        return Schedule.from_dict(data, f"schedule {path}")


def _some(names: Iterable[str]) -> str:
    every = sorted(names)
    first = ", ".join(every[:3])
    return first if len(every) <= 3 else f"{first} and {len(every) - 3} more"


def _examples(names: Iterable[str]) -> str:
    every = list(names)
    return ", ".join(dict.fromkeys([every[0], every[len(every) // 2], every[-1]]))
