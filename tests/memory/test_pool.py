"""Slots of fixed address that are used again, counted to the byte, and given back when the budget falls."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import pytest
import torch

from ciuic_runtime.devices.errors import InvalidInput, OutOfMemory
from ciuic_runtime.memory.arena import slot_size
from ciuic_runtime.memory.pool import TensorPool
from ciuic_runtime.memory.tensor import CiuicTensor


def test_a_tensor_is_used_again_when_its_last_reference_is_gone() -> None:
    pool = TensorPool("1MiB")
    assert pool.get_tensor((8, 2048), "float32") is None
    t = pool.add_tensor(CiuicTensor((8, 2048), "float32"))
    assert t
    assert t.tolist() == CiuicTensor((8, 2048)).tolist()
    address, view = t.data.data_ptr(), t.reshape(2048, 8)[3]
    array = view.numpy()
    del t, view
    gc.collect()
    assert pool.memory().used == 65536, "a numpy view still reads it"
    del array
    assert (pool.memory().used, pool.memory().free) == (0, 65536)
    again = pool.get_tensor((2048, 8))
    assert again is not None
    assert again.data.data_ptr() == address
    assert pool.get_tensor((2048, 8)) is None


def test_slots_are_counted_and_remembered_at_their_highest() -> None:
    pool = TensorPool(20 * 4096)
    slots = [pool.allocate(n) for n in (1, 64, 65, 4096, 4097)]
    sizes = [64, 64, 128, 4096, 8192]
    assert [slot_size(n) for n in (1, 64, 65, 4096, 4097)] == sizes
    assert [s.numel() for s in slots] == [1, 64, 65, 4096, 4097]
    assert all(s.data_ptr() % 64 == 0 for s in slots)
    assert all(s.data_ptr() % 4096 == 0 for s in slots[3:])
    assert pool.memory().used == sum(sizes)
    for s in slots:
        pool.free(s)
    assert (pool.memory().used, pool.memory().free, pool.memory().peak) == (0, sum(sizes), sum(sizes))
    assert pool.allocate(4000).data_ptr() == slots[3].data_ptr() or pool.memory().held_peak > sum(sizes)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free(slots[4])


def test_slots_that_wait_make_room_for_other_sizes() -> None:
    pool = TensorPool(8 * 4096)
    small = [pool.allocate(4096) for _ in range(8)]
    for s in small:
        pool.free(s)
    large = pool.allocate(7 * 4096)
    assert pool.memory().held_peak <= 8 * 4096
    with pytest.raises(OutOfMemory, match="larger budget"):
        pool.allocate(2 * 4096)
    pool.free(large)
    assert pool.can_allocate(8 * 4096)
    assert not pool.can_allocate(9 * 4096)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_a_lower_budget_gives_memory_back_to_the_system() -> None:
    size, count = 3 << 20, 64
    pool = TensorPool(size * count)
    before = resident()
    slots = [pool.allocate(size) for _ in range(count)]
    for s in slots:
        s.fill_(1)
    full = resident()
    assert full - before > 0.9 * size * count
    for s in slots[: count // 2]:
        pool.free(s)
    pool.budget = size * count // 2
    assert full - resident() > 0.4 * size * count
    assert all(int(s[0]) == int(s[-1]) == 1 for s in slots[count // 2 :]), "what is out stays"
    pool.budget = size * count
    again = [pool.allocate(size) for _ in range(count // 2)]
    assert {s.data_ptr() for s in again} == {s.data_ptr() for s in slots[: count // 2]}


def test_tensors_may_be_let_go_of_in_any_thread() -> None:
    pool = TensorPool()
    tensors = [pool.add_tensor(CiuicTensor((64, i + 1))) for i in range(50)]

    def let_go() -> None:
        while tensors:
            tensors.pop()

    threads = [threading.Thread(target=let_go) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    gc.collect()
    assert pool.memory().used == 0


def test_using_again_does_not_allocate() -> None:
    pool = TensorPool()
    kept = pool.add_tensor(CiuicTensor((16, 16), "bfloat16"))
    assert kept.dtype == "bfloat16"
    del kept
    most = pool.memory().held_peak
    for _ in range(100):
        t = pool.get_tensor((16, 16), "bfloat16")
        assert t is not None
        t.data.fill_(torch.pi)
        del t
    assert pool.memory().held_peak == most


@pytest.mark.parametrize(("shape", "dtype"), [((0, 3), "float32"), ((), "float32"), ((2.5,), "int64"), ((2,), "f3")])
def test_what_cannot_be_a_tensor_is_refused(shape: tuple[int, ...], dtype: str) -> None:
    with pytest.raises(InvalidInput):
        TensorPool().get_tensor(shape, dtype)
    with pytest.raises(InvalidInput, match="CiuicTensors"):
        TensorPool().add_tensor(torch.zeros(2))  # type: ignore[arg-type]
