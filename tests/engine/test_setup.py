"""What is decided before loading: this host's memory, schedules that are given, options that contradict them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import ciuic_runtime as ciuic
from ciuic_runtime.engine import setup

HUGE = 16 << 40  # bytes, more than any host here has


@pytest.fixture
def schedule(tiny_v3: Path, here: ciuic.Topology) -> ciuic.Schedule:
    return ciuic.plan(ciuic.Model(tiny_v3), here, workload=ciuic.Workload(200, 50, 2))


def device(here: ciuic.Topology, **changes: object) -> ciuic.DeviceSpec:
    return replace(here.device("cpu"), memory_bytes=HUGE, memory_free_bytes=None, **changes)  # type: ignore[arg-type]


def test_memory_that_was_only_declared_is_not_there(tiny_v3: Path, here: ciuic.Topology) -> None:
    with pytest.raises(ciuic.OutOfMemory, match="of this host's memory"):
        ciuic.LLM(tiny_v3, devices=ciuic.Topology((device(here),)), max_model_len=512, max_num_seqs=1_000_000)


def test_a_simulated_device_uses_this_hosts_memory(tiny_v3: Path, here: ciuic.Topology) -> None:
    sim = device(here, name="sim:0", kind="SIM")
    with pytest.raises(ciuic.OutOfMemory, match="for sim:0"):
        ciuic.LLM(tiny_v3, devices=ciuic.Topology((sim,)), max_model_len=512, max_num_seqs=1_000_000)


def test_two_shares_of_a_host_have_its_memory_once(tiny_v3: Path, here: ciuic.Topology) -> None:
    cpu = here.device("cpu")
    halves = ciuic.Topology((cpu, replace(cpu, name="cpu:1")))
    scheduler = ciuic.TaskScheduler(halves, workload=ciuic.Workload(8, 8))
    layers = ciuic.Model(tiny_v3).layers
    for i, layer in enumerate(layers):
        scheduler.add_task(layer, "cpu" if i % 2 else "cpu:1")
    schedule = scheduler.schedule()
    free = cpu.memory_free_bytes or cpu.memory_bytes
    per_sequence = ciuic.Model(tiny_v3).graph.kv_bytes_per_token * 512
    sequences = int(1.5 * free / per_sequence)  # each share alone would hold its half
    with pytest.raises(ciuic.OutOfMemory, match="for cpu:1"):
        ciuic.LLM(tiny_v3, devices=halves, schedule=schedule, max_model_len=512, max_num_seqs=sequences)


def test_a_given_schedule_brings_its_workload_and_is_forecast_anew(
    tiny_v3: Path, here: ciuic.Topology, schedule: ciuic.Schedule
) -> None:
    assert schedule.predicted is not None
    stale = replace(schedule, predicted=replace(schedule.predicted, decode_tokens_per_s=1e9))
    with ciuic.LLM(tiny_v3, schedule=stale, devices=here) as llm:
        assert (llm.context, llm.max_num_seqs) == (250, 2)
        assert llm.schedule.policy == "as given"
        assert llm.schedule.predicted is not None
        assert llm.schedule.workload == schedule.workload
        assert llm.schedule.predicted.decode_tokens_per_s == pytest.approx(schedule.predicted.decode_tokens_per_s)
        assert {a.task: a.device for a in llm.schedule.assignments} == {a.task: a.device for a in schedule.assignments}


def test_the_forecast_is_for_the_prompts_that_came(tiny_v3: Path, here: ciuic.Topology) -> None:
    with ciuic.LLM(tiny_v3, devices=here) as llm:
        llm.generate([[1, 2, 3], [4] * 9], ciuic.SamplingParams(max_tokens=5, ignore_eos=True))
        assert llm.schedule.workload == ciuic.Workload(9, 5, 2)
        two = llm.schedule.predicted
        llm.generate([1, 2, 3], ciuic.SamplingParams(max_tokens=5, ignore_eos=True))
        one = llm.schedule.predicted
    assert one is not None
    assert two is not None
    assert one.decode_tokens_per_s < two.decode_tokens_per_s


def test_options_that_a_schedule_decides_already_are_refused(
    tiny_v3: Path, here: ciuic.Topology, schedule: ciuic.Schedule
) -> None:
    placement = ciuic.Placement().put("layers.0", on="cpu")
    for settings in ({"placement": placement}, {"goal": "throughput"}, {"dtype": "float32"}):
        with pytest.raises(ciuic.InvalidInput, match="schedule"):
            ciuic.LLM(tiny_v3, schedule=schedule, devices=here, **settings)  # type: ignore[arg-type]
    with pytest.raises(ciuic.OutOfMemory, match="can be used"):
        ciuic.LLM(tiny_v3, schedule=schedule, devices=here, memory={"cpu": "100KiB"})


@pytest.mark.parametrize("name", ["max_model_len", "max_num_seqs", "threads", "prefill_chunk"])
@pytest.mark.parametrize("value", [0, -1, 2.5, True, "2"])
def test_numbers_that_make_no_sense(tiny_v3: Path, here: ciuic.Topology, name: str, value: object) -> None:
    with pytest.raises(ciuic.InvalidInput, match=name):
        ciuic.LLM(tiny_v3, devices=here, **{name: value})  # type: ignore[arg-type]


def test_fewer_threads_are_forecast_slower(tiny_v3: Path, here: ciuic.Topology) -> None:
    cpu = replace(here.device("cpu"), threads=2, memory_bandwidth_by_threads={1: 12e9, 2: 20e9})
    rates = []
    for threads in (1, 2):
        with ciuic.LLM(tiny_v3, devices=ciuic.Topology((cpu,)), threads=threads) as llm:
            assert llm.schedule.predicted is not None
            rates.append(llm.schedule.predicted.decode_tokens_per_s)
    assert rates[0] < rates[1]


def test_closed_is_closed(tiny_v3: Path, two_devices: ciuic.Topology) -> None:
    llm = ciuic.LLM(tiny_v3, devices=two_devices)
    llm.generate([1, 2, 3], ciuic.SamplingParams(max_tokens=2, ignore_eos=True))
    llm.close()
    assert llm.trace.tokens("decode") == 1
    with pytest.raises(ciuic.InvalidInput, match="closed"):
        llm.generate([1, 2, 3])


def test_sampling_is_part_of_the_step(tiny_v3: Path, here: ciuic.Topology) -> None:
    with ciuic.LLM(tiny_v3, devices=here) as llm:
        llm.generate([1, 2, 3], ciuic.SamplingParams(max_tokens=4, temperature=1, ignore_eos=True))
        trace = llm.trace
    samples = [e for e in trace.events if e.kind == "sample"]
    assert [e.step for e in samples] == [0, 1, 2, 3]
    assert all(trace.steps[e.step].start <= e.start <= e.end <= trace.steps[e.step].end for e in samples)
    assert "sample" in trace.seconds_by_kind("decode")


def test_ids_of_other_libraries_are_taken(tiny_v3: Path, here: ciuic.Topology) -> None:
    import numpy as np
    import torch

    params = ciuic.SamplingParams(max_tokens=3, ignore_eos=True)
    with ciuic.LLM(tiny_v3, devices=here, dtype="float32") as llm:
        plain = llm.generate([5, 6, 7], params)[0].token_ids
        assert llm.generate(np.array([5, 6, 7]), params)[0].token_ids == plain
        assert llm.generate([torch.tensor([5, 6, 7])], params)[0].token_ids == plain
        assert llm.generate((i for i in (5, 6, 7)), params)[0].token_ids == plain
        for wrong in (None, b"abc", 7, [["a"], [1]], ["a", 5]):
            with pytest.raises(ciuic.InvalidInput):
                llm.generate(wrong, params)  # type: ignore[arg-type]


@pytest.mark.parametrize("split", [0, 1, 2, 4])
def test_forecast_and_actual_are_the_same_events_in_the_same_order(
    tiny_v3: Path, two_devices: ciuic.Topology, split: int
) -> None:
    """So that planned against actual is one picture: tasks and copies, step by step, lane by lane."""
    model, work = ciuic.Model(tiny_v3), ciuic.Workload(20, 5)
    scheduler = ciuic.TaskScheduler(two_devices, workload=work)
    for i, layer in enumerate(model.layers):
        scheduler.add_task(layer, "cpu" if i < split else "sim:0")
    schedule = scheduler.schedule()
    cost = ciuic.CostModel(schedule.topology, model.format, workload=work)
    forecast = ciuic.simulate(schedule, model.graph, cost)
    with ciuic.LLM(tiny_v3, schedule=schedule, devices=two_devices) as llm:
        llm.generate(list(range(20)), ciuic.SamplingParams(max_tokens=5, ignore_eos=True))
        actual = llm.trace
    shown = [[(e.step, e.task, e.lane, e.kind) for e in t.events if e.kind != "sample"] for t in (forecast, actual)]
    assert shown[0] == shown[1]
    assert [(s.phase, s.tokens, s.sequences) for s in forecast.steps] == [
        (s.phase, s.tokens, s.sequences) for s in actual.steps
    ]


def test_torch_operators_need_room_for_unpacked_weights(monkeypatch: pytest.MonkeyPatch, tiny_v3: Path) -> None:
    """Refused before anything is loaded: 4 bits fit, the bfloat16 values that torch computes with do not."""
    model = ciuic.Model(tiny_v3, "int4")
    monkeypatch.setattr(setup, "capacity", lambda device: 2 * model.graph.parameters - 1)
    with pytest.raises(ciuic.OutOfMemory, match=r"computed by torch here, which takes .* in bfloat16"):
        setup._check_unpacked(model)
    monkeypatch.setattr(setup, "capacity", lambda device: 2 * model.graph.parameters)
    setup._check_unpacked(model)


def test_a_schedule_that_streams_is_refused_before_anything_is_loaded(
    tiny_v3: Path, here: ciuic.Topology, schedule: ciuic.Schedule
) -> None:
    sim = ciuic.DeviceSpec("sim:0", "SIM", memory_bytes=1 << 30, memory_bandwidth=1e10, matrix_rates={"bfloat16": 1e11})
    rows = (replace(schedule.assignments[0], device="sim:0"), *schedule.assignments[1:])
    streams = replace(schedule, assignments=rows, topology=ciuic.Topology((*schedule.topology.devices, sim)))
    streams.validate(ciuic.Model(tiny_v3).graph)
    with pytest.raises(ciuic.InvalidInput, match="cannot be run: it streams weights from cpu to sim:0"):
        ciuic.LLM(tiny_v3, schedule=streams, devices=here)
