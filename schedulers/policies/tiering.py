"""Tiering: which weights are pinned where and which are streamed, as a linear program rounded to whole pages.
Knows one decode step on a GPU, a CPU (the host) and a disk; what the activations cost that go to and fro, and how well
copies overlap, is the simulator's business.

Pages that are alike are a class c of n_c, an option o is (computed on, stored on): (gpu, gpu), (gpu, host),
(gpu, disk), (host, host), (host, disk). With x_co pages of class c in option o (after FlexGen, Sheng et al., 2023):

    minimise    T
    subject to  sum_o x_co = n_c                                          for every class
                sum_co x_co seconds_c(computed on) <= T                   one stream of tokens: computing adds up
                sum_co x_co moved_c [o uses r] <= bandwidth_r T           for the host's link and for the disk
                sum_co x_co (nbytes_c [stored on d] + cache_c [computed on d]) <= room_d - slots_d s_d
                x_co >= 0, and x_co = 0 where o streams through d and a page of c is larger than s_d

`moved` is what a step is expected to read of a page: all of it, of a routed expert the share of steps that pick it, of
a table its tokens' rows. What streams goes through slots of the size s of the largest page that does: two where it is
computed, one on the host if it comes from a disk. s is not linear: the program is solved for every size on the GPU, and
on the host for none and for the largest. Of equal T, the least sum of the left sides is taken. At a vertex no more
classes have fractions than there are rows below the first kind, so rounding, by the same program over the whole numbers
beside the vertex, decides on few pages."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, product

import numpy as np
import numpy.typing as npt

from ciuic_runtime.devices.errors import OutOfMemory
from ciuic_runtime.devices.spec import Topology
from ciuic_runtime.devices.units import format_bytes
from ciuic_runtime.schedulers.assignment import Paging
from ciuic_runtime.schedulers.cost import CostModel
from ciuic_runtime.schedulers.draft import NOTHING, Fixed, schedule_of
from ciuic_runtime.schedulers.graph import Task, TaskGraph
from ciuic_runtime.schedulers.memory import STREAM_SLOTS, can_stream, capacity
from ciuic_runtime.schedulers.policies.pipeline import usable
from ciuic_runtime.schedulers.schedule import Schedule

Array = npt.NDArray[np.float64]
EVEN = 1e-6  # of a page: what a solver's whole number may be off
NODES = 10_000  # of a search for whole pages, so that a hard case ends


@dataclass(frozen=True, slots=True)
class Option:
    device: str  # computes
    home: str  # stores
    route: tuple[str, ...] = ()  # the link and the disk that what is read comes over
    through: tuple[str, ...] = ()  # the devices that need slots for it

    @property
    def paged(self) -> bool:
        """The host itself reads it from the disk."""
        return self.route == (self.home,)


@dataclass(frozen=True, slots=True)
class PageClass:
    """Pages (or bundles of pages that stay together) that are alike in all that counts here."""

    count: int
    nbytes: float
    moved: float  # bytes that a step is expected to read of one
    slot: int  # bytes of its largest page that is read whole
    cache_bytes: float  # KV cache that comes with computing it
    seconds: tuple[tuple[str, float], ...]  # (device that may compute it, what one takes there in a step)


@dataclass(frozen=True, slots=True)
class Tiers:
    """What the pages share."""

    options: tuple[Option, ...]
    room: Mapping[str, float]  # device -> bytes, beside working memory; the GPU first
    bandwidth: Mapping[str, float]  # link or disk -> bytes/s
    slots: Mapping[str, int]  # device -> slots for what streams through it, if anything does
    at_once: bool = False  # passes follow one another so closely that every device computes all the time


@dataclass(frozen=True)
class Tiering:
    bound: float  # s per step, of the linear program
    seconds: float  # s per step, of whole pages
    counts: Array  # [classes, options]
    relaxed: Array  # [classes, options] what was rounded


def tiering(graph: TaskGraph, topology: Topology, cost: CostModel, fixed: Fixed = NOTHING) -> Schedule:
    """On the fastest GPU, the CPU beside it and a disk, as far as they are there. The dense tasks of a layer stay
    together; rules say where a row is computed, not where it is stored.

    Where the CPU computes with pages from the disk it has a cache (`paging`), which all routed experts that it computes
    share; a GPU streams without one, and what comes from the disk does so by way of the host."""
    tiers = _tiers(topology, cost, graph, fixed)
    alike = alike_pages(graph, tiers, cost, fixed)
    found = solve(list(alike), tiers)
    if found is None:
        raise _too_large(graph, tiers, alike)
    schedule = _schedule(graph, topology, cost, tiers, alike, found.counts)
    schedule.check_memory(graph)
    return schedule


def tiering_bound(graph: TaskGraph, topology: Topology, cost: CostModel, fixed: Fixed = NOTHING) -> float:
    """Seconds per decode step that no tiering of whole pages can beat, in this model; infinite where nothing fits."""
    tiers = _tiers(topology, cost, graph, fixed)
    return relax(list(alike_pages(graph, tiers, cost, fixed)), tiers)


def relax(classes: Sequence[PageClass], tiers: Tiers) -> float:
    """T of the linear program with the best size of slots; infinite where none has a solution."""
    program = _Program(classes, tiers)
    return min((t for sizes in program.sizes if (t := program.relax(sizes)) is not None), default=math.inf)


def solve(classes: Sequence[PageClass], tiers: Tiers) -> Tiering | None:
    """The best over all sizes of slots; None where pages do not fit, or whole ones do not."""
    program = _Program(classes, tiers)
    bounds = [(t, sizes) for sizes in program.sizes if (t := program.relax(sizes)) is not None]
    best: Tiering | None = None
    # Of equal T the smallest slots first
    for bound, sizes in sorted(bounds, key=lambda one: (float(f"{one[0]:.9g}"), one[1])):
        if best is not None and bound >= best.seconds * (1 - EVEN):
            break
        found = program.whole(sizes, bound)
        if found is not None and (best is None or found.seconds < best.seconds * (1 - EVEN)):
            best = found
    return None if best is None else replace(best, bound=min(bounds)[0])


class _Program:
    """The coefficients, as matrices with a column for each (class, option)."""

    def __init__(self, classes: Sequence[PageClass], tiers: Tiers) -> None:
        columns = [(c, o) for c in classes for o in tiers.options]
        self.shape = len(classes), len(tiers.options)
        self.count = np.array([c.count for c in classes])
        self.may = np.array([o.device in dict(c.seconds) for c, o in columns], dtype=bool)
        slot = [[c.slot * (d in o.through) for c, o in columns] for d in tiers.room]
        self.slot = np.array(slot, dtype=int).reshape(len(tiers.room), len(columns))  # [devices, columns], bytes
        every = sorted({0, *(c.slot for c in classes)})
        used = [any(d in o.through for o in tiers.options) for d in tiers.room]
        choices = [(every if i == 0 else (0, every[-1])) if used[i] else (0,) for i in range(len(used))]
        self.sizes = list(product(*choices))
        self.each = np.kron(np.eye(len(classes)), np.ones(len(tiers.options)))  # [classes, columns]
        together = [{d} for d in tiers.room] if tiers.at_once else [{o.device for o in tiers.options}]
        computes = [[dict(c.seconds).get(o.device, 0.0) * (o.device in ds) for c, o in columns] for ds in together]
        reads = [[c.moved / rate * (way in o.route) for c, o in columns] for way, rate in tiers.bandwidth.items()]
        self.loads = np.array([*computes, *reads])  # [resources, columns], s
        held = [[c.nbytes * (o.home == d) + c.cache_bytes * (o.device == d) for c, o in columns] for d in tiers.room]
        self.held = np.array(held, dtype=float).reshape(len(tiers.room), len(columns))  # [devices, columns], bytes
        self.room = np.array(list(tiers.room.values()), dtype=float)
        self.slots = np.array([tiers.slots.get(d, 0) for d in tiers.room])

    def relax(self, sizes: Sequence[int]) -> float | None:
        """The least T for these sizes of slots; None where nothing fits."""
        found = self._minimise(sizes, 1.0, 0.0)
        return None if found is None else found[0]

    def whole(self, sizes: Sequence[int], bound: float) -> Tiering | None:
        """Of the x that reach the bound, that with the least sum of loads, each number rounded up or down; further off
        only where that does not fit, or takes longer by more than one page. None where no whole pages fit."""
        relaxed = self._minimise(sizes, 0.0, 1.0, limit=bound * (1 + 1e-9)) or self._minimise(sizes, 1.0, 0.0)
        assert relaxed is not None, f"slots of {sizes}: {bound} was reached before"
        best: Tiering | None = None
        for off in (0.0, 1.0, math.inf):
            box = np.floor(relaxed[1] + EVEN) - off, np.ceil(relaxed[1] - EVEN) + off
            found = self._minimise(sizes, 1.0, EVEN, box=box)
            counts = np.rint(found[1]) if found else relaxed[1]
            if found is None or (self.held @ counts.ravel() > self._free(sizes)).any():
                continue
            seconds = float((self.loads @ counts.ravel()).max())
            if best is None or seconds < best.seconds:
                best = Tiering(bound, seconds, counts, relaxed[1])
            if best.seconds <= bound + self.loads.max():
                break
        return best

    def _free(self, sizes: Sequence[int]) -> Array:
        free: Array = self.room - self.slots * np.array(sizes, dtype=int)
        return free

    def _minimise(
        self, sizes: Sequence[int], per_T: float, per_load: float, limit: float = math.inf,
        box: tuple[Array, Array] | None = None,
    ) -> tuple[float, Array] | None:  # fmt: skip
        """T and x that make per_T x T + per_load x (sum of all loads) least, with T <= limit; within a box: in whole
        numbers."""
        from scipy.optimize import Bounds, LinearConstraint, milp

        # The solver's tolerances are absolute: time in units of the largest load, memory in those of the smallest page
        second, byte = self.loads.max(initial=0.0) or 1.0, self.held[self.held > 0].min(initial=np.inf)
        loads, room = self.loads / second, self._free(sizes) / byte
        low, high = box or (np.zeros(self.shape), np.full(self.shape, np.inf))
        high = np.where(self.may & (self.slot <= np.array(sizes, dtype=int)[:, None]).all(axis=0), high.ravel(), 0.0)
        if (self.each @ (high > 0) == 0).any():
            return None
        result = milp(
            np.append(per_load * loads.sum(axis=0), per_T),
            constraints=[
                LinearConstraint(np.pad(self.each, ((0, 0), (0, 1))), self.count, self.count),
                LinearConstraint(np.pad(loads, ((0, 0), (0, 1)), constant_values=-1.0), -np.inf, 0.0),
                LinearConstraint(np.pad(self.held / byte, ((0, 0), (0, 1))), -np.inf, room),
            ],
            bounds=Bounds(np.append(low.ravel().clip(0.0, high), 0.0), np.append(high, limit / second)),
            integrality=np.append(np.full(high.shape, float(box is not None)), 0.0),
            options={"node_limit": NODES},
        )
        return None if result.x is None else (float(result.x[-1] * second), result.x[:-1].reshape(self.shape))


# From a graph to the program and back


def _tiers(topology: Topology, cost: CostModel, graph: TaskGraph, fixed: Fixed) -> Tiers:
    """The fastest GPU, the CPU that is joined to it, the disk that is joined to that, and where else rules compute."""
    working = graph.working_bytes(cost.workload.batch, cost.workload.prompt_tokens, cost.workload.context)
    room = {d.name: capacity(d) - working for d in usable(topology, cost)}
    able = [topology.device(name) for name, left in room.items() if left > 0]
    gpu = next((d.name for d in able if d.kind != "CPU"), "")
    cpus = [d.name for d in able if d.kind == "CPU"]
    host = min(cpus, key=lambda d: not (gpu and can_stream(topology, d, gpu)), default="")
    disk = next((d.name for d in topology.by_kind("DISK") if host and can_stream(topology, d.name, host)), "")
    link = f"{host} -> {gpu}"
    options = [
        *([Option(gpu, gpu)] if gpu else []),
        *([Option(gpu, host, (link,), (gpu,))] if gpu and host and can_stream(topology, host, gpu) else []),
        *([Option(gpu, disk, (link, disk), (gpu, host))] if gpu and disk and can_stream(topology, disk, gpu) else []),
        *([Option(host, host)] if host else []),
        *([Option(host, disk, (disk,), (host,))] if disk else []),
        *(Option(name, name) for name in dict.fromkeys(fixed.values()) if name not in (gpu, host)),
    ]
    used = {way for option in options for way in option.route}
    ends = {link: (host, gpu), disk: (disk, host)}
    return Tiers(
        tuple(options),
        {name: room[name] for name in (gpu, host) if name},
        {way: topology.link(*ends[way]).bandwidth for way in ends if way in used},
        {gpu: STREAM_SLOTS, host: 1 if disk else 0},
    )


def alike_pages(
    graph: TaskGraph, tiers: Tiers, cost: CostModel, fixed: Fixed = NOTHING
) -> dict[PageClass, list[tuple[str, ...]]]:
    """The classes, each with the rows of each of its pages or bundles, in the order of the graph."""
    found: dict[PageClass, list[tuple[str, ...]]] = {}
    for rule, tasks in _dense(graph, fixed):
        one = _dense_class(tasks, [rule] if rule else list(tiers.room), cost)
        found.setdefault(one, []).append(tuple(task.name for task in tasks))
    for task in (task for task in graph if task.num_experts):
        rates = _rates(task, {*tiers.room, *fixed.values()}, cost)
        known: dict[tuple[str, float], PageClass] = {}
        for e, page in enumerate(task.pages):
            rule, liked = fixed.get(page.name, ""), task.popularity[e] if task.popularity else 0.0
            if (rule, liked) not in known:
                there = {d: rates[d] for d in ([rule] if rule else tiers.room)}
                known[rule, liked] = _expert_class(task, e, there, cost)
            found.setdefault(known[rule, liked], []).append((page.name,))
    return {replace(one, count=len(rows)): rows for one, rows in found.items()}


def _dense(graph: TaskGraph, fixed: Fixed) -> list[tuple[str, list[Task]]]:
    """What every pass needs, in bundles that rules do not divide: the tasks of a layer, and what shares a page."""
    bundles: list[tuple[str, list[Task]]] = []
    for _, run in groupby((task for task in graph if not task.num_experts), key=lambda task: task.layer):
        tasks = list(run)
        for rule in dict.fromkeys(fixed.get(task.name, "") for task in tasks):
            mine = [task for task in tasks if fixed.get(task.name, "") == rule]
            pages = {page.name for task in mine for page in task.pages}
            same = [b for b in bundles if b[0] == rule and pages & {p.name for task in b[1] for p in task.pages}]
            bundles = [b for b in bundles if b not in same]
            bundles.append((rule, [task for b in same for task in b[1]] + mine))
    return bundles


def _dense_class(tasks: Sequence[Task], devices: Sequence[str], cost: CostModel) -> PageClass:
    step, pages = cost.workload.mean_decode, {page.name: page for task in tasks for page in task.pages}.values()
    return PageClass(
        count=1,
        nbytes=sum(page.nbytes for page in pages),
        moved=sum(min(page.nbytes, (page.row_nbytes or page.nbytes) * step.tokens) for page in pages),
        slot=max((page.nbytes for page in pages if not page.row_nbytes), default=0),
        cache_bytes=sum(task.kv_bytes_per_token for task in tasks) * cost.workload.cache_tokens,
        seconds=tuple(
            (name, sum(cost.task(task, cost.topology.device(name), step).seconds for task in tasks)) for name in devices
        ),
    )


def _expert_class(task: Task, expert: int, rates: Mapping[str, float], cost: CostModel) -> PageClass:
    """One routed expert. Popularities are taken to two digits, which is as well as they are known: thousands of experts
    are then some hundred classes."""
    page, tokens = task.pages[expert], cost.workload.mean_decode.tokens
    uses = _rounded(task.expected_experts(tokens, [expert]), task)
    seconds = tuple((name, uses * rate) for name, rate in rates.items())
    return PageClass(1, page.nbytes, uses * page.nbytes, page.nbytes, 0.0, seconds)


def _rates(task: Task, devices: Iterable[str], cost: CostModel) -> dict[str, float]:
    """By device: seconds of a layer's routed experts for each that a step is expected to touch."""
    step, every = cost.workload.mean_decode, range(task.num_experts)
    touched = task.expected_experts(step.tokens) or 1.0
    seconds = {name: cost.experts(task, cost.topology.device(name), step, every).seconds for name in devices}
    return {name: _rounded(value / touched, task) for name, value in seconds.items()}


