"""Pipeline partitions are the best of all cuts, memory included; what does not fit says what would."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement, pairwise, permutations

import pytest
from machines import DENSE, DISK, KIB, device, machine, model

from ciuic_runtime.devices.errors import InvalidInput, OutOfMemory
from ciuic_runtime.devices.spec import Link, Topology
from ciuic_runtime.schedulers.cost import CostModel
from ciuic_runtime.schedulers.memory import capacity, memory_need
from ciuic_runtime.schedulers.policies.pipeline import (
    Objective,
    partition,
    pipeline_latency,
    pipeline_throughput,
    shortfall,
    stage_seconds,
)
from ciuic_runtime.schedulers.policies.trivial import groups
from ciuic_runtime.schedulers.schedule import Schedule
from ciuic_runtime.schedulers.workload import Workload

WORK = Workload(20, 10)


# The partition as numbers


@dataclass(frozen=True)
class Numbers:
    seconds: list[list[float]]
    nbytes: list[list[float]]
    room: list[float]
    hop: list[list[float]]
    busy: list[float]
    shared: list[tuple[int, int, float]]

    def cut(self, objective: Objective) -> tuple[int, ...] | None:
        return partition(self.seconds, self.nbytes, self.room, self.hop, objective, self.busy, self.shared)


def random_numbers(rng: random.Random, most_groups: int = 10) -> Numbers:
    devices, n = rng.randint(1, 4), rng.randint(1, most_groups)
    sizes = [float(rng.randint(1, 20)) for _ in range(n)]
    work = [rng.uniform(0.1, 5.0) for _ in range(n)]
    speed = [10 ** rng.uniform(-1, 1) for _ in range(devices)]
    shared = [(0, n - 1, min(sizes[0], sizes[-1]) / 2)] if n > 1 and rng.random() < 0.3 else []
    return Numbers(
        [[w / s * rng.uniform(0.8, 1.2) for w in work] for s in speed],
        [[b + rng.choice([0.0, 0.5]) for b in sizes] for _ in speed],
        [sum(sizes) * rng.uniform(-0.05, 0.9) for _ in speed],
        [[0.0 if a == b else rng.choice([0.0, 0.1, 3.0]) for b in range(devices)] for a in range(devices)],
        [rng.choice([0.0, 0.0, 2.0]) for _ in speed],
        shared,
    )


def all_cuts(numbers: Numbers) -> Iterator[tuple[int, ...]]:
    """Every cut that fits, by trying all of them."""
    n, devices = len(numbers.nbytes[0]), len(numbers.room)
    for inner in combinations_with_replacement(range(n + 1), devices - 1):
        cuts = (*inner, n)
        for d, (i, j) in enumerate(pairwise((0, *cuts))):
            held = sum(numbers.nbytes[d][i:j]) - sum(b for p, q, b in numbers.shared if i <= p and q < j)
            if j > i and held > numbers.room[d]:
                break
        else:
            yield cuts


def value(numbers: Numbers, cuts: Sequence[int], objective: Objective) -> float:
    runs = [(d, i, j) for d, (i, j) in enumerate(pairwise((0, *cuts))) if j > i]
    times = []
    for at, (d, i, j) in enumerate(runs):
        enters = numbers.hop[runs[at - 1][0]][d] if at else 0.0
        besides = numbers.busy[d] if objective == "throughput" else 0.0
        times.append(sum(numbers.seconds[d][i:j]) + enters + besides)
    return sum(times) if objective == "latency" else max(times)


def check_against_all_cuts(cases: int, most_groups: int, seed: str) -> None:
    possible = 0
    for case in range(cases):
        numbers = random_numbers(random.Random(f"{seed}/{case}"), most_groups)
        every = list(all_cuts(numbers))
        lack = min(shortfall(numbers.nbytes, numbers.room, numbers.shared))
        for objective in ("latency", "throughput"):
            cuts = numbers.cut(objective)
            assert (cuts is None) == (not every), f"{seed}/{case}: {cuts} of {len(every)}"
            if cuts is not None:
                assert cuts in every, f"{seed}/{case}: {cuts} does not fit"
                best = min(value(numbers, one, objective) for one in every)
                assert value(numbers, cuts, objective) == pytest.approx(best, rel=1e-9), f"{seed}/{case}: {objective}"
        assert (lack > 0) == (not every), f"{seed}/{case}: {lack=}"
        possible += bool(every)
    assert 0.25 * cases < possible < 0.9 * cases, f"{possible} of {cases} fit: too one-sided to show much"


def test_partition_is_the_best_of_all_cuts() -> None:
    check_against_all_cuts(1000, 10, "quick")


@pytest.mark.slow
def test_partition_is_the_best_of_all_cuts_of_many() -> None:
    check_against_all_cuts(20_000, 14, "slow")


def test_of_equal_bottlenecks_the_least_sum_is_taken() -> None:
    """The first group is the bottleneck wherever it goes; the second need not go to the slow device for that."""
    seconds, nbytes = [[5.0, 1.0], [9.0, 4.0]], [[1.0, 1.0]] * 2
    assert partition(seconds, nbytes, [9.0, 9.0], [[0.0, 0.0]] * 2, "throughput") == (1, 2)
    seconds = [[5.0, 1.0, 1.0], [9.0, 9.0, 4.0], [9.0, 3.0, 1.0]]
    assert partition(seconds, [[1.0] * 3] * 3, [9.0] * 3, [[0.0] * 3] * 3, "throughput") == (1, 1, 3)


def test_empty_stages_cost_no_hop() -> None:
    """The way over the middle device costs more than the direct one: it is left out."""
    hop = [[0.0, 9.0, 1.0], [9.0, 0.0, 9.0], [1.0, 9.0, 0.0]]
    cuts = partition([[1.0, 1.0]] * 3, [[1.0, 1.0]] * 3, [1.0, 1.0, 1.0], hop, "latency")
    assert cuts == (1, 1, 2)
    assert stage_seconds(cuts, [[1.0, 1.0]] * 3, hop) == [1.0, 2.0]
    assert stage_seconds(cuts, [[1.0, 1.0]] * 3, hop, [0.5, 9.0, 0.25]) == [1.5, 2.25]


def test_the_shortfall_is_exactly_what_is_lacking() -> None:
    """With so many bytes more on that one device there is a cut; with one fewer there is none."""
    infeasible = 0
    for case in range(600):
        numbers = random_numbers(random.Random(f"lack/{case}"))
        if any(all_cuts(numbers)):
            continue
        infeasible += 1
        for d, lack in enumerate(shortfall(numbers.nbytes, numbers.room, numbers.shared)):
            for more, enough in ((lack + 1e-9, True), (lack - 0.01, False)):
                room = [r + more if d == i else r for i, r in enumerate(numbers.room)]
                cuts = partition(numbers.seconds, numbers.nbytes, room, numbers.hop, "latency", shared=numbers.shared)
                assert (cuts is not None) == enough, f"{case}: {more} more on {d}"
    assert infeasible > 100


# The policies


def stages(schedule: Schedule) -> list[str]:
    """The device of each group, which must be one."""
    where = [{schedule.rows[row].device for task in g for row, _ in task.rows} for g in groups(DENSE_MODEL)]
    assert all(len(one) == 1 for one in where)
    return [one.pop() for one in where]


DENSE_MODEL = model(DENSE, num_hidden_layers=8)
BASE = int(DENSE_MODEL.working_bytes(1, 20, 30))
LAYER = DENSE_MODEL.layers[0].nbytes + int(DENSE_MODEL.layers[0].tasks[1].kv_bytes_per_token * 64)


def three(cpu: float = 20, fast: float = 4, slow: float = 4) -> Topology:
    """A CPU and two unequal GPUs with room for so many layers each."""
    rooms = {"cpu": (cpu, 1e9, 1e10), "cuda:0": (fast, 1e11, 1e13), "cuda:1": (slow, 5e10, 5e12)}
    links = tuple(Link(a, b, 1e10, 1e-7) for a, b in permutations(rooms, 2))
    devices = [device(name, BASE + int(n * LAYER), band, rate) for name, (n, band, rate) in rooms.items()]
    return machine(*devices, links=links)


def best_by_hand(topology: Topology, objective: Objective) -> float:
    """Over all orders and cuts, from the cost model and what each plan needs."""
    cost, cut, step = CostModel(topology, workload=WORK), groups(DENSE_MODEL), WORK.mean_decode
    row = DENSE_MODEL.hidden_bytes_per_token
    best = math.inf
    for order in permutations(topology.devices):
        for inner in combinations_with_replacement(range(len(cut) + 1), len(order) - 1):
            times, before = [], None
            for d, (i, j) in zip(order, pairwise((0, *inner, len(cut))), strict=True):
                if j == i:
                    continue
                tasks = [task for group in cut[i:j] for task in group]
                cache = sum(t.kv_bytes_per_token for t in tasks) * WORK.cache_tokens
                if sum(t.nbytes for t in tasks) + cache + BASE > capacity(d):
                    break
                enters = cost.transfer(before, d.name, row) if before else 0.0
                times.append(enters + sum(cost.task(t, d, step).seconds for t in tasks))
                before = d.name
            else:
                best = min(best, sum(times) if objective == "latency" else max(times))
    return best


def time_of(schedule: Schedule, objective: Objective) -> float:
    cost, times = CostModel(schedule.topology, workload=WORK), {}
    before = ""
    for group, name in zip(groups(DENSE_MODEL), stages(schedule), strict=True):
        if name != before:
            assert name not in times, f"{name} has two stages"
            times[name] = cost.transfer(before, name, DENSE_MODEL.hidden_bytes_per_token) if before else 0.0
        spec = schedule.topology.device(name)
        times[name] += sum(cost.task(task, spec, WORK.mean_decode).seconds for task in group)
        before = name
    return sum(times.values()) if objective == "latency" else max(times.values())


@pytest.mark.parametrize("rooms", [(20, 4, 4), (20, 20, 20), (3, 5, 6), (20, 0.5, 3), (20, 0, 0)])
def test_policies_are_the_best_of_all_orders_and_cuts(rooms: tuple[float, float, float]) -> None:
    topology = three(*rooms)
    cost = CostModel(topology, workload=WORK)
    for policy, objective in ((pipeline_latency, "latency"), (pipeline_throughput, "throughput")):
        schedule = policy(DENSE_MODEL, topology, cost)
        schedule.check_memory(DENSE_MODEL)
        assert schedule.policy == f"pipeline for {objective}"
        assert time_of(schedule, objective) == pytest.approx(best_by_hand(topology, objective), rel=1e-9)


def test_latency_leaves_slow_devices_out_and_throughput_does_not() -> None:
    topology = three(20, 20, 20)
    cost = CostModel(topology, workload=WORK)
    assert pipeline_latency(DENSE_MODEL, topology, cost).devices_used() == ("cuda:0",)
    assert set(pipeline_throughput(DENSE_MODEL, topology, cost).devices_used()) >= {"cuda:0", "cuda:1"}


def test_the_order_can_be_given() -> None:
    topology = three(4, 4, 5)
    cost = CostModel(topology, workload=WORK)
    order = ["cpu", "cuda:1", "cuda:0"]
    schedule = pipeline_latency(DENSE_MODEL, topology, cost, order=order)
    assert list(dict.fromkeys(stages(schedule))) == order
    for wrong in ([], ["cpu", "cpu"], ["cuda:7"]):
        with pytest.raises(InvalidInput, match=r"must name some of cpu, cuda:0, cuda:1, each once"):
            pipeline_latency(DENSE_MODEL, topology, cost, order=wrong)


def test_a_disk_is_no_stage() -> None:
    topology = machine(*three().devices, DISK)
    schedule = pipeline_throughput(DENSE_MODEL, topology, CostModel(topology, workload=WORK))
    assert "disk" not in schedule.devices_used()


def test_rules_stay() -> None:
    """What the rules put somewhere is there, and its room and time are taken into account."""
    topology = three(20, 4, 4)
    cost = CostModel(topology, workload=WORK)
    fixed = {row: "cpu" for row in DENSE_MODEL.rows if row.startswith("layers.3.")} | {"head": "cuda:1"}
    for policy in (pipeline_latency, pipeline_throughput):
        schedule = policy(DENSE_MODEL, topology, cost, fixed)
        assert {row: schedule.rows[row].device for row in fixed} == fixed
        schedule.check_memory(DENSE_MODEL)
    everything = dict.fromkeys(DENSE_MODEL.rows, "cuda:0")
    with pytest.raises(OutOfMemory, match="on cuda:0, where"):
        pipeline_latency(DENSE_MODEL, topology, cost, everything)


def test_half_of_the_experts_by_rule() -> None:
    moe = model()
    topology = machine(device("cpu"), device("cuda:0", bandwidth=1e11, rate=1e13))
    fixed = {f"layers.1.experts.{e}": "cpu" for e in range(4)}
    schedule = pipeline_latency(moe, topology, CostModel(topology, workload=WORK), fixed)
    assert schedule.expert_devices(moe.task("layers.1.experts")) == ("cpu",) * 4 + ("cuda:0",) * 4


def test_tied_embeddings_are_held_once() -> None:
    """One device has room for the shared matrix once, and for no second copy."""
    tied = model(DENSE, tie_word_embeddings=True)
    need = tied.nbytes + int(tied.kv_bytes_per_token * 64) + int(tied.working_bytes(1, 20, 30))
    topology = machine(device("cpu", memory=need))
    schedule = pipeline_latency(tied, topology, CostModel(topology, workload=WORK))
    assert memory_need(schedule, tied, WORK)["cpu"].total == need


def test_what_does_not_fit_says_what_would() -> None:
    topology = three(2, 2, 3)
    cost = CostModel(topology, workload=WORK)
    with pytest.raises(OutOfMemory, match=r"no cut of llama into contiguous stages fits in .* would do") as error:
        pipeline_throughput(DENSE_MODEL, topology, cost)
    lack = error.value.need - error.value.capacity
    name = str(error.value).split(" more on ")[1].split()[0]
    assert f"({lack} bytes) more on {name}" in str(error.value)

    def larger(more: int) -> Topology:
        rooms = {d.name: capacity(d) + (more if d.name == name else 0) for d in topology.devices}
        grown = [device(d.name, rooms[d.name], d.memory_bandwidth or 0) for d in topology.devices]
        return machine(*grown, links=topology.links)

    pipeline_throughput(DENSE_MODEL, larger(lack), cost).check_memory(DENSE_MODEL)
    with pytest.raises(OutOfMemory):
        pipeline_throughput(DENSE_MODEL, larger(lack - 1), cost)


def test_many_devices_are_tried_in_the_order_of_their_speed() -> None:
    devices = [device(f"cuda:{i}", BASE + 2 * LAYER + 60 * KIB, 1e11 + 1e9 * i, 1e13) for i in range(7)]
    topology = machine(*devices)
    schedule = pipeline_throughput(DENSE_MODEL, topology, CostModel(topology, workload=WORK))
    used = list(dict.fromkeys(stages(schedule)))
    assert used == sorted(used, reverse=True)
    assert len(used) > 3
