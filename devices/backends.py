"""Opens the backend of a device by its kind: one table of factories, each of which imports what it needs.
Knows no backend's inside, and decides nothing about what runs where."""

from __future__ import annotations

from collections.abc import Callable

from ciuic_runtime.devices.backend import Backend
from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.devices.spec import DeviceSpec, Topology


def open_backend(spec: DeviceSpec, topology: Topology | None = None) -> Backend:
    """The device, ready to use. `topology` tells a simulated device how fast its links are."""
    factory = _FACTORIES.get(spec.kind)
    if factory is None:
        raise InvalidInput(f"{spec.name} is a {spec.kind}, which cannot compute; choose one of {', '.join(_FACTORIES)}")
    if not spec.usable:
        raise InvalidInput(f"{spec.name} cannot be used: {spec.why_not_usable or 'not usable'}; choose another device")
    return factory(spec, topology)


def _open_cpu(spec: DeviceSpec, topology: Topology | None) -> Backend:
    from ciuic_runtime.devices.cpu import CpuBackend

    return CpuBackend(spec)


def _open_cuda(spec: DeviceSpec, topology: Topology | None) -> Backend:
    from ciuic_runtime.devices.cuda import CudaBackend

    return CudaBackend(spec)


def _open_simulated(spec: DeviceSpec, topology: Topology | None) -> Backend:
    from ciuic_runtime.devices.simulated import SimulatedBackend

    return SimulatedBackend(spec, topology)


_FACTORIES: dict[str, Callable[[DeviceSpec, Topology | None], Backend]] = {
    "CPU": _open_cpu,
    "GPU": _open_cuda,
    "SIM": _open_simulated,
}