def _rounded(value: float, task: Task) -> float:
    return float(f"{value:.2g}") if task.popularity else value


def _schedule(
    graph: TaskGraph, topology: Topology, cost: CostModel, tiers: Tiers,
    alike: Mapping[PageClass, list[tuple[str, ...]]], counts: Array,
) -> Schedule:  # fmt: skip
    # Step 1: pages of a class to options, both in order
    where: dict[str, Option] = {}
    for row_counts, bundles in zip(counts, alike.values(), strict=True):
        each = [option for option, count in zip(tiers.options, row_counts, strict=True) for _ in range(round(count))]
        where |= {row: option for option, bundle in zip(each, bundles, strict=True) for row in bundle}
    # Step 2: what a CPU reads from a disk comes through a cache, which all routed experts that it computes share
    paged = next((option for option in where.values() if option.paged), None)
    if paged is not None:
        for row in graph.rows.keys() - graph.by_name.keys():
            if where[row].device == paged.device:
                where[row] = paged
    # Step 3: rows by where they are stored, then where they are computed
    stored = schedule_of(graph, topology, cost.workload, {row: option.home for row, option in where.items()}, "tiering")
    rows = tuple(replace(row, device=where[row.task].device) for row in stored.assignments)
    paging = _paging(graph, cost, tiers, where, paged) if paged else None
    return replace(stored, assignments=rows, paging=paging)


