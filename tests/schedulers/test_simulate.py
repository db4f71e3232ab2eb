"""Schedules carried out on paper: times by the cost model, copies where devices change, the engine's own passes."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from machines import DISK, device, machine, model, random_machine, random_model, toy_graph, toy_task

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.devices.spec import Domain, Link, Topology
from ciuic_runtime.schedulers.assignment import Paging
from ciuic_runtime.schedulers.calibration import Curve, Point
from ciuic_runtime.schedulers.cost import Calibration, CostModel
from ciuic_runtime.schedulers.draft import ScheduleDraft, schedule_of
from ciuic_runtime.schedulers.graph import Page, Step, Task, TaskGraph, Work
from ciuic_runtime.schedulers.pipeline import CALL_SECONDS, HANDLING_SECONDS
from ciuic_runtime.schedulers.predict import predict
from ciuic_runtime.schedulers.schedule import Schedule
from ciuic_runtime.schedulers.simulate import micro_steps, simulate, simulate_pipeline, simulate_stages
from ciuic_runtime.schedulers.simulate_requests import simulate_requests
from ciuic_runtime.schedulers.steps import pipeline_steps, workload_steps
from ciuic_runtime.schedulers.trace import Trace
from ciuic_runtime.schedulers.workload import CACHE_BLOCK_TOKENS, Workload

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
    from ciuic_runtime.engine.batching import Batching
    from ciuic_runtime.engine.request import Request
    from ciuic_runtime.engine.sampling import SamplingParams

    batching = Batching(num_blocks=10 * batch, max_num_seqs=batch, chunk_tokens=chunk)
    for i in range(batch):
        params = SamplingParams(max_tokens=3, ignore_eos=True)
        batching.add(Request(i, (1,) * prompt, params, NoText(), frozenset()))
    made = []
    while todo := batching.next_pass():
        pairs = sum(c.position + i + 1 for c in todo.chunks for i in range(len(c.token_ids)))
        tokens = sum(len(c.token_ids) for c in todo.chunks)
        positions = sum(c.position + len(c.token_ids) for c in todo.chunks)
        sampled = sum(bool(c.sample) for c in todo.chunks)
        made.append(Step(todo.phase, tokens, len(todo.chunks), pairs, positions, sampled))
        batching.computed(todo)
        for request, piece in zip(todo.requests, todo.chunks, strict=True):
            if piece.sample:
                request.append(7)
        batching.release_finished()
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


def close(value: float) -> object:
    return pytest.approx(value, rel=1e-9)


def check_lanes(trace: Trace) -> None:
    """No lane does two things at once."""
    lanes = defaultdict(list)
    for event in trace.events:
        assert event.start <= event.end
        lanes[event.lane].append((event.start, event.end))
    for spans in lanes.values():
        assert all(a[1] <= b[0] for a, b in pairwise(sorted(spans)))


def random_case(rng: random.Random) -> tuple[Schedule, TaskGraph, CostModel]:
    """Rows anywhere, weights of some of them stored elsewhere, some links through domains."""
    graph = random_model(rng)
    topology = random_machine(rng, 3 * graph.nbytes + (1 << 20))
    domains = tuple(Domain(name, 10 ** rng.uniform(8, 10)) for name in ("root", "controller"))
    names = [d.name for d in domains]
    links = tuple(replace(x, domains=tuple(rng.sample(names, rng.randint(0, 2)))) for x in topology.links)
    topology = replace(topology, links=links, domains=domains)
    work = Workload(rng.choice([1, 30, 600]), 3, rng.choice([1, 5]))
    draft = ScheduleDraft(graph, topology, work)
    devices = [d.name for d in topology.compute_devices]
    for layer in graph.layers:
        device = rng.choice(devices)
        for task in layer.tasks:
            for row, _ in task.rows:
                draft.put(row, device if rng.random() < 0.8 else rng.choice(devices))
    for row in graph.rows:
        if row not in draft.where:
            draft.put(row, rng.choice(devices))
    schedule = draft.freeze("random")
    streamed = rng.choice([0.0, 0.3, 1.0])
    rows = tuple(replace(r, home=rng.choice(devices)) if rng.random() < streamed else r for r in schedule.assignments)
    return replace(schedule, assignments=rows), graph, CostModel(topology, workload=work)


@pytest.mark.parametrize("seed", range(25))
def test_no_lane_does_two_things_at_once_and_equal_inputs_give_equal_traces(seed: int) -> None:
    rng = random.Random(seed)
    schedule, graph, cost = random_case(rng)
    requests = [(rng.uniform(0, 0.01), rng.randint(1, 90), rng.randint(1, 6)) for _ in range(6)]
    count = rng.randint(1, 4)

    def traces() -> list[Trace]:
        return [
            simulate(schedule, graph, cost),
            simulate_pipeline(schedule, graph, cost, count),
            simulate_requests(schedule, graph, cost, requests, 3).trace,
        ]

    first = traces()
    for trace in first:
        check_lanes(trace)
    assert traces() == first


@pytest.mark.parametrize("seed", range(25))
def test_every_task_takes_what_the_cost_model_says(seed: int) -> None:
    """Though the cost of equal tasks is asked for once: 1e-9 relative, also where weights are streamed."""
    schedule, graph, cost = random_case(random.Random(seed))
    steps = list(workload_steps(graph, schedule.workload))
    trace = simulate(schedule, graph, cost, steps)
    spent: dict[tuple[int, str], float] = defaultdict(float)
    for event in trace.events:
        if event.kind == "compute":
            spent[event.step, event.task] += event.seconds
    devices = {d.name: d for d in cost.topology.devices}
    for number, step in enumerate(steps):
        for task in graph:
            home = devices[schedule.device_of(task.name)]
            spread = defaultdict(list)
            for expert, name in enumerate(schedule.expert_devices(task) if task.num_experts else ()):
                spread[name].append(expert)
            if spread.keys() <= {home.name}:
                direct = cost.task(task, home, step).seconds
            else:
                direct = sum(cost.experts(task, devices[n], step, those).seconds for n, those in spread.items())
                direct += cost.combine(task, home, step).seconds
            assert spent[number, task.name] == pytest.approx(direct, rel=1e-9, abs=1e-15), task.name


@pytest.mark.parametrize("seed", range(10))
def test_time_of_a_pass_is_all_accounted_for(seed: int) -> None:
    """What is not computing, copying or sampling is waiting for pages; reads go on beside."""
    schedule, graph, cost = random_case(random.Random(seed))
    trace = simulate(schedule, graph, cost)
    chain = [e for e in trace.events if e.kind != "read"]
    assert all(a.end == b.start for a, b in pairwise(chain))
    for phase in ("prefill", "decode"):
        assert sum(trace.seconds_by_kind(phase).values()) == close(trace.seconds(phase))


def test_sampling_and_what_lies_besides_tasks_end_every_step() -> None:
    curves = (
        Curve("cpu", 0, "bfloat16", "pass.between", 0.0, 1e-6),
        Curve("cpu", 0, "bfloat16", "pass.ends", 0.0, 3e-6),
        Curve("cpu", 0, "bfloat16", "pass.around", 0.0, 1.0),  # in no step of one process
        Curve("cpu", 0, "bfloat16", "sample", MODEL.tasks[-1].output_bytes_per_token, 2e-5, (Point(1.0, 0.0, 1e-3),)),
    )
    cost = CostModel(TWO, calibration=Calibration(curves=curves))
    for head in ("cpu", "sim:0"):
        schedule = placed(head=head)
        trace = simulate(schedule, MODEL, cost)
        for number, info in enumerate(trace.steps):
            last = [e for e in trace.events if e.step == number][-1]
            assert (last.task, last.lane, last.kind) == ("sample", "host", "sample")
            assert info.step is not None
            assert info.end - last.end == close(3e-6 + 1e-6 * len(MODEL.tasks))
            assert last.seconds == close(cost.sampling(TWO.device("cpu"), info.step, MODEL))
        assert "sample" in trace.seconds_by_kind("decode")


# Pages from elsewhere


def even(name: str, after: tuple[str, ...] = (), nbytes: int = 10**6, seconds: float = 1e-4) -> Task:
    """A task that takes a device of 1e10 bytes/s so many seconds at any size."""
    return toy_task(name, nbytes=nbytes, after=after, work=Work(bytes_fixed=seconds * 1e10))


def even_chain(count: int, **more: float) -> TaskGraph:
    tasks: list[Task] = []
    for i in range(count):
        tasks.append(even(f"t{i}", (f"t{i - 1}",) if i else (), **more))  # type: ignore[arg-type]
    return toy_graph(*tasks)


GPU_AND_HOST = machine(device("cpu"), device("cuda:0"), links=(Link("cpu", "cuda:0", 1e10, 2e-5),))


def streamed(graph: TaskGraph, topology: Topology, rows: tuple[str, ...] | None = None) -> Schedule:
    """All on the GPU; these rows (None: all) are stored on the host."""
    schedule = schedule_of(graph, topology, SHORT, dict.fromkeys(graph.rows, "cuda:0"), "streamed")
    kept = tuple(replace(r, home="cpu") if rows is None or r.task in rows else r for r in schedule.assignments)
    return replace(schedule, assignments=kept)


@pytest.mark.parametrize("seconds", [1e-5, 1.2e-4, 5e-4])
def test_streamed_weights_come_while_the_task_before_computes(seconds: float) -> None:
    """load + compute + (n - 1) max(load, compute), over all tasks of all passes."""
    graph = even_chain(5, seconds=seconds)
    trace = simulate(streamed(graph, GPU_AND_HOST), graph, CostModel(GPU_AND_HOST), [Step.decode(9)] * 4)
    load = 2e-5 + 1e6 / 1e10
    assert trace.steps[-1].end == close(load + seconds + 19 * max(load, seconds))
    reads = [e for e in trace.events if e.kind == "read"]
    assert [e.task for e in reads] == [f"t{i}" for i in range(5)] * 4
    assert {(e.lane, e.nbytes) for e in reads} == {("cpu -> cuda:0", 10**6)}
    computes = [e for e in trace.events if e.kind == "compute"]
    assert all(read.end <= compute.start for read, compute in zip(reads, computes, strict=True))
    assert all(before.end <= read.start for before, read in zip(computes, reads[2:], strict=False))  # two slots


def test_only_what_is_stored_elsewhere_is_streamed() -> None:
    graph = even_chain(6)
    schedule = streamed(graph, GPU_AND_HOST, ("t1", "t4"))
    trace = simulate(schedule, graph, CostModel(GPU_AND_HOST), [Step.decode(9)] * 3)
    assert Counter(e.task for e in trace.events if e.kind == "read") == {"t1": 3, "t4": 3}
    assert trace.steps[0].end == close(2e-5 + 1e-4 + 5e-4)  # t1 and all after it wait for the first load
    assert trace.steps[2].end - trace.steps[0].end == close(2 * 6e-4)  # later ones are there in time


def test_rows_of_a_table_come_when_they_are_needed() -> None:
    table = toy_task("embedding", pages=(Page("embedding", 10**6, row_nbytes=100),), work=Work(bytes_fixed=1e4))
    graph = toy_graph(table, even("t0", ("embedding",)))
    schedule = streamed(graph, GPU_AND_HOST, ("embedding",))
    trace = simulate(schedule, graph, CostModel(GPU_AND_HOST), [Step.prefill(30), Step.decode(31)])
    assert [e.nbytes for e in trace.events if e.kind == "read"] == [3000, 100]
    assert [e.kind for e in trace.events if e.step == 1] == ["read", "wait", "compute", "compute"]
    assert trace.seconds("decode") == close(2e-5 + 100 / 1e10 + 1e-6 + 1e-4)


def expert_graph(num_experts: int, seconds: float, nbytes: int = 10**5) -> TaskGraph:
    """A layer whose experts, all of which every token picks, take so long together."""
    pages = tuple(Page(f"layers.0.experts.{e}", nbytes) for e in range(num_experts))
    work = Work(bytes_fixed=1e10 * seconds)
    router = replace(even("layers.0.router", seconds=1e-5), kind="router")
    experts = Task(
        "layers.0.experts", "experts", 0, pages, work, work, ("layers.0.router",), 8.0, num_experts, num_experts
    )
    return toy_graph(router, experts)


@pytest.mark.parametrize("seconds", [1e-6, 2e-4, 1e-2])
def test_streamed_experts_come_one_by_one_once_they_are_chosen(seconds: float) -> None:
    """n equal pages into two slots: load + compute + (n - 1) max(load, compute), from the router's end on."""
    graph, n = expert_graph(8, seconds), 8
    rows = tuple(row for row in graph.rows if ".experts." in row)
    topology = machine(device("cpu"), device("cuda:0"), links=(Link("cpu", "cuda:0", 1e9),))
    trace = simulate(streamed(graph, topology, rows), graph, CostModel(topology), [Step.decode(9)])
    load, compute = 1e5 / 1e9, seconds / n
    assert trace.steps[0].end == close(1e-5 + load + compute + (n - 1) * max(load, compute))
    assert sum(e.nbytes for e in trace.events if e.kind == "read") == n * 10**5


