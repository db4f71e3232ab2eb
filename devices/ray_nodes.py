"""The devices of a Ray cluster: an actor on every node discovers its own, and pairs of them measure the links between.
Knows Ray and `DeviceManager`'s results; what is placed there is for schedulers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

from ciuic_runtime.devices.errors import CiuicError
from ciuic_runtime.devices.ray_calls import Spinner, measure_calls, measure_hop
from ciuic_runtime.devices.ray_session import join
from ciuic_runtime.devices.spec import DeviceSpec, Link, Topology
from ciuic_runtime.devices.toml import topology_from_dict, topology_to_dict

# Facts of a device:
NODE_ID = "ray_node_id"  # on which of Ray's nodes it is
MACHINE = "machine"  # whose several nodes may be
GIVEN = "cores_given"  # share of all its cores that processes get who want all, beside those of the cluster itself
LARGE = 16 << 20  # bytes, enough to see a link's bandwidth
DISCOVERY_SECONDS = 120.0
Progress = Callable[[str], None]


class NodeProbe(Spinner):
    """On one node: what is there, and how fast things come from another one's probe."""

    def topology(self, measure: str, path: str | None) -> dict[str, Any]:
        from ciuic_runtime.devices.manager import DeviceManager

        return topology_to_dict(DeviceManager(path, measure).topology)

    def put(self, nbytes: int) -> list[Any]:
        """In the node's object store: a reference to it, wrapped so that it is not followed on the way."""
        import ray

        return [ray.put(bytes(nbytes))]

    def fetch(self, boxed: list[Any]) -> float:
        """Seconds until it is here."""
        import ray

        begin = time.perf_counter()
        ray.get(boxed[0])
        return time.perf_counter() - begin


def ray_topology(
    address: str | None, measure: str = "cached", path: str | Path | None = None, insecure: bool = False,
    progress: Progress | None = None,
) -> Topology:  # fmt: skip
    """All nodes' devices as one topology, `node0/cpu` and so on, node0 being the head. Raises CiuicError for a node
    that does not answer."""
    ray = join(address, insecure)
    nodes = {f"node{i}": node["NodeID"] for i, node in enumerate(nodes_of(ray))}
    return _looked_at(ray, None, nodes, measure, path, progress)


def with_node(
    ray: Any, known: Topology, name: str, node_id: str, measure: str = "cached", progress: Progress | None = None
) -> Topology:
    """What is known of a cluster, with the devices of one more of its nodes and the links between it and the others.
    Raises CiuicError where a node does not answer."""
    return _looked_at(ray, known, {name: node_id}, measure, None, progress)


def node_ids(topology: Topology) -> dict[str, str]:
    """By node's name, what Ray calls it."""
    return {d.name.rpartition("/")[0]: str(d.facts[NODE_ID]) for d in topology.devices if NODE_ID in d.facts}


