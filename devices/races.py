"""Who touched which bytes, and in what order that is known to have happened: vector clocks and a happens-before check.
Knows neither time nor values; the simulated device asks it before every copy and launch."""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ciuic_runtime.devices.backend import MemoryFault, RaceError

if TYPE_CHECKING:
    import torch

HOST = "host"
POISON = 0xFF  # NaN in every float type
QUARANTINE_BYTES = 64 << 20  # freed buffers kept poisoned, so that a late use is an error message and not a crash

Clock = dict[str, int]  # stream -> the last of its operations known to be over


def join(clock: Clock, other: Clock) -> None:
    """What `other` knows to be over, `clock` knows from now on."""
    for stream, tick in other.items():
        clock[stream] = max(clock.get(stream, 0), tick)


@dataclass(frozen=True, slots=True)
class Operation:
    """One copy, launch or host access."""

    name: str
    stream: str
    tick: int  # counts the operations of its stream

    def over(self, clock: Clock) -> bool:
        return clock.get(self.stream, 0) >= self.tick


@dataclass(frozen=True, slots=True)
class Access:
    """One operation's touch of some bytes of a region."""

    by: Operation
    start: int
    end: int
    write: bool

    def conflicts(self, other: Access) -> bool:
        return (self.write or other.write) and self.start < other.end and other.start < self.end

    def replaces(self, old: Access, clock: Clock) -> bool:
        """Whoever comes after this one also comes after `old`, which need not be kept."""
        inside = self.start <= old.start and old.end <= self.end
        return inside and (self.write or not old.write) and old.by.over(clock)

    def __str__(self) -> str:
        return f"{'write' if self.write else 'read'} by {self.by.name} (stream {self.by.stream})"


@dataclass(slots=True, eq=False)
class Region:
    """Contiguous memory whose accesses are remembered: a buffer, the result of a launch, or a host tensor."""

    base: int  # address
    nbytes: int
    on_device: bool
    buffer: torch.Tensor | None = None  # held by the region; None: held by whoever uses it
    live: bool = True
    accesses: list[Access] = field(default_factory=list)


class AccessHistory:
    """All memory of one device: buffers by address, everything else by its storage."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.host: Clock = {HOST: 0}  # what the host has synchronized with
        self._bases: list[int] = []  # sorted addresses of the buffers, live and in quarantine
        self._buffers: dict[int, Region] = {}
        self._others: dict[int, Region] = {}  # storage address -> region, forgotten when the storage goes
        self._quarantine: deque[Region] = deque()
        self._quarantined = 0  # bytes

    def add_buffer(self, buffer: torch.Tensor) -> None:
        region = Region(buffer.data_ptr(), buffer.numel(), True, buffer.fill_(POISON))
        self._bases.insert(bisect_right(self._bases, region.base), region.base)
        self._buffers[region.base] = region

    def check_idle(self, buffer: torch.Tensor) -> None:
        """Raises RaceError where an operation on the buffer may still be running as far as the host knows."""
        for access in self.region(buffer, "free").accesses:
            if not access.by.over(self.host):
                raise RaceError(f"free on {self.device} while {access} may still run; synchronize with it first")

    def remove_buffer(self, buffer: torch.Tensor) -> None:
        """Poisons a freed buffer and keeps it for a while; beyond the quarantine's size the oldest go for good."""
        region = self._buffers[buffer.data_ptr()]
        region.live = False
        buffer.fill_(POISON)
        self._quarantine.append(region)
        self._quarantined += region.nbytes
        while self._quarantined > QUARANTINE_BYTES:
            old = self._quarantine.popleft()
            self._quarantined -= old.nbytes
            del self._buffers[old.base]
            self._bases.remove(old.base)

    def region(self, tensor: torch.Tensor, name: str) -> Region:
        """Where the tensor's bytes are; one never seen before is a host tensor."""
        if tensor.numel() == 0:
            return Region(0, 0, True)
        address = tensor.data_ptr()
        at = bisect_right(self._bases, address) - 1
        if at >= 0 and address < (region := self._buffers[self._bases[at]]).base + region.nbytes:
            if not region.live:
                raise MemoryFault(f"{name} on {self.device}: the buffer was freed before")
            return region
        storage = tensor.untyped_storage()
        return self._others.get(storage.data_ptr()) or self._remember(storage)

    def adopt(self, results: Iterable[torch.Tensor], by: Operation) -> None:
        """New tensors that a launch returned live on the device and were written by it."""
        for tensor in results:
            region = self.region(tensor, by.name)
            if not region.on_device:
                region.on_device = True
                region.accesses.append(Access(by, 0, region.nbytes, True))

    def access(self, tensor: torch.Tensor, write: bool, by: Operation, clock: Clock) -> None:
        """Remembers an access, or raises RaceError where a conflicting earlier one may still be running."""
        region = self.region(tensor, by.name)
        start = tensor.data_ptr() - region.base
        new = Access(by, start, start + _span(tensor), write)
        for old in region.accesses:
            if new.conflicts(old) and not old.by.over(clock):
                raise RaceError(_explain(self.device, new, old))
        kept = [a for a in region.accesses if not new.replaces(a, clock) and not a.by.over(self.host)]
        region.accesses = [*kept, new]

    def _remember(self, storage: torch.UntypedStorage) -> Region:
        base = storage.data_ptr()
        region = self._others[base] = Region(base, storage.nbytes(), on_device=False)
        weakref.finalize(storage, self._forget, region).atexit = False
        return region

    def _forget(self, region: Region) -> None:
        if self._others.get(region.base) is region:
            del self._others[region.base]


def _explain(device: str, new: Access, old: Access) -> str:
    if new.by.stream == HOST:
        return f"on {device}: {new} while {old} may still run; synchronize with stream {old.by.stream} first"
    return (
        f"on {device}: {new} is not ordered after {old}; record an event in stream {old.by.stream} "
        f"and let stream {new.by.stream} wait for it"
    )


def _span(tensor: torch.Tensor) -> int:
    """Bytes from the first to the last element."""
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size() if tensor.numel() else 0
