"""A page that comes late on purpose, to be found again by who looks for it."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch

from ciuic_runtime.memory.source import Finished, PageSource


class LatePage:
    """A source whose reads of one page end `delay` s after they began; `once`: only the first of them."""

    def __init__(self, source: PageSource, page: str, delay: float, once: bool = False) -> None:
        self._source, self._page, self._delay, self._once = source, page, delay, once
        self._tickets: set[int] = set()
        self._late: list[Finished] = []

    def submit(self, page: str, into: torch.Tensor, order: int) -> int:
        ticket = self._source.submit(page, into, order)
        if page == self._page and not (self._once and self._tickets):
            self._tickets.add(ticket)
        return ticket

    def finished(self, seconds: float) -> list[Finished]:
        found = self._source.finished(min(seconds, 0.005) if self._late else seconds)
        self._late += [replace(d, end=d.start + self._delay) for d in found if d.ticket in self._tickets]
        come = [done for done in self._late if done.end <= time.perf_counter()]
        self._late = [done for done in self._late if done not in come]
        return [*(done for done in found if done.ticket not in self._tickets), *come]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)
