"""Every policy on random graphs and machines: what it returns is valid, what it refuses it refuses with a reason."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest
from machines import random_machine, random_model, toy_graph, toy_task

from ciuic_runtime.devices.errors import InvalidInput, OutOfMemory
from ciuic_runtime.devices.spec import Topology
from ciuic_runtime.schedulers.cost import CostModel
from ciuic_runtime.schedulers.draft import Fixed
from ciuic_runtime.schedulers.graph import Page, Task, TaskGraph, Work
from ciuic_runtime.schedulers.policies.paged import paged_on
from ciuic_runtime.schedulers.policies.pipeline import pipeline_latency, pipeline_throughput
from ciuic_runtime.schedulers.policies.popularity import experts_by_popularity
from ciuic_runtime.schedulers.policies.tiering import tiering
from ciuic_runtime.schedulers.policies.trivial import all_on, fastest_first, split_by_speed
from ciuic_runtime.schedulers.schedule import Schedule
from ciuic_runtime.schedulers.workload import Workload

Policy = Callable[[TaskGraph, Topology, CostModel, Fixed], Schedule]
FITTING: dict[str, Policy] = {  # what these return also fits
    "pipeline_latency": pipeline_latency,
    "pipeline_throughput": pipeline_throughput,
    "experts_by_popularity": experts_by_popularity,
    "tiering": tiering,
}


def policies(topology: Topology) -> dict[str, Policy]:
    found: dict[str, Policy] = {"fastest_first": fastest_first, "split_by_speed": split_by_speed, **FITTING}
    found |= {f"all_on {d.name}": partial(all_on, device=d.name) for d in topology.compute_devices}
    for disk in topology.by_kind("DISK"):
        for cpu in topology.by_kind("CPU"):
            found[f"paged_on {cpu.name}"] = partial(paged_on, device=cpu.name, disk=disk.name)
    return found


def random_toy(rng: random.Random) -> TaskGraph:
    """Tasks that depend on any earlier ones, some in layers, some with routed experts, two that share a page."""
    tasks: list[Task] = []
    for layer in range(rng.randint(1, 4)):
        names = [f"layers.{layer}.{part}" for part in rng.sample(["attention", "mlp", "a", "b"], rng.randint(1, 4))]
        for name in names:
            tasks.append(toy_task(name, nbytes=rng.randint(1, 5000), after=earlier(rng, tasks), **cached(rng)))
        if rng.random() < 0.5:
            tasks += routed(rng, layer, tasks)
        if rng.random() < 0.3:
            tasks.append(toy_task(f"extra.{layer}", "other", rng.randint(1, 3000), earlier(rng, tasks)))
    shared = rng.choice([task for task in tasks if not task.num_experts]).pages
    tasks.append(toy_task("head", "head", after=earlier(rng, tasks), pages=shared, nbytes=shared[0].nbytes))
    return toy_graph(*tasks, hidden_bytes_per_token=8.0, working_bytes_per_token=rng.choice([0.0, 4.0]))


def earlier(rng: random.Random, tasks: list[Task]) -> tuple[str, ...]:
    return tuple(task.name for task in rng.sample(tasks, min(len(tasks), rng.randint(0, 3))))


def cached(rng: random.Random) -> dict[str, float]:
    return {"kv_bytes_per_token": rng.choice([0.0, 2.0, 7.5])}


def routed(rng: random.Random, layer: int, tasks: list[Task]) -> list[Task]:
    name, count, nbytes = f"layers.{layer}.experts", rng.randint(2, 6), rng.randint(1, 2000)
    router = toy_task(f"layers.{layer}.router", "router", 100, earlier(rng, tasks))
    picks = rng.randint(1, count)
    weights = [rng.uniform(0.1, 1.0) for _ in range(count)]
    popularity = tuple(picks * w / sum(weights) for w in weights) if rng.random() < 0.5 else ()
    pages = tuple(Page(f"{name}.{e}", nbytes) for e in range(count))
    experts = toy_task(
        name, "experts", after=(tasks[-1].name, router.name), pages=pages,
        work=Work(flops_per_token=10.0, bytes_per_expert=nbytes), num_experts=count, experts_per_token=picks,
        popularity=popularity,
    )  # fmt: skip
    return [router, experts]


def random_rules(rng: random.Random, graph: TaskGraph, topology: Topology) -> Fixed:
    if rng.random() < 0.6:
        return {}
    rows = rng.sample(list(graph.rows), rng.randint(1, max(1, len(graph.rows) // 3)))
    return {row: rng.choice(topology.compute_devices).name for row in rows}


def check(seed: str, made: Counter[str], refused: dict[str, list[str]]) -> None:
    rng = random.Random(seed)
    graph = random_toy(rng) if rng.random() < 0.5 else random_model(rng)
    work = Workload(rng.choice([1, 20, 300]), rng.choice([1, 2, 60]), rng.choice([1, 3]))
    need = graph.nbytes + graph.working_bytes(work.batch, work.prompt_tokens, work.context)
    topology = random_machine(rng, int(need + graph.kv_bytes_per_token * work.cache_tokens))
    cost, fixed = CostModel(topology, workload=work), random_rules(rng, graph, topology)
    for name, policy in policies(topology).items():
        kind = name.partition(" ")[0]
        try:
            schedule = policy(graph, topology, cost, fixed)
        except (OutOfMemory, InvalidInput) as error:
            refused.setdefault(kind, []).append(str(error))
            continue
        made[kind] += 1
        schedule.validate(graph)
        assert {row: schedule.rows[row].device for row in fixed} == fixed, f"{seed}, {name}"
        assert schedule.workload == work
        if name in FITTING:
            schedule.check_memory(graph)
        if rng.random() < 0.25:
            assert policy(graph, topology, cost, fixed) == schedule, f"{seed}, {name}: not the same again"


def check_all(cases: int, seed: str) -> None:
    made: Counter[str] = Counter()
    refused: dict[str, list[str]] = {}
    for case in range(cases):
        check(f"{seed}/{case}", made, refused)
    assert all(made[name] > cases // 4 for name in FITTING), made
    assert refused.keys() <= FITTING.keys()
    assert made.keys() == FITTING.keys() | {"all_on", "fastest_first", "split_by_speed", "paged_on"}
    for reason in (reason for reasons in refused.values() for reason in reasons):
        assert len(reason) > 40
        assert any(word in reason for word in ("try", "would do"))


def test_every_policy_returns_valid_schedules() -> None:
    check_all(200, "quick")


@pytest.mark.slow
def test_every_policy_returns_valid_schedules_of_many() -> None:
    check_all(10_000, "slow")
