"""Threads of C++ that read pages: what comes first, what is taken back, and that nothing is written to afterwards."""

from __future__ import annotations

import errno
import gc
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ciuic_runtime.devices.backend import host_buffer
from ciuic_runtime.ops.native import kernels

if kernels() is None:
    pytest.skip("the compiled parts are not built here", allow_module_level=True)

from ciuic_runtime.memory._page_reader import PageReader

PAGE, PAGES = 4096, 256
LARGE = 128 << 20  # bytes, of a file with nothing in it: read in one piece, some tens of milliseconds


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[int]:
    """A descriptor of 256 pages, each full of its own number."""
    path = tmp_path / "pages"
    path.write_bytes(b"".join(bytes([i]) * PAGE for i in range(PAGES)))
    handle = os.open(path, os.O_RDONLY)
    yield handle
    os.close(handle)


@pytest.fixture
def hole(tmp_path: Path) -> Iterator[int]:
    handle = os.open(tmp_path / "hole", os.O_RDWR | os.O_CREAT)
    os.truncate(handle, LARGE)
    yield handle
    os.close(handle)


def ended(reader: PageReader, count: int) -> list[tuple[int, int, int]]:
    """(ticket, errno, bytes missing) of so many reads, in the order in which they ended."""
    found: list[tuple[int, int, int]] = []
    while len(found) < count:
        found += [done[:3] for done in reader.finished(5.0)]
    return found


def in_order(hole: int, act: Callable[[PageReader], list[int]]) -> tuple[list[int], list[int]]:
    """The tickets that `act` returns, submitted while the only thread was busy, and in what order they ended."""
    for _ in range(20):
        reader, into, found = PageReader(1, LARGE), torch.empty(LARGE, dtype=torch.uint8), list[int]()
        large = reader.submit(-1, hole, 0, LARGE, into.data_ptr(), 0)
        time.sleep(0.005)  # until it has begun: nothing comes before it then
        tickets = act(reader)
        in_time = not reader.finished(0)
        while reader.in_flight:
            found += [ticket for ticket, *_ in reader.finished(0.1)]
        found += [ticket for ticket, *_ in reader.finished(0)]
        reader.stop()
        if in_time:
            assert found.pop(0) == large
            return tickets, found
    pytest.skip("this machine is too busy to keep a thread waiting")


def test_pages_come_whole_by_any_number_of_threads_and_pieces(plain: int) -> None:
    for threads, piece in ((1, PAGE), (3, 3 * PAGE), (8, 1 << 20)):
        reader, into = PageReader(threads, piece), host_buffer(PAGE * PAGES)
        spans = [(i, n) for i in range(0, PAGES, 10) for n in [min(10, PAGES - i)]]
        tickets = [reader.submit(-1, plain, i * PAGE, n * PAGE, into.data_ptr() + i * PAGE, 0) for i, n in spans]
        assert sorted(ended(reader, len(tickets))) == [(ticket, 0, 0) for ticket in tickets]
        assert into.view(PAGES, PAGE).eq(torch.arange(PAGES).unsqueeze(1)).all()
        assert reader.plain_nbytes == PAGE * PAGES
        assert reader.in_flight == 0
        reader.stop()


def test_smaller_orders_come_first_and_equal_ones_in_turn(plain: int, hole: int) -> None:
    into = host_buffer(PAGE)
    orders = [5, 3, 0, 5, 3, 0, 9]

    def submit(reader: PageReader) -> list[int]:
        return [reader.submit(-1, plain, 0, PAGE, into.data_ptr(), order) for order in orders]

    tickets, found = in_order(hole, submit)
    assert found == [ticket for _, ticket in sorted(zip(orders, tickets, strict=True))]


def test_what_has_become_urgent_comes_before_the_rest_and_what_is_taken_back_not_at_all(plain: int, hole: int) -> None:
    into = host_buffer(PAGE)

    def submit(reader: PageReader) -> list[int]:
        tickets = [reader.submit(-1, plain, 0, PAGE, into.data_ptr(), 7) for _ in range(5)]
        reader.promote(tickets[3], 0)
        reader.promote(tickets[3], 9)  # later than it is: nothing
        assert reader.cancel(tickets[1])
        assert not reader.cancel(tickets[1]), "it is gone"
        reader.promote(tickets[1], 0)
        return tickets

    tickets, found = in_order(hole, submit)
    assert found == [tickets[i] for i in (3, 0, 2, 4)]


def test_a_read_stopped_midway_ends_early_and_says_so(hole: int) -> None:
    """In pieces: what was not begun of it is left out."""
    for _ in range(20):
        reader, into = PageReader(2, PAGE), torch.ones(LARGE, dtype=torch.uint8)
        ticket = reader.submit(-1, hole, 0, LARGE, into.data_ptr(), 0)
        time.sleep(0.002)
        assert not reader.cancel(ticket)
        [(done, code, missing)] = ended(reader, 1)
        assert (done, missing) == (ticket, 0)
        read = LARGE - int(into.sum())
        reader.stop()
        if code == errno.ECANCELED:
            assert read % PAGE == 0
            assert 0 < read < LARGE
            return
        assert (code, read) == (0, LARGE)
    pytest.skip("this machine reads too fast for anybody to stop it")


