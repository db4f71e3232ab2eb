"""The plans that need no thought: everything on one device, fastest first, split by speed.
They are always among the candidates, so that no clever plan is chosen that loses to one of them."""

from __future__ import annotations

from ciuic_runtime.devices.spec import DeviceSpec, Topology
from ciuic_runtime.schedulers.cost import CostModel
from ciuic_runtime.schedulers.graph import Layer, Task, TaskGraph
from ciuic_runtime.schedulers.schedule import Schedule, ScheduleDraft


def all_on(device: str, graph: TaskGraph, topology: Topology, cost: CostModel) -> Schedule:
    """Everything on one device, whether it fits or not."""
    draft = ScheduleDraft(graph, topology, cost.workload)
    for task in graph:
        draft.place(task, device)
    return draft.freeze(f"all on {device}")


def fastest_first(graph: TaskGraph, topology: Topology, cost: CostModel) -> Schedule:
    """Whole layers in order, on the fastest device that has room left; the last one takes what is left over."""
    draft = ScheduleDraft(graph, topology, cost.workload)
    devices = by_speed(topology, cost)
    reserve = graph.working_bytes(cost.workload.batch, cost.workload.prompt_tokens, cost.workload.context)
    for name in draft.room:
        draft.room[name] -= reserve
    at = 0
    for group in groups(graph):
        while at < len(devices) - 1 and not _group_fits(draft, group, devices[at].name):
            at += 1
        for task in group:
            draft.place(task, devices[at].name)
    return draft.freeze("fastest first")


def split_by_speed(graph: TaskGraph, topology: Topology, cost: CostModel) -> Schedule:
    """Contiguous runs of layers in proportion to each device's memory bandwidth."""
    draft = ScheduleDraft(graph, topology, cost.workload)
    devices = by_speed(topology, cost)
    total_speed = sum(cost.bandwidth(d) for d in devices)
    total = sum(task.nbytes for task in graph)
    ends, run = [], 0.0
    for device in devices:
        run += cost.bandwidth(device) / total_speed * total
        ends.append(run)
    done = 0.0
    for group in groups(graph):
        size = sum(task.nbytes for task in group)
        at = next((i for i, end in enumerate(ends) if done + size / 2 <= end), len(ends) - 1)
        for task in group:
            draft.place(task, devices[at].name)
        done += size
    return draft.freeze("split by speed")


def by_speed(topology: Topology, cost: CostModel) -> list[DeviceSpec]:
    """Devices that can compute, the one with the highest memory bandwidth first; equals by name."""
    return sorted(topology.compute_devices, key=lambda d: (-cost.bandwidth(d), d.name))


def groups(graph: TaskGraph) -> list[tuple[Task, ...]]:
    """The graph cut into what is placed as one: single tasks outside layers, and whole layers."""
    layers: dict[int, Layer] = {int(layer.name.split(".")[1]): layer for layer in graph.layers}
    found: list[tuple[Task, ...]] = []
    for task in graph:
        if task.layer is None:
            found.append((task,))
        elif layer := layers.pop(task.layer, None):
            found.append(layer.tasks)
    return found


def _group_fits(draft: ScheduleDraft, group: tuple[Task, ...], device: str) -> bool:
    return sum(draft.need(task, device) for task in group) <= draft.room[device]
