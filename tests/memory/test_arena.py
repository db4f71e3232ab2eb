"""Where slots lie: one range of addresses, larger than memory if need be."""

from __future__ import annotations

import ctypes
import gc
import platform
import sys
import threading

import pytest
import torch

from ciuic_runtime.devices.backend import PAGE
from ciuic_runtime.memory import arena as arena_module
from ciuic_runtime.memory.arena import HostArena
from ciuic_runtime.memory.pool import TensorPool

MIB = 1 << 20


@pytest.fixture
def at_least_kernel_5_14() -> None:
    major, minor = platform.release().split(".")[:2]
    if (int(major), int(minor)) < (5, 14):
        pytest.skip("an older kernel gives memory when it is written")


def test_more_address_space_than_there_is_memory_is_reserved() -> None:
    """A model larger than memory gets one range: what is not used does not count."""
    arena = HostArena(1 << 40)
    first, second = arena.take(1 << 20), arena.take(1 << 20)
    first.fill_(1)
    assert second.data_ptr() - first.data_ptr() == 1 << 20
    assert arena.discard(first)
    assert not first.any()


linux = pytest.mark.skipif(sys.platform != "linux", reason="another system's memory comes when it is written")


def resident(arena: HostArena) -> list[bool]:
    """Of each MiB of the range, whether all of it is in memory."""
    memory = arena._range
    assert memory is not None
    pages = (ctypes.c_ubyte * (memory.numel() // PAGE))()
    assert not ctypes.CDLL(None).mincore(ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(memory.numel()), pages)
    found = torch.frombuffer(pages, dtype=torch.uint8).bitwise_and(1).view(-1, MIB // PAGE)
    return found.bool().all(1).tolist()


def touched(arena: HostArena) -> int:
    """MiB, when the system has given what it was asked for."""
    assert arena._toucher is not None
    arena._toucher.join()
    found = resident(arena)
    count = found.index(False)
    assert not any(found[count:])
    return count


@linux
def test_memory_comes_before_it_is_written(at_least_kernel_5_14: None) -> None:
    arena = HostArena()
    arena.take(MIB).fill_(7)
    assert sum(resident(arena)) <= 2, "a huge page at most"
    arena.touch_ahead(63 * MIB)
    slots = [arena.take(3 * MIB).fill_(i) for i in range(1, 5)]
    assert touched(arena) == 64
    assert all((slot == i).all() for i, slot in enumerate(slots, 1)), "what is written meanwhile stays"


@linux
def test_what_was_touched_and_not_taken_goes_back(at_least_kernel_5_14: None) -> None:
    arena = HostArena()
    slot = arena.take(4 * MIB).fill_(7)
    arena.touch_ahead(40 * MIB)
    assert touched(arena) == 44
    arena.touch_no_further()
    assert sum(resident(arena)) == 4
    assert (slot == 7).all()
    arena.touch_no_further()
    later = arena.take(2 * MIB).fill_(8)
    assert (later == 8).all()
    for _ in range(20):  # while it goes on
        arena.touch_ahead(900 * MIB)
        arena.touch_no_further()
        assert (slot == 7).all()
        assert (later == 8).all()
        assert sum(resident(arena)) <= 6


@linux
def test_addresses_that_wait_without_memory_count_as_what_will_be_used(at_least_kernel_5_14: None) -> None:
    pool = TensorPool(32 * MIB)
    arena = pool._arena
    assert isinstance(arena, HostArena)
    slots = [pool.allocate(4 * MIB).fill_(1) for _ in range(4)]
    for slot in slots[:2]:
        pool.free(slot)
    pool.budget = 8 * MIB
    assert sum(resident(arena)) == 8
    pool.budget = 32 * MIB
    pool.touch_ahead()
    assert arena._toucher is not None
    arena._toucher.join()
    for _ in range(6):
        pool.allocate(4 * MIB).fill_(2)
    assert sum(resident(arena)) == 32


@linux
def test_touching_ends_with_the_arena(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever forgets to close it has its memory back all the same."""
    begun, go_on, asked = threading.Event(), threading.Event(), []

    def slowly(address: int, nbytes: int, advice: int) -> int:
        asked.append(nbytes)
        begun.set()
        assert go_on.wait(30)
        return 0

    monkeypatch.setattr(arena_module, "_madvise", lambda: slowly)
    arena = HostArena()
    arena.touch_ahead(900 * MIB)
    toucher = arena._toucher
    assert toucher is not None
    assert begun.wait(30)
    del arena
    gc.collect()
    go_on.set()
    toucher.join()
    assert len(asked) == 1


def test_a_system_without_another_thread_gives_memory_later(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    arena = HostArena()
    arena.touch_ahead(100 * MIB)
    assert (arena.take(MIB).fill_(3) == 3).all()
    arena.touch_no_further()


def test_where_all_is_taken_nothing_goes_back() -> None:
    arena = HostArena(1 << 30)
    arena.touch_ahead(8 * MIB)
    slot = arena.take(1 << 30)
    slot[-1] = 5
    arena.touch_no_further()
    assert slot[-1] == 5
    arena.take(MIB)[0] = 1  # of another range
    arena.touch_ahead(8 * MIB)
    arena.touch_no_further()
    assert slot[-1] == 5


@linux
def test_a_pool_has_its_budget_touched_and_gives_back_what_a_lower_one_has_no_room_for(
    at_least_kernel_5_14: None,
) -> None:
    pool = TensorPool(48 * MIB)
    arena = pool._arena
    assert isinstance(arena, HostArena)
    slots = [pool.allocate(2 * MIB).fill_(i) for i in range(8)]
    pool.free(slots.pop())
    pool.touch_ahead()
    assert touched(arena) == 48
    pool.budget = 14 * MIB
    assert sum(resident(arena)) == 14
    assert all((slot == i).all() for i, slot in enumerate(slots))


def test_a_system_that_cannot_give_memory_in_advance_gives_it_later(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refused(address: int, nbytes: int, advice: int) -> int:
        asked.append(nbytes)
        return -1

    monkeypatch.setattr(arena_module, "_madvise", lambda: refused)
    arena = HostArena()
    arena.touch_ahead(100 * MIB)
    if arena._toucher is not None:
        arena._toucher.join()
        assert len(asked) == 1
    arena.touch_no_further()
    assert (arena.take(MIB).fill_(3) == 3).all()
