"""What a schedule needs on each device, and whether that is there: weights, KV cache, working memory.
Counts pages of the graph, not the sizes that a schedule file states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ciuic_runtime.devices.errors import InvalidInput, OutOfMemory
from ciuic_runtime.devices.spec import DeviceSpec, Topology
from ciuic_runtime.devices.units import format_bytes, parse_bytes
from ciuic_runtime.schedulers.graph import TaskGraph
from ciuic_runtime.schedulers.workload import Workload

if TYPE_CHECKING:
    from ciuic_runtime.schedulers.assignment import Paging
    from ciuic_runtime.schedulers.schedule import Schedule


# Of a page's size, on a device that computes with pages stored elsewhere: one is computed with while the next arrives.
STREAM_SLOTS = 2


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes on one device."""

    weights: int
    cache: int
    working: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.working


def capacity(device: DeviceSpec) -> int:
    """Bytes that a plan may use: what this process may have at all, and of that what is free."""
    free = device.memory_free_bytes
    return device.memory_bytes if free is None else min(free, device.memory_bytes)


def memory_need(schedule: Schedule, graph: TaskGraph, workload: Workload) -> dict[str, Need]:
    """By device: every page once, where it is stored, and slots for those that come from elsewhere; the cache of the
    whole workload, and working memory where anything is computed. What is on a disk takes no memory there."""
    used, paging = schedule.devices_used(), schedule.paging
    weights, cache = dict.fromkeys(used, 0), dict.fromkeys(used, 0.0)
    disks = {d.name for d in schedule.topology.devices if d.kind == "DISK"}
    held: set[tuple[str, str]] = set()
    rows, shared = schedule.rows, graph.shared_pages
    for row, page in graph.rows.items():
        home = rows[row].home
        if page.name in shared:
            if (page.name, home) in held:
                continue
            held.add((page.name, home))
        if home not in disks:
            weights[home] = weights.get(home, 0) + page.nbytes
    if paging is not None:
        weights[paging.device] = paging.cache_bytes
    for device, nbytes in _largest_streamed(schedule, graph).items():
        weights[device] += STREAM_SLOTS * nbytes
    for task in graph:
        if task.kv_bytes_per_token:
            cache[schedule.device_of(task.name)] += task.kv_bytes_per_token * workload.cache_tokens
    working = int(graph.working_bytes(workload.batch, workload.prompt_tokens, workload.context))
    return {
        name: Need(nbytes, int(cache.get(name, 0)), working if name in used else 0) for name, nbytes in weights.items()
    }


def can_stream(topology: Topology, home: str, device: str) -> bool:
    """Whether weights stored at `home` can be brought to `device` in every pass: over a link that is declared or was
    measured, or from the memory of a CPU or the disk of the device's own node, which are always joined to it."""
    if any((link.src, link.dst) == (home, device) for link in topology.links):
        return True
    return topology.device(home).kind in ("CPU", "DISK") and node_of(home) == node_of(device)


def node_of(device: str) -> str:
    """node1/cuda:0 -> node1; "" for the only node."""
    return device.rpartition("/")[0]


def _largest_streamed(schedule: Schedule, graph: TaskGraph) -> dict[str, int]:
    """By device: the largest page that is computed with there and comes from elsewhere, whole, without a cache."""
    paged = (schedule.paging.device, schedule.paging.disk) if schedule.paging else None
    largest: dict[str, int] = {}
    for row in schedule.assignments:
        if row.home != row.device and (row.device, row.home) != paged:
            page = graph.rows[row.task]
            if not page.row_nbytes:
                largest[row.device] = max(largest.get(row.device, 0), page.nbytes)
    return largest


def check_memory(schedule: Schedule, graph: TaskGraph, workload: Workload) -> None:
    """Raises OutOfMemory, with the figures, for the device that lacks most."""
    if schedule.paging is not None:
        _check_paging(schedule, schedule.paging, graph, workload)
    lacking = [
        (need.total - capacity(schedule.topology.device(name)), name, need)
        for name, need in memory_need(schedule, graph, workload).items()
    ]
    worst, name, need = max(lacking, key=lambda one: one[0])
    if worst > 0:
        room = capacity(schedule.topology.device(name))
        alone = sum(lack > 0 for lack, _, _ in lacking) == 1
        raise OutOfMemory(_does_not_fit(graph, workload, name, need, room, alone), need=need.total, capacity=room)


def _check_paging(schedule: Schedule, paging: Paging, graph: TaskGraph, workload: Workload) -> None:
    """Raises OutOfMemory, with what would do, where not even one page at a time fits."""
    mine = (page for row, page in graph.rows.items() if schedule.rows[row].device == paging.device)
    largest = max((page.nbytes for page in mine if not page.row_nbytes), default=0)
    if paging.cache_bytes >= largest:
        return
    need, room = (
        memory_need(schedule, graph, workload)[paging.device],
        capacity(schedule.topology.device(paging.device)),
    )
    other = need.cache + need.working
    raise OutOfMemory(
        f"{graph.name} needs at least {format_bytes(other + largest)} on {paging.device}, where {format_bytes(room)} "
        f"can be used, even with one page at a time read from {paging.disk} ({format_bytes(largest)} the largest page "
        f"in {graph.format}, {format_bytes(need.cache)} cache and {format_bytes(need.working)} working memory for "
        f"{workload.batch} x {workload.context} tokens); {format_bytes(other + graph.nbytes)} would hold everything; "
        f"try more memory (--memory {paging.device}=...), a shorter context or a smaller batch",
        need=other + largest, capacity=room,
    )  # fmt: skip


def _does_not_fit(graph: TaskGraph, workload: Workload, device: str, need: Need, room: int, alone: bool) -> str:
    """`alone`: no other device lacks anything."""
    lacks = format_bytes(need.total - room)
    more = f"{lacks} more there would do" if alone else f"it lacks {lacks} there, and others lack some too"
    what = (
        f"{graph.name} needs {format_bytes(need.total)} on {device}, where {format_bytes(room)} can be used "
        f"({format_bytes(need.weights)} weights in {graph.format}, {format_bytes(need.cache)} cache and "
        f"{format_bytes(need.working)} working memory for {workload.batch} x {workload.context} tokens)"
    )
    if need.weights < room:
        return f"{what}; {more}, or try a shorter context, a smaller batch, or more memory (--memory {device}=...)"
    return f"{what}; {more}, or try a smaller model or format, or part of it on another device"


def limit_memory(topology: Topology, budgets: Mapping[str, str | int]) -> Topology:
    """The topology with the free memory of the devices that are named cut down to the user's budgets."""
    sizes = {topology.device(name).name: parse_bytes(size) for name, size in budgets.items()}
    return replace(topology, devices=tuple(_limit(d, sizes.get(d.name)) for d in topology.devices))


def _limit(device: DeviceSpec, budget: int | None) -> DeviceSpec:
    available = capacity(device)
    if budget is not None and budget > available:
        raise InvalidInput(
            f"--memory {device.name}={format_bytes(budget)} is more than can be used there "
            f"({format_bytes(available)}); ask for less"
        )
    if not device.can_compute:
        return device
    return replace(device, memory_free_bytes=available if budget is None else budget)
