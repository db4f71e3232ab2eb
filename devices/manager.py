"""What hardware there is: discovered here or read from a TOML file, as one topology of devices and links.
Puts together what the files beside this one find and measure; decides nothing about what runs where."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

from ciuic_runtime.devices import limits
from ciuic_runtime.devices.cpu import discover_cpus
from ciuic_runtime.devices.cuda import discover_gpus
from ciuic_runtime.devices.disk import discover_disk, disk_fingerprint, measure_disk
from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.devices.files import write_whole
from ciuic_runtime.devices.limits import Limits
from ciuic_runtime.devices.measure import fingerprint, measure_device
from ciuic_runtime.devices.spec import DeviceSpec, Kind, Link, Topology
from ciuic_runtime.devices.table import device_table
from ciuic_runtime.devices.toml import read_topology, topology_to_toml

KINDS: tuple[str, ...] = get_args(Kind)
MODES = ("cached", "never", "fresh")
COMPUTE_SECONDS = 5.0  # for all devices that compute together, loading torch included
DISK_SECONDS = 1.5  # 6.5 s together, so that a busy machine stays below 10

NOISY = 0.3  # relative interquartile range
NOISE = "the figures of %s vary by %.0f %%: was the machine busy? measure='fresh' measures again"

log = logging.getLogger(__name__)
Progress = Callable[[str], None]


class DeviceManager:
    """The devices of this machine, and the disk under `path` (None: no disk, which measuring would write to).

    `measure`: "cached" measures what is not in the cache, "fresh" everything, "never" nothing (no rates then)."""

    topology: Topology
    discovered = True  # False: declared, whether it is here or not

    def __init__(
        self, path: str | Path | None = ".", measure: str = "cached", progress: Progress | None = None
    ) -> None:
        if measure not in MODES:
            raise InvalidInput(f"measure={measure!r} is not known; choose one of {', '.join(MODES)}")
        cpus = discover_cpus()
        gpus, links = discover_gpus(cpus)
        devices = [*cpus, *gpus, *([discover_disk(path)] if path is not None else [])]
        if measure != "never":
            devices = _measured(devices, path, fresh=measure == "fresh", progress=progress)
        self.topology = Topology(tuple(devices), (*links, *_disk_links(devices)))

    @classmethod
    def from_topology(cls, topology: Topology) -> DeviceManager:
        manager = cls.__new__(cls)
        manager.topology, manager.discovered = topology, False
        return manager

    @classmethod
    def from_toml(cls, path: str | Path) -> DeviceManager:
        """The declared devices, whether they are here or not; nothing is measured."""
        return cls.from_topology(read_topology(path))

    @classmethod
    def from_ray(
        cls, address: str | None = None, measure: str = "cached", path: str | Path | None = None,
        insecure: bool = False, progress: Progress | None = None,
    ) -> DeviceManager:  # fmt: skip
        """The devices of all nodes of a Ray cluster (None: of one that is started on this machine), `node0/cpu` and so
        on, with the links between them as measured now. `path`: a folder on each node whose disk is looked at."""
        from ciuic_runtime.devices.ray_nodes import ray_topology

        return cls.from_topology(ray_topology(address, measure, path, insecure, progress))

    def to_toml(self, path: str | Path | None = None) -> str:
        """The topology as TOML, also written to `path` if one is given; `from_toml` reads back an equal one."""
        text = topology_to_toml(self.topology)
        if path is not None:
            write_whole(path, text)
        return text

    def get_devices(self, kind: str | None = None) -> list[DeviceSpec]:
        """All devices, or those of one kind ("GPU", "cpu", ...); an empty list where there are none."""
        if kind is None:
            return list(self.topology.devices)
        if kind.upper() not in KINDS:
            raise InvalidInput(f"no kind of device is called {kind!r}; kinds are {', '.join(KINDS)}")
        return self.topology.by_kind(kind)

    def __repr__(self) -> str:
        return f"DeviceManager({', '.join(d.name for d in self.topology.devices)})"

    def __str__(self) -> str:
        return device_table(self.topology)


def measured_disk(
    path: str | Path, cpus: Sequence[str], progress: Progress | None = None
) -> tuple[DeviceSpec, list[Link]]:
    """The disk under `path`, as measured now or before, and the links from it into the memory of `cpus`."""
    [disk] = _measured([discover_disk(path)], path, fresh=False, progress=progress)
    return disk, _links_of(disk, cpus)


def _measured(
    devices: Sequence[DeviceSpec], path: str | Path | None, fresh: bool, progress: Progress | None
) -> list[DeviceSpec]:
    num_computing = sum(d.can_compute and d.usable for d in devices) or 1

    def measure(spec: DeviceSpec) -> Limits:
        if spec.kind == "DISK" and path is not None:
            if progress:
                progress(f"measuring how fast the disk under {path} reads")
            return measure_disk(path, DISK_SECONDS)
        return measure_device(spec, COMPUTE_SECONDS / num_computing, progress)

    return [_cached(spec, measure, fresh) if spec.usable else spec for spec in devices]


def _cached(spec: DeviceSpec, measure: Callable[[DeviceSpec], Limits], fresh: bool) -> DeviceSpec:
    key = disk_fingerprint(spec) if spec.kind == "DISK" else fingerprint(spec)
    found = None if fresh else limits.load(key)
    if found is None:
        found = measure(spec)
        if found.measured:
            limits.store(key, found)
        if found.spread > NOISY:
            log.warning(NOISE, spec.name, 100 * found.spread)
    return found.on(spec)


def _disk_links(devices: Sequence[DeviceSpec]) -> list[Link]:
    """From the disk into each CPU's memory, as measured; writing to it was not measured and has no link."""
    cpus = [d.name for d in devices if d.kind == "CPU"]
    return [link for disk in devices if disk.kind == "DISK" for link in _links_of(disk, cpus)]


def _links_of(disk: DeviceSpec, cpus: Sequence[str]) -> list[Link]:
    if not disk.memory_bandwidth:
        return []
    latency = float(disk.facts.get("read_latency_s", 0.0))
    return [Link(disk.name, cpu, disk.memory_bandwidth, latency, disk.basis) for cpu in cpus]
