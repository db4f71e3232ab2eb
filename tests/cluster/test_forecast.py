"""What is forecast of a cluster's run is that of its pipeline: stages beside one another, as many passes on their way
as the engine has. Ray is needed only to see that it is so."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import ciuic_runtime as ciuic
from ciuic_runtime.devices.spec import DeviceSpec, Link, Topology
from ciuic_runtime.engine.batching import Batching
from ciuic_runtime.engine.config import RuntimeConfig
from ciuic_runtime.engine.request import Request
from ciuic_runtime.engine.setup import Setup, set_up
from ciuic_runtime.engine.text import NoText, TextStream
from ciuic_runtime.models.checkpoint import open_checkpoint
from ciuic_runtime.ops.native import kernels
from ciuic_runtime.schedulers.calibration import Calibration, Curve, Point
from ciuic_runtime.schedulers.forecaster import Forecaster, Pipelining
from ciuic_runtime.schedulers.graph import Step
from ciuic_runtime.schedulers.pipeline import (
    CALL_SECONDS,
    HANDLING_SECONDS,
    call_seconds,
    given_share,
    handling_seconds,
    pipeline_of,
)
from ciuic_runtime.schedulers.steps import pipeline_steps, workload_steps
from ciuic_runtime.schedulers.workload import Workload

HOP = 2e-3  # s


def cpu(name: str, **changes: Any) -> DeviceSpec:
    """So slow that calls count for little; four cores."""
    rates = {"float32": 1e9, "bfloat16": 1e9, "int8": 1e9}
    known = {"memory_bytes": 1 << 30, "memory_bandwidth": 2e6, "matrix_rates": rates, "launch_overhead": 0.0}
    return DeviceSpec(name, "CPU", **({**known, "cores": 4, "threads": 4, "basis": "estimated"} | changes))


NODES = ("node0/cpu", "node1/cpu")
TWO_NODES = Topology(tuple(map(cpu, NODES)), tuple(Link(a, b, 1e9, HOP, "measured") for a, b in (NODES, NODES[::-1])))
HALVES = ciuic.Placement().put("*", on="node0/cpu")
for last in ("layers.2.*", "layers.3.*", "head", "final_norm"):
    HALVES = HALVES.put(last, on="node1/cpu")


def setup(model: Path, topology: Topology, batch: int = 4, **settings: Any) -> Setup:
    settings = {"max_model_len": 128, "max_num_seqs": batch, "workload": Workload(20, 30, batch)} | settings
    return set_up(open_checkpoint(model), RuntimeConfig(executor="ray", **settings), None, topology)


def decode_rate(one: Setup) -> float:
    assert one.schedule.predicted is not None
    return one.schedule.predicted.decode_tokens_per_s


def engine_passes(chunk: int, work: Workload, depth: int) -> list[Step]:
    """What the real batching makes of equal requests, whose passes end in the order in which they began."""
    batching = Batching(64, work.batch, chunk)
    batching.depth = depth
    params = ciuic.SamplingParams(max_tokens=work.max_tokens, ignore_eos=True)
    for i in range(work.batch):
        batching.add(Request(i, (1,) * work.prompt_tokens, params, TextStream(NoText()), frozenset()))
    passes, way = [], deque[Any]()
    while batching.running or batching.waiting:
        while len(way) < depth and (todo := batching.next_pass()) is not None:
            way.append(todo)
            spans = [(c.position, len(c.token_ids)) for c in todo.chunks]
            passes.append(Step.of(todo.phase, spans, sum(bool(c.sample) for c in todo.chunks)))
        done = way.popleft()
        batching.computed(done)
        for request in done.requests:
            if request.computed == request.num_tokens:
                request.append(1)
        batching.release_finished()
    return passes


def test_the_passes_are_those_that_the_engine_makes(tiny_int4: Path) -> None:
    graph, rng = ciuic.Model(tiny_int4).graph, random.Random(7)
    for _ in range(200):
        chunk = rng.choice([16, 64])
        work = Workload(rng.randint(1, 80), rng.randint(1, 6), rng.randint(1, 9))
        depth = rng.randint(1, 5)
        expected = engine_passes(chunk, work, depth)
        found = list(pipeline_steps(replace(graph, prefill_chunk=chunk), work, depth))
        case = f"{work}, chunks of {chunk}, {depth} at once"
        if chunk >= work.batch * work.prompt_tokens:
            assert found == expected, case
        # Where prompts take several passes, those who decode form other groups as prompts end.
        prompts = [[s for s in steps if s.phase == "prefill"] for steps in (found, expected)]
        assert prompts[0] == prompts[1], case
        tokens = [sum(s.tokens for s in steps if s.phase == "decode") for steps in (found, expected)]
        assert tokens[0] == tokens[1] == work.batch * (work.max_tokens - 1), case


def test_one_pass_at_once_is_the_local_executors_order(tiny_int4: Path) -> None:
    graph = replace(ciuic.Model(tiny_int4).graph, prefill_chunk=16)
    for work in (Workload(20, 4, 3), Workload(3, 2, 9), Workload(16, 1, 2)):
        assert list(pipeline_steps(graph, work, 1)) == list(workload_steps(graph, work))


def test_two_nodes_work_at_once(tiny_int4: Path) -> None:
    one = setup(tiny_int4, TWO_NODES, placement=HALVES, micro_batches=1)
    two = setup(tiny_int4, TWO_NODES, placement=HALVES, micro_batches=2, batch=8, workload=Workload(20, 30, 8))
    alike = setup(tiny_int4, TWO_NODES, placement=HALVES, micro_batches=1, batch=8, workload=Workload(20, 30, 8))
    assert decode_rate(two) < 2 * 1.001 * decode_rate(one)  # passes of four, two at once, against one at once
    assert decode_rate(two) > 1.5 * decode_rate(one)  # the stages are not quite equal
    assert decode_rate(alike) < decode_rate(two)
    trace = two.forecast_trace(two.schedule)
    assert set(trace.devices) == set(NODES) <= set(trace.lanes)
    assert len(trace.steps) == len(engine_passes(two.model.prefill_chunk, two.schedule.workload, 2))
    copies = [e for e in trace.events if e.kind == "copy"]
    assert {e.lane for e in copies} == {"node0/cpu -> node1/cpu"}  # logits stay where the head is
    assert len(copies) == len(trace.steps)
    assert all(e.seconds + HANDLING_SECONDS >= HOP for e in copies)


def test_one_sequence_is_in_one_stage_at_a_time(tiny_int4: Path) -> None:
    work = Workload(20, 30, 1)
    one, four = (setup(tiny_int4, TWO_NODES, 1, placement=HALVES, micro_batches=m, workload=work) for m in (1, 4))
    assert decode_rate(one) == pytest.approx(decode_rate(four))
    trace = four.forecast_trace(four.schedule)
    assert len(trace.steps) == 1 + 29
    compute = [e for e in trace.events if e.kind == "compute"]
    assert all(a.end <= b.start + 1e-9 for a, b in pairwise(compute))
    step = trace.steps[-1]
    busy = sum(e.seconds for e in trace.events if e.step == len(trace.steps) - 1)
    assert step.end - step.start == pytest.approx(busy + 2 * CALL_SECONDS + HANDLING_SECONDS)


def test_stages_of_one_machine_share_its_cores(tiny_int4: Path) -> None:
    whole = setup(tiny_int4, Topology((cpu("cpu"),)), stages=1)
    halves = setup(tiny_int4, Topology((cpu("cpu"),)), stages=2)
    pipeline = pipeline_of(halves.schedule, halves.model.graph, 2, None, None)
    assert [(d.name, d.threads) for d in pipeline.schedule.topology.devices] == [("stage0/cpu", 2), ("stage1/cpu", 2)]
    assert pipeline.depth == 2
    trace = halves.forecast_trace(halves.schedule)
    assert {e.lane for e in trace.events} >= {"stage0/cpu", "stage1/cpu", "stage0/cpu -> stage1/cpu"}
    assert halves.schedule.predicted is not None
    assert whole.schedule.predicted is not None
    assert halves.schedule.predicted.memory_bytes == whole.schedule.predicted.memory_bytes
    assert halves.schedule.topology == whole.schedule.topology  # what is carried out does not change
    given = pipeline_of(halves.schedule, halves.model.graph, 2, 3, 1)
    assert {d.threads for d in given.schedule.topology.devices} == {1}
    assert given.depth == 3


def test_what_is_known_of_a_device_is_known_of_its_stages(tiny_int4: Path) -> None:
    curves = (Curve("cpu", 2, "int4", "mlp", 1.0, 1e-6), Curve("sim:0", 2, "int4", "mlp", 1.0, 1e-6))
    known = Calibration({"cpu": 0.5}, {}, {"cpu": 1e-3, "sim:0": 1.0}, curves=curves)
    found = known.under({"stage0/cpu": "cpu", "stage1/cpu": "cpu"})
    assert found.compute_utilisation == {"stage0/cpu": 0.5, "stage1/cpu": 0.5}
    assert found.launch_overhead == {"stage0/cpu": 1e-3, "stage1/cpu": 1e-3}
    assert [c.device for c in found.curves] == ["stage0/cpu", "stage1/cpu"]


def test_every_stage_has_a_pass_of_its_own_to_make(tiny_int4: Path) -> None:
    """Between its tasks, at the ends and around its pass: by its process, so that another stage computes meanwhile."""
    one = setup(tiny_int4, TWO_NODES, placement=HALVES, micro_batches=1)
    alone = one.forecaster(one.schedule)
    own = {"pass.between": 1e-3, "pass.ends": 3e-3, "pass.around": 2e-3, "sample": 4e-3}
    curves = [Curve(node, 4, "int4", what, 0.0, s, (Point(1, 1, 1e9),)) for what, s in own.items() for node in NODES]
    tasks = [sum(one.schedule.device_of(t.name) == node for t in alone.graph) for node in NODES]
    stages = [tasks[0] * 1e-3 + 5e-3, tasks[1] * 1e-3 + 5e-3 + 4e-3]
    steps = [Step.decode(9, 1)] * 40

    def longer(way: Forecaster) -> float:
        """Seconds a pass, with what is known of a pass's own."""
        known, bare = (replace(way, calibration=Calibration(curves=tuple(c))).recost(steps) for c in (curves, []))
        return (known.steps[-1].end - bare.steps[-1].end) / len(steps)

    assert longer(alone) == pytest.approx(sum(stages), rel=1e-3)
    assert 0.9 * min(stages) < longer(replace(alone, pipelining=Pipelining(micro_batches=4))) < 1.1 * max(stages)


