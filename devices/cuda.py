"""NVIDIA GPUs as devices: NVML's facts matched with what torch can use, links estimated from PCIe and NVLink.
The backend is a thin adapter to torch.cuda; it was written without a GPU at hand and has never run on one."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from ciuic_runtime.devices.backend import DEFAULT_STREAM, Event, Ledger, MemoryUse, copy_bytes
from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.devices.nvml import SWITCH, Gpu, list_gpus
from ciuic_runtime.devices.spec import DeviceSpec, Link

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

_PCIE_LANE = {1: 0.25e9, 2: 0.5e9, 3: 0.985e9, 4: 1.969e9, 5: 3.938e9, 6: 7.563e9}  # bytes/s each way, by generation
_NVLINK = {7: 25e9, 8: 25e9, 9: 25e9, 10: 50e9, 12: 50e9}  # bytes/s each way and link, by compute capability
_REACHED = 0.8  # of the line rate by large copies; estimated
_LATENCY = 10e-6  # s per copy; estimated


@dataclass(frozen=True, slots=True)
class TorchGpus:
    """What torch can compute on, in torch's numbering, which CUDA_VISIBLE_DEVICES changes."""

    why_none: str = ""  # "" if torch can use GPUs
    uuids: tuple[str, ...] = ()
    memory_bytes: tuple[int, ...] = ()


def discover_gpus(
    cpus: Sequence[DeviceSpec] = (), torch_gpus: Callable[[], TorchGpus] | None = None
) -> tuple[list[DeviceSpec], list[Link]]:
    """The visible GPUs and the links among them and to the CPUs; torch is asked only where there is a GPU."""
    gpus = list_gpus()
    if not gpus:
        return [], []
    view = (torch_gpus or ask_torch)()
    chosen = _visible_to_torch(gpus, view) if not view.why_none else _visible_by_environment(gpus)
    lost = [g for g in gpus if g.lost and g not in chosen]
    named = {f"cuda:{i}": gpu for i, gpu in enumerate(chosen + lost)}
    specs = [_spec(name, gpu, view, i) for i, (name, gpu) in enumerate(named.items())]
    return specs, _links({n: g for n, g in named.items() if not g.lost}, cpus)


def ask_torch() -> TorchGpus:
    try:
        import torch
    except ImportError:
        return TorchGpus("torch is not installed")
    if torch.version.cuda is None:
        return TorchGpus(f"torch {torch.__version__} was built without CUDA; install the CUDA build of torch")
    if not torch.cuda.is_available():
        return TorchGpus(f"torch finds no GPU; is the driver new enough for CUDA {torch.version.cuda}?")
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return TorchGpus("", tuple(f"GPU-{p.uuid}" for p in properties), tuple(int(p.total_memory) for p in properties))


def _visible_to_torch(gpus: list[Gpu], view: TorchGpus) -> list[Gpu]:
    """In torch's order; one that NVML does not list (a MIG instance) keeps what torch says."""
    by_uuid = {g.uuid: g for g in gpus}
    return [by_uuid.get(uuid) or Gpu(-1, uuid=uuid, name="GPU instance") for uuid in view.uuids]


def _visible_by_environment(gpus: list[Gpu]) -> list[Gpu]:
    """As CUDA reads CUDA_VISIBLE_DEVICES: numbers or the beginnings of UUIDs, up to the first that is neither."""
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return gpus
    chosen: list[Gpu] = []
    for word in (w.strip() for w in wanted.split(",")):
        match = [g for g in gpus if (word == str(g.index) if word.isdigit() else word and g.uuid.startswith(word))]
        if len(match) != 1:
            break
        chosen += match
    return chosen


def _spec(name: str, gpu: Gpu, view: TorchGpus, index: int) -> DeviceSpec:
    why_not = gpu.lost or view.why_none
    memory = view.memory_bytes[index] if index < len(view.memory_bytes) else gpu.memory_bytes
    memory = min(memory, gpu.memory_bytes or memory)  # a MIG instance has less than its GPU
    free = gpu.memory_free_bytes
    return DeviceSpec(
        name=name,
        kind="GPU",
        model=gpu.name,
        memory_bytes=memory,
        memory_free_bytes=None if free is None else min(free, memory),
        memory_bandwidth=_memory_bandwidth(gpu),
        numa_node=gpu.numa_node,
        facts=_facts(gpu),
        basis="unknown" if _memory_bandwidth(gpu) is None else "estimated",
        usable=not why_not,
        why_not_usable=why_not,
    )


def _memory_bandwidth(gpu: Gpu) -> float | None:
    """Bytes/s that reads may reach, from bus width and clock: two transfers per clock."""
    if not gpu.memory_bus_bits or not gpu.memory_clock_mhz:
        return None
    return gpu.memory_bus_bits / 8 * gpu.memory_clock_mhz * 1e6 * 2 * _REACHED


