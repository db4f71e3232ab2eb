"""The plans that need no thought: everything on one device, fastest first, split by speed.
They are always among the candidates, so that no clever plan is chosen that loses to one of them."""

from __future__ import annotations

from ciuic_runtime.devices.spec import DeviceSpec, Topology
from ciuic_runtime.schedulers.cost import CostModel
from ciuic_runtime.schedulers.draft import NOTHING, Fixed, ScheduleDraft
from ciuic_runtime.schedulers.graph import Task, TaskGraph
from ciuic_runtime.schedulers.schedule import Schedule


def all_on(graph: TaskGraph, topology: Topology, cost: CostModel, fixed: Fixed = NOTHING, *, device: str) -> Schedule:
    """Everything on one device, whether it fits or not."""
    draft = ScheduleDraft(graph, topology, cost.workload, fixed)
    for task in graph:
        draft.place(task, device)
    return draft.freeze(f"all on {device}")


def fastest_first(graph: TaskGraph, topology: Topology, cost: CostModel, fixed: Fixed = NOTHING) -> Schedule:
    """Whole layers in order, on the fastest device that has room left; the last one takes what is left over."""
    draft = ScheduleDraft(graph, topology, cost.workload, fixed)
    devices = by_speed(topology, cost)
    at = 0
    for group in groups(graph):
        while at < len(devices) - 1 and not draft.fits(group, devices[at].name):
            at += 1
        for task in group:
            draft.place(task, devices[at].name)
    return draft.freeze("fastest first")


def split_by_speed(graph: TaskGraph, topology: Topology, cost: CostModel, fixed: Fixed = NOTHING) -> Schedule:
    """Contiguous runs of layers in proportion to each device's memory bandwidth."""
    draft = ScheduleDraft(graph, topology, cost.workload, fixed)
    devices = by_speed(topology, cost)
    speed, total = sum(cost.bandwidth(d) for d in devices), sum(task.nbytes for task in graph)
    ends, run = [], 0.0
    for device in devices:
        run += cost.bandwidth(device) / speed * total
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
    layers = {layer.tasks[0].name: layer.tasks for layer in graph.layers}
    return [layers.get(task.name, (task,)) for task in graph if task.layer is None or task.name in layers]
