"""Events of one lane as bars, and many short ones that stand close together as one: what a chart can show at a zoom.
Knows columns and widths; which of them a tile holds is `timeline.py`'s business."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from ciuic_runtime.schedulers.lanes import SHOWN

SEVERAL = -1  # tasks
CHUNK = 1 << 16  # bars that are merged at a time
Whole = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Bars:
    """Columns, in order of start. Times are whole ns since the recording began."""

    start: Whole
    end: Whole
    reach: Whole  # the latest end so far
    length: Whole  # of a single event; 0 of several: together they are as short as the shortest
    busy: Whole  # ns of events inside
    count: Whole
    nbytes: Whole
    task: Whole  # a place in the recording's names, or SEVERAL
    kind: Whole  # a place in SHOWN: what took most
    step: Whole  # the first one's
    by_kind: npt.NDArray[np.float32] | None = None  # ns, [bars, kinds]; None: all of `busy` is of `kind`

    def __len__(self) -> int:
        return len(self.start)

    def part(self, first: int, last: int) -> Bars:
        every = [*self.columns, self.by_kind]
        return Bars(*[None if c is None else c[first:last] for c in every])  # type: ignore[arg-type]

    @property
    def columns(self) -> list[Whole]:
        """All but `by_kind`."""
        return [getattr(self, name) for name in COLUMNS]

    def between(self, start: int, end: int) -> tuple[int, int]:
        """(first, last + 1) of those that may have a part in it."""
        return int(np.searchsorted(self.reach, start, "right")), int(np.searchsorted(self.start, end, "left"))


COLUMNS = tuple(item.name for item in fields(Bars) if item.name != "by_kind")
REACH = COLUMNS.index("reach")


def events(start: Whole, end: Whole, nbytes: Whole, task: Whole, kind: Whole, step: Whole) -> Bars:
    """A bar for each event."""
    order = np.argsort(start, kind="stable")
    start, end, nbytes, task, kind, step = (c[order] for c in (start, end, nbytes, task, kind, step))
    took = end - start
    return Bars(start, end, np.maximum.accumulate(end), took, took, np.ones_like(start), nbytes, task, kind, step)


def joined(first: Bars, then: Bars) -> Bars:
    """`then` begins where `first` ends, or later."""
    if not len(first) or not len(then):
        return first if len(first) else then
    with_kinds = first.by_kind is not None or then.by_kind is not None
    columns = [np.concatenate([a, b]) for a, b in zip(first.columns, then.columns, strict=True)]
    columns[REACH] = np.maximum.accumulate(columns[1])
    if not with_kinds:
        return Bars(*columns)
    return Bars(*columns, np.concatenate([_by_kind(first), _by_kind(then)]))  # type: ignore[call-arg]


def merged(bars: Bars, width: int) -> Bars:
    """Those that are shorter than `width` and begin in the same cell of that width are one, unless a longer one is
    between them. Merging what was merged at a smaller width gives the same as merging at once."""
    if len(bars) > CHUNK:
        found = merged(bars.part(0, CHUNK), width)
        for at in range(CHUNK, len(bars), CHUNK):
            found = added(found, bars.part(at, at + CHUNK), width)
        return found
    if len(bars) < 2:
        return bars
    short, cell = bars.length < width, bars.start // width
    begins = np.ones(len(bars), np.bool_)
    begins[1:] = ~(short[1:] & short[:-1] & (cell[1:] == cell[:-1]))
    first = np.flatnonzero(begins)
    if len(first) == len(bars):
        return bars
    end = np.maximum.reduceat(bars.end, first)
    count, several = np.add.reduceat(bars.count, first), np.diff(first, append=len(bars)) > 1
    low, high = np.minimum.reduceat(bars.task, first), np.maximum.reduceat(bars.task, first)
    by_kind = np.add.reduceat(_by_kind(bars), first, axis=0)
    return Bars(
        bars.start[first], end, np.maximum.accumulate(end), np.where(several, 0, bars.length[first]),
        np.add.reduceat(bars.busy, first), count, np.add.reduceat(bars.nbytes, first),
        np.where(low == high, low, SEVERAL), np.where(several, by_kind.argmax(axis=1), bars.kind[first]),
        bars.step[first], by_kind,
    )  # fmt: skip


def added(done: Bars, new: Bars, width: int) -> Bars:
    """What was merged before, and bars that come after it: only its last one can still grow."""
    more = merged(new, width)
    if not len(done):
        return more
    seam = merged(joined(done.part(len(done) - 1, len(done)), more.part(0, 1)), width)
    return joined(joined(done.part(0, len(done) - 1), seam), more.part(1, len(more)))


class Store:
    """Single events that are added to: room doubles when it runs out."""

    def __init__(self) -> None:
        self._columns = np.zeros((len(COLUMNS), 1 << 10), np.int64)
        self._used = 0

    @property
    def bars(self) -> Bars:
        return Bars(*self._columns[:, : self._used])

    def add(self, new: Bars) -> int:
        """Events, of which those of passes that overlap may begin before what is there; from which place on anything
        is new."""
        have = self.bars
        at = int(np.searchsorted(have.start, new.start[0], "right")) if len(new) else self._used
        if at < self._used:
            tail = joined(have.part(at, self._used), new)
            new = events(tail.start, tail.end, tail.nbytes, tail.task, tail.kind, tail.step)
        while at + len(new) > self._columns.shape[1]:
            self._columns = np.concatenate([self._columns, np.zeros_like(self._columns)], axis=1)
        self._columns[:, at : at + len(new)] = new.columns
        self._used = at + len(new)
        reach = self._columns[REACH]
        if at:
            reach[at : self._used] = np.maximum(reach[at : self._used], reach[at - 1])
        return at


def _by_kind(bars: Bars) -> npt.NDArray[np.float32]:
    if bars.by_kind is not None:
        return bars.by_kind
    found = np.zeros((len(bars), len(SHOWN)), np.float32)
    found[np.arange(len(bars)), bars.kind] = bars.busy
    return found
