"""Tiles: at every zoom all events and all busy time, each in one place, whatever came when."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from generated import made, recordings
from hypothesis import given
from hypothesis import strategies as st

from ciuic_runtime.dashboard import timeline as module
from ciuic_runtime.dashboard.bars import SEVERAL, merged
from ciuic_runtime.dashboard.growing import Growing
from ciuic_runtime.dashboard.timeline import CELLS, COARSEST, FINEST, Timeline
from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.schedulers.chrome import nanoseconds
from ciuic_runtime.schedulers.lanes import SHOWN
from ciuic_runtime.schedulers.recording import COLUMNS, COMPUTE, READ, Recording
from ciuic_runtime.schedulers.trace import StepInfo


def timeline_of(recording: Recording) -> Timeline:
    found = Timeline()
    found.add(recording, recording.rows)
    return found


def totals(timeline: Timeline, level: int) -> dict[str, tuple[int, int, int]]:
    """Lane -> (events, busy ns, bytes) over all tiles of a level, each bar in the tile in which it begins."""
    found: dict[str, tuple[int, int, int]] = {}
    for index in range((timeline.end >> level) + 1):
        for lane in timeline.tile(level, index)["lanes"]:
            name, begins = lane["lane"], [at >= 0 for at in lane["from"]]
            mine = [
                sum(v for v, here in zip(lane[key], begins, strict=True) if here) for key in ("count", "busy", "bytes")
            ]
            before = found.get(name, (0, 0, 0))
            found[name] = (before[0] + mine[0], before[1] + mine[1], before[2] + mine[2])
    return {name: total for name, total in found.items() if total[0]}


def expected(recording: Recording) -> dict[str, tuple[int, int, int]]:
    found = {}
    rows = recording.rows[recording.rows["kind"] <= READ]
    for number in set(rows["lane"].tolist()):
        mine = rows[rows["lane"] == number]
        busy = nanoseconds(mine["end"]) - nanoseconds(mine["start"])
        found[recording.names[number]] = (len(mine), int(busy.sum()), int(mine["nbytes"].sum()))
    return found


@given(recordings, st.integers(FINEST, 24), st.booleans())
def test_no_event_and_no_time_is_lost(recording: Recording, level: int, few: bool) -> None:
    most = module.MOST_AT_ONCE
    module.MOST_AT_ONCE = 4 if few else most  # then what is merged is kept and built upon
    try:
        timeline = timeline_of(recording)
        for one in (level, level + 2, level):
            assert totals(timeline, one) == expected(recording)
    finally:
        module.MOST_AT_ONCE = most


@given(recordings, st.integers(1, 5), st.integers(12, 24))
def test_what_came_later_is_as_if_it_had_always_been_there(recording: Recording, first: int, level: int) -> None:
    grown, parts, whole = Timeline(), Growing(recording), timeline_of(recording)
    end = len(recording.steps)
    for low, high in ((0, min(first, end)), (min(first, end), end)):
        part = parts.of_steps(low, high)
        grown.add(part, part.rows)
        if len(part.rows) and grown.end:
            grown.tile(level, 0)
    assert grown.end == whole.end
    for index in range((whole.end >> level) + 1):
        first_tile, second = grown.tile(level, index), whole.tile(level, index)
        assert by_lane(first_tile) == by_lane(second)


def by_lane(tile: dict[str, Any]) -> dict[str, Any]:
    """With the names of tasks in place of their numbers; lanes are in order of arrival."""
    return {
        lane["lane"]: {
            **{key: value for key, value in lane.items() if key not in ("lane", "task")},
            "task": [None if n == SEVERAL else tile["tasks"][n] for n in lane["task"]],
        }
        for lane in tile["lanes"]
    }


@given(recordings, st.integers(12, 24))
def test_only_short_neighbours_share_a_bar(recording: Recording, level: int) -> None:
    timeline, width = timeline_of(recording), (1 << level) // CELLS
    for index in range((timeline.end >> level) + 1):
        tile = timeline.tile(level, index)
        for lane in tile["lanes"]:
            for start, end, count, busy in zip(*(lane[k] for k in ("from", "to", "count", "busy")), strict=True):
                assert busy <= end - start
                assert count == 1 or end - start < 2 * width
            assert len(lane["from"]) <= 2 * CELLS + 2
        assert tile["merged"] == any(n > 1 for lane in tile["lanes"] for n in lane["count"])


@given(recordings, st.integers(4, 14), st.integers(1, 4))
def test_merging_what_was_merged_is_merging_at_once(recording: Recording, bits: int, more: int) -> None:
    timeline = timeline_of(recording)
    for lane in timeline._lanes.values():
        bars = lane._store.bars
        twice, once = merged(merged(bars, 1 << bits), 1 << bits + more), merged(bars, 1 << bits + more)
        for one, other in zip(twice.columns, once.columns, strict=True):
            assert one.tolist() == other.tolist()


def test_a_bar_has_the_kind_that_took_most() -> None:
    rows = [(1, 0, 0, COMPUTE, 0, i * 1e-6, i * 1e-6 + (5e-7 if i % 3 else 9e-7), -1) for i in range(9)]
    for i in (0, 3, 6):
        rows[i] = (2, *rows[i][1:])
    recording = Recording(np.array(rows, COLUMNS), ["cpu", "layers.0.mlp", "head"], devices=["cpu"])
    [lane] = timeline_of(recording).tile(34, 0)["lanes"]
    assert [SHOWN[kind] for kind in lane["kind"]] == ["mlp"]
    assert lane["task"] == [SEVERAL]
    assert lane["count"] == [9]


@given(recordings, st.integers(FINEST, 40))
def test_tiles_cover_the_whole_recording(recording: Recording, level: int) -> None:
    """Which may end with a step, after its last event."""
    timeline = timeline_of(recording)
    last = int(nanoseconds(recording.seconds)) >> level
    assert timeline.tile(level, last)["index"] == last
    with pytest.raises(InvalidInput, match="there is no tile"):
        timeline.tile(level, last + 1)


@pytest.mark.parametrize(("level", "index"), [(FINEST - 1, 0), (COARSEST + 1, 0), (20, 10**6), (20, -1)])
def test_tiles_that_are_not_there(level: int, index: int) -> None:
    with pytest.raises(InvalidInput, match="there is no tile"):
        timeline_of(made(1)).tile(level, index)


def test_a_million_events_are_looked_at_once() -> None:
    """Any tile, however coarse, is then a matter of milliseconds."""
    number, each = 1_000_000, 100
    rows = np.zeros(number, COLUMNS)
    at = np.arange(number)
    rows["task"], rows["step"], rows["cause"] = 1 + at % 4, at // each, -1
    rows["start"] = at * 100e-6
    rows["end"] = rows["start"] + 80e-6
    names = ["cpu", "layers.0.mlp", "layers.0.attention", "head", "layers.0.router"]
    steps = [StepInfo("decode", 1, 1, i * each * 1e-4, (i + 1) * each * 1e-4) for i in range(number // each)]
    timeline = timeline_of(Recording(rows, names, steps, devices=["cpu"]))
    times = []
    for level in range(24, 38):
        timeline.tile(level, 0)  # builds what is kept of this level
        begin = time.process_time()
        tile = timeline.tile(level, (timeline.end >> level) // 2)
        times.append(time.process_time() - begin)
        assert len(tile["lanes"][0]["from"]) <= 2 * CELLS + 2
    assert max(times) < 0.05