def test_experts_that_are_here_compute_while_others_come() -> None:
    graph = expert_graph(8, 8e-4)
    rows = ("layers.0.experts.0", "layers.0.experts.5")
    topology = machine(device("cpu"), device("cuda:0"), links=(Link("cpu", "cuda:0", 1e9),))
    trace = simulate(streamed(graph, topology, rows), graph, CostModel(topology), [Step.decode(9)])
    assert [e.kind for e in trace.events if e.task == "layers.0.experts"] == ["compute", "read", "read"] + [
        "compute"
    ] * 2
    assert trace.steps[0].end == close(1e-5 + 8e-4)
    assert "wait" not in trace.seconds_by_kind("decode")


def paged(graph: TaskGraph, cache_bytes: int, topology: Topology, lookahead: int = 2) -> Schedule:
    schedule = schedule_of(graph, topology, SHORT, dict.fromkeys(graph.rows, "cpu"), "paged")
    return replace(schedule, paging=Paging("cpu", "disk", cache_bytes, lookahead=lookahead))


def test_pages_are_read_from_the_task_before_on() -> None:
    """Half of each page is there, the rest is read from disk, one task ahead; what is there computes meanwhile."""
    graph, topology = even_chain(4), machine(device("cpu"), DISK, links=(Link("disk", "cpu", 5e9),))
    trace = simulate(paged(graph, 2 * 10**6, topology), graph, CostModel(topology), [Step.decode(9)] * 2)
    read, half = 1e-4, 0.5e-4  # of half a page; computing with half a page
    reads = [e for e in trace.events if e.kind == "read"]
    assert [e.nbytes for e in reads] == [5 * 10**5] * 8
    # The first page's rest is asked for when the pass begins and is there at `read`; the second's right after it.
    ends = [read + half, 2 * read + half, 3 * read + half, 4 * read + half]
    tasks = [max(e.end for e in trace.events if e.step == 0 and e.task == f"t{i}") for i in range(4)]
    assert tasks == close(ends)  # type: ignore[comparison-overlap]
    assert [e.start for e in reads[:4]] == close([0.0, read, 2 * read, 3 * read])
    assert trace.seconds("decode") == close(2 * ends[-1])