def test_what_the_system_refuses_and_what_the_file_lacks_is_reported(plain: int, tmp_path: Path) -> None:
    reader, into = PageReader(2, PAGE), host_buffer(PAGE * PAGES)
    beyond = reader.submit(-1, plain, (PAGES - 2) * PAGE, 5 * PAGE, into.data_ptr(), 0)
    assert ended(reader, 1) == [(beyond, 0, 3 * PAGE)]
    far = reader.submit(-1, plain, 1 << 40, PAGE, into.data_ptr(), 0)
    assert ended(reader, 1) == [(far, 0, PAGE)]
    folder = os.open(tmp_path, os.O_RDONLY)
    for handle, code in ((folder, errno.EISDIR), (9999, errno.EBADF)):
        wrong = reader.submit(-1, handle, 0, 3 * PAGE, into.data_ptr(), 0)
        assert [(ticket, error) for ticket, error, _ in ended(reader, 1)] == [(wrong, code)]
    os.close(folder)
    for nbytes in (0, -1):
        with pytest.raises(ValueError, match="at least one byte"):
            reader.submit(-1, plain, 0, nbytes, into.data_ptr(), 0)
    for threads, piece in ((0, PAGE), (1, 0), (1, PAGE + 1)):
        with pytest.raises(ValueError, match="at least one thread"):
            PageReader(threads, piece)
    reader.stop()


@given(data=st.data(), nbytes=st.integers(1, 3 * PAGE))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_of_any_size_come_from_any_offset_side_by_side(plain: int, data: st.DataObject, nbytes: int) -> None:
    offsets = data.draw(st.lists(st.integers(0, PAGE * PAGES - nbytes), max_size=40))
    into = torch.empty(len(offsets) + 1, nbytes, dtype=torch.uint8).fill_(99)
    reader = PageReader(data.draw(st.integers(1, 8)), PAGE)
    assert reader.read_rows(-1, plain, offsets, nbytes, into.data_ptr()) == (0, 0)
    for row, offset in zip(into, offsets, strict=False):
        assert bytes(row.numpy()) == os.pread(plain, nbytes, offset)
    assert (into[-1] == 99).all(), "nothing is written behind the last one"
    reader.stop()


def test_rows_that_the_system_refuses_or_the_file_lacks_are_reported(plain: int) -> None:
    reader, into = PageReader(4, PAGE), torch.empty(64, 100, dtype=torch.uint8)
    offsets = [100 * i for i in range(63)]
    assert reader.read_rows(-1, 9999, [*offsets, 0], 100, into.data_ptr()) == (errno.EBADF, 0)
    error, missing = reader.read_rows(-1, plain, [*offsets, PAGES * PAGE], 100, into.data_ptr())
    assert error == 0
    assert missing >= 100
    with pytest.raises(ValueError, match="at least one byte"):
        reader.read_rows(-1, plain, [0], 0, into.data_ptr())
    assert reader.in_flight == 0
    reader.stop()


def test_times_are_those_of_pythons_clock(plain: int) -> None:
    reader, into = PageReader(1, PAGE), host_buffer(PAGE)
    before = time.perf_counter()
    reader.submit(-1, plain, 0, PAGE, into.data_ptr(), 0)
    [(_, _, _, start, end)] = reader.finished(5.0)
    assert before <= start <= end <= time.perf_counter()
    reader.stop()


def test_many_threads_may_ask_promote_and_take_back(plain: int) -> None:
    reader = PageReader(4, PAGE)
    into = [host_buffer(PAGE) for _ in range(400)]
    page_of: dict[int, int] = {}
    kept: list[int] = []

    def ask(first: int) -> None:
        draw = random.Random(first)
        for i in range(first, 400, 4):
            page = i % PAGES
            ticket = reader.submit(-1, plain, page * PAGE, PAGE, into[i].data_ptr(), draw.randrange(5))
            page_of[ticket] = i
            if draw.random() < 0.5:
                reader.promote(ticket, 0)
            if draw.random() < 0.3 and reader.cancel(ticket):
                continue
            kept.append(ticket)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    found = ended(reader, len(kept))
    assert sorted(ticket for ticket, _, _ in found) == sorted(kept)
    for ticket, code, missing in found:
        i = page_of[ticket]
        assert (code, missing) == (0, 0)
        assert into[i].eq(i % PAGES).all()
    reader.stop()


def test_whoever_waits_is_woken_by_the_end_and_nothing_is_written_to_afterwards(hole: int) -> None:
    for _ in range(10):
        reader, into = PageReader(3, PAGE), torch.ones(LARGE // 8, dtype=torch.uint8)
        for i in range(8):
            reader.submit(-1, hole, 0, LARGE // 8, into.data_ptr(), i)
        waits = threading.Thread(target=lambda r=reader: [r.finished(60.0) for _ in range(9)])
        waits.start()
        reader.stop()
        left = into.clone()
        waits.join()
        assert torch.equal(into, left)
        del reader
        gc.collect()
        assert torch.equal(into, left)
