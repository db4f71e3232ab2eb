"""Traces: rates, plan against actual, and the Chrome trace."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from machines import CPU_AND_GPU, device, machine, model

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.devices.spec import Link
from ciuic_runtime.schedulers.cost import CostModel
from ciuic_runtime.schedulers.graph import Step, task_kind
from ciuic_runtime.schedulers.scheduler import TaskScheduler
from ciuic_runtime.schedulers.simulate import simulate
from ciuic_runtime.schedulers.trace import Event, StepInfo, Trace
from ciuic_runtime.schedulers.workload import Workload

MODEL = model()
TRACE = Trace(
    (
        Event("layers.0.attention", "cpu", 0.0, 2.0, 0, "prefill"),
        Event("layers.0.attention", "cpu -> cuda:0", 2.0, 2.5, 0, "prefill", "copy", 64),
        Event("layers.0.mlp_norm", "cuda:0", 2.5, 3.0, 0, "prefill"),
        Event("layers.0.attention", "cpu", 5.0, 5.25, 1, "decode"),
        Event("sample", "cpu", 5.25, 5.5, 1, "decode", "sample"),
    ),
    (StepInfo("prefill", 12, 1, 0.0, 3.0), StepInfo("decode", 1, 1, 5.0, 5.5)),
    "measured",
    ("cpu", "cuda:0"),
    ("a note",),
)


def test_rates_leave_pauses_out() -> None:
    assert TRACE.tokens_per_s("prefill") == 4
    assert TRACE.tokens_per_s("decode") == 2
    assert Trace((), (), "measured").tokens_per_s("decode") is None
    assert TRACE.seconds_by_kind("prefill") == {"attention": 2.0, "copy": 0.5, "norm": 0.5}
    assert TRACE.seconds_by_kind("decode") == {"attention": 0.25, "sample": 0.25}


def test_kinds() -> None:
    assert {t.kind for t in MODEL} == {task_kind(t.name) for t in MODEL}


def test_lanes_begin_with_the_devices() -> None:
    assert TRACE.lanes == ("cpu", "cuda:0", "cpu -> cuda:0")


def test_against() -> None:
    schedule = TaskScheduler(CPU_AND_GPU, workload=Workload(20, 10)).schedule(MODEL)
    p = schedule.predicted
    assert p is not None
    schedule = replace(schedule, predicted=replace(p, prefill_tokens_per_s=8.0, decode_tokens_per_s=1.0))
    found = TRACE.against(schedule)
    assert (found.prefill_tokens_per_s.error, found.decode_tokens_per_s.error) == (-0.5, 1.0)
    kinds = found.seconds_per_token["prefill"]
    assert kinds["attention"].actual == 2.0 / 12
    assert kinds["attention"].forecast == p.seconds_per_token["prefill"]["attention"]
    assert kinds["experts"].actual is None
    assert kinds["experts"].error is None
    assert kinds["copy"].forecast is None
    data = json.loads(json.dumps(found.to_dict()))
    assert data["decode_tokens_per_s"] == {
        "forecast": 1.0, "actual": 2.0, "recosted": None, "error": 1.0, "workload_error": None, "model_error": None,
    }  # fmt: skip
    assert data["seconds_per_token"]["decode"]["sample"]["actual"] == 0.25
    lines = str(found).splitlines()
    assert lines[0].split() == ["forecast", "recosted", "actual", "actual/forecast"]
    assert lines[1].split() == ["prefill", "tokens/s", "8", "-", "4", "0.50"]
    assert lines[2].split() == ["decode", "tokens/s", "1", "-", "2", "2.00"]
    assert any(line.split()[:2] == ["prefill", "copy"] and line.split()[-1] == "-" for line in lines)


def test_the_error_falls_into_that_of_the_workload_and_that_of_the_model() -> None:
    schedule = TaskScheduler(CPU_AND_GPU, workload=Workload(20, 10)).schedule(MODEL)
    recosted = Trace((), (StepInfo("prefill", 12, 1, 0.0, 2.0), StepInfo("decode", 1, 1, 2.0, 2.25)), "simulated")
    found = TRACE.against(schedule, recosted).decode_tokens_per_s
    assert (found.recosted, found.actual) == (4.0, 2.0)
    assert found.model_error == -0.5
    assert found.error is not None
    assert found.workload_error is not None
    assert (1 + found.error) == pytest.approx((1 + found.workload_error) * (1 + found.model_error))


def test_of_many_passes_some_are_recosted() -> None:
    steps = tuple(StepInfo("decode", 1, 1, i, i + 1, Step.decode(i)) for i in range(1000))
    trace = Trace((), (*steps, StepInfo("prefill", 2, 1, 0, 1)), "measured")
    assert trace.passes("prefill") == []
    contexts = [step.pairs for step in trace.passes("decode", most=10)]
    assert contexts == [50, 150, 250, 350, 450, 550, 650, 750, 850, 950]


def test_against_a_schedule_without_a_forecast() -> None:
    schedule = replace(TaskScheduler(CPU_AND_GPU).schedule(MODEL), predicted=None)
    found = TRACE.against(schedule)
    assert (found.decode_tokens_per_s.forecast, found.decode_tokens_per_s.actual) == (None, 2)
    assert found.decode_tokens_per_s.error is None
    assert "-" in str(found)
    assert str(Trace((), (), "measured").against(schedule))


def test_a_simulated_run_agrees_with_its_forecast() -> None:
    schedule = TaskScheduler(CPU_AND_GPU, workload=Workload(20, 10, 2)).schedule(MODEL)
    trace = simulate(schedule, MODEL, CostModel(schedule.topology))
    found = trace.against(schedule)
    for phase in found.seconds_per_token.values():
        assert all(c.error == pytest.approx(0, abs=1e-3) for c in phase.values())


def test_chrome_trace(tmp_path: Path) -> None:
    links = (Link("cpu", "sim:0", 1.1e9, 1e-7), Link("sim:0", "cpu", 0.7e9, 1e-7))
    topology = machine(device("cpu", rate=7e9), device("sim:0", rate=3e9), links=links)
    scheduler = TaskScheduler(topology, workload=Workload(20, 10))
    scheduler.add_task(MODEL.layers[0], "cpu")
    scheduler.add_task(MODEL.layers[1], "sim:0")
    scheduler.add_task(MODEL.layers[2], "cpu")
    schedule = scheduler.schedule()
    trace = simulate(schedule, MODEL, CostModel(topology))
    file = tmp_path / "trace.json"
    trace.to_chrome_trace(file)
    data = json.loads(file.read_text())
    rows = data["traceEvents"]
    names = {r["tid"]: r["args"]["name"] for r in rows if r["name"] == "thread_name"}
    assert list(names.values()) == ["cpu", "sim:0", "cpu -> sim:0", "sim:0 -> cpu"]
    assert next(r for r in rows if r["name"] == "process_name")["args"]["name"] == "ciuic (simulated)"
    assert "sim:0 is simulated" in data["otherData"]["notes"]

    lanes = defaultdict(list)
    for row in rows:
        if row["ph"] == "X":
            lanes[row["tid"]].append((round(row["ts"] * 1000), round((row["ts"] + row["dur"]) * 1000)))
    assert lanes.keys() == names.keys()
    assert sum(map(len, lanes.values())) == len(trace.events)
    for spans in lanes.values():
        assert all(start <= end for start, end in spans)
        assert all(a[1] <= b[0] for a, b in pairwise(spans))
    copies = [r for r in rows if r["ph"] == "X" and r["cat"] == "copy"]
    assert {r["args"]["bytes"] for r in copies} == {20 * 64 * 4, 64 * 4}
    assert {r["args"]["phase"] for r in rows if r["ph"] == "X"} == {"prefill", "decode"}


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot write"):
        TRACE.to_chrome_trace(tmp_path / "none" / "trace.json")
