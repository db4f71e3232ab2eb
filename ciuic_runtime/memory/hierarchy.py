"""`MemoryHierarchy`: the pages of a model between disk and a device's memory, within a budget of bytes.
Carries out what `schedulers/residency.py` decides: slots from the pool, reads by the source, checksums on arrival."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch

from ciuic_runtime.devices.backend import Backend
from ciuic_runtime.devices.cpu import discover_cpus
from ciuic_runtime.devices.errors import CiuicError, InvalidInput, OutOfMemory
from ciuic_runtime.devices.units import format_bytes, parse_bytes
from ciuic_runtime.memory.arena import slot_size
from ciuic_runtime.memory.paging import PagingReport, Stalls
from ciuic_runtime.memory.pool import TensorPool
from ciuic_runtime.memory.source import Finished, PageSource, page_source
from ciuic_runtime.model import Model
from ciuic_runtime.models.checkpoint import Checkpoint, open_checkpoint
from ciuic_runtime.models.layout import KERNEL_FORMATS
from ciuic_runtime.schedulers.graph import Page, Phase, TaskGraph
from ciuic_runtime.schedulers.policies.cache import cache_policy
from ciuic_runtime.schedulers.recording import PageCounts
from ciuic_runtime.schedulers.residency import (
    Cancel,
    Command,
    Evict,
    PageFacts,
    Promote,
    Read,
    Residency,
    Where,
    largest_needed,
)

log = logging.getLogger("ciuic")

Pages = str | Page | Iterable[str | Page]
OnRead = Callable[[str, int, float, float], None]  # page, bytes, start, end
OnEvict = Callable[[str], None]  # page
_LOOK = 0.25  # s between two looks at Ctrl-C while waiting


@dataclass(slots=True)
class Request:
    """Pages that somebody has asked for."""

    left: set[int]  # not handed out yet, or still in use
    ready: list[int]  # held, to be handed out


def page_facts(graph: TaskGraph) -> list[PageFacts]:
    """Every page of a graph once, in the order of a forward pass."""
    facts: dict[str, PageFacts] = {}
    for place, task in enumerate(graph):
        for i, page in enumerate(task.pages):
            liked = task.popularity[i] if task.popularity else 0.0
            routed, by_rows = bool(task.num_experts), bool(page.row_nbytes)
            facts.setdefault(page.name, PageFacts(page.name, page.nbytes, place, routed, by_rows, liked))
    return list(facts.values())


class MemoryHierarchy:
    """Disk and the memory of one device. Names, sizes and places of pages are those of the model's graph.

    A pass holds the hierarchy from `begin_step` to `end_step`; calls of other threads wait for its end. Where a page
    lies, and in what order pages came, changes nothing of what is in them."""

    def __init__(
        self,
        model: str | Path | Checkpoint | None = None,
        *,
        memory: Mapping[str, str | int] | None = None,
        format: str = "auto",
        cache_policy: str = "auto",
        io_threads: int | None = None,
        graph: TaskGraph | None = None,
        backend: Backend | None = None,
        reserved: int = 0,
        source: PageSource | None = None,
    ) -> None:
        """`memory`: the device's budget, such as {"cpu": "12GiB"}, of which `reserved` bytes are used for other things
        than pages; None: as much as there is. `graph`: the model's, if it was made already. Without a model it knows no
        pages."""
        self.device = backend.spec.name if backend else "cpu"
        self._lock = threading.RLock()
        self._source, self.reserved = source, reserved
        self.on_read: OnRead = lambda page, nbytes, start, end: None
        self.on_evict: OnEvict = lambda page: None
        self.graph: TaskGraph | None = None
        facts: list[PageFacts] = []
        if model is not None:
            checkpoint = open_checkpoint(model) if isinstance(model, (str, Path)) else model
            known = Model(checkpoint.path, format, checkpoint.spec)
            if known.format not in KERNEL_FORMATS:
                raise InvalidInput(
                    f"{known.spec.name} in {known.format} is not held in pages; formats that are: "
                    + ", ".join(KERNEL_FORMATS)
                )
            self.graph = graph or known.graph
            self._source = source or page_source(checkpoint, known.format, io_threads)
            facts = page_facts(self.graph)
        self.policy, policy = _policy(cache_policy)
        self._number = {p.name: i for i, p in enumerate(facts)}
        total = sum(slot_size(p.nbytes) for p in facts)
        budget = self._budget_for_pages(facts, memory, total)
        self.pool = TensorPool(budget, backend, reserve=total)
        self.state = Residency(facts, budget, policy)
        self._slots: dict[int, torch.Tensor] = {}  # page -> its slot, uint8 [nbytes]
        self._tickets: dict[int, int] = {}  # ticket -> page
        self._ticket_of: dict[int, int] = {}
        self._asked_by: dict[int, Request] = {}  # page that is waited for -> who asked for it
        self._stalls = Stalls()
        self._bytes_read = self.evictions = 0
        self.slots_given = 0  # so far: since that changed, a page may lie elsewhere
        self._read_before = 0  # bytes, when the pass began
        self._came_last: int | None = None  # of the pages that passes waited for, their checks included
        self.clear_counts()
        self._open: Iterator[list[int]] | None = None  # holds what `slot` had to wait for
        self._said_slower = self._closed = self._touching = False
        self.report = PagingReport()

    # What people ask

    @property
    def pages(self) -> dict[str, int]:
        """Bytes of every page."""
        return {p.name: p.nbytes for p in self.state.pages}

    @property
    def budget(self) -> int:
        """Bytes for pages."""
        return self.state.budget

    @property
    def minimum(self) -> int:
        """Bytes for pages below which nothing can be computed."""
        return self.state.minimum

    @property
    def pinned_nbytes(self) -> int:
        """Bytes of pages that are pinned."""
        return self.state.pinned_nbytes

    def where(self, page: str | Page) -> str:
        """The device that holds the page now, or "disk"."""
        [number] = self._numbers(page)
        return self.device if self.state.where[number] == Where.RESIDENT else "disk"

    def holders(self, page: str | Page) -> int:
        """How many use the page at this moment."""
        [number] = self._numbers(page)
        return self.state.held[number]

    def is_in_device_memory(self, pages: Pages) -> bool:
        """Whether all of them can be computed with now."""
        return all(self.state.where[n] == Where.RESIDENT for n in self._numbers(pages))

    def move_to_device(self, pages: Pages, device: str = "CPU") -> None:
        """Reads what is not there. They stay as long as the policy has no better use for the room; `pin` keeps them.

        Raises OutOfMemory where they do not fit together."""
        self._check_device(device)
        numbers = self._numbers(pages)
        with self._lock:
            self._check_open()
            self._check_room(self.state.pinned_pages.union(numbers))
            try:
                for ready in self.take(numbers):
                    del ready
            except BaseException:
                self._give_up()
                raise

    def prefetch(self, pages: Pages) -> None:
        """They will be needed soon: reading begins, and is not waited for."""
        numbers = self._numbers(pages)
        with self._lock:
            self._check_open()
            self._poll()
            self._do(self.state.expect(numbers))

    def pin(self, pages: Pages) -> None:
        """Loads them and keeps them until `unpin`, whatever the policy says."""
        numbers = self._numbers(pages)
        with self._lock:
            self._check_open()
            before = self.state.pinned_pages
            self._check_pins(before.union(numbers))
            for n in numbers:
                self._do(self.state.pin(n))
            try:
                self.move_to_device(pages, self.device)
            except BaseException:
                for n in set(numbers) - before:
                    self._do(self.state.pin(n, False))
                raise

    def unpin(self, pages: Pages) -> None:
        with self._lock:
            for n in self._numbers(pages):
                self._do(self.state.pin(n, False))

    def evict(self, pages: Pages) -> None:
        """Frees their slots, of those that nobody holds or has pinned."""
        with self._lock:
            self._poll()
            for n in self._numbers(pages):
                self._do(self.state.evict(n))

    def set_budget(self, device: str, nbytes: str | int) -> None:
        """The device's budget from now on, in the sense of `--memory`; lower ones give memory back at once.

        Raises InvalidInput, with the least that would do, where nothing could be computed any more."""
        self._check_device(device)
        with self._lock:
            budget = parse_bytes(nbytes) - self.reserved
            self._check_open()
            self._check_minimum(budget, self.pinned_nbytes)
            lower = budget < self.state.budget
            if not lower:  # what was touched is not in use; the next pass goes on, up to the new budget
                self.pool.touch_no_further()
                self._touching = False
            free = sum(d.memory_free_bytes or 0 for d in discover_cpus())
            if budget > self.state.budget and budget - self.pool.memory().used > free:
                raise InvalidInput(
                    f"a budget of {format_bytes(budget + self.reserved)} was asked for on {self.device}, where "
                    f"{format_bytes(self.pool.memory().used + self.reserved + free)} can be had; ask for less"
                )
            if not lower:
                self.pool.budget = budget
            self._do(self.state.set_budget(budget))
            if lower:
                self.pool.budget = budget

    def page_counts(self) -> dict[str, PageCounts]:
        """Of every page, since `clear_counts`; while a pass is under way, uses are those before it."""
        state, there = self.state, Where.RESIDENT
        if self._lock.acquire(blocking=False):
            try:
                state.count_uses()
            finally:
                self._lock.release()
        counts = zip(
            state.num_uses.tolist(), state.num_hits.tolist(), self._num_reads, self._waited,
            (where == there for where in state.where), self._nbytes_read, self._num_evictions, strict=True,
        )  # fmt: skip
        return {page.name: PageCounts(*one) for page, one in zip(state.pages, counts, strict=True)}

    def clear_counts(self, since: float = 0.0) -> None:
        """Nor does what is being read count that had come by `since`, of time.perf_counter()."""
        self._counted_since = since
        num = len(self.state.pages)
        self.state.clear_counts()
        self._num_reads, self._nbytes_read, self._num_evictions = [0] * num, [0] * num, [0] * num  # by page
        self._waited = [0.0] * num  # s, by page

    @property
    def came_last(self) -> str:
        """The page that ended the last wait."""
        return "" if self._came_last is None else self.state.pages[self._came_last].name

    # What a pass does

    def alone(self) -> AbstractContextManager[object]:
        """Until it is left, calls of other threads wait, as they do in a pass. `on_read` and `on_evict` are only called
        by whoever has the hierarchy to itself: what is recorded beside them belongs in here."""
        return self._lock

    def number(self, page: str) -> int:
        return self._number[page]

    def begin_reading(self, progress: Callable[[int, int], None]) -> None:
        """Before the first pass: where everything fits it is loaded, else what every pass needs begins to be read."""
        with self._lock:
            total, every = self.state.total, range(len(self.state.pages))
            self.state.begin_step()
            if total > self.state.budget:
                self.expect(n for n in every if not (self.state.pages[n].routed or self.state.pages[n].by_rows))
                return
            self._touch_ahead()
            done = 0
            for ready in self.take(every):
                done += sum(self.state.pages[n].nbytes for n in ready)
                progress(done, total)
            self.report.begin(self.state.counts, self._bytes_read, self._stalls)

    def begin_step(self, scanning: bool = False, last_scan: bool = False) -> None:
        self._lock.acquire()
        try:
            self._read_before = self._bytes_read
            self._touch_ahead()
            self._poll()
            self.state.begin_step(scanning, last_scan)
        except BaseException:
            self._lock.release()
            raise

    def _touch_ahead(self) -> None:
        """Once, when pages begin to be used: before that, nobody is in a hurry."""
        if not self._touching:
            self._touching = True
            self.pool.touch_ahead()

    @property
    def bytes_read_in_step(self) -> int:
        """That came from disk since the last pass began."""
        return self._bytes_read - self._read_before

    def end_step(self, phase: Phase, tokens: int, complete: bool = True) -> None:
        """Whatever happened, nobody holds anything after this."""
        try:
            if complete:
                self._let_go()
            else:
                self._give_up()
            self.report.add(phase, tokens, self.state.counts, self._bytes_read, self._stalls)
        finally:
            self._lock.release()

    def slot(self, page: int) -> torch.Tensor:
        """The page's slot, which stays until the next is asked for; waits for it if need be."""
        self._let_go()
        if self.state.where[page] is Where.RESIDENT:
            self.state.touch(page)
            return self._slots[page]
        come = self.take([page])
        next(come)
        self._open = come
        return self._slots[page]

    def rows(self, page: int, offset: int, row_nbytes: int, numbers: Sequence[int], into: torch.Tensor) -> None:
        """Rows of a table of the page that is not there: fills `into`, uint8 [len(numbers), row_nbytes]. The table
        begins `offset` bytes into the page."""
        name, begin = self.state.pages[page].name, perf_counter()
        self._source_of().rows(name, [offset + row_nbytes * n for n in numbers], row_nbytes, into)
        end = perf_counter()
        self._stalls.disk += end - begin
        self._came_last = page
        self._waited[page] += end - begin
        self._num_reads[page] += 1
        self._nbytes_read[page] += into.numel()
        self._bytes_read += into.numel()
        self.on_read(name, into.numel(), begin, end)

    def take(self, pages: Sequence[int]) -> Iterator[list[int]]:
        """Pages of one place: those that are there, then the others as they come. Each list is held until the next is
        asked for."""
        return self.come(self.ask(pages))

    def ask(self, pages: Sequence[int]) -> Request:
        """Pages of one place are needed: they begin to be read, and are held when they are there; `come` hands them
        out, and must be run to its end."""
        self._let_go()
        self._poll()
        ready, commands = self.state.need(pages)
        request = Request(set(pages), ready)
        if len(ready) < len(request.left):
            for page in request.left.difference(ready):
                self._asked_by[page] = request
        if commands:
            self._do(commands)
        return request

    def come(self, request: Request) -> Iterator[list[int]]:
        while request.left:
            if not request.ready:
                self._wait(request)
            ready, request.ready = request.ready, []
            yield ready
            request.left.difference_update(ready)
            if commands := self.state.release(ready):
                self._do(commands)

    def _give_up(self) -> None:
        """Nobody holds or waits for anything any more. Whatever was interrupted, even the moment in which a read ended:
        reads under way are waited for and dropped, and what is in slots is all there is."""
        self._open = None
        self._asked_by.clear()
        self._source_of().drain()
        self._tickets.clear()
        self._ticket_of.clear()
        there = {p for p in self._slots if self.state.where[p] == Where.RESIDENT}
        self._slots = {p: self._slots[p] for p in there}
        self.pool.keep(self._slots.values())
        self._do(self.state.recover(there))

    def _let_go(self) -> None:
        """Of the page that `slot` had to wait for."""
        if self._open is not None:
            held, self._open = self._open, None
            for _ in held:
                pass

    def expect(self, pages: Iterable[int], perhaps: Iterable[int] = ()) -> None:
        """They will be needed, in this order; and perhaps some others."""
        commands = self.state.expect(pages, perhaps)
        if commands:
            self._do(commands)

    def expect_certain(self, pages: Sequence[int]) -> None:
        """As `expect`, of pages that every pass needs and that are mostly there."""
        where = self.state.where
        if missing := [n for n in pages if where[n] == Where.ABSENT]:
            self.expect(missing)

    def slot_of(self, page: int) -> torch.Tensor:
        """Of a page that is there."""
        return self._slots[page]

    @property
    def stalled(self) -> float:
        """Seconds that passes have waited so far, checking included."""
        return self._stalls.total

    def close(self) -> None:
        """Waits for reads that are under way; gives the memory back."""
        with self._lock:
            if self._source is not None and not self._closed:
                self._source.close()
            self._closed = True
            self._tickets.clear()
            self._ticket_of.clear()
            self._slots.clear()
            self.state.recover(())
            self.pool.keep(())
            self.pool.clear()

    # Carrying out

    def _do(self, commands: Iterable[Command]) -> None:
        work = list(commands)
        while work:
            more: list[Command] = []
            for command in work:
                if isinstance(command, Read):
                    self._read(command)
                elif isinstance(command, Evict):
                    self.evictions += 1
                    self._num_evictions[command.page] += 1
                    self.pool.free(self._slots.pop(command.page))
                    self.on_evict(self.state.pages[command.page].name)
                elif isinstance(command, Promote):
                    self._source_of().promote(self._ticket_of[command.page])
                elif isinstance(command, Cancel) and self._source_of().cancel(self._ticket_of[command.page]):
                    del self._tickets[self._ticket_of.pop(command.page)]
                    self.pool.free(self._slots.pop(command.page))
                    more += self.state.cancelled(command.page)
            work = more

    def _read(self, command: Read) -> None:
        page = self.state.pages[command.page]
        slot = self._slots[command.page] = self.pool.allocate(page.nbytes)
        self.slots_given += 1
        ticket = self._source_of().submit(page.name, slot, command.order)
        self._tickets[ticket], self._ticket_of[command.page] = command.page, ticket

    def _poll(self) -> None:
        """Takes in what has arrived meanwhile."""
        if self._tickets:
            self._take_in(self._source_of().finished(0))

    def _wait(self, request: Request) -> None:
        """Until a page of those that were asked for has come."""
        self._poll()
        since = self._stalls.total
        while not request.ready:
            if not self._tickets:
                raise self._too_little()
            begin, for_room = perf_counter(), self.state.starved
            found = self._source_of().finished(_LOOK)
            waited = perf_counter() - begin
            if for_room:
                self._stalls.room += waited
            else:
                self._stalls.disk += waited
            self._take_in(found)
        self._came_last = request.ready[-1]
        self._waited[self._came_last] += self._stalls.total - since

    def _take_in(self, found: Sequence[Finished]) -> None:
        """Reads that have ended; raises the first error when all of them have been seen to."""
        errors = [error for done in found if (error := self._take_in_one(done))]
        if errors:
            raise errors[0]

    def _take_in_one(self, done: Finished) -> CiuicError | None:
        page = self._tickets.pop(done.ticket)
        del self._ticket_of[page]
        facts = self.state.pages[page]
        error = done.error or (None if done.cancelled else self._check(page))
        if error or done.cancelled:
            self.pool.free(self._slots.pop(page))
            self._do(self.state.failed(page, again=done.cancelled))
            return error
        self._bytes_read += facts.nbytes
        if done.end > self._counted_since:
            self._num_reads[page] += 1
            self._nbytes_read[page] += facts.nbytes
        self.on_read(facts.name, facts.nbytes, done.start, done.end)
        wanted, commands = self.state.arrived(page)
        if wanted:
            self._asked_by.pop(page).ready.append(page)
        self._do(commands)
        return None

    def _check(self, page: int) -> CiuicError | None:
        begin = perf_counter()
        try:
            self._source_of().check(self.state.pages[page].name, self._slots[page])
        except CiuicError as error:
            return error
        finally:
            self._stalls.verify += perf_counter() - begin
            self._came_last = page
        if not self._said_slower and (why := self._source_of().slower):
            self._said_slower = True
            log.warning("%s", why)
        return None

    # What can be refused

    def _source_of(self) -> PageSource:
        assert self._source is not None, "there are no pages without a model"
        return self._source

    def _numbers(self, pages: Pages) -> list[int]:
        given = [pages] if isinstance(pages, (str, Page)) else list(pages)
        names = [page.name if isinstance(page, Page) else page for page in given]
        if strange := [name for name in names if name not in self._number]:
            known = (
                f"pages are like {next(iter(self._number))}" if self._number else "give it a model, or use llm.memory"
            )
            raise InvalidInput(f"page {strange[0]!r} is not known to this hierarchy; {known}")
        return [self._number[name] for name in names]

    def _check_device(self, device: str) -> None:
        if device.lower() != self.device.partition(":")[0] and device != self.device:
            raise InvalidInput(f"{device!r} was asked for; this hierarchy has pages on {self.device} and on disk only")

    def _check_room(self, numbers: set[int]) -> None:
        need = sum(self.state.pages[n].nbytes for n in numbers)
        if need > self.state.budget:
            raise OutOfMemory(
                f"{len(numbers)} pages need {format_bytes(need)} on {self.device}, which has "
                f"{format_bytes(self.state.budget)} for pages; move fewer at a time, or raise the budget",
                need=need, capacity=self.state.budget,
            )  # fmt: skip

    def _check_open(self) -> None:
        if self._closed:
            raise InvalidInput("this memory hierarchy is closed; open another one")

    def _check_pins(self, numbers: set[int]) -> None:
        """That beside what is pinned every other page can still come, one at a time."""
        pinned = sum(self.state.pages[n].nbytes for n in numbers)
        others = largest_needed(p for n, p in enumerate(self.state.pages) if n not in numbers)
        if pinned + others > self.state.budget:
            raise OutOfMemory(
                f"{len(numbers)} pinned pages take {format_bytes(pinned)} on {self.device}, which has "
                f"{format_bytes(self.state.budget)} for pages, and the largest of the others needs "
                f"{format_bytes(others)}; pin fewer, or raise the budget",
                need=pinned + others, capacity=self.state.budget,
            )  # fmt: skip

    def _check_minimum(self, budget: int, pinned: int = 0) -> None:
        least = self.state.minimum + pinned
        if budget < least:
            raise _below_minimum(self.device, budget + self.reserved, least + self.reserved, self.state.pages)

    def _too_little(self) -> OutOfMemory:
        need, budget = self.state.minimum + self.reserved, self.state.budget + self.reserved
        return _below_minimum(self.device, budget, need, self.state.pages)

    def _budget_for_pages(self, facts: list[PageFacts], memory: Mapping[str, str | int] | None, total: int) -> int:
        """Bytes: what was asked for, else what there is; never more than all pages take."""
        for device in memory or {}:
            self._check_device(device)
        if memory:
            budget = parse_bytes(next(iter(memory.values()))) - self.reserved
        else:
            budget = sum(d.memory_free_bytes or d.memory_bytes for d in discover_cpus()) - self.reserved
        largest = slot_size(largest_needed(facts))
        if budget < largest:
            raise _below_minimum(self.device, budget + self.reserved, largest + self.reserved, facts)
        return min(budget, total) if facts else budget


def _below_minimum(device: str, given: int, least: int, pages: Sequence[PageFacts]) -> OutOfMemory:
    whole = sum(p.nbytes for p in pages)
    return OutOfMemory(
        f"{format_bytes(max(0, given))} on {device} are too little: the least is {format_bytes(least)} "
        f"(one page at a time, the largest has {format_bytes(largest_needed(pages))}), and all pages take "
        f"{format_bytes(whole)}; give more (--memory {device}=...), or take a smaller format",
        need=least, capacity=max(0, given),
    )  # fmt: skip


_policy = cache_policy  # the constructor's argument has the same name