@pytest.mark.parametrize(("cores", "threads", "lost"), [(2, 2, 1.0), (1, 1, 1.0), (4, 3, 0.0)])
def test_reading_takes_from_those_who_compute_on_all_cores(cores: int, threads: int, lost: float) -> None:
    """`lost`: of the seconds that the reads take, what the pass is longer."""
    graph, per_byte = even_chain(4), 4e-11
    seconds = []
    for cpu in (0.0, per_byte):
        disk = replace(DISK, facts={"read_takes_s": cpu})
        topology = machine(device("cpu", cores=cores, threads=threads), disk, links=(Link("disk", "cpu", 5e11),))
        trace = simulate(paged(graph, 2 * 10**6, topology), graph, CostModel(topology), [Step.decode(9)])
        seconds.append(sum(e.seconds for e in trace.events if e.kind == "compute"))
    assert seconds[1] - seconds[0] == pytest.approx(lost * 4 * 5e5 * per_byte)


@pytest.mark.parametrize("lookahead", [0, 2])
def test_asking_for_pages_and_guessing_them_take_time_besides_tasks(lookahead: int) -> None:
    graph, topology, page, guess = model(num_hidden_layers=6), machine(device("cpu"), DISK), 3e-5, 7e-5
    curves = tuple(
        Curve("cpu", 0, "bfloat16", f"page.{what}", 0.0, s) for what, s in (("read", page), ("guess", guess))
    )
    schedule = paged(graph, int(graph.nbytes * 0.6), topology, lookahead)
    step = Step.decode(30)
    free, charged = (
        simulate(schedule, graph, CostModel(topology, calibration=Calibration(curves=known)), [step])
        for known in ((), curves)
    )
    routed = sum(bool(task.num_experts) for task in graph)
    pages = sum(
        e.nbytes / task.pages[0].nbytes
        for e in charged.events
        if e.kind == "read" and not (task := graph.by_name[e.task]).pages[0].row_nbytes
    )
    seconds = [
        {kind: sum(e.seconds for e in trace.events if e.kind == kind) for kind in ("compute", "wait")}
        for trace in (free, charged)
    ]
    assert seconds[0]["compute"] == close(seconds[1]["compute"])
    besides = charged.seconds("decode") - sum(seconds[1].values())
    assert besides == pytest.approx(pages * page + (routed * guess if lookahead else 0.0), rel=1e-3)  # whole bytes
    assert pages > 0
    assert seconds[1]["wait"] <= seconds[0]["wait"] + 1e-12


