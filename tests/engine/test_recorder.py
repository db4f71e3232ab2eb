"""What was recorded is what a snapshot says: numbers become names, steps that did not end are left out, and of a
recording that goes on for days the newest events are kept."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ciuic_runtime.engine.recorder import STEPS, Recorder
from ciuic_runtime.schedulers.graph import Step
from ciuic_runtime.schedulers.recording import COPY, EVICT, MEMORY, WAIT
from ciuic_runtime.schedulers.trace import Trace


def test_numbers_become_names_again() -> None:
    recorder = Recorder()
    attention, cpu, link, page = (recorder.number(n) for n in ("layers.0.attention", "cpu", "cpu -> sim:0", "page"))
    assert recorder.number("cpu") == cpu
    t = recorder.begin
    recorder.add(attention, cpu, t + 1, t + 2)
    recorder.add(attention, link, t + 2, t + 2.5, COPY, 640)
    recorder.end_step(Step("prefill", 5, 2, 9.0, 7.0, 2), t + 0.5)
    recorder.add(attention, cpu, t + 2.75, t + 3, WAIT, cause=page)
    recorder.add(page, cpu, t + 3, t + 3, EVICT)
    recorder.add(attention, cpu, t + 3, t + 4)
    recorder.add(page, cpu, t + 4, t + 4, MEMORY, 64)
    recorder.end_step(Step.decode(1), t + 3)
    snapshot = recorder.snapshot()
    trace = replace(snapshot, devices=["cpu", "sim:0"], notes=["a note"]).trace()
    rows = [(e.task, e.lane, e.step, e.phase, e.kind, e.nbytes, e.cause) for e in trace.events]
    assert rows == [
        ("layers.0.attention", "cpu", 0, "prefill", "compute", 0, ""),
        ("layers.0.attention", "cpu -> sim:0", 0, "prefill", "copy", 640, ""),
        ("layers.0.attention", "cpu", 1, "decode", "wait", 0, "page"),
        ("layers.0.attention", "cpu", 1, "decode", "compute", 0, ""),
    ]
    spans = [(e.start, e.end) for e in trace.events]
    assert spans == [pytest.approx(p) for p in ((1, 2), (2, 2.5), (2.75, 3), (3, 4))]
    assert [(s.phase, s.tokens, s.sequences) for s in trace.steps] == [("prefill", 5, 2), ("decode", 1, 1)]
    assert trace.steps[0].start == pytest.approx(0.5)
    assert trace.passes("prefill") == [Step("prefill", 5, 2, 9.0, 7.0, 2)]
    assert (trace.notes, trace.devices) == (("a note",), ("cpu", "sim:0"))
    assert trace.seconds_by_kind("decode") == {"wait": pytest.approx(0.25), "attention": pytest.approx(1)}
    assert snapshot.rows["kind"].tolist() == [0, COPY, WAIT, EVICT, 0, MEMORY]
    assert snapshot.began == recorder.began


def test_it_grows() -> None:
    recorder = Recorder(chunk=4)
    task, lane = recorder.number("t"), recorder.number("cpu")
    for i in range(100):
        recorder.add(task, lane, i, i + 0.5)
    recorder.end_step(Step.decode(1), 0)
    assert recorder.snapshot().rows["start"] + recorder.begin == pytest.approx(list(range(100)))


def trace(recorder: Recorder) -> Trace:
    return recorder.snapshot().trace()


def test_steps_that_did_not_end_are_left_out() -> None:
    recorder = Recorder(chunk=2)
    good, bad, lane = (recorder.number(n) for n in ("good", "bad", "cpu"))
    recorder.add(good, lane, 0, 1)
    recorder.end_step(Step.prefill(1), 0)
    for _ in range(5):
        recorder.add(bad, lane, 1, 2)
    assert [e.task for e in trace(recorder).events] == ["good"]
    recorder.abandon_step()
    recorder.add(good, lane, 3, 4)
    recorder.end_step(Step.decode(1), 3)
    assert [(e.task, e.step) for e in trace(recorder).events] == [("good", 0), ("good", 1)]


def test_it_begins_anew_and_names_keep_their_numbers() -> None:
    recorder = Recorder()
    task, lane = recorder.number("t"), recorder.number("cpu")
    recorder.add(task, lane, 0, 1)
    recorder.end_step(Step.decode(1), 0)
    begin = recorder.begin
    recorder.clear()
    assert trace(recorder) == Trace((), (), "measured")
    assert recorder.begin > begin
    assert recorder.number("t") == task
    recorder.add(task, lane, recorder.begin, recorder.begin)
    recorder.end_step(Step.decode(1), recorder.begin)
    assert [(e.task, e.step) for e in trace(recorder).events] == [("t", 0)]


@given(
    steps=st.lists(st.integers(0, 9), max_size=40), chunk=st.integers(1, 7), most=st.integers(1, 50),
    since=st.integers(0, 50), until=st.none() | st.integers(0, 50),
)  # fmt: skip
def test_the_newest_steps_are_whole_and_keep_their_numbers(
    steps: list[int], chunk: int, most: int, since: int, until: int | None
) -> None:
    """Steps with so many events each, of which the `start` says which step and the `end` which event it is."""
    recorder = Recorder(chunk, most)
    recorder.begin = 0.0
    task, lane = recorder.number("t"), recorder.number("cpu")
    for step, events in enumerate(steps):
        for i in range(events):
            recorder.add(task, lane, step, i)
        recorder.end_step(Step.decode(step), step, step + 0.5)
    found = recorder.snapshot(since, until)
    last = min(len(steps), len(steps) if until is None else max(until, recorder.first_step))
    assert found.first_step == min(max(since, recorder.first_step), last)
    assert [info.start for info in found.steps] == list(range(found.first_step, last))
    assert found.rows[["step", "end"]].tolist() == [
        (n, i) for n in range(found.first_step, last) for i in range(steps[n])
    ]
    kept = sum(steps[recorder.first_step :])
    assert kept <= most + chunk
    assert recorder.num_steps == len(steps)
    whole = sum(steps[max(0, recorder.first_step - 1) :]) + 2 * chunk
    assert recorder.first_step == 0 or whole > most or len(steps) * STEPS > most


def test_a_copy_can_be_taken_while_it_records() -> None:
    """Every copy is of whole steps: step n has n % 7 events, each with the step's number as its bytes."""
    recorder = Recorder(chunk=64, most=4096)
    task, lane, stop = recorder.number("t"), recorder.number("cpu"), threading.Event()

    def record() -> None:
        step = 0
        while not stop.is_set():
            for _ in range(step % 7):
                recorder.add(task, lane, 0, 1, nbytes=step)
            recorder.end_step(Step.decode(1), 0)
            step += 1

    thread = threading.Thread(target=record)
    thread.start()
    seen, since = 0, 0
    try:
        while seen < 5_000:
            found = recorder.snapshot(since)
            rows = found.rows
            assert (rows["step"] == rows["nbytes"]).all()
            last = found.first_step + len(found.steps)
            numbers = np.arange(found.first_step, last)
            assert np.repeat(numbers, numbers % 7).tolist() == rows["step"].tolist()
            assert found.first_step >= since
            seen, since = seen + len(found.steps), last
    finally:
        stop.set()
        thread.join()
    assert recorder.first_step > 0