def test_what_is_left_is_forecast_anew(tiny_int4: Path) -> None:
    both = setup(tiny_int4, TWO_NODES, placement=HALVES)
    left = both.without_nodes({"node1"})
    assert left.schedule.devices_used() == ("node0/cpu",)
    trace = left.forecast_trace(left.schedule)
    assert not [e for e in trace.events if e.kind == "copy"]
    assert decode_rate(left) < decode_rate(both)


def test_a_layer_on_two_nodes_has_no_forecast(tiny_int4: Path) -> None:
    spread = HALVES.put("layers.1.attention", on="node1/cpu")
    found = setup(tiny_int4, TWO_NODES, placement=spread).schedule
    assert found.predicted is None
    assert "a layer, with its experts, lies on one node" in found.notes[-1]


def test_passes_as_they_came_are_costed_as_a_pipeline(tiny_int4: Path) -> None:
    one = setup(tiny_int4, TWO_NODES, placement=HALVES)
    passes = [Step.prefill(20, 2), Step.prefill(20, 2), *[Step.decode(21, 2)] * 6]
    trace = one.recost(one.schedule, passes)
    assert [info.step for info in trace.steps] == passes
    lanes = {lane: [e for e in trace.events if e.lane == lane] for lane in NODES}
    assert all(a.end <= b.start + 1e-9 for es in lanes.values() for a, b in pairwise(es))
    overlap = any(a.start < b.end and b.start < a.end for a in lanes[NODES[0]] for b in lanes[NODES[1]])
    assert overlap, "both nodes compute at once"


