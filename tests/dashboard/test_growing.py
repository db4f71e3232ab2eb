"""A recording that grows: what was given out stays as it was, and figures of columns are those of events."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from generated import made, recordings
from hypothesis import given
from hypothesis import strategies as st

from ciuic_runtime.dashboard.growing import First, Growing
from ciuic_runtime.schedulers.graph import PHASES
from ciuic_runtime.schedulers.recording import COLUMNS, PassNote, Recording


def in_words(recording: Recording) -> list[tuple[object, ...]]:
    """Rows with names in place of their numbers."""
    names = [*recording.names, ""]
    return [(names[task], names[lane], *rest, names[cause]) for task, lane, *rest, cause in recording.rows.tolist()]


def renamed(recording: Recording, seed: int) -> Recording:
    """The same, with its names in another order and some that no row has."""
    names = [*recording.names, "nobody", f"nobody {seed}"]
    order = np.random.default_rng(seed).permutation(len(names))
    table = np.append(np.argsort(order), -1).astype(np.int32)
    rows = recording.rows.copy()
    for column in ("task", "lane", "cause"):
        rows[column] = table[rows[column]]
    return replace(recording, rows=rows, names=[names[n] for n in order])


@given(recordings, st.lists(st.integers(0, 6), max_size=3), st.integers(0, 99))
def test_snapshots_make_the_whole_and_what_was_given_out_stays(
    recording: Recording, cuts: list[int], seed: int
) -> None:
    passes = [PassNote(((n, 1),), n, 0) for n in range(len(recording.steps))]
    whole = Growing(replace(recording, passes=passes))
    growing, given_out = Growing(Recording(np.zeros(0, COLUMNS), ())), []
    at = [0, *sorted(min(cut, len(passes)) for cut in cuts), len(passes)]
    for i, (low, high) in enumerate(pairwise(at)):
        rows = growing.add(renamed(whole.of_steps(low, high), seed + i))
        given_out.append((growing.recording, high))
        assert in_words(replace(growing.recording, rows=rows)) == in_words(whole.of_steps(low, high))
    for found, high in given_out:
        expected = whole.of_steps(0, high)
        assert in_words(found) == in_words(expected)
        assert (list(found.steps), list(found.passes)) == (list(expected.steps), list(expected.passes))
        assert len(found.names) == len(list(found.names)) == len(set(found.names))
    assert growing.next_step == len(passes)


@given(recordings, st.integers(1, 40))
def test_the_newest_are_kept_from_the_first_on(recording: Recording, most: int) -> None:
    growing = Growing(recording, most)
    kept, first = growing.recording, growing.recording.first_step
    assert len(kept.rows) <= most or len(kept.steps) == 1
    assert growing.next_step == len(recording.steps)
    assert in_words(kept) == in_words(Growing(recording).of_steps(first, growing.next_step))
    assert (first > 0) == (growing.forgotten > 0)


def test_the_first_of_a_list_are_a_sequence() -> None:
    items = [0, 1, 2, 3]
    first = First(items)
    items += [4, 5]
    assert list(first) == [0, 1, 2, 3] == first[:] == [*reversed(first)][::-1]
    assert (first[-1], first[1:3], first[::-1], first[2:99], first[-2:]) == (3, [1, 2], [3, 2, 1, 0], [2, 3], [2, 3])
    assert (4 in first, 3 in first, len(first)) == (False, True, 4)
    with pytest.raises(IndexError):
        first[4]


@given(recordings)
def test_figures_of_columns_are_those_of_events(recording: Recording) -> None:
    for one in (recording, Growing(recording).of_steps(1, 9), replace(made(1), steps=())):
        events, summed = one.trace(), one.summed()
        for phase in PHASES:
            expected = events.seconds_by_kind(phase)
            found = summed.seconds_by_kind(phase)
            assert list(found) == list(expected)
            assert found == pytest.approx(expected)
            assert summed.tokens_per_s(phase) == events.tokens_per_s(phase)
            assert summed.passes(phase) == events.passes(phase)
