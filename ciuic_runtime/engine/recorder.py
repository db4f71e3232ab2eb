"""Records what ran where and when into preallocated columns, cheaply; a `Trace` is built when somebody reads it.
Knows lanes and tasks as numbers only until then."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import cast

import numpy as np

from ciuic_runtime.schedulers.graph import Step
from ciuic_runtime.schedulers.trace import Event, EventKind, StepInfo, Trace

_KINDS: tuple[EventKind, ...] = ("compute", "copy", "sample", "wait", "read")
SAMPLE, WAIT, READ = 2, 3, 4  # places in _KINDS
_COLUMNS = np.dtype(
    [("task", "i4"), ("lane", "i4"), ("step", "i4"), ("kind", "i1"), ("nbytes", "i8"), ("start", "f8"), ("end", "f8")]
)


class Recorder:
    """Rows double when they run out; that is the only allocation."""

    def __init__(self, capacity: int = 1 << 14) -> None:
        self._rows = np.zeros(capacity, _COLUMNS)
        self._used = self._ended = 0  # rows in use, and those of them that belong to finished steps
        self._names: dict[str, int] = {}
        self._steps: list[tuple[Step, float, float]] = []
        self.begin = time.perf_counter()

    def number(self, name: str) -> int:
        """The number under which `add` knows a task or lane."""
        return self._names.setdefault(name, len(self._names))

    @property
    def num_events(self) -> int:
        return self._used

    def add(self, task: int, lane: int, start: float, end: float, kind: int = 0, nbytes: int = 0) -> None:
        """One event of the current step; times as time.perf_counter() gives them."""
        if self._used == len(self._rows):
            self._rows = np.concatenate([self._rows, np.zeros_like(self._rows)])
        self._rows[self._used] = (task, lane, len(self._steps), kind, nbytes, start, end)
        self._used += 1

    def end_step(self, step: Step, start: float) -> None:
        self._steps.append((step, start, time.perf_counter()))
        self._ended = self._used

    def abandon_step(self) -> None:
        """Forgets the events of a step that did not come to its end."""
        self._used = self._ended

    def clear(self) -> None:
        """Forgets what was recorded; names keep their numbers."""
        self._used = self._ended = 0
        self._steps.clear()
        self.begin = time.perf_counter()

    def trace(self, devices: Sequence[str], notes: Sequence[str] = ()) -> Trace:
        names = list(self._names)
        begin, steps = self.begin, self._steps
        events = tuple(
            Event(
                names[r["task"]],
                names[r["lane"]],
                float(r["start"]) - begin,
                float(r["end"]) - begin,
                int(r["step"]),
                steps[r["step"]][0].phase,
                cast(EventKind, _KINDS[r["kind"]]),
                int(r["nbytes"]),
            )
            for r in self._rows[: self._ended]
        )
        infos = tuple(StepInfo(s.phase, s.tokens, s.sequences, a - begin, b - begin, s) for s, a, b in steps)
        return Trace(events, infos, "measured", tuple(devices), tuple(notes))
