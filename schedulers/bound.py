"""What no placement can beat: the linear program of `policies/tiering.py` over every device and every way to it,
with no room taken for slots, and activations copied in no time. Knows no plan; how far one is from it is its gap."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ciuic_runtime.devices.spec import DeviceSpec, Topology
from ciuic_runtime.schedulers.cost import CostModel
from ciuic_runtime.schedulers.graph import TaskGraph
from ciuic_runtime.schedulers.memory import can_stream, capacity, node_of
from ciuic_runtime.schedulers.policies.pipeline import usable
from ciuic_runtime.schedulers.policies.tiering import Option, Tiers, alike_pages, relax


def decode_bound(graph: TaskGraph, topology: Topology, cost: CostModel, at_once: bool = False) -> float | None:
    """Tokens/s of decoding that the workload's batch reaches at most, in this cost model; None where nothing fits.
    `at_once`: passes are on their way at the same time, so that computing on one device hides behind another's."""
    work = cost.workload
    seconds = relax(list(alike_pages(graph, tiers := _every_way(graph, topology, cost, at_once), cost)), tiers)
    if math.isinf(seconds):
        return None
    if not at_once:
        seconds += _anywhere(graph, [topology.device(name) for name in tiers.room], cost)
    return work.batch / seconds


def _anywhere(graph: TaskGraph, devices: Sequence[DeviceSpec], cost: CostModel) -> float:
    """Seconds of a step for what is no page's: rows of experts put together, tokens sampled, time besides tasks."""
    step = cost.workload.mean_decode
    combined = (min(cost.combine(task, d, step).seconds for d in devices) for task in graph if task.num_experts)
    besides = min(cost.sampling(d, step, graph) + cost.besides_tasks(d, len(graph.tasks)) for d in devices)
    return sum(combined) + besides


def _every_way(graph: TaskGraph, topology: Topology, cost: CostModel, at_once: bool) -> Tiers:
    work = cost.workload
    working = graph.working_bytes(work.batch, work.prompt_tokens, work.context)
    room = {d.name: capacity(d) - working for d in usable(topology, cost)}
    room = {name: left for name, left in room.items() if left > 0}
    options = [Option(device, device) for device in room]
    bandwidth: dict[str, float] = {}
    for device in room:
        for home in (*room, *(d.name for d in topology.by_kind("DISK"))):
            if home == device or not can_stream(topology, home, device):
                continue
            link, on_disk = f"{home} -> {device}", topology.device(home).kind == "DISK"
            bandwidth[link] = topology.link(home, device).bandwidth
            if on_disk:
                bandwidth[home] = _fastest_read(topology, home, list(room))
            options.append(Option(device, home, (link, home) if on_disk else (link,)))
    return Tiers(tuple(options), room, bandwidth, {}, at_once)


def _fastest_read(topology: Topology, disk: str, devices: list[str]) -> float:
    """Bytes/s, to whomever: what all reads share."""
    near = [d for d in devices if node_of(d) == node_of(disk)]
    return max((topology.link(disk, d).bandwidth for d in near), default=math.inf)
