"""The contract between whoever computes and a device: a few verbs over plain uint8 tensors, streams and events.
Knows no device and decides nothing; each kind has its own file beside this one, and only using one loads torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from ciuic_runtime.devices.errors import InvalidInput, OutOfMemory
from ciuic_runtime.devices.spec import DeviceSpec
from ciuic_runtime.devices.units import format_bytes

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
DEFAULT_STREAM = "compute"
PAGE = 4096  # bytes; buffers of at least this size start on a page, so that O_DIRECT can read into them


class RaceError(RuntimeError):
    """Two accesses to the same bytes, at least one of them a write, that no event or synchronize orders."""


class MemoryFault(RuntimeError):
    """A buffer was used after it was freed, freed twice, or is not on this device at all."""


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Bytes handed out by `allocate`; results of `launch` are not counted."""

    used: int  # bytes
    peak: int  # bytes
    capacity: int  # bytes; 0: no limit known

    @property
    def free(self) -> int:
        return self.capacity - self.used


class Event:
    """A point in one stream's work, made by `record`; good only for the backend that made it."""

    __slots__ = ("stream",)

    def __init__(self, stream: str) -> None:
        self.stream = stream


@runtime_checkable
class Backend(Protocol):
    """One device. Streams are names ("compute", "copy"): work within one runs in order, between two only events order.

    `free`, and reading a copy's result on the host, are allowed only after the host has synchronized with the
    last user. `reads` and `writes` name the device tensors that a launch touches; the simulated device checks them."""

    spec: DeviceSpec
    host_memory: bool  # True: ordinary host tensors can be used in place, copies are not needed

    @property
    def torch_device(self) -> torch.device: ...

    def allocate(self, nbytes: int) -> torch.Tensor:
        """A uint8 tensor [nbytes] at an address that does not change; raises OutOfMemory."""
        ...

    def free(self, buffer: torch.Tensor) -> None: ...

    def copy(self, dst: torch.Tensor, src: torch.Tensor, stream: str | None = None) -> None:
        """The bytes of `src` over those of `dst`; either may be a host tensor."""
        ...

    def launch(
        self,
        fn: Callable[..., T],
        *args: Any,
        stream: str | None = None,
        reads: Sequence[torch.Tensor] = (),
        writes: Sequence[torch.Tensor] = (),
        cost_s: float = 0.0,  # s, what it takes on a virtual clock; real devices ignore it
        name: str = "",
    ) -> T:
        """What `fn(*args)` returns; tensors in it count as living on this device."""
        ...

    def record(self, stream: str | None = None) -> Event: ...

    def wait(self, event: Event, stream: str | None = None) -> None:
        """Later work in `stream` starts after `event`; the host does not wait."""
        ...

    def synchronize(self, event: Event | None = None) -> None:
        """The host waits for one event, or for everything."""
        ...

    def elapsed(self, start_event: Event, end_event: Event) -> float:
        """Seconds between two recorded events (virtual ones on the simulated device)."""
        ...

    def host_access(self, tensor: torch.Tensor, write: bool = False) -> None:
        """Declares that the host touches a tensor that copies read or write; only the simulated device checks it."""
        ...

    def memory(self) -> MemoryUse: ...


class Ledger:
    """Which buffers are out and how many bytes they hold: refuses what does not fit and what was never given out."""

    def __init__(self, name: str, capacity: int, granule: int = 1) -> None:
        self.name, self.capacity, self.granule = name, capacity, granule
        self.used = self.peak = 0
        self._sizes: dict[int, int] = {}  # address -> bytes, rounded up to granules

    def can_allocate(self, nbytes: int) -> bool:
        return not self.capacity or self.used + self._rounded(nbytes) <= self.capacity

    def check(self, nbytes: int) -> None:
        if nbytes <= 0:
            raise InvalidInput(f"{nbytes} bytes were asked for on {self.name}; a buffer has at least one byte")
        if not self.can_allocate(nbytes):
            raise self.out_of_memory(nbytes)

    def out_of_memory(self, nbytes: int) -> OutOfMemory:
        free = max(0, self.capacity - self.used)
        text = f"{format_bytes(nbytes)} asked for on {self.name}, {format_bytes(free)} free of "
        text += f"{format_bytes(self.capacity)}; free something first, or give this device a larger memory budget"
        return OutOfMemory(text, need=nbytes, free=free, capacity=self.capacity)

    def add(self, buffer: torch.Tensor) -> torch.Tensor:
        self._sizes[buffer.data_ptr()] = size = self._rounded(buffer.numel())
        self.used += size
        self.peak = max(self.peak, self.used)
        return buffer

    def remove(self, buffer: torch.Tensor) -> None:
        size = self._sizes.pop(buffer.data_ptr(), None)
        if size is None:
            raise MemoryFault(f"free on {self.name} of what is not allocated there: freed twice, or part of a buffer")
        self.used -= size

    def memory(self) -> MemoryUse:
        return MemoryUse(self.used, self.peak, self.capacity)

    def _rounded(self, nbytes: int) -> int:
        return -(-nbytes // self.granule) * self.granule


def host_buffer(nbytes: int) -> torch.Tensor:
    """Fresh host memory, uint8 [nbytes]: 64-byte aligned, page aligned from one page upwards."""
    import torch

    align = PAGE if nbytes >= PAGE else 64
    raw = torch.empty(nbytes + align, dtype=torch.uint8)
    start = -raw.data_ptr() % align
    return raw[start : start + nbytes]


def copy_bytes(dst: torch.Tensor, src: torch.Tensor, non_blocking: bool = False) -> None:
    """Bits, never values: tensors of different types are copied as bytes."""
    import torch

    if dst.nbytes != src.nbytes:
        raise ValueError(f"copy of {src.nbytes} bytes into {dst.nbytes} bytes; both sides must have the same size")
    if (dst.dtype, dst.shape) != (src.dtype, src.shape):
        dst, src = dst.view(-1).view(torch.uint8), src.contiguous().view(-1).view(torch.uint8)
    dst.copy_(src, non_blocking=non_blocking)
