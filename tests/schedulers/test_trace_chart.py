"""What a page shows of a trace: whole steps, as many as it can hold, in order and to the nanosecond."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from machines import model

from ciuic_runtime.schedulers import trace_chart as module
from ciuic_runtime.schedulers.graph import Phase
from ciuic_runtime.schedulers.trace import Event, StepInfo, Trace
from ciuic_runtime.schedulers.trace_chart import MOST_EVENTS, kind_of, trace_chart


def steps(*events_each: int, decodes: int = 3, devices: tuple[str, ...] = ("cpu", "cuda:0")) -> Trace:
    """A trace of one step for each number, the last `decodes` of them decode steps, a microsecond per event."""
    events, infos, now = [], [], 7.0
    for number, count in enumerate(events_each):
        phase: Phase = "decode" if number >= len(events_each) - decodes else "prefill"
        for i in range(count):
            at = now + i * 1e-6
            events.append(Event(f"layers.{i}.mlp", devices[i % len(devices)], at, at + 1e-6, number, phase))
        infos.append(StepInfo(phase, 1 if phase == "decode" else 512, 1, now, now + count * 1e-6))
        now += count * 1e-6
    return Trace(tuple(events), tuple(infos), "simulated", devices)


def numbers(chart: dict[str, Any]) -> list[int]:
    return [step["number"] for step in chart["steps"]]


def test_a_small_trace_is_shown_whole() -> None:
    trace = steps(4, 4, 2, 2, 2)
    chart = trace_chart("Forecast", trace)
    assert (chart["shown"], chart["total"], numbers(chart)) == (14, 14, [0, 1, 2, 3, 4])
    assert [lane["name"] for lane in chart["lanes"]] == ["cpu", "cuda:0"]
    cpu = chart["lanes"][0]
    assert cpu["from"] == [0, 2000, 4000, 6000, 8000, 10000, 12000]
    assert cpu["to"] == [at + 1000 for at in cpu["from"]]
    assert [chart["tasks"][i] for i in cpu["task"]] == [e.task for e in trace.events if e.lane == "cpu"]
    assert chart["end"] == chart["firstView"] == 14_000
    assert json.loads(json.dumps(chart)) == chart


def test_first_in_view_are_the_passes_up_to_the_third_token() -> None:
    assert trace_chart("", steps(4, 4, *[2] * 10, decodes=10))["firstView"] == 8000 + 3 * 2000
    assert trace_chart("", steps(4, 4, decodes=0))["firstView"] == 8000


@pytest.mark.parametrize(
    ("counts", "decodes", "shown"),
    [
        ((5, 5, 5, 5, 5), 3, [1, 2]),  # the last pass over the prompt, then what there is room for
        ((5, 5, 1, 1, 1), 3, [1, 2, 3, 4]),
        ((1, 1, 5, 1, 1, 1), 3, [0, 1, 2, 3, 4, 5]),  # and what comes before, if there is room for that too
        ((1, 2, 5, 1, 1, 1), 3, [1, 2, 3, 4, 5]),
        ((5, 5, 5), 0, [0, 1]),
        ((5, 50, 5), 1, [1]),  # one step at least, or its beginning
        ((50,), 1, [0]),
    ],
)
def test_a_long_trace_is_cut_to_whole_steps(
    counts: tuple[int, ...], decodes: int, shown: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_EVENTS", 10)
    chart = trace_chart("", steps(*counts, decodes=decodes))
    assert numbers(chart) == shown
    assert chart["shown"] == min(10, sum(counts[i] for i in shown))
    assert chart["total"] == sum(counts)
    assert min(at for lane in chart["lanes"] for at in lane["from"]) == 0
    assert chart["steps"][0]["from"] == 0


def test_a_page_holds_so_many_events_at_most() -> None:
    chart = trace_chart("", steps(*[600] * 100, decodes=99))
    assert MOST_EVENTS - 600 < chart["shown"] <= MOST_EVENTS
    assert len(json.dumps(chart)) < 2e6


def test_events_of_a_lane_are_in_order_of_their_ends() -> None:
    """The chart finds what is under the pointer by halving."""
    trace = steps(40, 40, 5, 5, 5)
    chart = trace_chart("", replace(trace, events=trace.events[::-1]))
    for lane in chart["lanes"]:
        assert lane["from"] == sorted(lane["from"])
        assert lane["to"] == sorted(lane["to"])


def test_a_trace_without_steps_or_events() -> None:
    assert trace_chart("", replace(steps(5), steps=()))["shown"] == 5
    assert trace_chart("", Trace((), (), "measured"))["lanes"] == []


def test_colours_are_of_known_kinds() -> None:
    assert {kind_of(Event(task.name, "cpu", 0, 1, 0, "decode")) for task in model()} == {
        "embedding", "norm", "attention", "mlp", "router", "experts", "shared_experts", "head",
    }  # fmt: skip
    assert kind_of(Event("layers.3.mlp", "disk -> cpu", 0, 1, 0, "decode", "read")) == "read"
    assert kind_of(Event('x"onclick=', "cpu", 0, 1, 0, "decode")) == "other"
