"""Tiering: the linear program bounds what whole pages can reach, and rounding stays within a page of it."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from machines import DENSE, DISK, GIB, MOE, device, machine, model, random_machine, random_model

from ciuic_runtime.devices.errors import InvalidInput, OutOfMemory
from ciuic_runtime.devices.spec import Link, Topology
from ciuic_runtime.schedulers.assignment import Paging
from ciuic_runtime.schedulers.cost import CostModel
from ciuic_runtime.schedulers.graph import TaskGraph
from ciuic_runtime.schedulers.memory import STREAM_SLOTS, capacity, memory_need
from ciuic_runtime.schedulers.policies.paged import paged_on
from ciuic_runtime.schedulers.policies.tiering import (
    Option,
    PageClass,
    Tiers,
    relax,
    solve,
    tiering,
    tiering_bound,
)
from ciuic_runtime.schedulers.policies.trivial import all_on
from ciuic_runtime.schedulers.schedule import Schedule
from ciuic_runtime.schedulers.workload import Workload

WORK = Workload(20, 10)
BIG = model(MOE, num_hidden_layers=6, n_routed_experts=16, moe_intermediate_size=64)
SOLVER = 1e-6  # relative, what a bound may be off


# The program on numbers


def random_program(rng: random.Random) -> tuple[list[PageClass], Tiers]:
    """Up to four classes of a few pages, so that all their whole tierings can be listed."""
    disk = rng.random() < 0.5
    bandwidth = {"up": 10 ** rng.uniform(0, 2)} | ({"disk": 10 ** rng.uniform(-1, 1)} if disk else {})
    options = [Option("gpu", "gpu"), Option("gpu", "cpu", ("up",), ("gpu",)), Option("cpu", "cpu")]
    options += (
        [Option("gpu", "disk", ("up", "disk"), ("gpu", "cpu")), Option("cpu", "disk", ("disk",), ("cpu",))]
        if disk
        else []
    )
    num_classes = rng.randint(1, 4)
    classes = []
    for _ in range(num_classes):
        nbytes, uses = rng.randint(1, 20), rng.choice([1.0, rng.uniform(0.05, 1)])
        speed = {"gpu": 10 ** rng.uniform(1, 3), "cpu": 10 ** rng.uniform(0, 2)}
        devices = rng.choice([("gpu", "cpu")] * 6 + [("gpu",), ("cpu",)])
        seconds = tuple((d, nbytes * uses / speed[d]) for d in devices)
        count = rng.randint(1, {1: 8, 2: 4, 3: 2, 4: 1}[num_classes])
        classes.append(PageClass(count, nbytes, nbytes * uses, nbytes, rng.choice([0.0, 0.0, 1.5]), seconds))
    total = sum(c.count * (c.nbytes + c.cache_bytes) for c in classes)
    room = {"gpu": total * rng.uniform(0.1, 1.0), "cpu": total * rng.uniform(0.1, 1.1)}
    return classes, Tiers(tuple(options), room, bandwidth, {"gpu": 2, "cpu": int(disk)})


def shares(count: int, options: int) -> Iterator[tuple[int, ...]]:
    if options == 1:
        yield (count,)
        return
    for first in range(count + 1):
        for rest in shares(count - first, options - 1):
            yield (first, *rest)


def seconds_of(classes: list[PageClass], tiers: Tiers, counts: Any) -> float:
    """T by hand; infinite where it does not fit or is not allowed."""
    compute, reads = 0.0, dict.fromkeys(tiers.bandwidth, 0.0)
    held, slots = dict.fromkeys(tiers.room, 0.0), dict.fromkeys(tiers.room, 0)
    for one, row in zip(classes, counts, strict=True):
        for number, option in zip(row, tiers.options, strict=True):
            if not number:
                continue
            compute += number * dict(one.seconds).get(option.device, math.inf)
            for way in option.route:
                reads[way] += number * one.moved / tiers.bandwidth[way]
            if option.home in held:
                held[option.home] += number * one.nbytes
            held[option.device] += number * one.cache_bytes
            for name in option.through:
                slots[name] = max(slots[name], one.slot)
    slots["cpu"] = max(one.slot for one in classes) if slots["cpu"] else 0
    if any(held[d] + tiers.slots[d] * slots[d] > tiers.room[d] for d in held):
        return math.inf
    return max(compute, *reads.values())


def best_by_hand(classes: list[PageClass], tiers: Tiers) -> float:
    every = product(*(shares(one.count, len(tiers.options)) for one in classes))
    return min(seconds_of(classes, tiers, counts) for counts in every)


def page_worth(classes: list[PageClass], tiers: Tiers) -> float:
    """The most that one page can add to one of the times."""
    slowest = max(seconds for one in classes for _, seconds in one.seconds)
    return max(slowest, max(one.moved for one in classes) / min(tiers.bandwidth.values()))


def check_against_all_tierings(cases: int, seed: str) -> None:
    fitting = optimal = rounded = 0
    for case in range(cases):
        classes, tiers = random_program(random.Random(f"{seed}/{case}"))
        best, found, bound = best_by_hand(classes, tiers), solve(classes, tiers), relax(classes, tiers)
        assert bound <= best * (1 + SOLVER), f"{seed}/{case}"
        assert (found is None) == math.isinf(best), f"{seed}/{case}: {found} where the best is {best}"
        if found is None:
            continue
        fitting += 1
        assert found.bound == bound
        assert found.seconds == pytest.approx(seconds_of(classes, tiers, found.counts), rel=1e-9), f"{seed}/{case}"
        assert bound <= found.seconds * (1 + SOLVER), f"{seed}/{case}"
        assert best <= found.seconds * (1 + SOLVER), f"{seed}/{case}"
        assert found.seconds <= best + page_worth(classes, tiers), f"{seed}/{case}: {found.seconds} and {best}"
        optimal += found.seconds <= best * (1 + SOLVER)
        assert found.counts.sum(axis=1).tolist() == [one.count for one in classes]
        rounded += bool((np.abs(found.counts - found.relaxed) < 1).all())
    assert rounded > 0.75 * fitting, "each number rounded up or down, except where nothing fits so"
    assert fitting > 0.3 * cases
    assert optimal > 0.75 * fitting, f"{optimal} of {fitting}"


def test_whole_pages_come_within_one_page_of_the_best() -> None:
    check_against_all_tierings(80, "quick")


@pytest.mark.slow
def test_whole_pages_come_within_one_page_of_the_best_of_many() -> None:
    check_against_all_tierings(5000, "slow")


def test_the_program_by_hand() -> None:
    """Ten pages of one byte: the GPU takes 1 s for each, the CPU 3 s, the link 2 s. On the GPU six fit, or four and two
    slots: of the six others y stream, computing takes 22 - 2 y and the link 2 y seconds: 11 where y is 5.5."""
    pages = PageClass(10, 1, 1.0, 1, 0.0, (("gpu", 1.0), ("cpu", 3.0)))
    options = (Option("gpu", "gpu"), Option("gpu", "cpu", ("up",), ("gpu",)), Option("cpu", "cpu"))
    tiers = Tiers(options, {"gpu": 6.0, "cpu": 100.0}, {"up": 0.5}, {"gpu": 2, "cpu": 0})
    found = solve([pages], tiers)
    assert found is not None
    assert found.bound == pytest.approx(11.0)
    assert found.relaxed[0].tolist() == pytest.approx([4.0, 5.5, 0.5], abs=1e-5)
    assert found.counts.tolist() in ([[4.0, 5.0, 1.0]], [[4.0, 6.0, 0.0]])
    assert found.seconds == 12.0
    without = solve([pages], replace(tiers, bandwidth={"up": 0.01}))
    assert without is not None
    assert without.counts.tolist() == [[6.0, 0.0, 4.0]], "a slow link is not worth the slots"
    assert without.seconds == 18.0


def test_of_equal_times_the_lighter_tiering_is_taken() -> None:
    """The disk takes 100 s whatever else happens: what fits on the GPU is there all the same."""
    cold = PageClass(2, 100, 50.0, 100, 0.0, (("gpu", 1.0), ("cpu", 2.0)))
    warm = PageClass(3, 1, 1.0, 1, 0.0, (("gpu", 1.0), ("cpu", 2.0)))
    options = (Option("gpu", "gpu"), Option("cpu", "cpu"), Option("cpu", "disk", ("disk",), ("cpu",)))
    found = solve([cold, warm], Tiers(options, {"gpu": 3.0, "cpu": 199.0}, {"disk": 1.0}, {"gpu": 2, "cpu": 1}))
    assert found is not None
    assert found.counts.tolist() == [[0.0, 0.0, 2.0], [3.0, 0.0, 0.0]]


def test_more_memory_makes_the_bound_no_worse_and_whole_pages_by_no_more_than_one() -> None:
    for case in range(20):
        rng = random.Random(f"more/{case}")
        classes, tiers = random_program(rng)
        before, whole = math.inf, math.inf
        for share in (0.3, 0.6, 1.0, 1.5, 3.0):
            wider = replace(tiers, room={d: share * room for d, room in tiers.room.items()})
            bound, found = relax(classes, wider), solve(classes, wider)
            assert bound <= before * (1 + SOLVER) or math.isinf(before), f"{case}: {share}"
            assert found is not None or math.isinf(whole), f"{case}: {share}"
            if found is not None:
                assert found.seconds <= whole + page_worth(classes, tiers), f"{case}: {share}"
                whole = found.seconds
            before = bound


# Where weights may be stored


def stored(computes: str, home: str, paging: Paging | None = None) -> Schedule:
    """The head of a model is computed on `computes` and stored at `home`, everything else is on the CPU."""
    names = ("cpu", "cuda:0", "node1/cpu", "node1/cuda:0", "node1/cuda:1")
    devices = [device(name) for name in names] + [device("sim:0", usable=False, why_not_usable="not asked for")]
    topology = machine(*devices, DISK, links=(Link("node1/cuda:0", "node1/cuda:1", 1e11),))
    schedule = all_on(BIG, topology, CostModel(topology, workload=WORK), device="cpu")
    rows = tuple(replace(r, device=computes, home=home) if r.task == "head" else r for r in schedule.assignments)
    return replace(schedule, assignments=rows, paging=paging)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (("cuda:0", "cpu"), ""),
        (("cuda:0", "disk"), ""),  # a GPU streams from a disk without a cache
        (("node1/cuda:1", "node1/cuda:0"), ""),  # by the declared link
        (("cpu", "disk"), "head is stored on disk and computed on cpu; paging is not planned here"),
        (
            ("cpu", "cuda:0"),
            "head is stored on cuda:0 and computed on cpu; no way from cuda:0 is known: declare a link",
        ),
        (("cuda:0", "node1/cpu"), "no way from node1/cpu is known"),
        (("node1/cuda:0", "node1/cuda:1"), "no way from node1/cuda:1 is known"),
        (("cuda:0", "sim:0"), "head is stored on sim:0 and computed on cuda:0; sim:0 cannot be used: not asked for"),
    ],
)
def test_weights_are_stored_where_there_is_a_way_from(where: tuple[str, str], message: str) -> None:
    if not message:
        stored(*where).validate(BIG)
        return
    with pytest.raises(InvalidInput, match=message):
        stored(*where).validate(BIG)


def test_a_cpu_reads_from_a_disk_through_a_cache() -> None:
    stored("cpu", "disk", Paging("cpu", "disk", BIG.nbytes)).validate(BIG)
    with pytest.raises(InvalidInput, match="paging is between disk and node1/cpu only"):
        stored("cpu", "disk", Paging("node1/cpu", "disk", BIG.nbytes)).validate(BIG)


def test_what_is_on_a_disk_takes_no_memory_but_its_slots() -> None:
    need = memory_need(stored("cuda:0", "disk"), BIG, WORK)
    assert need.keys() == {"cpu", "cuda:0"}
    assert need["cuda:0"].weights == STREAM_SLOTS * BIG.rows["head"].nbytes
    assert need["cpu"].weights == BIG.nbytes - BIG.rows["head"].nbytes


# The policy


def homes(schedule: Schedule) -> set[tuple[str, str]]:
    return {(row.device, row.home) for row in schedule.assignments}


def base(graph: TaskGraph, work: Workload = WORK) -> int:
    cache = int(graph.kv_bytes_per_token * work.cache_tokens)
    return cache + int(graph.working_bytes(work.batch, work.prompt_tokens, work.context)) + 1


def pc(graph: TaskGraph, gpu: float, cpu: float, link: float = 2e10, disk: bool = False) -> Topology:
    """A CPU, and a GPU ten times as fast, with room for such shares of the model."""
    devices = [
        device("cpu", memory=base(graph) + int(cpu * graph.nbytes)),
        device("cuda:0", memory=base(graph) + int(gpu * graph.nbytes), bandwidth=1e11, rate=1e13),
    ]
    return machine(
        *devices, *([DISK] if disk else []), links=(Link("cpu", "cuda:0", link), Link("cuda:0", "cpu", link))
    )


def test_what_fits_on_the_gpu_is_there() -> None:
    topology = pc(BIG, 1.0, 1.0)
    schedule = tiering(BIG, topology, CostModel(topology, workload=WORK))
    assert homes(schedule) == {("cuda:0", "cuda:0")}
    assert schedule.policy == "tiering"
    assert schedule.paging is None


def test_a_fast_link_streams_and_a_slow_one_does_not() -> None:
    for link, expected in (
        (1e12, {("cuda:0", "cuda:0"), ("cuda:0", "cpu")}),
        (1e7, {("cuda:0", "cuda:0"), ("cpu", "cpu")}),
    ):
        topology = pc(BIG, 0.5, 1.0, link)
        schedule = tiering(BIG, topology, CostModel(topology, workload=WORK))
        assert homes(schedule) == expected
        schedule.check_memory(BIG)


def test_streamed_pages_have_two_slots() -> None:
    topology = pc(BIG, 0.5, 1.0, link=1e12)
    schedule = tiering(BIG, topology, CostModel(topology, workload=WORK))
    streamed = [BIG.rows[r.task].nbytes for r in schedule.assignments if (r.device, r.home) == ("cuda:0", "cpu")]
    need = memory_need(schedule, BIG, WORK)
    weights = schedule.weight_bytes()
    assert need["cuda:0"].weights == weights["cuda:0"] + STREAM_SLOTS * max(streamed)
    assert need["cpu"].weights == weights["cpu"] == sum(streamed)
    assert (need["cpu"].working, need["cpu"].cache) == (0, 0), "nothing is computed there"
    assert sum(weights.values()) == BIG.nbytes


def test_dense_tasks_of_a_layer_stay_together() -> None:
    topology = pc(BIG, 0.1, 1.0)
    schedule = tiering(BIG, topology, CostModel(topology, workload=WORK))
    for layer in BIG.layers:
        assert len({(r.device, r.home) for t in layer.tasks if not t.num_experts for r in [schedule.rows[t.name]]}) == 1


@pytest.mark.parametrize("graph", [BIG, model(DENSE, tie_word_embeddings=True)], ids=["moe", "tied"])
def test_a_cpu_and_a_disk_are_paged(graph: TaskGraph) -> None:
    """The same kind of schedule as `paged_on` makes, with the same memory for pages."""
    largest = max(page.nbytes for page in graph.pages.values())
    topology = machine(device("cpu", memory=base(graph) + largest + graph.nbytes // 2), DISK)
    cost = CostModel(topology, workload=WORK)
    schedule, paged = tiering(graph, topology, cost), paged_on(graph, topology, cost, device="cpu", disk="disk")
    assert schedule.paging is not None
    assert paged.paging is not None
    assert (schedule.paging.device, schedule.paging.disk) == ("cpu", "disk")
    assert schedule.paging.cache_bytes == pytest.approx(paged.paging.cache_bytes, abs=2)
    experts = {schedule.rows[row].home for row in graph.rows.keys() - graph.by_name.keys()}
    assert experts <= {"disk"}, "which experts stay is for the cache"
    whole = machine(device("cpu"), DISK)
    assert homes(tiering(graph, whole, CostModel(whole, workload=WORK))) == {("cpu", "cpu")}


def test_three_tiers() -> None:
    """Neither memory holds all: hot and dense pages are pinned, the disk has the rest."""
    topology = pc(BIG, 0.3, 0.4, disk=True)
    schedule = tiering(BIG, topology, CostModel(topology, workload=WORK))
    schedule.check_memory(BIG)
    assert {home for _, home in homes(schedule)} >= {"cuda:0", "disk"}
    for row in schedule.assignments:
        if (row.device, row.home) == ("cpu", "disk"):
            assert schedule.paging is not None
    assert sum(schedule.weight_bytes().values()) == BIG.nbytes


def test_hot_experts_are_on_the_gpu() -> None:
    rng = random.Random(1)
    tasks = []
    for task in BIG.tasks:
        weights = [rng.paretovariate(1.0) for _ in range(task.num_experts)]
        picks = tuple(min(1.0, task.experts_per_token * w / sum(weights)) for w in weights)
        tasks.append(replace(task, popularity=picks))
    graph = replace(BIG, tasks=tuple(tasks))
    topology = pc(graph, 0.4, 1.0, link=1e7)
    schedule = tiering(graph, topology, CostModel(topology, workload=WORK))
    picks_by_row = {page.name: p for t in graph if t.num_experts for page, p in zip(t.pages, t.popularity, strict=True)}
    hot = [p for row, p in picks_by_row.items() if schedule.rows[row].device == "cuda:0"]
    cold = [p for row, p in picks_by_row.items() if schedule.rows[row].device == "cpu"]
    assert hot
    assert cold
    assert min(hot) >= max(cold) * 0.95, "but for what two digits do not tell apart"


def test_rules_say_where_rows_are_computed() -> None:
    topology = machine(*pc(BIG, 0.6, 1.0).devices, device("cuda:1", bandwidth=5e10), links=pc(BIG, 1, 1).links)
    fixed = {"layers.2.experts.3": "cuda:1", "layers.1.attention": "cpu", "head": "cuda:0"}
    schedule = tiering(BIG, topology, CostModel(topology, workload=WORK), fixed)
    assert {row: schedule.rows[row].device for row in fixed} == fixed
    assert schedule.rows["layers.2.experts.3"].home == "cuda:1"
    assert schedule.rows["layers.1.attention"].home == "cpu"


def test_no_room_says_so() -> None:
    topology = pc(BIG, 0.2, 0.3)
    cost = CostModel(topology, workload=WORK)
    with pytest.raises(OutOfMemory, match=r"weights in bfloat16 and cache to store, .* or a disk to stream from"):
        tiering(BIG, topology, cost)
    assert tiering_bound(BIG, topology, cost) == math.inf
    tiny = machine(device("cpu", memory=10))
    with pytest.raises(OutOfMemory, match="there is nothing anywhere"):
        tiering(BIG, tiny, CostModel(tiny, workload=WORK))


def test_random_tierings_respect_memory_and_their_bound() -> None:
    made = 0
    for case in range(60):
        rng = random.Random(f"policy/{case}")
        graph, work = random_model(rng), Workload(rng.choice([1, 20, 300]), rng.choice([2, 50]), rng.choice([1, 4]))
        topology = random_machine(rng, base(graph, work) + graph.nbytes)
        kinds = {"GPU" if d.kind == "SIM" else d.kind: d.name for d in topology.devices}
        topology = topology.only(kinds.values())  # one of each, so that more memory changes no choice between devices
        cost = CostModel(topology, workload=work)
        try:
            schedule = tiering(graph, topology, cost)
        except OutOfMemory:
            continue
        made += 1
        schedule.check_memory(graph)
        need = memory_need(schedule, graph, work)
        assert all(one.total <= capacity(topology.device(name)) for name, one in need.items())
        more = machine(
            *(
                replace(d, memory_bytes=4 * GIB, memory_free_bytes=None) if d.can_compute else d
                for d in topology.devices
            ),
            links=topology.links,
        )
        bound, wider = tiering_bound(graph, topology, cost), tiering_bound(graph, more, replace(cost, topology=more))
        assert 0 < wider <= bound * (1 + SOLVER), f"{case}"
    assert made > 30