def test_experts_are_read_as_many_layers_ahead_as_they_are_guessed() -> None:
    graph, cost = model(num_hidden_layers=6), CostModel(machine(device("cpu"), DISK))
    waits = []
    for lookahead in (0, 1, 3):
        schedule = paged(graph, int(graph.nbytes * 0.6), cost.topology, lookahead)
        trace = simulate(schedule, graph, cost, [Step.decode(30)])
        starts = {e.task: e.start for e in trace.events if e.kind == "read"}
        begins = {e.task: e.start for e in reversed(trace.events) if e.kind in ("compute", "wait")}
        for layer in range(1, 6):
            earlier = f"layers.{max(1, layer - lookahead)}.experts"
            assert starts[f"layers.{layer}.experts"] >= begins[earlier]
        waits.append(trace.seconds_by_kind("decode").get("wait", 0.0))
    assert waits[0] >= waits[1] >= waits[2]


def test_a_pass_over_all_experts_reads_the_next_layer_and_displaces_the_last() -> None:
    """What the first two layers lack takes the place of what the last ones will need."""
    graph, cost = model(num_hidden_layers=6), CostModel(machine(device("cpu"), DISK))
    schedule = paged(graph, int(graph.nbytes * 0.8), cost.topology, lookahead=3)
    trace = simulate(schedule, graph, cost, [Step.prefill(512)])
    reads = {e.task: e for e in trace.events if e.kind == "read" and e.task.endswith("experts")}
    first, second, third, *last = (reads[f"layers.{n}.experts"].nbytes for n in range(1, 6))
    assert first == second == third
    there = sum(p.nbytes for p in graph.by_name["layers.5.experts"].pages) - first
    assert first < there < 2 * first, "one layer is not enough"
    assert last == pytest.approx([first + 2 * first - there, first + there], abs=2)  # whole bytes
    begins = {e.task: e.start for e in reversed(trace.events) if e.kind in ("compute", "wait")}
    for layer in range(2, 6):
        assert reads[f"layers.{layer}.experts"].start >= begins[f"layers.{layer - 1}.experts"]


