"""Pages moved by hand, whatever came before: every slot holds its page, devices and budgets that are not there are
refused, and what the system refuses is read another way."""

from __future__ import annotations

import errno
import os
import random
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from configs import TINY_V3
from safetensors import safe_open
from safetensors.torch import save_file

import ciuic_runtime as ciuic
from ciuic_runtime.devices.backend import host_buffer
from ciuic_runtime.devices.errors import InvalidInput, OutOfMemory
from ciuic_runtime.devices.units import format_bytes
from ciuic_runtime.memory.hierarchy import MemoryHierarchy
from ciuic_runtime.memory.page_store import PageStore
from ciuic_runtime.models.random_checkpoint import write_random_checkpoint
from ciuic_runtime.ops.native import kernels
from ciuic_runtime.packing import pack

pytestmark = pytest.mark.skipif(kernels() is None, reason="the compiled parts are not built here")


def content(memory: MemoryHierarchy, page: str) -> torch.Tensor:
    return memory.slot_of(memory.number(page))


def stored(store: PageStore, page: str) -> torch.Tensor:
    into = host_buffer(store.pages[page])
    store.read_page(page, into)
    return into


def test_a_slot_holds_its_page_whatever_came_before_it(tiny_int4: Path) -> None:
    """Slots are used again and again, by pages of all sizes, within a budget of two of the largest."""
    store, draw = PageStore(tiny_int4), random.Random(0)
    memory = MemoryHierarchy(tiny_int4, memory={"cpu": 2 * max(store.pages.values())}, cache_policy="lru", io_threads=2)
    expected = {page: stored(store, page) for page in store.pages}
    for _ in range(300):
        some = draw.sample(list(expected), draw.randint(1, 3))
        if sum(store.pages[page] for page in some) <= memory.budget:
            draw.choice([memory.move_to_device, memory.prefetch, memory.evict])(some)
        there = [page for page in expected if memory.is_in_device_memory(page)]
        assert sum(store.pages[page] for page in there) <= memory.budget
        assert all(torch.equal(content(memory, page), expected[page]) for page in there)
    assert memory.evictions > 50
    memory.close()


def test_pages_are_named_by_themselves_by_their_names_and_more_than_once(
    memory: MemoryHierarchy, tiny_int4: Path
) -> None:
    layer = ciuic.Model(tiny_int4).layers[1]
    first, second = layer.weights[:2]
    memory.move_to_device([first, first.name, first, second.name])
    assert memory.is_in_device_memory(page for page in (first, second))
    assert memory.is_in_device_memory([])
    assert memory.pool.memory().used == first.nbytes + second.nbytes
    assert [memory.holders(page) for page in (first, second)] == [0, 0]
    memory.pin([first, first])
    memory.evict([first, first, second])
    assert [memory.where(page) for page in (first, second)] == ["cpu", "disk"]
    memory.unpin(first)
    memory.evict(first)
    assert memory.pool.memory().used == 0


