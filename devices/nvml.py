"""What NVIDIA's management library says about the GPUs of this machine; every fact is optional, as drivers differ.
Knows nothing of torch and computes nothing; cuda.py turns these facts into devices and links."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

log = logging.getLogger(__name__)
SWITCH = "switch"  # an NVLink that ends at an NVSwitch reaches every GPU on it


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU as NVML numbers it; None: not said."""

    index: int
    lost: str = ""  # why it cannot be reached, "" if it can
    name: str = ""
    uuid: str = ""
    memory_bytes: int = 0
    memory_free_bytes: int | None = None
    pci_bus_id: str = ""  # "00000000:3B:00.0"
    pcie_gen: int | None = None  # the most that GPU and slot agree on, not the idle state
    pcie_width: int | None = None  # lanes
    nvlinks: Mapping[str, int] = field(default_factory=dict)  # peer's PCI bus id, or SWITCH -> active links
    numa_node: int | None = None
    compute_capability: tuple[int, int] | None = None
    mig: bool | None = None
    memory_bus_bits: int | None = None
    memory_clock_mhz: int | None = None
    driver: str = ""


def list_gpus() -> list[Gpu]:
    """All GPUs of the machine; none where there is no library, no driver, or it does not start."""
    try:
        import pynvml
    except ImportError:
        return []
    with _session(pynvml) as started:
        if not started:
            return []
        driver = _text(_optional(pynvml, "nvmlSystemGetDriverVersion"))
        return [_gpu(pynvml, index, driver) for index in range(_optional(pynvml, "nvmlDeviceGetCount") or 0)]


def driver_state() -> str:
    """One line for people: the driver's version, or why there is none."""
    try:
        import pynvml
    except ImportError:
        return "the module pynvml is not installed"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return f"no NVIDIA driver ({type(error).__name__})"
    version = _text(_optional(pynvml, "nvmlSystemGetDriverVersion"))
    pynvml.nvmlShutdown()
    return f"driver {version or 'of unknown version'}"


@contextmanager
def _session(nvml: ModuleType) -> Iterator[bool]:
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        absent = isinstance(error, (nvml.NVMLError_LibraryNotFound, nvml.NVMLError_DriverNotLoaded))
        log.log(logging.DEBUG if absent else logging.WARNING, "no GPUs: NVML did not start (%s)", error)
        yield False
        return
    try:
        yield True
    finally:
        nvml.nvmlShutdown()


def _gpu(nvml: ModuleType, index: int, driver: str) -> Gpu:
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        name = _text(_optional(nvml, "nvmlDeviceGetName", handle))
        memory = _optional(nvml, "nvmlDeviceGetMemoryInfo", handle)
        pci = _optional(nvml, "nvmlDeviceGetPciInfo", handle)
        mig = _optional(nvml, "nvmlDeviceGetMigMode", handle)
        return Gpu(
            index=index,
            name=name,
            uuid=_text(_optional(nvml, "nvmlDeviceGetUUID", handle)),
            memory_bytes=int(memory.total) if memory else 0,
            memory_free_bytes=int(memory.free) if memory else None,
            pci_bus_id=_text(pci.busId) if pci else "",
            pcie_gen=_optional(nvml, "nvmlDeviceGetMaxPcieLinkGeneration", handle),
            pcie_width=_optional(nvml, "nvmlDeviceGetMaxPcieLinkWidth", handle),
            nvlinks=_nvlinks(nvml, handle),
            numa_node=_node(_optional(nvml, "nvmlDeviceGetNumaNodeId", handle)),
            compute_capability=_pair(_optional(nvml, "nvmlDeviceGetCudaComputeCapability", handle)),
            mig=None if mig is None else bool(mig[0]),
            memory_bus_bits=_optional(nvml, "nvmlDeviceGetMemoryBusWidth", handle),
            memory_clock_mhz=_optional(nvml, "nvmlDeviceGetMaxClockInfo", handle, nvml.NVML_CLOCK_MEM),
            driver=driver,
        )
    except nvml.NVMLError as error:
        return Gpu(
            index, lost=f"the driver cannot reach it ({error}); reset it with nvidia-smi or reboot", driver=driver
        )


def _nvlinks(nvml: ModuleType, handle: object) -> dict[str, int]:
    peers: dict[str, int] = {}
    for link in range(nvml.NVML_NVLINK_MAX_LINKS):
        state = _optional(nvml, "nvmlDeviceGetNvLinkState", handle, link)
        if state is None:  # no NVLink at all, or no link of this number
            break
        if state != nvml.NVML_FEATURE_ENABLED:
            continue
        peer = _nvlink_peer(nvml, handle, link)
        peers[peer] = peers.get(peer, 0) + 1
    return peers


def _nvlink_peer(nvml: ModuleType, handle: object, link: int) -> str:
    kind = _optional(nvml, "nvmlDeviceGetNvLinkRemoteDeviceType", handle, link)
    if kind == nvml.NVML_NVLINK_DEVICE_TYPE_SWITCH:
        return SWITCH
    remote = _optional(nvml, "nvmlDeviceGetNvLinkRemotePciInfo", handle, link)
    return _text(remote.busId) if remote else "unknown"


def _optional(nvml: ModuleType, name: str, *args: object) -> Any:
    """What the call returns, None where this binding, driver or GPU does not say; a lost GPU is not a missing fact."""
    call = getattr(nvml, name, None)
    if call is None:
        return None
    try:
        return call(*args)
    except (nvml.NVMLError_GpuIsLost, nvml.NVMLError_Uninitialized):
        raise
    except nvml.NVMLError as error:
        log.debug("NVML does not say: %s (%s)", name, error)
        return None


def _text(value: str | bytes | None) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value or ""


def _node(value: int | None) -> int | None:
    """None also where the driver answers -1, as an unsigned number: the machine has one node only."""
    return value if value is not None and value < 65536 else None


def _pair(value: Any) -> tuple[int, int] | None:
    return None if value is None else (int(value[0]), int(value[1]))
