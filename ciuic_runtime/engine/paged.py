"""Tasks whose weights lie in slots: functions bound to wherever the page is at the moment, experts as they come.
Knows the hierarchy and the forward pass's functions; when what is read ahead, the executor says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from ciuic_runtime.memory.hierarchy import MemoryHierarchy, Request
from ciuic_runtime.models.layout import PageLayout
from ciuic_runtime.models.native_forward import ExpertsFunction, ReadRows, SlotExpertsFunction, TaskFunction
from ciuic_runtime.models.native_pages import NativePage, page_of_block
from ciuic_runtime.schedulers.graph import Task
from ciuic_runtime.schedulers.residency import Where

SURE = 0.5  # share of right guesses from which on they are read at once
LEARN = 1 / 64  # weight of the latest guess
Slots = Mapping[int, torch.Tensor]  # expert -> uint8 [nbytes]


class PagedFunction:
    """A task's function, made anew whenever its page has come into another slot."""

    def __init__(
        self, memory: MemoryHierarchy, task: Task, layout: PageLayout, make: Callable[[Task, NativePage], TaskFunction]
    ) -> None:
        self._memory, self._task, self._layout, self._make = memory, task, layout, make
        self.page = memory.number(task.pages[0].name)
        self._address = 0
        self._function: TaskFunction | None = None

    @property
    def is_there(self) -> bool:
        return self._memory.state.where[self.page] == Where.RESIDENT

    def at_hand(self) -> TaskFunction | None:
        """Where every page is there, without the care that it takes elsewhere."""
        state = self._memory.state
        if not state.whole:
            return None
        state.touch(self.page)
        return self._on(self._memory.slot_of(self.page))

    def bound(self) -> TaskFunction:
        """Waits for the page if need be; good until the next page is asked for."""
        return self._on(self._memory.slot(self.page))

    def peek(self) -> TaskFunction:
        """For a guess, where the page is there; does not count as a use."""
        return self._on(self._memory.slot_of(self.page))

    def _on(self, slot: torch.Tensor) -> TaskFunction:
        if self._function is None or slot.data_ptr() != self._address:
            self._address = slot.data_ptr()
            self._function = self._make(self._task, page_of_block(self._layout, slot))
        return self._function


class PagedTable(PagedFunction):
    """A task that needs single rows of its page's table, which are read one by one where the page is not there."""

    def __init__(
        self, memory: MemoryHierarchy, task: Task, layout: PageLayout, make: Callable[[Task, NativePage], TaskFunction],
        make_by_rows: Callable[[ReadRows], TaskFunction],
    ) -> None:  # fmt: skip
        super().__init__(memory, task, layout, make)
        self._offset, self._row_nbytes = layout.part("weight").offset, task.pages[0].row_nbytes
        self._by_rows = make_by_rows(self._read)

    def bound(self) -> TaskFunction:
        """The page comes into memory itself only where there is room for everything."""
        if self.is_there:
            return super().bound()
        if self._memory.state.total <= self._memory.budget:
            self._memory.expect([self.page])
        return self._by_rows

    def _read(self, numbers: list[int], into: torch.Tensor) -> None:
        self._memory.rows(self.page, self._offset, self._row_nbytes, numbers, into)


class PagedExperts:
    """A layer's routed experts."""

    def __init__(
        self, memory: MemoryHierarchy, task: Task, layout: PageLayout, run: SlotExpertsFunction,
        make: Callable[[Task, Mapping[int, NativePage]], ExpertsFunction],
    ) -> None:  # fmt: skip
        self._memory, self._task, self._layout, self.run, self._make = memory, task, layout, run, make
        self.pages = [memory.number(page.name) for page in task.pages]  # by expert
        self._expert = {page: e for e, page in enumerate(self.pages)}
        self._experts_per_token = task.experts_per_token
        self._right: dict[int, list[float]] = {}  # layers ahead -> share of right guesses by rank, recent ones first
        self._nbytes = task.pages[0].nbytes
        self._chosen: list[int] = []  # pages of the experts that the router has chosen
        self._were_there = False  # all pages, when it chose
        self._all: tuple[int, ExpertsFunction] | None = None  # made when so many slots had been given
        self._request: Request | None = None
        self._guess: dict[int, list[list[int]]] = {}  # layers ahead -> experts by row, most wanted first, in this pass

    def guessed(self, ids: torch.Tensor, ahead: int) -> tuple[list[int], list[int]]:
        """Pages of a guess made so many layers ahead, ids [tokens, k], most wanted first: those of ranks at which
        guesses are mostly right, and the rest, which are not worth a read that something else could have."""
        guess = self._guess[ahead] = ids.tolist()
        sure = [right >= SURE for right in self._right.setdefault(ahead, [1.0] * self._experts_per_token)]
        pages: dict[int, bool] = {}
        for row in guess:
            for e, is_sure in zip(row, sure, strict=True):
                pages[self.pages[e]] = is_sure or pages.get(self.pages[e], False)
        return [p for p, is_sure in pages.items() if is_sure], [p for p, is_sure in pages.items() if not is_sure]

    def _learn(self, ids: torch.Tensor) -> None:
        """How right the guesses were, now that it is known."""
        rows = ids.tolist()
        for ahead, guesses in self._guess.items():
            right = self._right[ahead]
            for guess, row in zip(guesses, rows, strict=False):  # an abandoned pass may have left another batch's
                for rank, e in enumerate(guess):
                    right[rank] += ((e in row) - right[rank]) * LEARN
        self._guess.clear()

    def ask(self, ids: torch.Tensor, chosen: Sequence[int]) -> None:
        """The router has chosen, ids [tokens, k], these experts: what is not there begins to be read. Where there is
        little room, only when it is computed: what is held now would be in the way of other pages."""
        if self._guess:
            self._learn(ids)
        self._chosen, memory = [self.pages[e] for e in chosen], self._memory
        self._were_there, self._request = memory.state.whole, None
        if self._were_there:
            memory.state.touch(*self._chosen)
            return
        roomy = memory.minimum + 2 * self._nbytes * len(self._chosen) <= memory.budget - memory.pinned_nbytes
        self._request = memory.ask(self._chosen) if roomy else None

    def at_hand(self) -> ExpertsFunction | None:
        """Of all experts at once, where every page was there when the router chose, and still is."""
        memory = self._memory
        if not self._were_there or not memory.state.whole:
            return None
        if self._all is None or self._all[0] != memory.slots_given:
            pages = {e: page_of_block(self._layout, memory.slot_of(page)) for e, page in enumerate(self.pages)}
            self._all = memory.slots_given, self._make(self._task, pages)
        return self._all[1]

    def come(self) -> Iterator[Slots]:
        """Slots of the experts that were asked for: first of those that are there, then of the others as they come."""
        memory = self._memory
        for ready in memory.come(self._request or memory.ask(self._chosen)):
            yield {self._expert[page]: memory.slot_of(page) for page in ready}
        self._request = None


@dataclass(frozen=True, slots=True)
class Guess:
    """A later layer's experts, as its router would choose them if the residual stayed as it is."""

    norm: PagedFunction
    router: PagedFunction
    experts: PagedExperts
    ahead: int  # layers


@dataclass(slots=True)
class Ahead:
    """What is read ahead when a task begins."""

    dense: tuple[int, ...] = ()  # pages that the next tasks need
    scan: tuple[int, ...] = ()  # where a pass will use nearly all: the next layer's experts
    guesses: tuple[Guess, ...] = ()  # else
