"""A schedule as the processes of a cluster carry it out, on paper: every stage on devices of its own, and calls between
them that take their time. Knows no policy; `stages.py` cuts the stages, and `simulate.py` carries them out."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from ciuic_runtime.devices.spec import DeviceSpec, Link
from ciuic_runtime.devices.threads import with_threads
from ciuic_runtime.schedulers.graph import TaskGraph
from ciuic_runtime.schedulers.memory import node_of
from ciuic_runtime.schedulers.schedule import Schedule
from ciuic_runtime.schedulers.stages import Stage, stages_of

# What a call from process to process is taken to take on one machine when both have been computing for milliseconds in
# between (benchmarks/pipeline.py measures such calls); between nodes it takes at least as long.
CALL_SECONDS = 0.9e-3
HANDLING_SECONDS = 0.5e-3  # of these, what keeps the process that is called from computing
CALL_BANDWIDTH = 1e9  # bytes/s, of what it brings along


@dataclass(frozen=True)
class Pipeline:
    schedule: Schedule  # its devices are those of one stage each
    names: dict[str, str]  # device -> what the schedule calls it that is carried out
    depth: int  # passes on their way at once, at most


def pipeline_of(
    schedule: Schedule, graph: TaskGraph, stages: int | None, micro_batches: int | None, threads: int | None
) -> Pipeline:
    """As the cluster does it with these settings. Stages that share a node share its cores, and each has its part to
    itself; unless pages are read there: those are on one device together, one at a time."""
    every = stages_of(schedule, graph, stages)
    shared = Counter(stage.node for stage in every)
    paged = node_of(schedule.paging.device) if schedule.paging else None
    node = [_on(s.node, f"stage{s.index}") if shared[s.node] > 1 and s.node != paged else s.node for s in every]
    names: dict[str, str] = {}
    devices: dict[str, DeviceSpec] = {}
    links: dict[tuple[str, str], Link] = {}
    for stage, where in zip(every, node, strict=True):
        share = stage_threads(stage, shared[stage.node], threads)
        local = with_threads(stage.schedule.topology.only(stage.schedule.places_used()), share)
        for device in local.devices:
            names[_on(where, device.name)] = _on(stage.node, device.name)
            devices[_on(where, device.name)] = replace(device, name=_on(where, device.name))
        for link in local.links:
            src, dst = _on(where, link.src), _on(where, link.dst)
            links[src, dst] = replace(link, src=src, dst=dst)
    for i in range(1, len(every)):
        for src in every[i - 1].schedule.devices_used():
            for dst in every[i].schedule.devices_used():
                link = _call(schedule, _on(node[i - 1], src), _on(node[i], dst), names)
                links.setdefault((link.src, link.dst), link)
    where_is = {row: where for stage, where in zip(every, node, strict=True) for row in stage.graph.rows}
    rows = tuple(
        replace(r, device=_on(where_is[r.task], _bare(r.device)), home=_on(where_is[r.task], _bare(r.home)))
        for r in schedule.assignments
    )
    topology = replace(schedule.topology, devices=tuple(devices.values()), links=tuple(links.values()), domains=())
    carried_out = replace(schedule, assignments=rows, topology=topology, predicted=None, candidates=())
    return Pipeline(carried_out, names, micro_batches or len(every))


def stage_threads(stage: Stage, on_node: int, asked: int | None) -> int:
    """Of a stage's process, where so many share the node's cores; 0 where no core is known."""
    topology = stage.schedule.topology
    cores = sum(topology.device(n).cores for n in stage.schedule.devices_used() if topology.device(n).kind == "CPU")
    return asked or (max(1, cores // on_node) if cores else 0)


def _call(schedule: Schedule, src: str, dst: str, names: dict[str, str]) -> Link:
    """What brings a stage's values to the next one."""
    if node_of(names[src]) == node_of(names[dst]):
        known = Link(src, dst, CALL_BANDWIDTH, CALL_SECONDS, "estimated")
    else:
        known = schedule.topology.link(names[src], names[dst])
    on_its_way = max(CALL_SECONDS, known.latency) - HANDLING_SECONDS
    return replace(known, src=src, dst=dst, latency=on_its_way, domains=())


def _on(node: str, device: str) -> str:
    return f"{node}/{device}" if node else device


def _bare(device: str) -> str:
    return device.rpartition("/")[2]
