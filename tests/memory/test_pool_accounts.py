"""Whatever is done with a pool in whatever order: slots keep what is in them, bytes add up, and a slot comes back with
the last of all views."""

from __future__ import annotations

import gc
import itertools
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ciuic_runtime.devices.errors import InvalidInput, OutOfMemory
from ciuic_runtime.memory.arena import slot_size
from ciuic_runtime.memory.pool import TensorPool
from ciuic_runtime.memory.tensor import CiuicTensor

SIZES = [1, 64, 65, 4000, 4096, 5000, 20_000]


@given(seed=st.integers(0, 2**32 - 1))
def test_slots_keep_what_is_in_them_and_bytes_add_up_whatever_is_done(seed: int) -> None:
    draw = random.Random(seed)
    pool = TensorPool(draw.choice([None, 40_000, 100_000]))
    out: list[tuple[torch.Tensor, int]] = []  # slots, and the byte that each is full of
    tensors: list[tuple[CiuicTensor, float]] = []
    most = 0
    for step in range(120):
        act = draw.choice(["allocate", "allocate", "free", "add", "get", "drop", "budget", "clear"])
        if act == "allocate":
            nbytes = draw.choice(SIZES)
            if not pool.can_allocate(nbytes):
                with pytest.raises(OutOfMemory, match="larger budget"):
                    pool.allocate(nbytes)
                continue
            out.append((pool.allocate(nbytes).fill_(step), step))
        elif act == "free" and out:
            pool.free(out.pop(draw.randrange(len(out)))[0])
        elif act == "add" and pool.can_allocate(4000):
            tensors.append((pool.add_tensor(CiuicTensor((10, 100)) + float(step)), float(step)))
        elif act == "get" and (found := pool.get_tensor((10, 100))):
            found.data.fill_(float(step))
            tensors.append((found, float(step)))
            del found
        elif act == "drop" and tensors:
            del tensors[draw.randrange(len(tensors))]
        elif act == "budget" and pool.budget:
            pool.budget = draw.choice([20_000, 60_000, 100_000])
        elif act == "clear":
            pool.clear()
        use = pool.memory()
        most = max(most, use.used)
        assert use.used == sum(slot_size(slot.numel()) for slot, _ in out) + len(tensors) * slot_size(4000)
        assert use.peak == most
        assert use.held_peak >= use.used + use.free
        assert not pool.budget or use.free == 0 or use.used + use.free <= pool.budget
        assert act != "clear" or use.free == 0
        assert all(slot.eq(value).all() for slot, value in out)
        assert all(tensor.data.eq(value).all() for tensor, value in tensors)
    spans = sorted((slot.data_ptr(), slot.data_ptr() + slot.numel()) for slot, _ in out)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans)), "slots overlap"


def test_a_slot_comes_back_only_with_the_last_of_all_views() -> None:
    pool = TensorPool()
    tensor = pool.add_tensor(CiuicTensor((8, 16), "int64"))
    views: dict[str, object] = {
        "reshaped": tensor.reshape(16, 8), "row": tensor[3], "column": tensor[:, 2], "transposed": tensor.T,
        "torch's": tensor.data.view(-1)[5:], "numpy's": tensor.numpy()[::2], "bytes": memoryview(tensor.numpy()),
        "dlpack": torch.from_dlpack(tensor.data), "element": tensor[1, 1],
    }  # fmt: skip
    assert tensor.astype("float32").data.data_ptr() != tensor.data.data_ptr(), "a copy holds nothing"
    del tensor
    while views:
        gc.collect()
        assert pool.memory().used == 1024, f"{', '.join(views)} still see it"
        assert pool.get_tensor((8, 16), "int64") is None
        views.popitem()
    gc.collect()
    assert (pool.memory().used, pool.memory().free) == (0, 1024)
    assert pool.get_tensor(128, "int64") is not None


def test_a_tensor_outlives_the_pool_it_is_from() -> None:
    pool = TensorPool("1MiB")
    tensor = pool.add_tensor(CiuicTensor((100, 100)) + 3.0)
    del pool
    gc.collect()
    assert tensor.sum().item() == 30_000.0


@pytest.mark.parametrize("shape", [None, 2.5, "ab", (None,), (-1,), (True,), ((2, 3),)])
def test_shapes_of_no_numbers_are_refused_in_one_line(shape: object) -> None:
    with pytest.raises(InvalidInput):
        TensorPool().get_tensor(shape)  # type: ignore[arg-type]


@pytest.mark.parametrize("nbytes", [0, -1])
def test_a_slot_has_at_least_one_byte(nbytes: int) -> None:
    with pytest.raises(InvalidInput, match="at least one"):
        TensorPool().allocate(nbytes)