def test_reads_that_came_are_used_where_they_are_known() -> None:
    graph, cost = model(), CostModel(machine(device("cpu"), DISK))
    schedule = paged(graph, graph.nbytes // 2, cost.topology)
    expected = simulate(schedule, graph, cost, [Step.decode(30)])
    bytes_read = sum(e.nbytes for e in expected.events if e.kind == "read")
    assert bytes_read > 0
    came = replace(Step.decode(30), read_bytes=bytes_read / 2)
    recosted = simulate(schedule, graph, cost, [came])
    assert sum(e.nbytes for e in recosted.events if e.kind == "read") == pytest.approx(bytes_read / 2, rel=1e-2)
    assert recosted.seconds("decode") < expected.seconds("decode")
    nothing = simulate(schedule, graph, cost, [replace(Step.decode(30), read_bytes=0.0)])
    assert {e.kind for e in nothing.events} == {"compute"}


def test_a_read_and_a_copy_share_a_memory_controller() -> None:
    """b's page is read while a's output is copied: each link alone gives 1e9 bytes/s, the controller 1e9 for both."""
    a = replace(even("a", seconds=1e-4), output_bytes_per_token=1e5)
    b = replace(even("b", ("a",), seconds=1e-6, nbytes=10**6), output_bytes_per_token=1.0)
    c = even("c", ("b",), seconds=1e-6)
    graph = toy_graph(a, b, c)
    for domains, rate in (((), 1e9), (("controller",), 0.5e9)):
        links = (
            Link("disk", "cpu", 1e9, domains=domains),
            Link("cuda:0", "cpu", 1e9, domains=domains),
            Link("cpu", "cuda:0", 1e9),
        )
        known = (Domain("controller", 1e9),)
        topology = Topology((device("cpu"), device("cuda:0"), DISK), links, known)
        where = {"a": "cuda:0", "b": "cpu", "c": "cpu"}
        schedule = replace(schedule_of(graph, topology, SHORT, where, "x"), paging=Paging("cpu", "disk", 10**6))
        trace = simulate(schedule, graph, CostModel(topology), [Step.decode(9)])
        copy = next(e for e in trace.events if e.kind == "copy")
        read = next(e for e in trace.events if e.kind == "read")
        assert (read.task, read.start) == ("b", copy.start)  # asked for when what comes before b begins
        assert copy.seconds == close(1e5 / rate)
        assert read.seconds == close(5e5 / 1e9 + (copy.seconds / 2 if domains else 0.0))


# Pipelines


def stages(count: int, seconds: float, hop: float, name: str = "cuda:{}") -> tuple[Schedule, TaskGraph, CostModel]:
    """Equal stages of two tasks each, one per GPU; what they hand on takes `hop` seconds."""
    names = [name.format(i) for i in range(count)]
    graph = even_chain(2 * count, seconds=seconds / 2)
    topology = machine(*map(device, names), links=tuple(Link(a, b, 1e300, hop) for a, b in pairwise(names)))
    where = {f"t{i}": names[i // 2] for i in range(2 * count)}
    return schedule_of(graph, topology, SHORT, where, "stages"), graph, CostModel(topology)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 5), st.integers(1, 8), st.integers(1, 5), st.floats(1e-4, 1.0), st.floats(0, 1))
def test_decode_steps_through_a_pipeline(p: int, m: int, steps: int, seconds: float, share: float) -> None:
    """A round takes what the slowest stage needs for all micro-batches, or what one needs for all stages."""
    hop = share * seconds
    schedule, graph, cost = stages(p, seconds, hop)
    trace = simulate_pipeline(schedule, graph, cost, m, [Step.decode(9, m)] * steps)
    through = p * seconds + (p - 1) * hop
    assert trace.steps[-1].end == close((steps - 1) * max(m * seconds, through) + through + (m - 1) * seconds)
    assert trace.seconds("decode") == close(trace.steps[-1].end)
    assert trace.tokens("decode") == m * steps
    check_lanes(trace)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 5), st.integers(1, 8), st.floats(1e-4, 1.0), st.floats(0, 4))
def test_chunks_of_prompts_follow_one_another(p: int, chunks: int, seconds: float, share: float) -> None:
    """Stages and links in a row: s + ... + (n - 1) max; also where a link is the slowest."""
    hop = share * seconds if p > 1 else 0.0
    schedule, graph, cost = stages(p, seconds, hop)
    trace = simulate_pipeline(schedule, graph, cost, 3, [Step.prefill(512, 1, 512 * i) for i in range(chunks)])
    assert trace.steps[-1].end == close(p * seconds + (p - 1) * hop + (chunks - 1) * max(seconds, hop))
    assert len(trace.steps) == chunks  # a prompt is not cut for micro-batches
    assert all(a.end == b.start for a, b in pairwise(trace.steps))


