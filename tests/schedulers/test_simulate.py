"""Schedules carried out on paper: times by the cost model, copies where devices change, the engine's own passes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from machines import device, machine, model, toy_graph, toy_task

from ciuic_runtime.devices.spec import Link, Topology
from ciuic_runtime.schedulers.cost import Calibration, CostModel
from ciuic_runtime.schedulers.draft import schedule_of
from ciuic_runtime.schedulers.graph import Step, TaskGraph
from ciuic_runtime.schedulers.predict import predict
from ciuic_runtime.schedulers.schedule import Schedule
from ciuic_runtime.schedulers.simulate import simulate, workload_steps
from ciuic_runtime.schedulers.workload import Workload

LINKS = (Link("cpu", "sim:0", 1e9, 1e-5), Link("sim:0", "cpu", 2e9, 3e-5))
TWO = machine(device("cpu", launch_overhead=1e-6), device("sim:0", bandwidth=1e11, rate=1e13), links=LINKS)
MODEL = model()
SHORT = Workload(20, 4)


def placed(graph: TaskGraph = MODEL, work: Workload = SHORT, topology: Topology = TWO, **at: str) -> Schedule:
    where = dict.fromkeys(graph.rows, "cpu")
    for pattern, name in at.items():
        prefix = pattern.replace("__", ".")
        where |= {row: name for row in where if row == prefix or row.startswith(prefix + ".")}
    return schedule_of(graph, topology, work, where, "by hand")


def test_one_device_is_the_sum_of_its_tasks() -> None:
    cost, step = CostModel(TWO), Step.decode(30, batch=3)
    trace = simulate(placed(), MODEL, cost, [step])
    assert [e.task for e in trace.events] == [t.name for t in MODEL]
    assert {e.lane for e in trace.events} == {"cpu"}
    times = [cost.task(t, TWO.device("cpu"), step).seconds for t in MODEL]
    assert [e.seconds for e in trace.events] == pytest.approx(times, rel=1e-9)
    assert trace.seconds("decode") == pytest.approx(sum(times), rel=1e-12)
    assert (trace.tokens("decode"), trace.devices, trace.source) == (3, ("cpu",), "simulated")


def test_copies_between_devices() -> None:
    """a on the CPU, b and c on the other, d back: x crosses once for b and c, and c's output crosses back."""
    graph = toy_graph(
        toy_task("a"), toy_task("b", after=("a",)), toy_task("c", after=("b", "a")), toy_task("d", after=("c",))
    )
    cost = CostModel(TWO)
    trace = simulate(placed(graph, b="sim:0", c="sim:0"), graph, cost, [Step.prefill(5)])
    assert [(e.task, e.lane, e.kind, e.nbytes) for e in trace.events] == [
        ("a", "cpu", "compute", 0),
        ("a", "cpu -> sim:0", "copy", 40),
        ("b", "sim:0", "compute", 0),
        ("c", "sim:0", "compute", 0),
        ("c", "sim:0 -> cpu", "copy", 40),
        ("d", "cpu", "compute", 0),
    ]
    assert trace.events[1].seconds == pytest.approx(1e-5 + 40 / 1e9)
    assert trace.events[4].seconds == pytest.approx(3e-5 + 40 / 2e9)
    assert all(a.end == b.start for a, b in zip(trace.events, trace.events[1:], strict=False))
    assert trace.notes == ("sim:0 is simulated",)


def test_tasks_keep_the_order_of_the_graph() -> None:
    schedule = placed(layers__1="sim:0", layers__2__experts__4="sim:0")
    trace = simulate(schedule, MODEL, CostModel(TWO))
    order = {task.name: i for i, task in enumerate(MODEL)}
    for step in range(len(trace.steps)):
        computed = [order[e.task] for e in trace.events if e.step == step and e.kind == "compute"]
        assert computed == sorted(computed)
        assert set(computed) == set(order.values())


def test_experts_over_two_devices() -> None:
    schedule = placed(layers__1__experts__5="sim:0", layers__1__experts__6="sim:0")
    cost, step = CostModel(TWO), Step.decode(30, batch=4)
    task = MODEL.task("layers.1.experts")
    trace = simulate(schedule, MODEL, cost, [step])
    last = next(i for i, e in enumerate(trace.events) if e.task == "layers.1.shared_experts")
    events = [e for e in trace.events[last + 1 :] if e.task.startswith(("layers.1.", ""))][:6]
    assert [(e.task, e.lane) for e in events] == [
        ("layers.1.experts", "cpu"),
        ("layers.1.mlp_norm", "cpu -> sim:0"),
        ("layers.1.router", "cpu -> sim:0"),
        ("layers.1.experts", "sim:0"),
        ("layers.1.experts", "sim:0 -> cpu"),
        ("layers.1.experts", "cpu"),  # combined where the router is
    ]
    cpu, sim = TWO.devices
    assert events[0].seconds == pytest.approx(cost.experts(task, cpu, step, [0, 1, 2, 3, 4, 7]).seconds)
    assert events[3].seconds == pytest.approx(cost.experts(task, sim, step, [5, 6]).seconds)
    assert events[4].nbytes == 4 * 2 * 64 * 4 // 4  # a quarter of (token, k) rows
    assert events[5].seconds == pytest.approx(cost.combine(task, cpu, step).seconds)


def test_all_experts_away_from_the_router() -> None:
    trace = simulate(placed(layers__1__experts="sim:0"), MODEL, CostModel(TWO), [Step.decode(30)])
    lanes = [e.lane for e in trace.events if e.task == "layers.1.experts"]
    assert lanes == ["sim:0", "sim:0 -> cpu", "cpu"]


