"""Tasks whose weights lie in slots: functions bound to wherever the page is at the moment, experts as they come.
Knows the hierarchy and the forward pass's functions; when what is read ahead, the executor says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from ciuic_runtime.memory.hierarchy import MemoryHierarchy
from ciuic_runtime.models.layout import PageLayout
from ciuic_runtime.models.native_forward import SlotExpertsFunction, TaskFunction
from ciuic_runtime.models.native_pages import NativePage, page_of_block
from ciuic_runtime.schedulers.graph import Task
from ciuic_runtime.schedulers.residency import Where

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


class PagedExperts:
    """A layer's routed experts."""

    def __init__(self, memory: MemoryHierarchy, task: Task, run: SlotExpertsFunction) -> None:
        self._memory, self.run = memory, run
        self.pages = [memory.number(page.name) for page in task.pages]  # by expert
        self._expert = {page: e for e, page in enumerate(self.pages)}

    def numbers(self, ids: torch.Tensor) -> list[int]:
        """The pages of the experts in ids [tokens, k], each once."""
        pages = self.pages
        chosen: list[int] = ids.flatten().tolist() if len(ids) == 1 else np.unique(ids.numpy()).tolist()
        return [pages[e] for e in chosen]

    def come(self, ids: torch.Tensor) -> Iterator[Slots]:
        """Slots of the chosen experts: first of those that are there, then of the others as they come."""
        memory = self._memory
        for ready in memory.take(self.numbers(ids)):
            yield {self._expert[page]: memory.slot_of(page) for page in ready}


@dataclass(slots=True)
class Ahead:
    """What is read ahead when a task begins."""

    dense: tuple[int, ...] = ()  # pages that the next tasks need
    scan: tuple[int, ...] = ()  # in a scan: the next layer's experts
    guesses: tuple[tuple[PagedFunction, PagedFunction, PagedExperts], ...] = ()  # else: a later layer's norm, router
