"""What hardware there is: discovered here or read from a TOML file, as one topology of devices and links.
Puts together what the files beside this one find and measure; decides nothing about what runs where."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ciuic_runtime.devices.cpu import discover_cpus
from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.devices.spec import DeviceSpec, Topology

KINDS = ("CPU", "GPU", "SIM", "DISK")


class DeviceManager:
    """The devices of this machine. `measure`: "cached" (measure what is not in the cache), "fresh", or "never"."""

    def __init__(
        self, path: str | Path = ".", measure: str = "cached", progress: Callable[[str], None] | None = None
    ) -> None:
        self.topology = Topology(tuple(discover_cpus()))

    @classmethod
    def from_topology(cls, topology: Topology) -> DeviceManager:
        manager = cls.__new__(cls)
        manager.topology = topology
        return manager

    def get_devices(self, kind: str | None = None) -> list[DeviceSpec]:
        """All devices, or those of one kind ("GPU", "cpu", ...); an empty list where there are none."""
        if kind is not None and kind.upper() not in KINDS:
            raise InvalidInput(f"no kind of device is called {kind!r}; kinds are {', '.join(KINDS)}")
        return [d for d in self.topology.devices if kind is None or d.kind == kind.upper()]