@pytest.mark.parametrize("seed", range(15))
def test_one_micro_batch_is_the_local_executor(seed: int) -> None:
    schedule, graph, cost = random_case(random.Random(seed))
    steps = [Step.prefill(20), *(Step.decode(20 + i) for i in range(1, 4))]
    alone, pipeline = simulate(schedule, graph, cost, steps), simulate_pipeline(schedule, graph, cost, 1, steps)
    assert [s.end for s in pipeline.steps] == close([s.end for s in alone.steps])
    done = [(e.task, e.lane, e.step, e.kind, e.nbytes) for e in alone.events if e.kind != "wait"]
    assert [(e.task, e.lane, e.step, e.kind, e.nbytes) for e in pipeline.events] == done


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 50), st.integers(1, 700))
def test_micro_batches_are_the_batch(batch: int, count: int, tokens: int) -> None:
    for step in (Step.decode(33, batch), Step.prefill(tokens, batch)):
        parts = micro_steps(step, count)
        assert len(parts) == min(batch, count)
        assert sum(p.tokens for p in parts) == step.tokens
        assert sum(p.sequences for p in parts) == step.sequences
        assert sum(p.sampled for p in parts) == step.sampled
        assert sum(p.pairs for p in parts) == close(step.pairs)
        assert sum(p.positions for p in parts) == close(step.positions)
        assert max(p.sequences for p in parts) - min(p.sequences for p in parts) <= 1


def test_no_micro_batches_is_an_error() -> None:
    schedule, graph, cost = stages(2, 1.0, 0.0)
    with pytest.raises(InvalidInput, match="a pipeline of 0 micro-batches does nothing; it must be at least 1"):
        simulate_pipeline(schedule, graph, cost, 0)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 5), st.integers(1, 8), st.integers(1, 5), st.floats(1e-4, 1.0), st.floats(0, 1))
def test_passes_through_the_stages_of_a_cluster(p: int, m: int, rounds: int, seconds: float, share: float) -> None:
    """A round takes what a stage needs for all passes and their calls, or what one takes through all stages and to the
    driver."""
    hop = share * seconds
    schedule, graph, cost = stages(p, seconds, hop, "node{}/cuda:0")
    schedule = replace(schedule, workload=Workload(8, 8, m))
    trace = simulate_stages(schedule, graph, cost, 9, [Step.decode(9)] * (m * rounds))
    busy = seconds + HANDLING_SECONDS
    through = 2 * CALL_SECONDS - HANDLING_SECONDS + p * busy + (p - 1) * hop
    least = (rounds - 1) * max(m * busy, through) + through + (m - 1) * busy
    calls_first = rounds * p * m * HANDLING_SECONDS  # at most: while they are handled, nobody computes
    assert (1 - 1e-9) * least <= trace.steps[-1].end <= least + calls_first
    assert trace.seconds("decode") == close(trace.steps[-1].end)
    check_lanes(trace)


def test_two_equal_stages_do_twice_as_much_with_two_passes_on_their_way() -> None:
    schedule, graph, cost = stages(2, 1.0, 0.0, "node{}/cuda:0")
    one, two = (
        predict(replace(schedule, workload=Workload(8, 8, m)), graph, cost, depth=m).decode_tokens_per_s for m in (1, 2)
    )
    assert one == close(1 / (2 + 2 * CALL_SECONDS + HANDLING_SECONDS))
    assert two == close(2 * one)
    four = predict(replace(schedule, workload=Workload(8, 8, 4)), graph, cost, depth=4).decode_tokens_per_s
    assert four == close(1 / (1 + HANDLING_SECONDS))  # both are busy all the time


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 6), st.floats(1e-3, 20e-3), st.floats(0, 2e-3), st.floats(0, 2e-3))
@example(4, 5e-3, 2e-3, 1.5e-3)
@example(5, 1e-3, 1e-3, 0.0009431065291551965)
def test_the_rate_of_a_pipeline_is_that_of_its_middle(depth: int, seconds: float, first: float, second: float) -> None:
    """As in a long run: not of its end, where nothing new comes between the last passes. Two stages, which calls keep
    from computing for so many seconds."""
    schedule, graph, cost = stages(2, seconds, 1e-3, "node{}/cuda:0")
    known = [{"call_s": 1e-3, "call_handling_s": s} for s in (first, second)]
    devices = tuple(replace(d, facts=facts) for d, facts in zip(schedule.topology.devices, known, strict=True))
    topology = replace(schedule.topology, devices=devices)
    schedule, cost = replace(schedule, workload=Workload(8, 8, depth), topology=topology), CostModel(topology)
    ends = [s.end for s in simulate_stages(schedule, graph, cost, depth, [Step.decode(12)] * (depth * 80)).steps]
    begin, end = 10 * depth - 1, 70 * depth - 1
    forecast = predict(schedule, graph, cost, depth).decode_tokens_per_s
    assert forecast == pytest.approx((end - begin) / (ends[end] - ends[begin]), rel=0.03)


