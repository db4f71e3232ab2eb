"""What the hardware is, how fast it is, and how to use it."""

from ciuic_runtime.devices.backend import Backend, Event, MemoryFault, MemoryUse, RaceError
from ciuic_runtime.devices.backends import open_backend
from ciuic_runtime.devices.errors import CiuicError, InvalidInput, OutOfMemory
from ciuic_runtime.devices.manager import DeviceManager
from ciuic_runtime.devices.spec import DeviceSpec, Link, Topology

__all__ = [
    "Backend",
    "CiuicError",
    "DeviceManager",
    "DeviceSpec",
    "Event",
    "InvalidInput",
    "Link",
    "MemoryFault",
    "MemoryUse",
    "OutOfMemory",
    "RaceError",
    "Topology",
    "open_backend",
]
