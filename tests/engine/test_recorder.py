"""What was recorded is what the trace says: numbers become names, steps that did not end are left out."""

from __future__ import annotations

import pytest

from ciuic_runtime.engine.recorder import Recorder
from ciuic_runtime.schedulers.graph import Step


def test_numbers_become_names_again() -> None:
    recorder = Recorder()
    attention, cpu, link = (recorder.number(n) for n in ("layers.0.attention", "cpu", "cpu -> sim:0"))
    assert recorder.number("cpu") == cpu
    t = recorder.begin
    recorder.add(attention, cpu, t + 1, t + 2)
    recorder.add(attention, link, t + 2, t + 2.5, 1, 640)
    recorder.end_step(Step("prefill", 5, 2, 9.0, 7.0, 2), t + 0.5)
    recorder.add(attention, cpu, t + 3, t + 4)
    recorder.end_step(Step.decode(1), t + 3)
    trace = recorder.trace(["cpu", "sim:0"], ["a note"])
    rows = [(e.task, e.lane, e.step, e.phase, e.kind, e.nbytes) for e in trace.events]
    assert rows == [
        ("layers.0.attention", "cpu", 0, "prefill", "compute", 0),
        ("layers.0.attention", "cpu -> sim:0", 0, "prefill", "copy", 640),
        ("layers.0.attention", "cpu", 1, "decode", "compute", 0),
    ]
    assert [(e.start, e.end) for e in trace.events] == [pytest.approx(p) for p in ((1, 2), (2, 2.5), (3, 4))]
    assert [(s.phase, s.tokens, s.sequences) for s in trace.steps] == [("prefill", 5, 2), ("decode", 1, 1)]
    assert trace.passes("prefill") == [Step("prefill", 5, 2, 9.0, 7.0, 2)]
    assert trace.notes == ("a note",)


def test_it_grows() -> None:
    recorder = Recorder(capacity=4)
    task, lane = recorder.number("t"), recorder.number("cpu")
    for i in range(100):
        recorder.add(task, lane, i, i + 0.5)
    recorder.end_step(Step.decode(1), 0)
    starts = [e.start + recorder.begin for e in recorder.trace(["cpu"]).events]
    assert starts == pytest.approx(list(range(100)))


def test_steps_that_did_not_end_are_left_out() -> None:
    recorder = Recorder()
    good, bad, lane = (recorder.number(n) for n in ("good", "bad", "cpu"))
    recorder.add(good, lane, 0, 1)
    recorder.end_step(Step.prefill(1), 0)
    recorder.add(bad, lane, 1, 2)
    assert [e.task for e in recorder.trace(["cpu"]).events] == ["good"]
    recorder.abandon_step()
    recorder.add(good, lane, 3, 4)
    recorder.end_step(Step.decode(1), 3)
    assert [(e.task, e.step) for e in recorder.trace(["cpu"]).events] == [("good", 0), ("good", 1)]


def test_clear_keeps_the_numbers() -> None:
    recorder = Recorder()
    number, begin = recorder.number("t"), recorder.begin
    recorder.add(number, number, 0, 1)
    recorder.end_step(Step.decode(1), 0)
    recorder.clear()
    assert recorder.number("t") == number
    assert recorder.begin > begin
    trace = recorder.trace(["cpu"])
    assert not trace.events
    assert not trace.steps
