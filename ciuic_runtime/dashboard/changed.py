"""Topologies with faster, larger or more devices than there are: what is asked of the planner in place of the real one.
Knows what follows from a changed figure; whether it is a good idea, the planner says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ciuic_runtime.devices.catalogue import find_device, find_link
from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.devices.spec import DeviceSpec, Topology
from ciuic_runtime.schedulers.memory import capacity, node_of


def faster(topology: Topology, bandwidth: Mapping[str, float]) -> Topology:
    """Devices that read so many bytes/s: memory, or a disk with its links. Their rates are not measured any more."""
    for name, rate in bandwidth.items():
        device = topology.device(name)
        if not 1e6 <= rate <= 1e15:
            raise InvalidInput(f"what-if: bandwidth of {name} is {rate:g} bytes/s; it must be from 1e6 to 1e15")
        share = rate / (bandwidth_of(device, topology) or rate)

        def scaled(rates: Mapping[Any, float], share: float = share) -> dict[Any, float]:
            return {key: value * share for key, value in rates.items()}

        changed = replace(
            device, memory_bandwidth=rate, memory_bandwidth_by_threads=scaled(device.memory_bandwidth_by_threads),
            matrix_vector_rates=scaled(device.matrix_vector_rates),
            bandwidth_by_access=scaled(device.bandwidth_by_access), basis="estimated",
        )  # fmt: skip
        links = topology.links
        if device.kind == "DISK":
            targets = [d.name for d in topology.by_kind("CPU") if node_of(d.name) == node_of(name)]
            here = [topology.link(name, target) for target in targets]
            links = tuple(x for x in links if x.src != name) + tuple(
                replace(
                    x, bandwidth=x.bandwidth * share, bandwidth_by_size=scaled(x.bandwidth_by_size), basis="estimated"
                )
                for x in here
            )
        devices = tuple(changed if d.name == name else d for d in topology.devices)
        topology = replace(topology, devices=devices, links=links)
    return topology


def bandwidth_of(device: DeviceSpec, topology: Topology) -> float | None:
    """Bytes/s; of a disk that was not measured, what its way into memory is taken to bring."""
    if device.memory_bandwidth or device.kind != "DISK":
        return device.memory_bandwidth
    cpus = topology.by_kind("CPU")
    return topology.link(device.name, cpus[0].name).bandwidth if cpus else None


def larger(topology: Topology, ram: Mapping[str, int]) -> Topology:
    """What is more, or less, is more or less of what is free."""
    for name, nbytes in ram.items():
        device = topology.device(name)
        if not device.can_compute:
            raise InvalidInput(f"what-if: {name} has no memory to compute in; give another device's")
        if nbytes < 4096:
            raise InvalidInput(f"what-if: {nbytes} bytes on {name} are too few; give at least 4096")
        free = max(0, capacity(device) + nbytes - device.memory_bytes)
        larger = replace(device, memory_bytes=nbytes, memory_free_bytes=free)
        topology = replace(topology, devices=tuple(larger if d.name == name else d for d in topology.devices))
    return topology


def added(topology: Topology, names: tuple[str, ...]) -> Topology:
    """Accelerators beside the first CPU, over the link that the catalogue gives them."""
    for name in names:
        known = find_device(name)
        host = next((d.name for d in topology.by_kind("CPU")), None)
        if known.kind != "GPU" or host is None:
            raise InvalidInput(f"what-if: {name} cannot be added; add a GPU of the catalogue to a machine with a CPU")
        node = f"{node_of(host)}/" if node_of(host) else ""
        taken = {d.name for d in topology.devices}
        called = next(n for i in range(len(taken) + 1) if (n := f"{node}cuda:{i}") not in taken)
        link = find_link(known.pcie)
        topology = replace(
            topology, devices=(*topology.devices, known.device(called)),
            links=(*topology.links, link.link(host, called), link.link(called, host)),
        )  # fmt: skip
    return topology


def not_measured(topology: Topology, names: set[str]) -> Topology:
    devices = tuple(replace(d, basis="estimated") if d.name in names else d for d in topology.devices)
    return replace(topology, devices=devices)
