"""Experts by popularity: the hottest are on the fastest device; for pages of equal size no other choice is better."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import product

import pytest
from machines import DENSE, GIB, MOE, device, machine, model

from ciuic_runtime.devices.errors import InvalidInput, OutOfMemory
from ciuic_runtime.devices.spec import Topology
from ciuic_runtime.schedulers.cost import CostModel
from ciuic_runtime.schedulers.graph import TaskGraph
from ciuic_runtime.schedulers.memory import capacity
from ciuic_runtime.schedulers.policies.popularity import by_popularity, experts_by_popularity
from ciuic_runtime.schedulers.schedule import Schedule
from ciuic_runtime.schedulers.workload import Workload

WORK = Workload(20, 10)


def with_popularity(graph: TaskGraph, rng: random.Random) -> TaskGraph:
    tasks = []
    for task in graph.tasks:
        weights = [rng.uniform(0.05, 1.0) for _ in range(task.num_experts)]
        tasks.append(replace(task, popularity=tuple(task.experts_per_token * w / sum(weights) for w in weights)))
    return replace(graph, tasks=tuple(tasks))


MODEL = model(MOE, num_hidden_layers=2, n_routed_experts=6)  # one layer of 6 experts, 2 of them per token
EXPERT = MODEL.rows["layers.1.experts.0"].nbytes
DENSE_BYTES = sum(page.nbytes for name, page in MODEL.pages.items() if ".experts." not in name)
BASE = int(MODEL.working_bytes(1, 20, 30)) + 1


def gpus_and_cpu(first: int, second: int, cpu: int) -> Topology:
    """Rooms in experts; the fastest device holds the dense tasks besides."""
    cache = int(MODEL.kv_bytes_per_token * WORK.cache_tokens)
    return machine(
        device("cpu", BASE + cpu * EXPERT, 1e9),
        device("cuda:0", BASE + DENSE_BYTES + cache + first * EXPERT, 1e11),
        device("cuda:1", BASE + second * EXPERT, 3e10),
    )


def expert_seconds(graph: TaskGraph, cost: CostModel, where: dict[str, str]) -> float:
    """Expected time of a decode step's experts, each by itself."""
    step = cost.workload.mean_decode
    return sum(
        cost.experts(task, cost.topology.device(where[page.name]), step, [e]).seconds
        for task in graph
        for e, page in enumerate(task.pages if task.num_experts else ())
    )


def best_by_hand(graph: TaskGraph, cost: CostModel, rooms: dict[str, int]) -> float:
    rows = [row for row in graph.rows if ".experts." in row]
    every = (dict(zip(rows, choice, strict=True)) for choice in product(rooms, repeat=len(rows)))
    fitting = (w for w in every if all(list(w.values()).count(d) <= room for d, room in rooms.items()))
    return min(expert_seconds(graph, cost, where) for where in fitting)


def where_experts(schedule: Schedule) -> dict[str, str]:
    return {row.task: row.device for row in schedule.assignments if ".experts." in row.task}


@pytest.mark.parametrize("seed", range(8))
def test_equal_pages_are_placed_as_well_as_can_be(seed: int) -> None:
    rng = random.Random(seed)
    graph = with_popularity(MODEL, rng)
    first, second = rng.randint(0, 4), rng.randint(0, 3)
    rooms = {"cuda:0": first, "cuda:1": second, "cpu": 6}
    topology = gpus_and_cpu(first, second, 6)
    cost = CostModel(topology, workload=replace(WORK, batch=1))
    schedule = experts_by_popularity(graph, topology, cost)
    schedule.check_memory(graph)
    found = expert_seconds(graph, cost, where_experts(schedule))
    assert found == pytest.approx(best_by_hand(graph, cost, rooms), rel=1e-12)


def test_hot_experts_are_on_the_faster_device() -> None:
    graph = with_popularity(model(MOE, num_hidden_layers=4), random.Random(3))
    dense = sum(page.nbytes for name, page in graph.pages.items() if ".experts." not in name)
    fast = device("cuda:0", BASE + dense + 9 * EXPERT, 1e11)
    topology = machine(device("cpu"), fast)
    schedule = experts_by_popularity(graph, topology, CostModel(topology, workload=WORK))
    where = where_experts(schedule)
    picks = {p.name: x for t in graph if t.num_experts for p, x in zip(t.pages, t.popularity, strict=True)}
    hot = [picks[row] for row, name in where.items() if name == "cuda:0"]
    cold = [picks[row] for row, name in where.items() if name == "cpu"]
    assert hot
    assert cold
    assert min(hot) >= max(cold)
    assert {row.device for row in schedule.assignments if ".experts." not in row.task} == {"cuda:0"}
    assert by_popularity(graph) == sorted(picks, key=lambda row: -picks[row])


def test_equally_popular_experts_are_taken_in_order() -> None:
    assert by_popularity(MODEL) == [f"layers.1.experts.{e}" for e in range(6)]
    topology = gpus_and_cpu(2, 1, 6)
    schedule = experts_by_popularity(MODEL, topology, CostModel(topology, workload=WORK))
    assert list(where_experts(schedule).values()) == ["cuda:0"] * 2 + ["cuda:1"] + ["cpu"] * 3
    assert schedule.policy == "experts by popularity"


def test_rules_stay() -> None:
    topology = gpus_and_cpu(2, 1, 6)
    fixed = {"layers.1.experts.0": "cpu", "head": "cpu"}
    schedule = experts_by_popularity(MODEL, topology, CostModel(topology, workload=WORK), fixed)
    assert {row: schedule.rows[row].device for row in fixed} == fixed
    assert schedule.rows["layers.1.experts.1"].device == "cuda:0"


def test_tied_embeddings_need_their_room_once() -> None:
    tied = model(DENSE, tie_word_embeddings=True)
    need = tied.nbytes + int(tied.kv_bytes_per_token * 64) + int(tied.working_bytes(1, 20, 30))
    topology = machine(device("cpu", GIB), device("cuda:0", need, 1e11))
    schedule = experts_by_popularity(tied, topology, CostModel(topology, workload=WORK))
    assert schedule.devices_used() == ("cuda:0",)


def test_what_does_not_fit_says_so() -> None:
    small = machine(device("cpu", BASE + DENSE_BYTES // 2), device("cuda:0", BASE, 1e11))
    with pytest.raises(OutOfMemory, match=r"the dense tasks of deepseek_v3 need .* on one device; .* on cpu") as error:
        experts_by_popularity(MODEL, small, CostModel(small, workload=WORK))
    assert error.value.need > capacity(small.device("cpu")) - BASE
    crowded = gpus_and_cpu(2, 1, 2)
    with pytest.raises(OutOfMemory, match=r"layers.1.experts.5 of deepseek_v3 needs .*already there is"):
        experts_by_popularity(MODEL, crowded, CostModel(crowded, workload=WORK))
    idle = machine(device("cuda:0", usable=False, why_not_usable="no driver"))
    with pytest.raises(InvalidInput, match=r"no device here can compute \(cuda:0: no driver\)"):
        experts_by_popularity(MODEL, idle, CostModel(idle, workload=WORK))
