"""A recording's events by lane, to be looked at from near and from far: tiles of whole powers of two ns.
Knows which bars are in a tile, without looking at all events; how they are merged is `bars.py`'s."""

from __future__ import annotations

from typing import Any

import numpy as np

from ciuic_runtime.dashboard.bars import SEVERAL, Bars, Store, added, events, merged
from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.schedulers.chrome import nanoseconds
from ciuic_runtime.schedulers.lanes import SHOWN, lane_kind, shown_as
from ciuic_runtime.schedulers.recording import COMPUTE, READ, Recording, Rows

CELLS = 1024  # per tile: shorter events may share a bar
FINEST, COARSEST = 10, 62  # levels: a tile of 1 us, one of 146 years
MOST_AT_ONCE = 1 << 15  # bars that are merged when they are asked for; of more, it is kept


class Timeline:
    """Added to as a recording grows. Lanes are in the order in which they came."""

    def __init__(self) -> None:
        self.lanes: list[str] = []
        self.end = 0  # ns
        self._names: list[str] = []
        self._lanes: dict[int, _Lane] = {}  # by the number of the lane's name

    def add(self, recording: Recording, rows: Rows) -> None:
        """Rows that came since; those of each lane come after what it has."""
        self._names = list(recording.names)
        ends = [*(step.end for step in recording.steps[-1:]), *([rows["end"].max()] if len(rows) else [])]
        self.end = max([self.end, *(int(nanoseconds(end)) for end in ends)])  # the recording's: tiles cover all of it
        rows = rows[rows["kind"] <= READ]
        if not len(rows):
            return
        lanes = rows["lane"]
        for number in np.flatnonzero(np.bincount(lanes)).tolist():
            if number not in self._lanes:
                self._lanes[number] = _Lane(lane_kind(self._names[number], recording.devices))
                self.lanes.append(self._names[number])
            self._lanes[number].add(rows[lanes == number], self._names)

    def tile(self, level: int, index: int) -> dict[str, Any]:
        """What is shown of [index * 2^level, (index + 1) * 2^level) ns."""
        if not FINEST <= level <= COARSEST or not 0 <= index <= self.end >> level:
            raise InvalidInput(
                f"there is no tile {level}/{index}: levels are {FINEST} to {COARSEST}, and this recording ends at "
                f"{self.end / 1e9:.6g} s"
            )
        begin, lanes, tasks = index << level, [], dict[int, int]()
        anything = False
        for name, lane in zip(self.lanes, self._lanes.values(), strict=True):
            bars = lane.tile(level, begin)
            if not len(bars):
                continue
            anything = anything or bool((bars.count > 1).any())
            for number in np.unique(bars.task).tolist():
                if number != SEVERAL:
                    tasks.setdefault(number, len(tasks))
            lanes.append({
                "lane": name, "from": (bars.start - begin).tolist(), "to": (bars.end - begin).tolist(),
                "task": [tasks.get(n, SEVERAL) for n in bars.task.tolist()], "kind": bars.kind.tolist(),
                "count": bars.count.tolist(), "busy": bars.busy.tolist(), "step": bars.step.tolist(),
                "bytes": bars.nbytes.tolist(),
            })  # fmt: skip
        return {
            "level": level, "index": index, "tasks": [self._names[n] for n in tasks], "kinds": list(SHOWN),
            "merged": anything, "lanes": lanes,
        }  # fmt: skip


class _Lane:
    def __init__(self, kind: Any) -> None:
        self._kind = kind
        self._store = Store()
        self._kinds: dict[tuple[int, int], int] = {}  # (name, kind of row) -> a place in SHOWN
        self._coarse: dict[int, tuple[int, Bars]] = {}  # level -> (events in it, merged)

    def add(self, rows: Rows, names: list[str]) -> None:
        start, end = (nanoseconds(rows[key]) for key in ("start", "end"))
        nbytes, task, step = (rows[key].astype(np.int64) for key in ("nbytes", "task", "step"))
        new = events(start, np.maximum(start, end), nbytes, task, self._shown(rows, names), step)
        at = self._store.add(new)
        self._coarse = {level: known for level, known in self._coarse.items() if known[0] <= at}

    def _shown(self, rows: Rows, names: list[str]) -> Any:
        """Each row's kind; every pair of name and kind is looked at once."""
        task, kind = rows["task"].astype(np.int64), rows["kind"].astype(np.int64)
        task = np.where(kind == COMPUTE, task, 0)  # of others the name says nothing
        pairs, which = np.unique(task * 8 + kind, return_inverse=True)
        places = []
        for name, what in ((int(pair) >> 3, int(pair) & 7) for pair in pairs):
            if (name, what) not in self._kinds:
                self._kinds[name, what] = SHOWN.index(shown_as(names[name], what, self._kind))
            places.append(self._kinds[name, what])
        return np.array(places, np.int64)[which]

    def tile(self, level: int, begin: int) -> Bars:
        width, end = (1 << level) // CELLS, begin + (1 << level)
        every = self._store.bars
        first, last = every.between(begin, end)
        if last - first <= MOST_AT_ONCE:
            # Whole cells on both sides, so that what is merged does not depend on where the tile begins.
            low, high = every.between(begin - 2 * width, end)
            bars = merged(every.part(low, high), width)
        else:
            bars = self._merged(level)
        first, last = bars.between(begin, end)
        return bars.part(first, last)

    def _merged(self, level: int) -> Bars:
        """All of the lane at a level, made of what was merged before at this one or a finer one."""
        width, every = (1 << level) // CELLS, self._store.bars
        if level not in self._coarse:
            finer = max((known for known in self._coarse if known < level), default=None)
            base = merged(every, width) if finer is None else merged(self._merged(finer), width)
            self._coarse[level] = len(every), base
        done, bars = self._coarse[level]
        if done < len(every):
            bars = added(bars, every.part(done, len(every)), width)
            self._coarse[level] = len(every), bars
        return bars
