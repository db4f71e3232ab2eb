"""Pages between disk and memory, by hand: what is where, what was read, and what is refused."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import pytest
import torch

import ciuic_runtime as ciuic
from ciuic_runtime.devices.backend import host_buffer
from ciuic_runtime.devices.errors import InvalidInput, OutOfMemory
from ciuic_runtime.memory.hierarchy import MemoryHierarchy
from ciuic_runtime.memory.page_store import PageStore
from ciuic_runtime.ops.native import kernels

pytestmark = pytest.mark.skipif(kernels() is None, reason="the compiled parts are not built here")


def content(memory: MemoryHierarchy, page: str) -> torch.Tensor:
    return memory.slot_of(memory.number(page))


def test_pages_are_moved_asked_for_and_evicted_by_name_or_layer(memory: MemoryHierarchy, tiny_int4: Path) -> None:
    model, store = ciuic.Model(tiny_int4), PageStore(tiny_int4)
    for layer in model.layers:
        assert not memory.is_in_device_memory(layer.weights)
        memory.move_to_device(layer.weights, "CPU")
        assert memory.is_in_device_memory(layer.weights)
    for page in model.layers[2].weights:
        expected = host_buffer(page.nbytes)
        store.read_page(page.name, expected)
        assert torch.equal(content(memory, page.name), expected)
        assert memory.where(page) == "cpu"
        assert memory.holders(page) == 0
    used = memory.pool.memory().used
    memory.evict(model.layers[1].weights)
    assert memory.pool.memory().used == used - model.layers[1].nbytes
    assert memory.where(model.layers[1].weights[0]) == "disk"


def test_pinned_pages_stay_while_others_come_and_go(tiny_int4: Path) -> None:
    pages = MemoryHierarchy(tiny_int4).pages
    experts = [page for page in pages if ".experts." in page]
    budget = max(pages.values()) + 3 * pages[experts[0]]
    memory = MemoryHierarchy(tiny_int4, memory={"cpu": budget}, cache_policy="lru")
    memory.pin(experts[:2])
    for page in experts[2:]:
        memory.move_to_device(page)
        assert memory.is_in_device_memory(experts[:2])
        assert memory.pool.memory().used <= budget
    memory.unpin(experts[:2])
    memory.move_to_device(max(pages, key=lambda p: pages[p]))
    with pytest.raises(OutOfMemory, match="move fewer at a time"):
        memory.move_to_device(list(pages))
    memory.close()


def test_prefetched_pages_are_there_when_they_are_asked_for(memory: MemoryHierarchy) -> None:
    some = [page for page in memory.pages if ".experts." in page][:5]
    memory.prefetch(some)
    memory.move_to_device(some)
    assert memory.is_in_device_memory(some)
    assert memory.state.counts.routed_misses == 5


def test_the_budget_can_be_lowered_and_raised(memory: MemoryHierarchy) -> None:
    everything = list(memory.pages)
    memory.move_to_device(everything)
    memory.set_budget("cpu", memory.minimum)
    assert memory.pool.memory().used + memory.pool.memory().free <= memory.minimum
    with pytest.raises(OutOfMemory, match=r"the least is .* all pages take"):
        memory.set_budget("cpu", memory.minimum - 1)
    memory.set_budget("cpu", sum(memory.pages.values()))
    memory.move_to_device(everything)
    assert memory.is_in_device_memory(everything)
    with pytest.raises(InvalidInput, match="can be had"):
        memory.set_budget("cpu", "900TiB")


def test_what_it_does_not_know_is_refused(memory: MemoryHierarchy, tiny_int4: Path) -> None:
    with pytest.raises(InvalidInput, match=r"'layers.9.mlp' is not known.*pages are like embedding"):
        memory.where("layers.9.mlp")
    with pytest.raises(InvalidInput, match="on cpu and on disk only"):
        memory.move_to_device("embedding", "GPU")
    with pytest.raises(InvalidInput, match="give it a model"):
        ciuic.MemoryHierarchy().is_in_device_memory("embedding")
    with pytest.raises(OutOfMemory, match="too little"):
        MemoryHierarchy(tiny_int4, memory={"cpu": 4096})
    with pytest.raises(InvalidInput, match="cache policy"):
        MemoryHierarchy(tiny_int4, cache_policy="best")


def test_an_unpacked_checkpoint_is_packed_as_it_is_read_and_says_so_once(
    tiny_v3: Path, tiny_int4: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "ciuic"):
        raw = MemoryHierarchy(tiny_v3, format="int4")
        raw.move_to_device(list(raw.pages))
    assert caplog.text.count("is not packed") == 1
    store = PageStore(tiny_int4)
    for page, nbytes in raw.pages.items():
        expected = host_buffer(nbytes)
        store.read_page(page, expected)
        assert torch.equal(content(raw, page), expected), page
    raw.close()


def test_where_o_direct_is_refused_pages_come_through_the_cache(
    tiny_int4: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = os.open

    def refusing(path: str, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", refusing)
    memory = MemoryHierarchy(tiny_int4)
    with caplog.at_level(logging.WARNING, "ciuic"):
        memory.move_to_device(list(memory.pages))
    assert caplog.text.count("refuses O_DIRECT") == 1
    memory.close()


# The reader


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.write_bytes(bytes(range(256)) * 4096)  # 1 MiB
    return path


def everything(reader: object, count: int) -> list[tuple[int, int, int]]:
    found: list[tuple[int, int, int]] = []
    while len(found) < count:
        found += [d[:3] for d in reader.finished(1.0)]  # type: ignore[attr-defined]
    return found


def test_the_reader_reads_in_pieces_and_falls_back_where_a_direct_read_is_refused(file: Path) -> None:
    from ciuic_runtime.memory._page_reader import PageReader

    direct, plain = os.open(file, os.O_RDONLY | os.O_DIRECT), os.open(file, os.O_RDONLY)
    expected = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8)
    for threads in (1, 3, 8):
        reader, into = PageReader(threads, 8192), host_buffer(1 << 20)
        reader.submit(direct, plain, 0, 1 << 20, into.data_ptr(), 0)
        assert [d[1:] for d in everything(reader, 1)] == [(0, 0)]
        assert torch.equal(into, expected)
        assert reader.plain_nbytes == 0
        crooked = host_buffer((1 << 20) + 8)[8:]  # the system refuses direct reads to such an address
        reader.submit(direct, plain, 0, 1 << 20, crooked.data_ptr(), 0)
        everything(reader, 1)
        assert torch.equal(crooked, expected)
        reader.stop()


def test_the_reader_says_what_went_wrong(file: Path) -> None:
    from ciuic_runtime.memory._page_reader import PageReader

    plain, folder, into = os.open(file, os.O_RDONLY), os.open(file.parent, os.O_RDONLY), host_buffer(1 << 21)
    reader = PageReader(2, 4096)
    short = reader.submit(-1, plain, 0, 1 << 21, into.data_ptr(), 0)
    assert everything(reader, 1) == [(short, 0, 1 << 20)]
    wrong = reader.submit(-1, folder, 0, 4096, into.data_ptr(), 0)
    assert everything(reader, 1) == [(wrong, errno.EISDIR, 0)]
    assert reader.in_flight == 0


def test_reads_can_be_stopped_and_the_reader_with_reads_under_way(file: Path) -> None:
    from ciuic_runtime.memory._page_reader import PageReader

    plain, into = os.open(file, os.O_RDONLY), host_buffer(1 << 20)
    for _ in range(50):
        reader = PageReader(1, 4096)
        tickets = [reader.submit(-1, plain, 0, 1 << 20, into.data_ptr(), i) for i in range(8)]
        reader.promote(tickets[7], 0)
        taken_back = [t for t in tickets[1:7] if reader.cancel(t)]
        found = everything(reader, len(tickets) - len(taken_back))
        assert {t for t, _, _ in found} == set(tickets) - set(taken_back)
        assert all(code in (0, errno.ECANCELED) for _, code, _ in found)
        assert next(code for t, code, _ in found if t == tickets[7]) == 0
        for i in range(8):
            reader.submit(-1, plain, 0, 1 << 20, into.data_ptr(), i)
        reader.stop()