@pytest.mark.parametrize("m", [1, 2, 3, 8, 31])
def test_chunks_of_one_prompt_fill_the_stages_of_a_cluster(m: int) -> None:
    """m chunks through two stages of s seconds: (m + 1) s, where one pass at once takes 2 m s; calls come on top. The
    tokens after it wait for one another, however many passes there may be."""
    schedule, graph, cost = stages(2, 1.0, 0.0, "node{}/cuda:0")
    work, graph = Workload(8 * m, 3), replace(graph, prefill_chunk=8)
    schedule = replace(schedule, workload=work)
    through = 2 + 2 * CALL_SECONDS + HANDLING_SECONDS
    for depth in (2, 5):
        trace = simulate_stages(schedule, graph, cost, depth, pipeline_steps(graph, work, depth))
        prompt, *tokens = trace.steps[m - 1 :]
        assert m + 1 <= prompt.end <= (m + 1) * (1 + 2 * CALL_SECONDS)
        assert [s.end - s.start for s in tokens] == [close(through)] * 2
        forecast = predict(schedule, graph, cost, depth)
        assert forecast.first_token_s == close(prompt.end)
        assert forecast.decode_tokens_per_s == close(1 / through)
        check_lanes(trace)
    one = simulate_stages(schedule, graph, cost, 1, pipeline_steps(graph, work, 1))
    assert one.steps[m - 1].end == close(m * through)


def test_passes_of_more_sequences_than_are_planned_have_company() -> None:
    """Of passes as they came: two of four sequences each are on their way though the plan is for four in all."""
    schedule, graph, cost = stages(2, 1.0, 0.0, "node{}/cuda:0")
    schedule = replace(schedule, workload=Workload(8, 8, 4))
    few, many = (simulate_stages(schedule, graph, cost, 2, [Step.decode(9, n)] * 6) for n in (2, 4))
    assert few.steps[-1].end < 6 * 1.5
    assert many.steps[-1].end == close(few.steps[-1].end)


def test_four_passes_keep_the_busier_of_two_stages_busy() -> None:
    """85 % of the time and more, also where each computes for 10 ms only."""
    schedule, graph, cost = stages(2, 10e-3, CALL_SECONDS, "node{}/cuda:0")
    schedule = replace(schedule, workload=Workload(8, 8, 4))
    trace = simulate_stages(schedule, graph, cost, 4, [Step.decode(9)] * 80)
    busy = sum(e.seconds for e in trace.events if e.lane == "node0/cuda:0")
    assert busy / trace.steps[-1].end > 0.9


# Requests


def test_a_single_request_is_the_workload() -> None:
    for seed in range(12):
        schedule, graph, cost = random_case(random.Random(seed))
        graph = replace(graph, prefill_chunk=64)
        work = Workload(150, 5)
        alone = simulate(schedule, graph, cost, workload_steps(graph, work))
        served = simulate_requests(schedule, graph, cost, [(0.0, 150, 5)], 4)
        assert served.trace.events == alone.events
        assert served.trace.steps == alone.steps
        [request] = served.requests
        assert (request.admitted, request.first_token, request.finish) == (0.0, alone.steps[2].end, alone.steps[-1].end)


def check_served(
    requests: list[tuple[float, int, int]], most: int, chunk: int, cost: CostModel, graph: TaskGraph
) -> None:
    schedule = placed(graph, topology=cost.topology, layers__1="sim:0")
    served = simulate_requests(schedule, graph, cost, requests, most)
    trace, done = served.trace, [r for r in served.requests if not r.outcome]
    check_lanes(trace)
    assert trace == simulate_requests(schedule, graph, cost, requests, most).trace
    for info in trace.steps:
        assert info.sequences <= most
        assert info.phase == "decode" or info.tokens <= max(chunk, most)
    assert sum(s.tokens for s in trace.steps) == sum(r.prompt_tokens + r.max_tokens - 1 for r in done)
    assert sum(s.step.sampled for s in trace.steps if s.step) == sum(r.max_tokens for r in done)
    order = sorted(done, key=lambda r: r.arrival)
    for r in order:
        assert r.admitted is not None
        assert r.first_token is not None
        assert r.finish is not None
        assert r.arrival <= r.admitted < r.first_token <= r.finish
        assert (r.first_token == r.finish) == (r.max_tokens == 1)
    for name in ("admitted", "first_token"):
        times = [getattr(r, name) for r in order]
        assert times == sorted(times)
    for name, nbytes in trace.memory_bytes.items():
        assert nbytes <= cost.topology.device(name).memory_bytes
    for at in {r.admitted for r in done}:
        assert sum(r.admitted <= at < r.finish for r in done) <= most  # type: ignore[operator]


@pytest.mark.parametrize("seed", range(20))
def test_requests_get_their_tokens_in_order(seed: int) -> None:
    rng = random.Random(seed)
    chunk, most = rng.choice([4, 16, 64]), rng.choice([1, 2, 5])
    graph = replace(MODEL, prefill_chunk=chunk)
    requests = [(rng.choice([0.0, rng.uniform(0, 1e-2)]), rng.randint(1, 60), rng.randint(1, 9)) for _ in range(12)]
    check_served(requests, most, chunk, CostModel(TWO), graph)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60))