@pytest.mark.skipif(kernels() is None, reason="the native kernels are not built here")
def test_a_run_has_the_passes_of_its_forecast(cluster: Any, tiny_int4: Path, here: Topology) -> None:
    with ciuic.LLM(
        tiny_int4, devices=here, max_model_len=128, max_num_seqs=8, threads=1, executor="ray", stages=2,
        micro_batches=3, address=cluster.address,
    ) as llm:  # fmt: skip
        params = ciuic.SamplingParams(max_tokens=6, ignore_eos=True, temperature=0.0)
        llm.generate([[5 + i, 9, 17, 3] for i in range(7)], params)
        actual, forecast = llm.trace, llm.forecast_trace()
        sizes = [[(s.phase, s.tokens, s.sequences) for s in trace.steps] for trace in (actual, forecast)]
        assert sizes[0] == sizes[1]
        assert all(a.end <= b.start for a, b in pairwise(actual.steps))  # so that rates add up
        compared = llm.comparison.decode_tokens_per_s
        assert all((compared.forecast, compared.recosted, compared.actual))


MEASURED = {"call_s": 4e-3, "call_handling_s": 1e-3, "call_cpu_s": 0.0}


def nodes_with(*facts: dict[str, Any]) -> Topology:
    return replace(TWO_NODES, devices=tuple(cpu(name, facts=own) for name, own in zip(NODES, facts, strict=True)))


