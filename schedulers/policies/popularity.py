"""Experts by popularity: what every token needs on one fast device, hot experts on fast ones, cold ones where room is.
Knows expected picks only; which experts a run really asks for is the cache policies' business.

Exchange argument: take pages of equal size, and two experts of which the hotter one, of uses u, is on the device that
takes longer for a use, t, and the colder one, u' <= u, on the faster one, t' < t. Swapped, both still fit, and a step's
expected time changes by (u - u')(t' - t) <= 0. So nothing beats giving the fastest room to the hottest experts; with
pages of unequal size it is the usual greedy of the knapsack, within one page per device."""

from __future__ import annotations

from collections.abc import Iterable

from ciuic_runtime.devices.errors import OutOfMemory
from ciuic_runtime.devices.spec import Topology
from ciuic_runtime.devices.units import format_bytes
from ciuic_runtime.schedulers.cost import CostModel
from ciuic_runtime.schedulers.draft import NOTHING, Fixed, ScheduleDraft
from ciuic_runtime.schedulers.graph import Task, TaskGraph
from ciuic_runtime.schedulers.policies.pipeline import usable
from ciuic_runtime.schedulers.schedule import Schedule


def experts_by_popularity(graph: TaskGraph, topology: Topology, cost: CostModel, fixed: Fixed = NOTHING) -> Schedule:
    """Dense tasks on the fastest device that holds all of them, then routed experts, hottest first, each on the fastest
    device that has room for it."""
    draft = ScheduleDraft(graph, topology, cost.workload, fixed)
    devices = [d.name for d in usable(topology, cost)]
    # Step 1: what every token needs
    dense = [task for task in graph if not task.num_experts]
    left = {name: _left(ScheduleDraft(graph, topology, cost.workload, fixed), dense, name) for name in devices}
    home = next((name for name in devices if left[name] >= 0), None)
    if home is None:
        largest = max(devices, key=lambda name: left[name])
        raise _too_large(f"the dense tasks of {graph.name} need", draft.room[largest] - left[largest], draft)
    for task in dense:
        draft.place(task, home)
    # Step 2: routed experts, by expected picks
    for row in by_popularity(graph):
        if row in fixed:
            continue
        device = next((name for name in devices if draft.row_need(row, name) <= draft.room[name]), None)
        if device is None:
            raise _too_large(f"{row} of {graph.name} needs", draft.row_need(row, devices[0]), draft)
        draft.put(row, device)
    schedule = draft.freeze("experts by popularity")
    schedule.check_memory(graph)  # the rules alone may ask for too much
    return schedule


def _left(draft: ScheduleDraft, tasks: Iterable[Task], device: str) -> float:
    """Bytes of room that these tasks leave there, pages that they share counted once."""
    for task in tasks:
        draft.place(task, device)
    return draft.room[device]


def by_popularity(graph: TaskGraph) -> list[str]:
    """Rows of all routed experts, the most used first; equally used ones in the order of the graph."""
    experts = [(picks, row) for task in graph if task.num_experts for row, picks in _picks(task)]
    return [row for _, row in sorted(experts, key=lambda one: -one[0])]


def _picks(task: Task) -> list[tuple[str, float]]:
    """(row, expected picks per token) of each expert."""
    even = (task.experts_per_token / task.num_experts,) * task.num_experts
    return [(row, picks) for (row, _), picks in zip(task.rows, task.popularity or even, strict=True)]


def _too_large(what: str, need: float, draft: ScheduleDraft) -> OutOfMemory:
    room = {name: max(0.0, left) for name, left in draft.room.items()}
    there = ", ".join(f"{format_bytes(left)} on {name}" for name, left in room.items())
    return OutOfMemory(
        f"{what} {format_bytes(need)} with its cache on one device; beside working memory and what is placed "
        f"already there is {there}; try more memory, a smaller format, a shorter context or a smaller batch",
        need=int(need), capacity=int(max(room.values())),
    )  # fmt: skip