def test_many_threads_move_pages_at_once(tiny_int4: Path) -> None:
    store = PageStore(tiny_int4)
    memory = MemoryHierarchy(tiny_int4, memory={"cpu": sum(store.pages.values()) // 2}, io_threads=3)
    experts = [page for page in memory.pages if ".experts." in page]

    def move(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(40):
            memory.move_to_device(draw.sample(experts, 4))
            memory.evict(draw.choice(experts))
            memory.prefetch(draw.sample(experts, 2))

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(move, range(6)))
    assert not any(memory.holders(page) for page in memory.pages)
    memory.move_to_device(experts[:4])
    assert memory.is_in_device_memory(experts[:4])
    memory.close()


def test_a_prefetch_of_more_than_fits_is_read_as_far_as_it_does(tiny_int4: Path) -> None:
    pages = PageStore(tiny_int4).pages
    experts = [page for page in pages if ".experts." in page]
    memory = MemoryHierarchy(tiny_int4, memory={"cpu": 8 * pages[experts[0]]})
    memory.prefetch(experts)
    for page in reversed(experts):
        memory.move_to_device(page)
        assert memory.pool.memory().used <= memory.budget
    assert memory.state.counts.misses == len(experts), "each was read ahead, or for the move"
    memory.close()


# What is not there


def test_a_hierarchy_without_a_model_has_a_budget_and_no_pages() -> None:
    memory = ciuic.MemoryHierarchy()
    assert (memory.pages, memory.minimum) == ({}, 0)
    assert memory.budget > 0
    memory.set_budget("cpu", "1GiB")
    assert memory.budget == 1 << 30
    for act in (memory.move_to_device, memory.prefetch, memory.pin, memory.unpin, memory.evict):
        act([])
        with pytest.raises(InvalidInput, match="give it a model, or use"):
            act("embedding")
    for ask in (memory.where, memory.holders, memory.is_in_device_memory):
        with pytest.raises(InvalidInput, match="'embedding' is not known"):
            ask("embedding")
    memory.close()


@pytest.mark.parametrize("device", ["GPU", "cuda:0", "cpu:1", "disk", ""])
def test_pages_are_moved_to_no_other_device(device: str, memory: MemoryHierarchy, tiny_int4: Path) -> None:
    with pytest.raises(InvalidInput, match="this hierarchy has pages on cpu and on disk only"):
        memory.move_to_device("embedding", device)
    with pytest.raises(InvalidInput, match="on cpu and on disk only"):
        memory.set_budget(device, "1GiB")
    with pytest.raises(InvalidInput, match="on cpu and on disk only"):
        MemoryHierarchy(tiny_int4, memory={device: "1GiB"})
    assert memory.where("embedding") == "disk"


def test_too_small_a_budget_is_refused_with_the_least_and_with_what_would_hold_everything(tiny_int4: Path) -> None:
    pages = PageStore(tiny_int4).pages
    least, whole, reserved = max(pages.values()), sum(pages.values()), 10_000
    with pytest.raises(OutOfMemory) as refused:
        MemoryHierarchy(tiny_int4, memory={"cpu": least + reserved - 1}, reserved=reserved)
    assert refused.value.need == least + reserved
    for nbytes in (least + reserved, least, whole):
        assert format_bytes(nbytes) in str(refused.value)
    memory = MemoryHierarchy(tiny_int4, memory={"cpu": least + reserved}, reserved=reserved)
    assert (memory.budget, memory.minimum) == (least, least)
    with pytest.raises(OutOfMemory, match="--memory cpu="):
        memory.set_budget("cpu", least)
    assert memory.budget == least, "what is refused changes nothing"
    memory.close()


def test_pages_that_do_not_fit_beside_what_is_pinned_are_refused_before_any_is_read(tiny_int4: Path) -> None:
    pages = PageStore(tiny_int4).pages
    experts = [page for page in pages if ".experts." in page]
    memory = MemoryHierarchy(tiny_int4, memory={"cpu": max(pages.values()) + 4 * pages[experts[0]]})
    memory.pin(experts[:4])
    room = max(pages.values()) // pages[experts[0]]
    memory.move_to_device(experts[4 : 4 + room])
    assert memory.is_in_device_memory(experts[: 4 + room])
    with pytest.raises(OutOfMemory, match="move fewer at a time"):
        memory.move_to_device(experts[8 : 9 + room])
    assert memory.is_in_device_memory(experts[: 4 + room])
    memory.close()


# Other ways to read


@pytest.mark.parametrize("format", ["int8", "bfloat16"])
def test_an_unpacked_checkpoint_gives_the_bytes_of_any_format(tiny_v3: Path, tmp_path: Path, format: str) -> None:
    pack(tiny_v3, tmp_path / "packed", format)
    store, raw = PageStore(tmp_path / "packed"), MemoryHierarchy(tiny_v3, format=format, io_threads=3)
    for page in store.pages:
        raw.move_to_device(page)
        assert torch.equal(content(raw, page), stored(store, page))
    raw.close()


def test_weights_that_cannot_be_packed_are_named_and_hold_nothing_up(tmp_path: Path) -> None:
    source = write_random_checkpoint(TINY_V3, tmp_path / "raw")
    file, bad = source / "model.safetensors", "model.layers.2.mlp.experts.5.up_proj.weight"
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        metadata = opened.metadata()
    tensors[bad][3, 3] = float("nan")
    save_file(tensors, file, metadata)
    memory = MemoryHierarchy(source, format="int4")
    experts = [page for page in memory.pages if ".experts." in page]
    with pytest.raises(InvalidInput, match=re.escape(bad)):
        memory.move_to_device(experts)
    memory.move_to_device([page for page in experts if page != "layers.2.experts.5"])
    assert not memory.is_in_device_memory("layers.2.experts.5")
    assert not any(memory.holders(page) for page in memory.pages)
    memory.close()


def refuse_direct(path: object, flags: int, *mode: int) -> int:
    if flags & os.O_DIRECT:
        raise OSError(errno.EINVAL, "Invalid argument")
    return _open(path, flags, *mode)


_open = os.open


@pytest.mark.parametrize("refused", ["opening", "reading"])
def test_the_page_caches_bytes_are_the_right_ones(
    refused: str, tiny_int4: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the file system refuses O_DIRECT when it opens, and where it refuses the reads only."""
    store, memory = PageStore(tiny_int4), MemoryHierarchy(tiny_int4)
    names = [page for page in store.pages if ".experts." in page]
    if refused == "opening":
        monkeypatch.setattr(os, "open", refuse_direct)
    else:  # as the system does for addresses such as these
        allocate = memory.pool.allocate
        monkeypatch.setattr(memory.pool, "allocate", lambda nbytes: allocate(nbytes + 8)[8:])
    memory.move_to_device(names)
    assert memory._source is not None
    assert "refuses O_DIRECT" in memory._source.slower
    for page in names:
        assert torch.equal(content(memory, page), stored(store, page))


def test_without_the_compiled_parts_a_packed_model_is_refused_in_one_line(
    tiny_int4: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ciuic_runtime.memory._page_reader", None)
    with pytest.raises(InvalidInput, match="compiled"):
        MemoryHierarchy(tiny_int4)