def _looked_at(
    ray: Any, known: Topology | None, new: dict[str, str], measure: str, path: str | Path | None,
    progress: Progress | None,
) -> Topology:  # fmt: skip
    """Those of `new` beside what is known already; between two that are known, nothing is measured again."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    say, there = progress or (lambda what: None), {n["NodeID"]: n for n in nodes_of(ray)}
    before = {name: i for name, i in (node_ids(known) if known else {}).items() if i in there}
    parts = {name: _part(known, name) for name in before} if known else {}
    own = there.get(ray.get_runtime_context().get_node_id())
    here = _machine(own) if own else None
    probe = ray.remote(num_cpus=0)(NodeProbe)
    probes = {
        name: probe.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)).remote()
        for name, node_id in {**before, **new}.items()
    }
    try:
        for name, node_id in new.items():
            node = there.get(node_id)
            say(f"looking at {name} ({node['NodeManagerAddress'] if node else 'gone'})")
            found = _answer(ray, name, probes[name].topology.remote(measure, None if path is None else str(path)))
            machine = _machine(node) if node else node_id
            calls = asdict(measure_calls(partial(_answer, ray, name), probes[name]))
            if machine != here:  # what the driver does for them takes nothing from stages there
                calls["call_cpu_s"] = calls["call_handling_s"]
            part = topology_from_dict(found, name)
            if cores := max((d.cores for d in part.devices if d.kind == "CPU"), default=0):
                calls[GIVEN] = _answer(ray, name, probes[name].given.remote(cores))
            parts[name] = _named(name, {NODE_ID: node_id, MACHINE: machine, **calls}, part)
        links: list[Link] = []
        for a, b in combinations(probes, 2):
            if a in new or b in new:
                say(f"measuring the link between {a} and {b}")
                links += _measured(ray, parts, a, b, probes[a], probes[b])
    finally:
        for one in probes.values():
            ray.kill(one)
    whole = [known] if known else []
    every = [*whole, *(parts[name] for name in new)]
    return Topology(
        tuple(d for part in every for d in part.devices),
        (*(x for part in every for x in part.links), *links),
        known.domains if known else (),
    )


def _part(known: Topology, node: str) -> Topology:
    return known.only(d.name for d in known.devices if d.name.rpartition("/")[0] == node)


def machine_of(nodes: Sequence[dict[str, Any]], node_id: str) -> str:
    """What stays of a node that leaves and joins again under another id: its host's name and address. Where another
    live node has the same, so that they are several of one machine, and where Ray does not know it: its id."""
    mine = next((_machine(n) for n in nodes if n["NodeID"] == node_id), node_id)
    alike = any(n["Alive"] and n["NodeID"] != node_id and _machine(n) == mine for n in nodes)
    return node_id if alike else mine


def _machine(node: dict[str, Any]) -> str:
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"


def nodes_of(ray: Any) -> list[dict[str, Any]]:
    """Those that are alive, the head first."""
    alive = [n for n in ray.nodes() if n["Alive"]]
    return sorted(alive, key=lambda n: ("node:__internal_head__" not in n["Resources"], n["NodeID"]))


def _named(node: str, facts: Mapping[str, str | float], part: Topology) -> Topology:
    """With the node's name before those of its devices, of which the facts are true."""

    def named(device: DeviceSpec) -> DeviceSpec:
        return replace(device, name=f"{node}/{device.name}", facts={**device.facts, **facts})

    links = (replace(x, src=f"{node}/{x.src}", dst=f"{node}/{x.dst}", domains=()) for x in part.links)
    return Topology(tuple(map(named, part.devices)), tuple(links))


def _measured(ray: Any, parts: dict[str, Topology], a: str, b: str, one: Any, other: Any) -> list[Link]:
    """Between the CPUs of two nodes, either way: what other devices hand on goes through these. The latency is that of
    a call with a token's residual stream, from a process that computes to another one."""
    latency = measure_hop(partial(_answer, ray, b), one, other)
    fetches = [_answer(ray, b, other.fetch.remote(one.put.remote(LARGE))) for _ in range(3)]
    bandwidth = LARGE / max(1e-6, statistics.median(fetches))
    cpus = {name: [d.name for d in parts[name].devices if d.kind == "CPU"] for name in (a, b)}
    pairs = [(x, y) for x in cpus[a] for y in cpus[b]]
    return [Link(src, dst, bandwidth, latency, "measured") for x, y in pairs for src, dst in ((x, y), (y, x))]


def _answer(ray: Any, node: str, ref: Any) -> Any:
    try:
        return ray.get(ref, timeout=DISCOVERY_SECONDS)
    except ray.exceptions.GetTimeoutError:
        raise CiuicError(f"{node} did not answer in {DISCOVERY_SECONDS:.0f} s; is its raylet running?") from None
    except ray.exceptions.RayError as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise CiuicError(f"{node} could not be looked at: {first}; is ciuic_runtime installed there?") from error
