"""A simulated accelerator: separate bounded memory, streams and copy engines on a virtual clock, and a race checker.
Values are computed at once on host memory in program order; only the clock and the checker know that work overlaps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from ciuic_runtime.devices.backend import DEFAULT_STREAM, Event, Ledger, MemoryFault, MemoryUse, copy_bytes, host_buffer
from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.devices.races import HOST, AccessHistory, Clock, Operation, join
from ciuic_runtime.devices.spec import ASSUMED_LINK_BANDWIDTH, ASSUMED_LINK_LATENCY, DeviceSpec, Link, Topology

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
GRANULE = 256  # bytes, as CUDA allocators round


@dataclass(slots=True)
class Stream:
    """Work that runs in order: what its next operation knows to be over, and when it could start."""

    name: str
    clock: Clock = field(default_factory=dict)
    busy_until: float = 0.0  # s, virtual


class SimulatedEvent(Event):
    __slots__ = ("at", "clock", "owner")

    def __init__(self, stream: Stream, owner: SimulatedBackend) -> None:
        super().__init__(stream.name)
        self.at, self.clock, self.owner = stream.busy_until, dict(stream.clock), owner


class SimulatedBackend:
    """No threads and no sleeping: the same program gives the same values, times and errors every time.

    A host tensor in a copy counts as page-locked: the host runs on, and must synchronize before it touches it again."""

    host_memory = False

    def __init__(self, spec: DeviceSpec, topology: Topology | None = None) -> None:
        import torch

        if spec.memory_bytes <= 0:
            raise InvalidInput(f"simulated {spec.name} has no memory_bytes; declare how much it has, such as 16GiB")
        self.spec = spec
        self.now = 0.0  # s, virtual: the host's clock
        self._device = torch.device("cpu")
        self._ledger = Ledger(f"simulated {spec.name}", spec.memory_bytes, GRANULE)
        self._links = _links(spec, topology)
        self._history = AccessHistory(f"simulated {spec.name}")
        self._streams: dict[str, Stream] = {}
        self._engine_free: dict[str, float] = {}  # engine -> s, virtual

    def __repr__(self) -> str:
        return f"SimulatedBackend({self.spec.name}, at {self.now:.6f} s of virtual time)"

    @property
    def torch_device(self) -> torch.device:
        return self._device

    def allocate(self, nbytes: int) -> torch.Tensor:
        self._ledger.check(nbytes)
        buffer = self._ledger.add(host_buffer(nbytes))
        self._history.add_buffer(buffer)
        return buffer

    def free(self, buffer: torch.Tensor) -> None:
        self._history.check_idle(buffer)
        self._ledger.remove(buffer)
        self._history.remove_buffer(buffer)

    def memory(self) -> MemoryUse:
        return self._ledger.memory()

    def copy(self, dst: torch.Tensor, src: torch.Tensor, stream: str | None = None) -> None:
        engine = self._engine(dst, src)
        seconds = self._links[engine].transfer_time(dst.nbytes)
        self._issue(stream, engine, seconds, f"{engine} copy of {dst.nbytes} B", [src], [dst])
        copy_bytes(dst, src)

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
        name = name or getattr(fn, "__name__", "launch")
        for tensor in (*reads, *writes):
            if not self._history.region(tensor, name).on_device:
                raise MemoryFault(f"{name} on simulated {self.spec.name} touches a host tensor; copy it there first")
        operation = self._issue(stream, "compute", cost_s, name, reads, writes)
        result = fn(*args)
        self._history.adopt(_tensors(result), operation)
        return result

    def _issue(
        self,
        stream_name: str | None,
        engine: str,
        seconds: float,
        name: str,
        reads: Sequence[torch.Tensor],
        writes: Sequence[torch.Tensor],
    ) -> Operation:
        """One operation joins its stream: checked against all that may run beside it, then given its virtual time."""
        stream = self._stream(stream_name)
        # Step 1: it comes after its stream's earlier work and after all that the host has synchronized with.
        join(stream.clock, self._history.host)
        operation = Operation(name, stream.name, stream.clock.get(stream.name, 0) + 1)
        stream.clock[stream.name] = operation.tick
        # Step 2: its accesses must be ordered with those of all others.
        for tensor, write in [(t, False) for t in reads] + [(t, True) for t in writes]:
            self._history.access(tensor, write, operation, stream.clock)
        # Step 3: it starts when the host has issued it, its stream got there and its engine is free.
        self.now += self.spec.launch_overhead or 0.0
        start = max(self.now, stream.busy_until, self._engine_free.get(engine, 0.0))
        stream.busy_until = self._engine_free[engine] = start + seconds
        return operation

    def record(self, stream: str | None = None) -> Event:
        return SimulatedEvent(self._stream(stream), self)

    def wait(self, event: Event, stream: str | None = None) -> None:
        point, waiter = self._own(event), self._stream(stream)
        join(waiter.clock, point.clock)
        waiter.busy_until = max(waiter.busy_until, point.at)

    def synchronize(self, event: Event | None = None) -> None:
        points = [SimulatedEvent(s, self) for s in self._streams.values()] if event is None else [self._own(event)]
        for point in points:
            join(self._history.host, point.clock)
            self.now = max(self.now, point.at)

    def elapsed(self, start_event: Event, end_event: Event) -> float:
        return self._own(end_event).at - self._own(start_event).at

    def host_access(self, tensor: torch.Tensor, write: bool = False) -> None:
        host = self._history.host
        host[HOST] += 1
        self._history.access(tensor, write, Operation("the host", HOST, host[HOST]), host)

    def _engine(self, dst: torch.Tensor, src: torch.Tensor) -> str:
        """Which copy engine moves these bytes: to the device, back, or within it."""
        if dst.nbytes != src.nbytes:
            raise ValueError(f"copy of {src.nbytes} bytes into {dst.nbytes} bytes on simulated {self.spec.name}")
        there = {True: "d", False: "h"}
        engine = "2".join(there[self._history.region(t, "copy").on_device] for t in (src, dst))
        if engine == "h2h":
            raise MemoryFault(f"copy on simulated {self.spec.name} between two host tensors; one must be on the device")
        return engine

    def _stream(self, name: str | None) -> Stream:
        name = name or DEFAULT_STREAM
        return self._streams.setdefault(name, Stream(name))

    def _own(self, event: Event) -> SimulatedEvent:
        if not isinstance(event, SimulatedEvent) or event.owner is not self:
            raise TypeError(f"this event was not recorded by simulated {self.spec.name}; wait for it where it was")
        return event


def _tensors(result: object) -> list[torch.Tensor]:
    """The tensors in what a launch returned."""
    import torch

    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, dict):
        result = list(result.values())
    return [t for item in result for t in _tensors(item)] if isinstance(result, (list, tuple)) else []


def _links(spec: DeviceSpec, topology: Topology | None) -> dict[str, Link]:
    """Copy engine -> its link: the topology's from and to a CPU; within the device each byte is read and written."""
    assumed = Link(HOST, spec.name, ASSUMED_LINK_BANDWIDTH, ASSUMED_LINK_LATENCY, "estimated")
    inside = spec.memory_bandwidth / 2 if spec.memory_bandwidth else ASSUMED_LINK_BANDWIDTH
    host = next((d.name for d in topology.devices if d.kind == "CPU"), None) if topology else None
    return {
        "h2d": topology.link(host, spec.name) if topology and host else assumed,
        "d2h": topology.link(spec.name, host) if topology and host else assumed,
        "d2d": Link(spec.name, spec.name, inside),
    }