def test_popular_experts_weigh_more() -> None:
    popularity = (0.9, 0.7, 0.1, 0.1, 0.05, 0.05, 0.05, 0.05)
    graph = toy_graph(*(replace(t, popularity=popularity) if t.num_experts else t for t in MODEL))
    cost, step = CostModel(TWO), Step.decode(30, batch=8)

    def rows(expert: str) -> int:
        trace = simulate(placed(graph, **{f"layers__1__experts__{expert}": "sim:0"}), graph, cost, [step])
        return next(e.nbytes for e in trace.events if e.lane == "sim:0 -> cpu")

    assert rows("0") == int(8 * 2 * 0.45 * 64 * 4)
    assert rows("7") == int(8 * 2 * 0.025 * 64 * 4)


def test_prompts_are_cut_into_chunks() -> None:
    graph = replace(MODEL, prefill_chunk=8)
    steps = list(workload_steps(graph, Workload(20, 3)))
    assert [(s.phase, s.tokens, s.pairs, s.positions, s.sampled) for s in steps] == [
        ("prefill", 8, 36, 8, 0),
        ("prefill", 8, 36 + 64, 16, 0),
        ("prefill", 4, 10 + 64, 20, 1),
        ("decode", 1, 21, 21, 1),
        ("decode", 1, 22, 22, 1),
    ]


class NoText:
    """Stands in for the stream of text: only the passes count here."""

    stopped = False

    def push(self, token_id: int) -> str:
        return ""

    def finish(self) -> str:
        return ""


@pytest.mark.parametrize(
    ("prompt", "batch", "chunk"), [(20, 1, 8), (5, 7, 8), (3, 9, 512), (13, 4, 6), (8, 3, 8), (1, 5, 2)]
)
def test_passes_are_those_of_the_engine(prompt: int, batch: int, chunk: int) -> None:
    from ciuic_runtime.engine.queue import RequestQueue
    from ciuic_runtime.engine.request import Request
    from ciuic_runtime.engine.sampling import SamplingParams

    queue = RequestQueue(num_blocks=10 * batch, max_num_seqs=batch, chunk_tokens=chunk)
    for i in range(batch):
        params = SamplingParams(max_tokens=3, ignore_eos=True)
        queue.add(Request(i, (1,) * prompt, params, NoText(), frozenset()))
    made = []
    while decision := queue.decide():
        pairs = sum(c.position + i + 1 for c in decision.chunks for i in range(len(c.token_ids)))
        tokens = sum(len(c.token_ids) for c in decision.chunks)
        positions = sum(c.position + len(c.token_ids) for c in decision.chunks)
        sampled = sum(bool(c.sample) for c in decision.chunks)
        made.append(Step(decision.phase, tokens, len(decision.chunks), pairs, positions, sampled))
        queue.computed(decision)
        for request, piece in zip(decision.requests, decision.chunks, strict=True):
            if piece.sample:
                request.append(7)
        queue.release_finished()
    assert list(workload_steps(replace(MODEL, prefill_chunk=chunk), Workload(prompt, 3, batch))) == made


def test_forecast_is_the_simulated_run() -> None:
    work, cost = Workload(50, 40, 3), CostModel(TWO)
    schedule = placed(work=work, layers__1="sim:0")
    p, trace = predict(schedule, MODEL, cost), simulate(schedule, MODEL, cost)
    assert p.first_token_s == pytest.approx(trace.seconds("prefill"))
    assert p.prefill_tokens_per_s == pytest.approx(trace.tokens_per_s("prefill"))
    assert p.decode_tokens_per_s == pytest.approx(trace.tokens_per_s("decode"), rel=1e-3)
    assert sum(p.seconds_per_token["decode"].values()) == pytest.approx(1 / p.decode_tokens_per_s)
    assert sum(p.seconds_per_token["prefill"].values()) == pytest.approx(1 / p.prefill_tokens_per_s)
    assert "copy" in p.seconds_per_token["decode"]
    assert p.range[0] < p.decode_tokens_per_s < p.range[1]
    assert p.range[1] / p.decode_tokens_per_s == pytest.approx(1 + Calibration().model_error)


def test_long_prompts_are_forecast_from_a_few_passes() -> None:
    graph = replace(MODEL, prefill_chunk=16)
    for work in (Workload(16 * 100 + 5, 2), Workload(77, 2, 40)):
        schedule = placed(graph, work)
        whole = simulate(schedule, graph, CostModel(TWO)).seconds("prefill")
        assert predict(schedule, graph, CostModel(TWO)).first_token_s == pytest.approx(whole, rel=0.02)
    huge = Workload(2**31, 2**31, 2**31)
    assert predict(placed(work=huge), MODEL, CostModel(TWO)).first_token_s > 0


def test_what_binds() -> None:
    def bound(topology: Topology, **at: str) -> str:
        return predict(placed(topology=topology, **at), MODEL, CostModel(topology)).bound_by

    assert bound(machine(device("cpu", bandwidth=1e6))) == "memory of cpu"
    assert bound(machine(device("cpu", rate=1e6))) == "compute of cpu"
    assert bound(machine(device("cpu", launch_overhead=1.0))) == "overhead of cpu"
    slow = machine(device("cpu"), device("sim:0"), links=(Link("cpu", "sim:0", 10.0), Link("sim:0", "cpu", 1e9)))
    assert bound(slow, layers__1="sim:0") == "link cpu -> sim:0"


def test_mean_decode_step() -> None:
    for max_tokens in (2, 3, 128):
        work = Workload(100, max_tokens, 2)
        contexts = [s.positions / 2 for s in workload_steps(MODEL, work) if s.phase == "decode"]
        assert work.mean_decode.positions / 2 == sum(contexts) / len(contexts)
    assert Workload(100, 1).mean_decode.positions == 101
