"""Which task of a step was late, and what it waited for. Knows the step's rows and those that were planned; what the
whole step's time was lost to is `blame.py`'s."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ciuic_runtime.devices.units import format_bytes
from ciuic_runtime.schedulers.recording import COMPUTE, COPY, NONE, READ, SAMPLE, WAIT, Recording, Rows

LEAST_SHARE = 0.02  # of a step's wall time, that one task must have lost to be called late


@dataclass(frozen=True, slots=True)
class PageRead:
    page: str
    lane: str
    start: float  # s
    end: float
    nbytes: int


@dataclass(frozen=True, slots=True)
class Late:
    task: str  # layers.3.experts; of a copy, the task whose result was copied
    lane: str
    start: float  # s, of its first event
    end: float
    planned_s: float | None  # None: no plan is known
    actual_s: float  # with its waits
    waited_s: float
    waits_for: str | None  # the page that came last
    read: PageRead | None

    @property
    def text(self) -> str:
        if self.planned_s is None:
            begin = f"{self.task} waited {in_words(self.waited_s)}"
            return f"{begin} for a page" if self.waits_for is None else f"{begin} for page {self.waits_for}{self._read}"
        over = f"{self.task} took {in_words(self.actual_s - self.planned_s)} more than planned"
        if not self.waited_s:
            return f"{over}, {in_words(self.actual_s)} instead of {in_words(self.planned_s)}, and waited for no page"
        what = "a page" if self.waits_for is None else f"page {self.waits_for}{self._read}"
        return f"{over}: it waited {in_words(self.waited_s)} for {what}"

    @property
    def _read(self) -> str:
        if self.read is None:
            return ""
        return f", whose read of {format_bytes(self.read.nbytes)} took {in_words(self.read.end - self.read.start)}"


@dataclass(slots=True)
class _Spent:
    """By one task on one lane."""

    start: float
    end: float
    seconds: float = 0.0
    waited: float = 0.0
    worst: int = NONE  # its longest wait, a place among the rows


def late_task(actual: Recording, step: int, planned: Recording | None) -> Late | None:
    """Of the tasks of a step, the one that took most beyond its planned time, waits counted; without a plan, that which
    waited longest at once. None where none is worth naming."""
    info = actual.steps[step - actual.first_step]
    rows = actual.of_step(step)
    spent = _spent(actual, rows)
    if planned is None:
        waited = [(float(rows["end"][s.worst] - rows["start"][s.worst]), key) for key, s in spent.items() if s.waited]
        lost, key = max(waited, default=(0.0, ("", "", "")))
    else:
        expected = _by_task(_spent(planned, planned.rows))
        over = {key: s.seconds - expected.get((key[0], key[2]), 0.0) for key, s in spent.items()}
        lost, key = max(((s, key) for key, s in over.items()), default=(0.0, ("", "", "")))
    if lost <= LEAST_SHARE * (info.end - info.start):
        return None
    one, (task, lane, what) = spent[key], key
    page, read = _waited_for(actual, rows, one.worst) if one.waited else (None, None)
    planned_s = None if planned is None else expected.get((task, what), 0.0)
    return Late(task, lane, one.start, one.end, planned_s, one.seconds, one.waited, page, read)


def _spent(recording: Recording, rows: Rows) -> dict[tuple[str, str, str], _Spent]:
    """(task, lane, "compute" or "copy") -> what it took there."""
    found: dict[tuple[str, str, str], _Spent] = {}
    names = recording.names
    for i, (task, lane, _, kind, _, start, end, _) in enumerate(rows.tolist()):
        if kind not in (COMPUTE, COPY, SAMPLE, WAIT):
            continue
        key = (names[task], names[lane], "copy" if kind == COPY else "compute")
        one = found.setdefault(key, _Spent(start, end))
        one.start, one.end, one.seconds = min(one.start, start), max(one.end, end), one.seconds + end - start
        if kind == WAIT:
            one.waited += end - start
            if one.worst == NONE or end - start > rows["end"][one.worst] - rows["start"][one.worst]:
                one.worst = i
    return found


def _by_task(spent: dict[tuple[str, str, str], _Spent]) -> dict[tuple[str, str], float]:
    """On whatever lane: of a task that several devices share, the longest."""
    found: dict[tuple[str, str], float] = {}
    for (task, _, what), one in spent.items():
        found[task, what] = max(found.get((task, what), 0.0), one.seconds)
    return found


def _waited_for(recording: Recording, rows: Rows, wait: int) -> tuple[str | None, PageRead | None]:
    """The page that a wait is noted to have waited for, and its read; else the read that ended last before it went on,
    with what is between a read's end and its being noticed."""
    row, reads = rows[wait], rows[rows["kind"] == READ]
    if row["cause"] != NONE:
        mine = reads[reads["task"] == row["cause"]]
    else:
        mine = reads[(reads["end"] > row["start"]) & (reads["end"] <= row["end"])]
    if not len(mine):
        return (recording.names[row["cause"]] if row["cause"] != NONE else None), None
    last = mine[np.argmax(mine["end"])]
    page, lane = recording.names[last["task"]], recording.names[last["lane"]]
    return page, PageRead(page, lane, float(last["start"]), float(last["end"]), int(last["nbytes"]))


def in_words(seconds: float) -> str:
    """0.0523 -> "52.3 ms" """
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if abs(seconds) * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"
