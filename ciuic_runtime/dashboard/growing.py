"""A recording that is added to while it is looked at. Knows how snapshots follow one another; what was given out stays
as it was."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from ciuic_runtime.schedulers.recording import COLUMNS, NONE, Recording, Rows


class Growing:
    """Rows and steps pile up; of everything else the newest snapshot's is what there is."""

    def __init__(self, first: Recording, most: int | None = None) -> None:
        """`most`: events that are kept; None: all."""
        self.most, self.forgotten = most, 0  # times that older ones were forgotten
        self._rows, self._used = first.rows, len(first.rows)
        self._names = {name: i for i, name in enumerate(first.names)}
        self.recording = first
        self._starts = _starts(first)

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
        steps = [*self.recording.steps, *snapshot.steps]
        passes = [*self.recording.passes, *snapshot.passes]
        first_step = self.recording.first_step if self.recording.steps else snapshot.first_step
        self._starts = np.concatenate([self._starts[:-1], before + _starts(snapshot)])
        self.recording = replace(
            snapshot, rows=self._rows[: self._used], names=list(self._names), steps=steps, passes=passes,
            first_step=first_step,
        )  # fmt: skip
        if self.most is not None and self._used > self.most:
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
        numbers = [self._names.setdefault(name, len(self._names)) for name in snapshot.names]
        if numbers == list(range(len(numbers))):
            return snapshot.rows
        table, rows = np.array([*numbers, NONE], np.int32), snapshot.rows.copy()
        for column in ("task", "lane", "cause"):
            rows[column] = table[rows[column]]  # NONE is the last place
        return rows

    def _forget(self) -> None:
        """The older half of the steps."""
        middle = self.recording.first_step + len(self.recording.steps) // 2
        kept = self.of_steps(middle, self.next_step)
        self._rows, self._used = kept.rows.copy(), len(kept.rows)
        self._starts = _starts(kept)
        self.recording = replace(kept, rows=self._rows[: self._used])
        self.forgotten += 1


def _starts(recording: Recording) -> npt.NDArray[np.int64]:
    """Of each step the place of its first row, and at the end that of the next one."""
    numbers = np.arange(recording.first_step, recording.first_step + len(recording.steps) + 1)
    return np.searchsorted(recording.rows["step"], numbers)
