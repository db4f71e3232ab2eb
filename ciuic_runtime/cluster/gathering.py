"""What the stages of a cluster recorded, on one axis and under the plan's names, as it is brought to the driver.
Knows passes by the numbers under which they were sent; who asks the stages, and when, is `runner.py`'s business."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, cast

import numpy as np

from ciuic_runtime.engine.recorder import STEPS, Ended, Recorder
from ciuic_runtime.schedulers.graph import Step
from ciuic_runtime.schedulers.recording import COLUMNS, COPY, NONE, PageCounts, Rows

if TYPE_CHECKING:
    from ciuic_runtime.cluster.runner import PlacedStage


@dataclass(frozen=True)
class StageRecord:
    """What a stage recorded of some passes, at wall times, s; and counts of all passes so far."""

    rows: Rows  # their steps are places in `passes`
    names: list[str]
    passes: list[int]  # the numbers under which they were sent
    starts: list[float]
    ends: list[float]
    nbytes: list[int]  # that each handed on
    pages: dict[str, PageCounts]
    expert_uses: dict[str, list[int]]


class Gathered:
    """Passes that have ended wait here until the stages have told what they recorded of them."""

    def __init__(self) -> None:
        self.recorder = Recorder()
        self._wall = wall_offset()
        self.clear(0)

    def clear(self, sent: int) -> None:
        """`sent`: passes so far, of which nothing is wanted."""
        self.recorder.clear()
        self.since = sent  # the first pass that may have to be asked for
        self._waiting: deque[Ended] = deque()
        self._last_end = 0.0
        self._idle_since: dict[int, float] = {}  # by stage: the end of its last pass that was brought, wall time
        self._records: dict[int, StageRecord] = {}  # by stage, the last one

    def ended(self, number: int, step: Step, begun: float) -> None:
        """A pass has, which is timed from the end of the one before if that was on its way too."""
        now = time.perf_counter()
        self._waiting.append(Ended(step, max(begun, self._last_end), now, number))
        self._last_end = now
        most = self.recorder.most
        if most is not None and len(self._waiting) * STEPS > most:  # nobody has asked for long
            self.take(self._waiting[len(self._waiting) // 2].number, (), ())

    def take(self, until: int, stages: Sequence[PlacedStage], records: Sequence[StageRecord | None]) -> None:
        """Of passes before `until`; None: from a stage that is lost, which takes what it recorded with it."""
        done: list[Ended] = []
        while self._waiting and self._waiting[0].number < until:
            done.append(self._waiting.popleft())
        first = self.recorder.num_steps
        steps = {one.number: first + i for i, one in enumerate(done)}
        parts = [self._rows(s, r, steps) for s, r in zip(stages, records, strict=True) if r]
        pairs = pairwise(zip(stages, records, strict=True))
        parts += [self._hops(a, sent, b, got, steps) for (a, sent), (b, got) in pairs if sent and got]
        rows = np.concatenate([np.zeros(0, COLUMNS), *parts])
        rows = rows[np.argsort(rows["step"], kind="stable")]
        ends = np.searchsorted(rows["step"], np.arange(first, first + len(done)), side="right")
        for one, own in zip(done, np.split(rows, ends), strict=False):
            self.recorder.number_of_pass = one.number
            self.recorder.add_rows(own)
            self.recorder.end_step(one.step, one.start, one.end)
        for stage, record in zip(stages, records, strict=True):
            if record:
                self._records[stage.index] = record
                self._idle_since[stage.index] = max(record.ends, default=self._idle_since.get(stage.index, 0.0))
        self.since = max(self.since, until)

    def renumber(self, stages: Mapping[int, int]) -> None:
        """Of the stages that go on, the new number by the one before; nothing is known of others."""
        self._records = {stages[i]: record for i, record in self._records.items() if i in stages}
        self._idle_since = {stages[i]: end for i, end in self._idle_since.items() if i in stages}

    def page_counts(self) -> dict[str, PageCounts]:
        return {name: counts for record in list(self._records.values()) for name, counts in record.pages.items()}

    def expert_uses(self) -> dict[str, list[int]]:
        return {task: uses for record in list(self._records.values()) for task, uses in record.expert_uses.items()}

    def _rows(self, stage: PlacedStage, record: StageRecord, steps: dict[int, int]) -> Rows:
        """Those of passes that came to their end, under the driver's numbers and at its times."""
        step_of = np.array([*(steps.get(number, NONE) for number in record.passes), NONE])
        rows: Rows = record.rows.copy()
        rows["step"] = step_of[rows["step"]]
        rows = cast(Rows, rows[rows["step"] != NONE])
        self._renumber(rows, "task", record.names, str)
        self._renumber(rows, "cause", record.names, str)
        self._renumber(rows, "lane", record.names, stage.lane)
        for key in ("start", "end"):
            rows[key] -= self._wall
        return rows

    def _renumber(self, rows: Rows, column: str, names: Sequence[str], named: Callable[[str], str]) -> None:
        table = np.full(len(names) + 1, NONE)  # the last place is that of NONE
        for number in np.unique(rows[column]).tolist():
            if number != NONE:
                table[number] = self.recorder.number(named(names[number]))
        rows[column] = table[rows[column]]

    def _hops(
        self, src: PlacedStage, sent: StageRecord, dst: PlacedStage, got: StageRecord, steps: dict[int, int]
    ) -> Rows:
        """The way of values from stage to stage: from when the one had made them, or from when the other had nothing
        else to do, until that began with them. So hops between two stages do not overlap, and none is longer than what
        it kept the second one waiting."""
        number = self.recorder.number
        task, lane = number(src.plan.tasks[-1]), number(f"{src.lane(src.last)} -> {dst.lane(dst.first)}")
        made = {n: (end, nbytes) for n, end, nbytes in zip(sent.passes, sent.ends, sent.nbytes, strict=True)}
        idle, wall, found = self._idle_since.get(dst.index, 0.0), self._wall, []
        for n, begun, end in zip(got.passes, got.starts, got.ends, strict=True):
            if n in made and n in steps and (start := max(made[n][0], idle)) < begun:
                found.append((task, lane, steps[n], COPY, made[n][1], start - wall, begun - wall, NONE))
            idle = end
        return np.array(found, COLUMNS)


def wall_offset() -> float:
    """What to take off a wall time to have one of this process's time.perf_counter(); both are looked at more than
    once, since a process may be held up in between. To be asked for once: another look is another offset."""
    looks = [(time.perf_counter(), time.time(), time.perf_counter()) for _ in range(8)]
    before, wall, after = min(looks, key=lambda look: look[2] - look[0])
    return wall - (before + after) / 2