def _facts(gpu: Gpu) -> dict[str, str | int | float | bool]:
    capability = ".".join(map(str, gpu.compute_capability)) if gpu.compute_capability else None
    facts = {
        "driver": gpu.driver or None,
        "uuid": gpu.uuid or None,
        "pci_bus_id": gpu.pci_bus_id or None,
        "pcie_gen": gpu.pcie_gen,
        "pcie_width": gpu.pcie_width,
        "nvlinks": sum(gpu.nvlinks.values()) or None,
        "compute_capability": capability,
        "mig": gpu.mig,
    }
    return {key: value for key, value in facts.items() if value is not None}


def _links(gpus: dict[str, Gpu], cpus: Sequence[DeviceSpec]) -> list[Link]:
    """Both ways between each GPU and each CPU over PCIe, and between GPUs over NVLink or else PCIe."""
    links = []
    for name, gpu in gpus.items():
        ends = [(cpu.name, _pcie(gpu)) for cpu in cpus]
        ends += [(other, _between(gpu, peer)) for other, peer in gpus.items() if other > name]
        for end, rate in ends:
            if rate:
                pairs = ((name, end), (end, name))
                links += [Link(a, b, rate * _REACHED, _LATENCY, "estimated") for a, b in pairs]
    return links


def _pcie(gpu: Gpu) -> float:
    """Bytes/s each way, 0 where the driver does not say."""
    return _PCIE_LANE.get(gpu.pcie_gen or 0, 0.0) * (gpu.pcie_width or 0)


def _between(a: Gpu, b: Gpu) -> float:
    links = min(a.nvlinks.get(SWITCH, 0), b.nvlinks.get(SWITCH, 0)) + a.nvlinks.get(b.pci_bus_id, 0)
    generation = (a.compute_capability or (7, 0))[0]
    return links * _NVLINK.get(generation, 25e9) if links else min(_pcie(a), _pcie(b))


class CudaEvent(Event):
    __slots__ = ("event",)

    def __init__(self, stream: str, event: torch.cuda.Event) -> None:
        super().__init__(stream)
        self.event = event


class CudaBackend:
    """The same verbs over torch.cuda streams and events; host tensors should be pinned, or copies wait for them.

    The results of launches come from torch's allocator: keep them until every stream that reads them was waited for."""

    host_memory = False

    def __init__(self, spec: DeviceSpec) -> None:
        import torch

        index = int(spec.name.rpartition(":")[2])
        there = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if index >= there:
            raise InvalidInput(
                f"{spec.name} is declared, but torch {torch.__version__} finds {there} CUDA devices here; "
                "plan for it without opening it, or compute on cpu or sim:0"
            )
        self.spec = spec
        self._device = torch.device("cuda", index)
        self._ledger = Ledger(spec.name, spec.memory_bytes)
        self._streams = {DEFAULT_STREAM: torch.cuda.default_stream(self._device)}

    @property
    def torch_device(self) -> torch.device:
        return self._device

    def allocate(self, nbytes: int) -> torch.Tensor:
        import torch

        self._ledger.check(nbytes)
        try:
            return self._ledger.add(torch.empty(nbytes, dtype=torch.uint8, device=self._device))
        except torch.OutOfMemoryError as error:
            raise self._ledger.out_of_memory(nbytes) from error

    def free(self, buffer: torch.Tensor) -> None:
        self._ledger.remove(buffer)

    def copy(self, dst: torch.Tensor, src: torch.Tensor, stream: str | None = None) -> None:
        import torch

        with torch.cuda.stream(self._stream(stream)):
            copy_bytes(dst, src, non_blocking=True)

    def launch(
        self,
        fn: Callable[..., T],
        *args: Any,
        stream: str | None = None,
        reads: Sequence[torch.Tensor] = (),
        writes: Sequence[torch.Tensor] = (),
        cost_s: float = 0.0,
        name: str = "",
    ) -> T:
        import torch

        with torch.cuda.stream(self._stream(stream)):
            return fn(*args)

    def record(self, stream: str | None = None) -> Event:
        import torch

        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(self._stream(stream))
        return CudaEvent(stream or DEFAULT_STREAM, event)

    def wait(self, event: Event, stream: str | None = None) -> None:
        self._stream(stream).wait_event(_cuda_event(event))

    def synchronize(self, event: Event | None = None) -> None:
        import torch

        if event is None:
            torch.cuda.synchronize(self._device)
        else:
            _cuda_event(event).synchronize()

    def elapsed(self, start_event: Event, end_event: Event) -> float:
        _cuda_event(end_event).synchronize()
        return float(_cuda_event(start_event).elapsed_time(_cuda_event(end_event))) * 1e-3

    def host_access(self, tensor: torch.Tensor, write: bool = False) -> None:
        return None

    def memory(self) -> MemoryUse:
        return self._ledger.memory()

    def _stream(self, name: str | None) -> torch.cuda.Stream:
        import torch

        name = name or DEFAULT_STREAM
        if name not in self._streams:
            self._streams[name] = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        return self._streams[name]


def _cuda_event(event: Event) -> torch.cuda.Event:
    if not isinstance(event, CudaEvent):
        raise TypeError(f"{type(event).__name__} was recorded by another backend; wait for it there")
    return event.event
