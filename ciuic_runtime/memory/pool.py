"""`TensorPool`: slots of fixed address out of one arena, by size, used again without allocation, counted to the byte.
Knows sizes and budgets; what is in a slot, and when it may be given back, its user knows."""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ciuic_runtime.devices.backend import Backend
from ciuic_runtime.devices.errors import InvalidInput, OutOfMemory
from ciuic_runtime.devices.units import format_bytes, parse_bytes
from ciuic_runtime.memory.arena import arena_of, slot_size
from ciuic_runtime.memory.tensor import CiuicTensor, parse_dtype


@dataclass(frozen=True, slots=True)
class PoolUse:
    """Bytes, rounded to sizes of slots."""

    used: int  # in slots that are out
    free: int  # in slots that wait to be used again
    peak: int  # the most that was used at once
    held_peak: int  # the most that was used or waiting at once
    budget: int  # 0: none


class TensorPool:
    """Memory of one device (None: the host). `budget` bounds what slots occupy, those that wait included.

    One thread at a time, but tensors may be let go of anywhere."""

    def __init__(self, budget: str | int | None = None, backend: Backend | None = None, reserve: int = 0) -> None:
        """`reserve`: bytes of slots that are expected in all, as far as known."""
        self.backend = backend
        self._budget = parse_bytes(budget) if budget is not None else 0
        self._arena = arena_of(backend, reserve or self._budget)
        self._free: dict[int, list[torch.Tensor]] = {}  # size -> slots
        self._empty: dict[int, list[torch.Tensor]] = {}  # size -> addresses without memory
        self._out: dict[int, torch.Tensor] = {}  # address -> slot
        self._returned: deque[int] = deque()  # addresses of slots whose last tensor is gone
        self._used = self._waiting = self._peak = self._held_peak = 0

    # Slots

    def can_allocate(self, nbytes: int) -> bool:
        """What waits would be discarded for it."""
        self._take_back()
        return not self._budget or self._used + slot_size(nbytes) <= self._budget

    def allocate(self, nbytes: int) -> torch.Tensor:
        """A slot, uint8 [nbytes], with whatever was there; raises OutOfMemory where the budget has no room."""
        if nbytes <= 0:
            raise InvalidInput(f"{nbytes} bytes were asked for; a slot has at least one")
        size = slot_size(nbytes)
        self._take_back()
        slot = self._waiting_slot(size)
        if slot is None:
            if not self.can_allocate(nbytes):
                raise self._out_of_memory(nbytes)
            if self._budget:
                self._discard(self._used + self._waiting + size - self._budget)
            empty = self._empty.get(size)
            slot = empty.pop() if empty else self._arena.take(size)
        return self._hand_out(slot)[:nbytes]

    def free(self, slot: torch.Tensor) -> None:
        """The slot may be handed out again; only after its last reader is done."""
        self._put_back(slot.data_ptr())

    def keep(self, slots: Iterable[torch.Tensor]) -> None:
        """Frees every slot but these: for a user that lost count of what it had, and has no tensors of this pool."""
        kept = {slot.data_ptr() for slot in slots}
        for address in [a for a in self._out if a not in kept]:
            self._put_back(address)

    @property
    def budget(self) -> int:
        """Bytes; 0 where there is none."""
        return self._budget

    @budget.setter
    def budget(self, nbytes: int) -> None:
        """Slots that wait go back to the device as far as needed; those that are out stay until they are freed."""
        self._take_back()
        self._arena.touch_no_further()
        self._budget = nbytes
        if nbytes:
            self._discard(self._used + self._waiting - nbytes)

    def touch_ahead(self) -> None:
        """The rest of the budget will be used soon: the system may give its memory from now on."""
        empty = sum(size * len(slots) for size, slots in self._empty.items())  # are taken before others
        self._arena.touch_ahead(self._budget - self._used - self._waiting - empty)

    def touch_no_further(self) -> None:
        """What was touched and is in no slot goes back to the system."""
        self._arena.touch_no_further()

    def memory(self) -> PoolUse:
        self._take_back()
        return PoolUse(self._used, self._waiting, self._peak, self._held_peak, self._budget)

    def clear(self) -> None:
        """Gives slots that wait back to the device."""
        self._arena.touch_no_further()
        self._take_back()
        self._discard(self._waiting)

    # Tensors

    def get_tensor(self, shape: Sequence[int] | int, dtype: str = "float32") -> CiuicTensor | None:
        """A tensor in a slot that waits, with whatever was there; None where no slot of its size does."""
        dims, kind, nbytes = _described(shape, dtype)
        self._take_back()
        slot = self._waiting_slot(slot_size(nbytes))
        if slot is None:
            return None
        return self._tensor(self._hand_out(slot), dims, kind, nbytes)

    def add_tensor(self, tensor: CiuicTensor) -> CiuicTensor:
        """The tensor's values in a slot of the pool, to be used instead of it: when the last reference is gone, views
        included, the slot waits for the next `get_tensor`. Raises OutOfMemory where the budget has no room."""
        if not isinstance(tensor, CiuicTensor):
            raise InvalidInput(f"a pool takes CiuicTensors, not {type(tensor).__name__}; CiuicTensor(shape, dtype)")
        dims, kind, nbytes = _described(tensor.shape, tensor.dtype)
        slot = self.allocate(nbytes)
        pooled = self._tensor(self._out[slot.data_ptr()], dims, kind, nbytes)
        pooled.data.copy_(tensor.data)
        return pooled

    def _tensor(self, slot: torch.Tensor, dims: tuple[int, ...], dtype: torch.dtype, nbytes: int) -> CiuicTensor:
        """Over the slot; the slot comes back when torch lets go of the memory."""
        lease = _Lease(slot[:nbytes])
        weakref.finalize(lease, self._returned.append, slot.data_ptr()).atexit = False
        memory = torch.from_numpy(np.asarray(lease)) if slot.device.type == "cpu" else torch.as_tensor(lease)
        return CiuicTensor.of(memory.view(dtype).view(dims))

    # Accounts

    def _take_back(self) -> None:
        while self._returned:
            self._put_back(self._returned.popleft())

    def _put_back(self, address: int) -> None:
        slot = self._out.pop(address, None)
        assert slot is not None, "a slot was freed twice, or is not of this pool"
        size = slot.numel()
        self._used -= size
        self._waiting += size
        self._free.setdefault(size, []).append(slot)
        if self._budget and self._used + self._waiting > self._budget:
            self._discard(self._used + self._waiting - self._budget)

    def _hand_out(self, slot: torch.Tensor) -> torch.Tensor:
        self._out[slot.data_ptr()] = slot
        self._used += slot.numel()
        self._peak = max(self._peak, self._used)
        self._held_peak = max(self._held_peak, self._used + self._waiting)
        return slot

    def _waiting_slot(self, size: int) -> torch.Tensor | None:
        slots = self._free.get(size)
        if not slots:
            return None
        self._waiting -= size
        return slots.pop()

    def _discard(self, nbytes: int) -> None:
        """Gives waiting slots of at least so many bytes back to the device, largest first."""
        for size in sorted(self._free, reverse=True) if nbytes > 0 else ():
            slots = self._free[size]
            while slots and nbytes > 0:
                slot = slots.pop()
                if self._arena.discard(slot):
                    self._empty.setdefault(size, []).append(slot)
                self._waiting -= size
                nbytes -= size

    def _out_of_memory(self, nbytes: int) -> OutOfMemory:
        free = max(0, self._budget - self._used)
        return OutOfMemory(
            f"{format_bytes(nbytes)} were asked of a pool with {format_bytes(free)} left of "
            f"{format_bytes(self._budget)}; let go of tensors, or give the pool a larger budget",
            need=nbytes, free=free, capacity=self._budget,
        )  # fmt: skip


class _Lease:
    """What a tensor's memory hangs on: lives as long as torch's storage does."""

    __slots__ = ("__array_interface__", "__cuda_array_interface__", "__weakref__", "slot")

    def __init__(self, slot: torch.Tensor) -> None:
        self.slot = slot
        described: dict[str, Any] = {
            "shape": (slot.numel(),), "typestr": "|u1", "data": (slot.data_ptr(), False), "version": 3,
        }  # fmt: skip
        if slot.device.type == "cpu":
            self.__array_interface__ = described
        else:
            self.__cuda_array_interface__ = described


def _described(shape: Sequence[int] | int, dtype: str) -> tuple[tuple[int, ...], torch.dtype, int]:
    dims = tuple(shape) if isinstance(shape, Sequence) else (shape,)
    kind = parse_dtype(dtype)
    if not dims or any(type(n) is not int or n < 1 for n in dims):
        raise InvalidInput(f"a pooled tensor of shape {dims} was asked for; give whole numbers of at least 1")
    return dims, kind, math.prod(dims) * kind.itemsize
