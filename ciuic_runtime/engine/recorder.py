"""Records what ran where and when into preallocated rows, cheaply; the newest are kept, and anybody may take a copy.
Knows lanes and tasks as numbers only until then."""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np

from ciuic_runtime.schedulers.graph import Step
from ciuic_runtime.schedulers.recording import COLUMNS, COMPUTE, NONE, Recording, Rows
from ciuic_runtime.schedulers.trace import StepInfo

CHUNK = 1 << 14  # rows that are allocated, and forgotten, at once
STEPS = 64  # of the most events: so many steps may be kept


class Ended(NamedTuple):
    """A step that came to its end; times as time.perf_counter() gives them."""

    step: Step
    start: float
    end: float
    number: int  # that whoever drives the passes gave it


class _State(NamedTuple):
    """Rows of steps that have ended: no row and no step that is counted here is written to again."""

    full: tuple[Rows, ...]
    rows: Rows
    used: int  # of `rows`
    steps: list[Ended]
    num_steps: int  # of `steps`
    first_step: int
    begin: float
    began: float


class Recorder:
    """One thread records at a time; `snapshot` may be called in any other. What it returns is of steps that have
    ended."""

    def __init__(self, chunk: int = CHUNK, most: int | None = None) -> None:
        """`most`: events that are kept, the newest ones; None: all."""
        self._chunk, self.most = chunk, most
        self._numbers: dict[str, int] = {}
        self._names: list[str] = []
        self.number_of_pass = 0  # of the step under way, for whoever drives passes
        self.clear()

    def clear(self) -> None:
        """Forgets what was recorded; names keep their numbers, and steps are counted anew."""
        self.begin, self.began = time.perf_counter(), time.time()
        self._full: tuple[Rows, ...] = ()
        self._rows, self._used = np.zeros(self._chunk, COLUMNS), 0
        self._steps: list[Ended] = []
        self.first_step = self.num_steps = 0  # the first that is not forgotten; all that have ended, with those before
        self._publish()

    def number(self, name: str) -> int:
        """The number under which `add` knows a task or lane."""
        found = self._numbers.get(name)
        if found is None:
            self._names.append(name)
            found = self._numbers[name] = len(self._names) - 1
        return found

    def add(
        self, task: int, lane: int, start: float, end: float, kind: int = COMPUTE, nbytes: int = 0, cause: int = NONE
    ) -> None:
        """One event of the current step; times as time.perf_counter() gives them."""
        if self._used >= self._chunk:
            self._begin_chunk()
        self._rows[self._used] = (task, lane, self.num_steps, kind, nbytes, start, end, cause)
        self._used += 1

    def add_rows(self, rows: Rows) -> None:
        """Events that somebody else recorded, of the current step."""
        while len(rows):
            if self._used >= self._chunk:
                self._begin_chunk()
            part = rows[: self._chunk - self._used]
            self._rows[self._used : self._used + len(part)] = part
            self._used, rows = self._used + len(part), rows[len(part) :]

    def end_step(self, step: Step, start: float, end: float | None = None) -> None:
        self._steps.append(Ended(step, start, time.perf_counter() if end is None else end, self.number_of_pass))
        self.num_steps += 1
        if self.most is not None and (
            len(self._full) * self._chunk > self.most or len(self._steps) * STEPS > self.most
        ):
            self._forget(self.most)
        self._publish()

    def abandon_step(self) -> None:
        """Forgets the events of a step that did not come to its end."""
        ended = self._ended
        self._full, self._rows, self._used = ended.full, ended.rows, ended.used

    def snapshot(self, since_step: int = 0, until_step: int | None = None) -> Recording:
        """Of the steps from that number on, as far as they are not forgotten: a copy of their rows. `until_step` and
        those after it are left out."""
        now = self._ended
        end = now.first_step + now.num_steps
        last = end if until_step is None else max(now.first_step, min(end, until_step))
        first = min(max(since_step, now.first_step), last)
        every = [*now.full, now.rows[: now.used]]
        parts = [
            part[slice(*np.searchsorted(part["step"], (first, last)))]
            for part in every
            if len(part) and part["step"][0] < last and part["step"][-1] >= first
        ]
        rows = np.concatenate(parts) if parts else np.zeros(0, COLUMNS)
        rows["start"] -= now.begin
        rows["end"] -= now.begin
        steps = now.steps[first - now.first_step : last - now.first_step]
        infos = tuple(
            StepInfo(s.step.phase, s.step.tokens, s.step.sequences, s.start - now.begin, s.end - now.begin, s.step)
            for s in steps
        )
        return Recording(rows, list(self._names), infos, first, began=now.began)

    def passes(self) -> list[int]:
        """The numbers that whoever drives the passes gave to the steps that are not forgotten."""
        now = self._ended
        return [s.number for s in now.steps[: now.num_steps]]

    def _publish(self) -> None:
        """What a copy may be made of from now on, in one assignment, so that nobody sees half of it."""
        self._ended = _State(
            self._full, self._rows, self._used, self._steps, len(self._steps), self.first_step, self.begin, self.began
        )

    def _begin_chunk(self) -> None:
        self._full = (*self._full, self._rows)
        self._rows, self._used = np.zeros(self._chunk, COLUMNS), 0

    def _forget(self, most: int) -> None:
        """The oldest chunks, and the steps that have events there; where steps have few events, half of the steps."""
        first = self.first_step
        while len(self._full) * self._chunk > most:
            first = max(first, int(self._full[0]["step"][-1]) + 1)
            self._full = self._full[1:]
        if len(self._steps) * STEPS > most:
            first = max(first, self.first_step + len(self._steps) // 2)
        self._steps = self._steps[first - self.first_step :]
        self.first_step = first