def test_calls_take_what_was_measured_on_their_nodes(tiny_int4: Path) -> None:
    work = Workload(20, 30, 1)
    assumed, measured = (
        one.forecast_trace(one.schedule)
        for topology in (TWO_NODES, nodes_with(MEASURED, MEASURED))
        for one in (setup(tiny_int4, topology, 1, placement=HALVES, workload=work),)
    )
    compute = sum(e.seconds for e in measured.events if e.step == 9 and e.kind == "compute")
    step = measured.steps[9]
    assert step.end - step.start == pytest.approx(compute + 4 * 4e-3)  # HOP is less than the two calls that it is
    assert step.end - step.start > assumed.steps[9].end - assumed.steps[9].start


@pytest.mark.parametrize(("threads", "machines", "lost"), [(2, 1, 0.5), (1, 1, 0.0), (4, 2, 0.5), (4, 1, 0.25)])
def test_the_drivers_work_takes_from_stages_that_use_all_cores(
    tiny_int4: Path, threads: int, machines: int, lost: float
) -> None:
    """`lost`: of the seconds for one call beyond those that are its stage's own, what each stage loses in a pass."""
    driver = 8e-3
    more = {"call_cpu_s": 1e-3 + driver, "cores_given": 0.8}
    one = setup(
        tiny_int4, nodes_with(*({**MEASURED, **more, "machine": str(i % machines)} for i in range(2))), placement=HALVES
    )
    pipeline = pipeline_of(one.schedule, one.model.graph, 2, 2, threads).schedule.topology
    assert [handling_seconds(d) for d in pipeline.devices] == pytest.approx([1e-3 + lost * driver] * 2)
    assert [given_share(d) for d in pipeline.devices] == [0.8 if lost else 1.0] * 2
    alone = pipeline_of(one.schedule, one.model.graph, 2, 1, threads).schedule.topology
    assert [handling_seconds(d) for d in alone.devices] == [1e-3] * 2
    assert [given_share(d) for d in alone.devices] == [1.0] * 2


def test_stages_that_want_all_cores_compute_in_what_they_are_given(tiny_int4: Path) -> None:
    free, taken = (
        setup(tiny_int4, nodes_with(*({**MEASURED, "cores_given": share, "machine": "a"},) * 2), placement=HALVES)
        for share in (1.0, 0.8)
    )
    [whole, less] = [
        [e.seconds for e in one.forecast_trace(one.schedule).events if e.kind == "compute"] for one in (free, taken)
    ]
    assert less == pytest.approx([seconds / 0.8 for seconds in whole])


def test_calls_of_a_cluster_are_measured(cluster: Any) -> None:
    hardware = ciuic.DeviceManager.from_ray(cluster.address)
    for device in hardware.topology.devices:
        assert 0 < call_seconds(device) < 1
        assert 0 <= handling_seconds(device) <= call_seconds(device)
        assert float(device.facts["call_cpu_s"]) > 0, "the driver is on the same machine"
        assert 0.2 < float(device.facts["cores_given"]) <= 1
    assert len({device.facts["machine"] for device in hardware.topology.devices}) == 1
    assert all(0 < link.latency < 1 for link in hardware.topology.links)
