"""Pipeline partition: the graph's groups cut into contiguous stages over unequal devices with memory limits, exactly.
Knows one pass at a time; how micro-batches overlap in the stages is the simulator's business.

It is the chains-on-chains problem (Pinar and Aykanat, "Fast optimal load balancing algorithms for 1D partitioning",
2004) with processors that differ, links between them, and memory: for a given order of the devices solved by dynamic
programming over (device, groups done), as in PipeDream (Narayanan et al., 2019). Which order is best is NP-hard
(Benoit and Robert, "Mapping pipeline skeletons onto heterogeneous platforms", 2008): few devices are tried in every
order, many in that of their speed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, permutations
from typing import Literal

import numpy as np
import numpy.typing as npt

from ciuic_runtime.devices.errors import InvalidInput, OutOfMemory
from ciuic_runtime.devices.spec import DeviceSpec, Topology
from ciuic_runtime.devices.units import format_bytes
from ciuic_runtime.schedulers.cost import CostModel
from ciuic_runtime.schedulers.draft import NOTHING, Fixed, ScheduleDraft
from ciuic_runtime.schedulers.graph import Step, Task, TaskGraph
from ciuic_runtime.schedulers.memory import capacity
from ciuic_runtime.schedulers.policies.trivial import by_speed, groups
from ciuic_runtime.schedulers.schedule import Schedule

Objective = Literal["latency", "throughput"]
Table = Sequence[Sequence[float]]  # [devices][groups] or [devices][devices]
Shared = Sequence[tuple[int, int, float]]  # (group, later group, bytes that both need and a stage holds once)
Spans = npt.NDArray[np.float64]  # [groups + 1, groups + 1]: of groups i to j - 1
MOST_KINDS = 4  # of devices, up to which every order of them is tried


def pipeline_latency(
    graph: TaskGraph, topology: Topology, cost: CostModel, fixed: Fixed = NOTHING, *, order: Sequence[str] | None = None
) -> Schedule:
    """Stages that take a single pass through all of them the least time."""
    return _pipeline(graph, topology, cost, fixed, order, "latency")


def pipeline_throughput(
    graph: TaskGraph, topology: Topology, cost: CostModel, fixed: Fixed = NOTHING, *, order: Sequence[str] | None = None
) -> Schedule:
    """Stages of which the slowest is as fast as it can be: what counts when micro-batches keep all of them busy."""
    return _pipeline(graph, topology, cost, fixed, order, "throughput")


def partition(
    seconds: Table, nbytes: Table, room: Sequence[float], hop: Table, objective: Objective,
    busy: Sequence[float] = (), shared: Shared = (),
) -> tuple[int, ...] | None:  # fmt: skip
    """Where each device's run of groups ends, devices in the order given; None where no cut fits.

    A device may be left out. A stage takes `hop[src][dst]` for what the stage before hands on and `seconds` for its
    groups. Latency: the sum is least. Throughput: the largest stage is least, with `busy`, which its device spends
    besides; and of such cuts the sum is. O(devices^2 x groups^2), of which numpy does groups^2 at once."""
    # Step 1: what each device would take for each run of groups, from prefix sums
    fits = [held <= most for held, most in zip(_held(nbytes, shared), room, strict=True)]
    stages = [np.where(np.triu(ok, k=1), _spans(mine), np.inf) for ok, mine in zip(fits, seconds, strict=True)]
    besides = busy or [0.0] * len(stages)
    # Step 2: the least bottleneck
    limit = math.inf if objective == "latency" else _chain(stages, hop, besides, None)[0]
    # Step 3: the least sum within it
    return _chain(stages, hop, besides, limit)[1]


def stage_seconds(cuts: Sequence[int], seconds: Table, hop: Table, busy: Sequence[float] = ()) -> list[float]:
    """What each stage of a partition takes; a device that was left out has none."""
    times, start, before = [], 0, None
    for device, end in enumerate(cuts):
        if end > start:
            enters = 0.0 if before is None else hop[before][device]
            times.append((busy[device] if busy else 0.0) + enters + sum(seconds[device][start:end]))
            start, before = end, device
    return times


def shortfall(nbytes: Table, room: Sequence[float], shared: Shared = ()) -> list[float]:
    """How many bytes more each device alone would need for some cut to fit; none or fewer where one does.

    What fits still does without its first or last groups; so the devices before and after take all they can."""
    held, num_groups = _held(nbytes, shared), len(nbytes[0])
    begins, ends = [0], [num_groups]
    for spans, most in zip(held, room, strict=True):
        reach = np.flatnonzero(spans[begins[-1]] <= most)
        begins.append(int(max(reach, default=0)) if most >= 0 else begins[-1])
    for spans, most in zip(reversed(held), reversed(room), strict=True):
        reach = np.flatnonzero(spans[: ends[-1] + 1, ends[-1]] <= most)
        ends.append(int(min(reach, default=num_groups)) if most >= 0 else ends[-1])
    runs = zip(held, begins, reversed(ends[:-1]), room, strict=False)
    return [float(spans[i, max(i, j)]) - most for spans, i, j, most in runs]


@dataclass(frozen=True)
class _Instance:
    """The numbers that a partition is made from."""

    devices: tuple[DeviceSpec, ...]
    seconds: Table
    nbytes: Table
    room: tuple[float, ...]
    hop: Table  # [src][dst]
    busy: tuple[float, ...]  # seconds for what the rules put there
    shared: Shared

    def ordered(self, order: Sequence[int]) -> _Instance:
        return _Instance(
            tuple(self.devices[i] for i in order),
            [self.seconds[i] for i in order],
            [self.nbytes[i] for i in order],
            tuple(self.room[i] for i in order),
            [[self.hop[i][j] for j in order] for i in order],
            tuple(self.busy[i] for i in order),
            self.shared,
        )

    def cut(self, objective: Objective) -> tuple[int, ...] | None:
        return partition(self.seconds, self.nbytes, self.room, self.hop, objective, self.busy, self.shared)

    def value(self, cuts: Sequence[int], objective: Objective) -> float:
        if objective == "latency":
            return sum(stage_seconds(cuts, self.seconds, self.hop))
        return max(stage_seconds(cuts, self.seconds, self.hop, self.busy))


def _pipeline(
    graph: TaskGraph, topology: Topology, cost: CostModel, fixed: Fixed, order: Sequence[str] | None,
    objective: Objective,
) -> Schedule:  # fmt: skip
    draft = ScheduleDraft(graph, topology, cost.workload, fixed)
    devices = usable(topology, cost) if order is None else _given(topology, order)
    instance = _instance(draft, devices, cost, fixed)
    orders = _orders(devices) if order is None else [tuple(range(len(devices)))]
    tried = [instance.ordered(one) for one in orders]
    found = [(one.value(cuts, objective), one, cuts) for one in tried if (cuts := one.cut(objective)) is not None]
    if not found:
        raise _too_large(graph, tried)
    _, best, cuts = min(found, key=lambda one: one[0])
    for device, start, end in zip(best.devices, (0, *cuts), cuts, strict=False):
        for group in groups(graph)[start:end]:
            for task in group:
                draft.place(task, device.name)
    schedule = draft.freeze(f"pipeline for {objective}")
    schedule.check_memory(graph)  # the rules alone may ask for too much
    return schedule


def usable(topology: Topology, cost: CostModel) -> list[DeviceSpec]:
    """Devices that can compute, the fastest first. Raises InvalidInput where there is none."""
    devices = by_speed(topology, cost)
    if not devices:
        reasons = "; ".join(f"{d.name}: {d.why_not_usable or d.kind}" for d in topology.devices)
        raise InvalidInput(f"no device here can compute ({reasons}); name others, or see `ciuic doctor`")
    return devices


def _given(topology: Topology, order: Sequence[str]) -> list[DeviceSpec]:
    able = [d.name for d in topology.compute_devices]
    if not order or len(set(order)) < len(order) or not set(order) <= set(able):
        raise InvalidInput(f"order {list(order)} must name some of {', '.join(able)}, each once")
    return [topology.device(name) for name in order]


def _orders(devices: Sequence[DeviceSpec]) -> list[tuple[int, ...]]:
    """Orders of the devices that are tried, that of their speed first; equal devices stay together."""
    kinds: dict[str, list[int]] = {}
    for i, device in enumerate(devices):
        kinds.setdefault(repr(replace(device, name="", facts={})), []).append(i)
    every = permutations(kinds.values()) if len(kinds) <= MOST_KINDS else [tuple(kinds.values())]
    return [tuple(chain.from_iterable(one)) for one in every]


def _instance(draft: ScheduleDraft, devices: Sequence[DeviceSpec], cost: CostModel, fixed: Fixed) -> _Instance:
    graph, step, names = draft.graph, cost.workload.mean_decode, [d.name for d in devices]
    cut = groups(graph)
    row = graph.hidden_bytes_per_token * step.tokens  # of the residual stream
    known: dict[tuple[int, str], float] = {}  # tasks that are alike take equally long, where no rule tells them apart

    def seconds(task: Task, d: DeviceSpec, rule: str) -> float:
        if fixed:
            return _seconds(task, d, rule, fixed, cost, step)
        if rule:
            return 0.0
        key = graph.shapes[task.name], d.name
        if key not in known:
            known[key] = cost.task(task, d, step).seconds
        return known[key]

    return _Instance(
        tuple(devices),
        [[sum(seconds(t, d, "") for t in group) for group in cut] for d in devices],
        [[draft.need(group, name) for group in cut] for name in names],
        tuple(draft.room[name] for name in names),
        [[cost.transfer(src, dst, row) for dst in names] for src in names],
        tuple(sum(seconds(t, d, d.name) for t in graph) for d in devices),
        _shared(graph, cut, fixed),
    )


def _seconds(task: Task, device: DeviceSpec, rule: str, fixed: Fixed, cost: CostModel, step: Step) -> float:
    """What the rows of a task take on the device that the rules put on `rule` ("": those that they leave open)."""
    rows = [i for i, (row, _) in enumerate(task.rows) if fixed.get(row, "") == rule]
    if not rows:
        return 0.0
    if len(rows) == len(task.rows):
        return cost.task(task, device, step).seconds
    return cost.experts(task, device, step, rows).seconds


def _shared(graph: TaskGraph, cut: Sequence[Sequence[Task]], fixed: Fixed) -> list[tuple[int, int, float]]:
    """Pages that the rows of two groups need (tied embeddings), which a stage holds once."""
    there = {graph.rows[row].name for row in fixed}  # counted by the draft
    last: dict[str, int] = {}
    pairs = []
    for i, group in enumerate(cut):
        for page in (page for task in group for _, page in task.rows if page.name not in there):
            if page.name in last:
                pairs.append((last[page.name], i, float(page.nbytes)))
            last[page.name] = i
    return pairs


def _too_large(graph: TaskGraph, tried: Sequence[_Instance]) -> OutOfMemory:
    """What would do: the fewest bytes more on one device, whichever and in whatever order."""
    lacking = [
        (lack, device)
        for one in tried
        for lack, device in zip(shortfall(one.nbytes, one.room, one.shared), one.devices, strict=True)
    ]
    lack, device = min(lacking, key=lambda one: one[0])
    more, room = math.ceil(lack), capacity(device)
    there = ", ".join(f"{format_bytes(capacity(d))} on {d.name}" for d in tried[0].devices)
    return OutOfMemory(
        f"no cut of {graph.name} into contiguous stages fits in {there}, with cache and working memory; "
        f"{format_bytes(more)} ({more} bytes) more on {device.name} would do; try that, a shorter context, a smaller "
        "batch, or a plan that splits layers",
        need=room + more, capacity=room,
    )  # fmt: skip


def _chain(
    stages: Sequence[Spans], hop: Table, busy: Sequence[float], limit: float | None
) -> tuple[float, tuple[int, ...] | None]:
    """The least bottleneck and its cuts; with a limit for it, the least sum and its cuts."""
    num_devices, end = len(stages), len(stages[0]) - 1
    best = np.full((num_devices, end + 1), np.inf)  # of groups 0 to j - 1, the last stage being on d
    came = np.zeros((num_devices, end + 1, 2), dtype=int)  # device of the stage before, and where it ends
    for d, stage in enumerate(stages):
        for e in range(-1, d):  # -1: there is none before
            before = best[e] if e >= 0 else np.where(np.arange(end + 1) == 0, 0.0, np.inf)
            alone = stage + (hop[e][d] if e >= 0 else 0.0)
            if limit is None:
                total = np.maximum(before[:, None], busy[d] + alone)  # [i, j]
            else:
                total = before[:, None] + np.where(busy[d] + alone <= limit, alone, np.inf)
            start = total.argmin(axis=0)
            least = total[start, np.arange(end + 1)]
            better = least < best[d]
            best[d, better] = least[better]
            came[d, better] = np.stack([np.full(end + 1, e), start], axis=1)[better]
    last = int(best[:, end].argmin())
    if math.isinf(value := float(best[last, end])):
        return value, None
    # Trace back
    cuts, d, j = [0] * num_devices, last, end
    cuts[last:] = [end] * (num_devices - last)
    while d >= 0:
        e, i = (int(x) for x in came[d, j])
        cuts[max(e, 0) : d] = [i] * (d - max(e, 0))
        d, j = e, i
    return value, tuple(cuts)


def _spans(values: Sequence[float]) -> Spans:
    """[i, j]: the sum of values i to j - 1."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    spans: Spans = sums[None, :] - sums[:, None]
    return spans


def _held(nbytes: Table, shared: Shared) -> list[Spans]:
    """By device: the bytes of groups i to j - 1, what two of them share counted once."""
    held = [_spans(mine) for mine in nbytes]
    for first, second, common in shared:
        for spans in held:
            spans[: first + 1, second + 1 :] -= common
    return held
