"""The five parts of a step's wall time, overlap and idle time, against looking at every nanosecond."""

from __future__ import annotations

import numpy as np
import pytest
from generated import made, recordings
from hypothesis import given

from ciuic_runtime.dashboard.growing import Growing
from ciuic_runtime.dashboard.strip import Strip
from ciuic_runtime.schedulers.blame import CAUSES, COMPUTES, NONE, causes_of, idle, overlap, step_parts
from ciuic_runtime.schedulers.recording import READ, Recording


def looked_at(recording: Recording, step: int) -> list[int]:
    """Of each ns of a step, what it is."""
    info, rows = recording.steps[step], recording.of_step(step)
    begin, end = round(info.start * 1e9), round(info.end * 1e9)
    found = np.full(end - begin, len(CAUSES) - 1)
    causes = causes_of(recording, rows)
    for cause in reversed(range(len(CAUSES) - 1)):
        for row in rows[causes == cause]:
            low, high = (round(float(row[key]) * 1e9) - begin for key in ("start", "end"))
            found[max(0, low) : max(0, high)] = cause
    return found.tolist()


@given(recordings)
def test_the_parts_are_those_of_every_moment_and_add_up(recording: Recording) -> None:
    parts = step_parts(recording)
    for step, info in enumerate(recording.steps):
        moments = np.bincount(looked_at(recording, step), minlength=len(CAUSES)) / 1e9
        assert parts[step] == pytest.approx(moments, abs=1e-12)
        assert parts[step].sum() == pytest.approx(info.end - info.start, abs=1e-12)


@given(recordings)
def test_what_of_reads_is_hidden(recording: Recording) -> None:
    for step, info in enumerate(recording.steps):
        moments = np.array(looked_at(recording, step))
        reading = np.zeros(len(moments), bool)
        begin = round(info.start * 1e9)
        for row in (rows := recording.of_step(step))[rows["kind"] == READ]:
            low, high = (max(0, round(float(row[key]) * 1e9) - begin) for key in ("start", "end"))
            reading[low:high] = True
        found = overlap(recording, step)
        if not reading.any():
            assert found is None
            continue
        assert found is not None
        assert found.read_s == pytest.approx(reading.sum() / 1e9, abs=1e-12)
        assert found.hidden_s == pytest.approx((reading & (moments != CAUSES.index("disk"))).sum() / 1e9, abs=1e-12)
        assert 0 <= found.percent <= 100 + 1e-9


@given(recordings)
def test_a_lane_computes_or_idles_for_a_cause(recording: Recording) -> None:
    around = Growing(recording)
    for step, info in enumerate(recording.steps):
        mine = around.around(step)
        causes, found = causes_of(mine, mine.rows), idle(mine, step)
        for lane in recording.devices:
            number = recording.names.index(lane)
            rows = mine.rows[(mine.rows["lane"] == number) & (causes == COMPUTES)]
            busy = (np.minimum(rows["end"], info.end) - np.maximum(rows["start"], info.start)).clip(0).sum()
            idles = sum(one.seconds for one in found if one.lane == lane)
            assert busy + idles == pytest.approx(info.end - info.start, abs=1e-12)


@given(recordings)
def test_steps_that_share_a_bar_show_the_longest(recording: Recording) -> None:
    strip = Strip()
    strip.add(recording)
    walls = [info.end - info.start for info in recording.steps]
    for most in (1, 2, 100):
        bars = strip.bars(recording, 0, len(walls), most, lambda steps: [None] * len(steps))
        assert len(bars["first"]) <= most
        assert bars["total"] == len(walls)
        covered = [n for first, last in zip(bars["first"], bars["last"], strict=True) for n in range(first, last + 1)]
        assert covered == list(range(len(walls)))
        for first, last, worst in zip(bars["first"], bars["last"], bars["worst"], strict=True):
            assert walls[worst] == max(walls[first : last + 1])
        assert [sum(parts) for parts in bars["seconds"]] == pytest.approx([walls[n] for n in bars["worst"]], abs=1e-12)


def test_steps_that_come_later_have_the_same_parts() -> None:
    recording = made(3, steps=6, events=40)
    assert step_parts(recording, 4).tolist() == pytest.approx(step_parts(recording)[4:])
    assert NONE == -1
    growing, strip = Growing(recording), Strip()
    for low, high in ((0, 2), (2, 6)):
        strip.add(growing.of_steps(low, high))
    assert strip.parts == pytest.approx(step_parts(recording))