def _paging(graph: TaskGraph, cost: CostModel, tiers: Tiers, where: Mapping[str, Option], paged: Option) -> Paging:
    """All the room of the CPU that the KV cache leaves, as far as there are pages for it."""
    host = paged.device
    cache = sum(t.kv_bytes_per_token for t in graph if not t.num_experts and where[t.name].device == host)
    pages = {graph.rows[row] for row, option in where.items() if host in (option.device, option.home)}
    room = int(tiers.room[host] - cache * cost.workload.cache_tokens)
    return Paging(host, paged.home, min(room, sum(page.nbytes for page in pages)))


def _too_large(graph: TaskGraph, tiers: Tiers, classes: Iterable[PageClass]) -> OutOfMemory:
    need = math.ceil(sum(c.count * (c.nbytes + c.cache_bytes) for c in classes))
    room = math.floor(sum(tiers.room.values()))
    there = ", ".join(f"{format_bytes(left)} on {name}" for name, left in tiers.room.items()) or "nothing anywhere"
    return OutOfMemory(
        f"{graph.name} has {format_bytes(need)} of weights in {graph.format} and cache to store, and beside working "
        f"memory there is {there}: no tiering of whole pages fits; try more memory, a shorter context, a smaller "
        "batch, or a disk to stream from",
        need=need, capacity=room,
    )  # fmt: skip