def test_requests_get_their_tokens_in_order_at_length(seed: int) -> None:
    rng = random.Random(f"long {seed}")
    chunk, most = rng.choice([1, 4, 16, 64, 512]), rng.randint(1, 20)
    graph = replace(MODEL, prefill_chunk=chunk)
    requests = [(rng.uniform(0, 1e-1), rng.randint(1, 400), rng.randint(1, 40)) for _ in range(40)]
    check_served(requests, most, chunk, CostModel(TWO), graph)


def test_decodes_go_first_and_a_prompt_takes_the_rest() -> None:
    """Chunks of 8: the second prompt, of 20, begins while the first sequence decodes, which takes one of each pass."""
    graph = replace(MODEL, prefill_chunk=8)
    schedule, cost = placed(graph), CostModel(TWO)
    served = simulate_requests(schedule, graph, cost, [(0.0, 8, 5), (0.0, 20, 2)], 2)
    steps = [s.step for s in served.trace.steps if s.step]
    assert [(s.phase, s.tokens, s.sequences, s.sampled) for s in steps] == [
        ("prefill", 8, 1, 1),
        ("prefill", 8, 2, 1),
        ("prefill", 8, 2, 1),
        ("prefill", 7, 2, 2),
        ("decode", 2, 2, 2),
    ]
    assert [(s.pairs, s.positions) for s in steps[1:3]] == [(9 + 28, 9 + 7), (10 + sum(range(8, 15)), 10 + 14)]
    cpu, chunk, beside = TWO.device("cpu"), Step("prefill", 7, 1, 28.0, 7.0, 0), Step.decode(9)
    direct = sum(cost.task(task, cpu, chunk, beside).seconds for task in graph)
    assert served.trace.steps[1].end - served.trace.steps[1].start == close(direct)


def test_a_request_waits_until_it_arrives_and_until_there_is_cache() -> None:
    """Cache for three blocks: the third request waits for the second's end though the first has long arrived."""
    schedule, cost = placed(), CostModel(TWO)
    block = MODEL.kv_bytes_per_token * CACHE_BLOCK_TOKENS
    need = simulate_requests(schedule, MODEL, cost, [(0.0, 60, 1)], 3).trace.memory_bytes["cpu"] - block
    # As much working memory as the longest prompt takes, and three blocks
    work = MODEL.working_bytes(3, 100, 120) - MODEL.working_bytes(3, 60, 61)
    topology = machine(device("cpu", memory=int(need + work + 3.5 * block)), TWO.devices[1], links=LINKS)
    requests = [(0.0, 60, 4), (1.0, 100, 20), (1.0, 30, 40), (1.0, 10, 10)]
    served = simulate_requests(placed(topology=topology), MODEL, CostModel(topology), requests, 3)
    first, second, third, fourth = served.requests
    assert (first.admitted, second.admitted) == (0.0, 1.0)
    assert third.admitted == second.finish
    assert fourth.admitted == third.admitted
    assert served.trace.outcome == ""
    assert need + work < served.trace.memory_bytes["cpu"] <= topology.device("cpu").memory_bytes
    assert served.trace.steps[-1].end > 1.0


def test_a_request_that_can_never_fit_is_an_outcome() -> None:
    block = MODEL.kv_bytes_per_token * CACHE_BLOCK_TOKENS
    topology = machine(device("cpu", memory=int(MODEL.nbytes + MODEL.working_bytes(2, 3000, 4000) + 9 * block)))
    requests = [(0.0, 20, 4), (0.5, 3000, 1000), (0.6, 20, 4)]
    served = simulate_requests(placed(topology=topology), MODEL, CostModel(topology), requests, 2)
    lost = served.requests[1]
    assert lost.outcome.startswith("request 1 needs ")
    assert " of cpu at 0.5 s; " in lost.outcome
    assert (lost.admitted, lost.first_token, lost.finish) == (None, None, None)
    assert served.trace.outcome == lost.outcome
    assert all(served.requests[i].finish is not None for i in (0, 2))
    nothing = simulate_requests(placed(), MODEL, CostModel(TWO), [], 2)
    assert (nothing.requests, nothing.trace.events, nothing.trace.outcome) == ((), (), "")


@pytest.mark.parametrize(
    "request_", [(-1.0, 5, 5), (float("nan"), 5, 5), (float("inf"), 5, 5), (0.0, 0, 5), (0.0, 5, 0)]
)
def test_impossible_requests_are_errors(request_: tuple[float, int, int]) -> None:
    with pytest.raises(InvalidInput, match=r"request 1 arrives at .* must arrive at 0 or later and have at least one"):
        simulate_requests(placed(), MODEL, CostModel(TWO), [(0.0, 1, 1), request_], 2)
    with pytest.raises(InvalidInput, match="max_num_seqs is 0; at least 1"):
        simulate_requests(placed(), MODEL, CostModel(TWO), [(0.0, 1, 1)], 0)
