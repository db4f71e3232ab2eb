"""A recording that is added to while it is looked at. Knows how snapshots follow one another; what was given out stays
as it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ciuic_runtime.schedulers.recording import COLUMNS, NONE, PassNote, Recording, Rows
from ciuic_runtime.schedulers.trace import StepInfo

REFERRING = ("task", "lane", "cause")  # columns of places in `names`
T = TypeVar("T")


class First(Sequence[T]):
    """What is in a list now, of a list that is only added to."""

    def __init__(self, items: list[T]) -> None:
        self._items, self._number = items, len(items)

    def __len__(self) -> int:
        return self._number

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return [self._items[i] for i in range(*at.indices(self._number))]
        return self._items[range(self._number)[at]]

    def __iter__(self) -> Iterator[T]:
        return islice(self._items, self._number)


class Growing:
    """Rows and steps pile up; of everything else the newest snapshot's is what there is."""

    recording: Recording
    _rows: Rows
    _used: int
    _steps: list[StepInfo]
    _passes: list[PassNote]
    _starts: npt.NDArray[np.int64]  # of each step the place of its first row, and the end

    def __init__(self, first: Recording, most: int | None = None) -> None:
        """`most`: events that are kept; None: all."""
        self.most, self.forgotten = most, 0  # times that older ones were forgotten
        self._names = list(first.names)
        self._numbers = {name: i for i, name in enumerate(first.names)}
        self._keep(first)
        self._forget()

    @property
    def next_step(self) -> int:
        """The number of the first step that is not here yet."""
        return self.recording.first_step + len(self.recording.steps)

    def add(self, snapshot: Recording) -> Rows:
        """A snapshot from `next_step` on; its rows, by our numbers of names."""
        skipped = snapshot.first_step - self.next_step
        assert skipped <= 0 or not len(self.recording.rows), f"{skipped} steps are missing before {snapshot.first_step}"
        rows = self._renumbered(snapshot)
        if self._used + len(rows) > len(self._rows):
            room = np.zeros(max(1 << 10, self._used, len(rows)), COLUMNS)
            self._rows = np.concatenate([self._rows[: self._used], room])
        self._rows[self._used : self._used + len(rows)] = rows
        before, self._used = self._used, self._used + len(rows)
        self._steps += snapshot.steps
        self._passes += snapshot.passes
        first_step = self.recording.first_step if self.recording.steps else snapshot.first_step
        self._starts = np.concatenate([self._starts[:-1], before + _starts(snapshot)])
        self.recording = replace(
            snapshot, rows=self._rows[: self._used], names=First(self._names), steps=First(self._steps),
            passes=First(self._passes), first_step=first_step,
        )  # fmt: skip
        self._forget()
        return rows

    def of_steps(self, first: int, last: int) -> Recording:
        """Only the steps from `first` to before `last`, with their rows."""
        at = self.recording.first_step
        low, high = (min(max(0, n - at), len(self.recording.steps)) for n in (first, last))
        passes = self.recording.passes[low:high]
        return replace(
            self.recording, rows=self.recording.rows[self._starts[low] : self._starts[high]],
            steps=self.recording.steps[low:high], passes=passes, first_step=at + low,
        )  # fmt: skip

    def around(self, step: int) -> Recording:
        """A step, and those that were on their way at the same time."""
        steps, at = self.recording.steps, step - self.recording.first_step
        first, last = at, at + 1
        while first > 0 and steps[first - 1].end > steps[at].start:
            first -= 1
        while last < len(steps) and steps[last].start < steps[at].end:
            last += 1
        return self.of_steps(first + self.recording.first_step, last + self.recording.first_step)

    def _renumbered(self, snapshot: Recording) -> Rows:
        rows, names = snapshot.rows.copy(), snapshot.names
        table = np.full(len(names) + 1, NONE, np.int32)  # NONE is the last place
        for n in np.unique(np.concatenate([rows[column] for column in REFERRING])).tolist():
            if n != NONE:
                table[n] = self._number(names[n])
        for column in REFERRING:
            rows[column] = table[rows[column]]
        return rows

    def _number(self, name: str) -> int:
        if name not in self._numbers:
            self._numbers[name] = len(self._names)
            self._names.append(name)
        return self._numbers[name]

    def _keep(self, recording: Recording) -> None:
        """This, and what will be added to it."""
        self._rows, self._used = recording.rows, len(recording.rows)
        self._steps, self._passes = list(recording.steps), list(recording.passes)
        self._starts = _starts(recording)
        self.recording = recording

    def _forget(self) -> None:
        """The older half of the steps, until there are few enough events."""
        while self.most is not None and self._used > self.most and len(self._steps) > 1:
            kept = self.of_steps(self.recording.first_step + len(self._steps) // 2, self.next_step)
            self._keep(replace(kept, rows=kept.rows.copy()))
            self.forgotten += 1


def _starts(recording: Recording) -> npt.NDArray[np.int64]:
    """Of each step the place of its first row, and at the end that of the next one."""
    numbers = np.arange(recording.first_step, recording.first_step + len(recording.steps) + 1)
    return np.searchsorted(recording.rows["step"], numbers)
