"""What every pass of a schedule does, whatever its size: tasks where they are computed, values copied where they are
needed, pages that have to come from elsewhere. Knows the order of the local executor; times nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ciuic_runtime.schedulers.graph import Step, Task, TaskGraph
from ciuic_runtime.schedulers.memory import node_of
from ciuic_runtime.schedulers.schedule import Schedule


@dataclass(frozen=True, slots=True)
class Source:
    """Pages of a task that are stored elsewhere than they are computed with."""

    home: str
    nbytes: int  # of a page
    experts: tuple[int, ...] = ()  # whose pages they are
    row_nbytes: int = 0  # of a table whose rows can be had one by one


@dataclass(frozen=True, slots=True)
class Op:
    """One thing that every pass does, whatever its size."""

    task: Task
    device: str  # computes, or receives what is copied
    part: Literal["whole", "experts", "combine", "output", "rows"] = "whole"  # output, rows: a copy
    src: str = ""  # of a copy
    experts: tuple[int, ...] = ()  # those of this device, where others have the rest
    number: int = 0  # of its cost: equal numbers take equally long
    attends: bool = False  # whether that depends on the context
    sources: tuple[Source, ...] = ()
    paged: bool = False
    apart: bool = False  # it, or what comes after it, waits for pages: others have to know when it begins

    def copied(self, step: Step) -> float:
        """Bytes."""
        if self.part == "rows":
            rows = step.tokens * self.task.experts_per_token * self.task.share(self.experts)
            return rows * self.task.output_bytes_per_token
        return self.task.output_bytes_per_token * self.task.work(step.phase).rows(step)


Program = tuple[Op, ...]


def program_of(schedule: Schedule, graph: TaskGraph) -> Program:
    """A pass in the order of the graph: each value is copied to a device the first time it is needed there."""
    ops: list[Op] = []
    numbers: dict[tuple[object, ...], int] = {}
    shapes = graph.shapes
    where: dict[str, set[str]] = {}  # task -> devices that have its output

    def fetch(names: Iterable[str], device: str) -> None:
        for name in names:
            if device not in where[name]:
                ops.append(Op(graph.by_name[name], device, "output", schedule.device_of(name)))
                where[name].add(device)

    def compute(task: Task, device: str, part: Literal["whole", "experts", "combine"], experts: Sequence[int]) -> None:
        works = (task.prefill, task.decode)
        key = (shapes[task.name], device, part, tuple(experts) if part == "experts" else ())
        attends = any(w.flops_per_pair or w.flops_per_position or w.bytes_per_position for w in works)
        paged = schedule.paging is not None and device == schedule.paging.device and part != "combine"
        sources = sources_of(schedule, task, device, experts) if part != "combine" else ()
        number = numbers.setdefault(key, len(numbers))
        ops.append(Op(task, device, part, "", tuple(experts), number, attends, sources, paged))

    for task in graph:
        home = schedule.device_of(task.name)
        spread = _experts_by_device(schedule, task) if task.num_experts else {}
        if spread.keys() <= {home}:
            fetch(task.after, home)
            compute(task, home, "whole", spread.get(home, ()))
        else:
            for device, experts in spread.items():
                fetch(task.after[:2], device)
                compute(task, device, "experts", experts)
                if device != home:
                    ops.append(Op(task, home, "rows", device, tuple(experts)))
            fetch(task.after[1:], home)
            compute(task, home, "combine", ())
        where[task.name] = {home}
    if (host := host_of(schedule, graph)) is not None:
        fetch((graph.tasks[-1].name,), host)
    waits = [bool(op.sources) or op.paged for op in ops] + [False]
    return tuple(replace(op, apart=True) if waits[i] or waits[i + 1] else op for i, op in enumerate(ops))


def host_of(schedule: Schedule, graph: TaskGraph) -> str | None:
    """Where tokens are sampled: a CPU of the node that the last task is on."""
    node, kind = node_of(schedule.device_of(graph.tasks[-1].name)), {d.name: d.kind for d in schedule.topology.devices}
    return next((n for n in schedule.devices_used() if kind[n] == "CPU" and node_of(n) == node), None)


def _experts_by_device(schedule: Schedule, task: Task) -> dict[str, list[int]]:
    spread: dict[str, list[int]] = {}
    for expert, device in enumerate(schedule.expert_devices(task)):
        spread.setdefault(device, []).append(expert)
    return spread


def sources_of(schedule: Schedule, task: Task, device: str, experts: Sequence[int]) -> tuple[Source, ...]:
    """What has to come to `device` in every pass, by where it is stored; what is paged is not among it."""
    paging, page = schedule.paging, task.pages[0]
    paged = (paging.device, paging.disk) if paging else None
    if not task.num_experts:
        home = schedule.rows[task.name].home
        kept = home == device or (device, home) == paged
        return () if kept else (Source(home, page.nbytes, row_nbytes=page.row_nbytes),)
    by_home: dict[str, list[int]] = {}
    for expert in experts:
        home = schedule.rows[task.pages[expert].name].home
        if home != device and (device, home) != paged:
            by_home.setdefault(home, []).append(expert)
    return tuple(Source(home, page.nbytes, tuple(those)) for home, those in by_home.items())
