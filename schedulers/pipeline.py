"""A schedule as the processes of a cluster carry it out, on paper: every stage on devices of its own, and calls between
them that take their time. Knows no policy; `stages.py` cuts the stages, and `simulate.py` carries them out.

What calls take are facts of devices (`devices/ray_calls.py` measures them), or else the estimates below."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from ciuic_runtime.devices.ray_nodes import GIVEN, MACHINE
from ciuic_runtime.devices.spec import DeviceSpec, Link
from ciuic_runtime.devices.threads import with_threads
from ciuic_runtime.schedulers.graph import TaskGraph
from ciuic_runtime.schedulers.memory import node_of
from ciuic_runtime.schedulers.schedule import Schedule
from ciuic_runtime.schedulers.stages import Stage, stages_of

# From the driver to a process of its machine or back, when that has been computing for milliseconds in between, s:
CALL_SECONDS = 0.7e-3
HANDLING_SECONDS = 0.5e-3  # of these, what keeps the process that is called from computing
CPU_SECONDS = 1.2e-3  # of a core, by both
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
    depth = micro_batches or len(every)
    crowded = _crowded(every, shared, threads, min(depth, schedule.workload.batch))
    for stage, where, (more, given) in zip(every, node, crowded, strict=True):
        for name in (_on(where, name) for name in stage.schedule.devices_used()):
            handling = handling_seconds(devices[name]) + more
            facts = {**devices[name].facts, "call_handling_s": handling, GIVEN: given}
            devices[name] = replace(devices[name], facts=facts)
    where_is = {row: where for stage, where in zip(every, node, strict=True) for row in stage.graph.rows}
    rows = tuple(
        replace(r, device=_on(where_is[r.task], _bare(r.device)), home=_on(where_is[r.task], _bare(r.home)))
        for r in schedule.assignments
    )
    topology = replace(schedule.topology, devices=tuple(devices.values()), links=tuple(links.values()), domains=())
    carried_out = replace(schedule, assignments=rows, topology=topology, predicted=None, candidates=())
    return Pipeline(carried_out, names, depth)


def stage_threads(stage: Stage, on_node: int, asked: int | None) -> int:
    """Of a stage's process, where so many share the node's cores; 0 where no core is known."""
    topology = stage.schedule.topology
    cores = sum(topology.device(n).cores for n in stage.schedule.devices_used() if topology.device(n).kind == "CPU")
    return asked or (max(1, cores // on_node) if cores else 0)


def call_seconds(device: DeviceSpec) -> float:
    """From the driver to a process there or back, of a call by itself."""
    return float(device.facts.get("call_s", CALL_SECONDS))


def handling_seconds(device: DeviceSpec) -> float:
    """Of these, what keeps a process that computes there from computing."""
    return float(device.facts.get("call_handling_s", HANDLING_SECONDS))


def given_share(device: DeviceSpec) -> float:
    """Of its cores, in a pipeline: less than 1 where processes want all that its machine has."""
    return float(device.facts.get(GIVEN, 1.0))


def _call(schedule: Schedule, src: str, dst: str, names: dict[str, str]) -> Link:
    """What brings a stage's values to the next one, but for what that needs to take them. What is small goes by way of
    the driver, who made both calls."""
    called = schedule.topology.device(names[dst])
    if node_of(names[src]) == node_of(names[dst]):
        known = Link(src, dst, CALL_BANDWIDTH, 2 * call_seconds(called), "estimated")
    else:
        known = schedule.topology.link(names[src], names[dst])
    on_its_way = max(2 * call_seconds(called), known.latency) - handling_seconds(called)
    return replace(known, src=src, dst=dst, latency=on_its_way, domains=())


def _crowded(
    every: list[Stage], shared: Counter[str], asked: int | None, at_once: int
) -> list[tuple[float, float]]:  # fmt: skip
    """Seconds that each stage loses in a pass where it is not alone with its cores, and the share of these that it is
    given: all that the driver and the stages do for calls is done by the cores of their machine, as is what the
    cluster's own services do, and stages that work at once may use all of these."""
    threads, cores, calls = Counter[str](), dict[str, int](), dict[str, float]()
    for stage in every:
        device = _computes(stage)
        machine = _machine(device, stage)
        threads[machine] += stage_threads(stage, shared[stage.node], asked)
        cores[machine] = max(cores.get(machine, 0), device.cores)
        cpu = float(device.facts.get("call_cpu_s", 0.0 if stage.node else CPU_SECONDS))
        calls[machine] = max(0.0, cpu - handling_seconds(device))  # that is known to be its own process's
    full = {m for m in threads if at_once > 1 and 0 < cores[m] <= threads[m]}
    lost = {m: calls[m] * len(every) / threads[m] for m in full}
    given = {machine: given_share(_computes(s)) for s in every if (machine := _machine(_computes(s), s)) in full}
    machines = [_machine(_computes(stage), stage) for stage in every]
    return [(lost.get(machine, 0.0), given.get(machine, 1.0)) for machine in machines]


def _computes(stage: Stage) -> DeviceSpec:
    """The device that a stage's process computes on: its CPU if it uses one."""
    used = [stage.schedule.topology.device(name) for name in stage.schedule.devices_used()]
    return next((d for d in used if d.kind == "CPU"), used[0])


def _machine(device: DeviceSpec, stage: Stage) -> str:
    return str(device.facts.get(MACHINE, stage.node))


def _on(node: str, device: str) -> str:
    return f"{node}/{device}" if node else device


def _bare(device: str) -> str:
    return device.rpartition("/")[2]
