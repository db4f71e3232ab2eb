"""What no placement can beat is beaten by none, and is reached where it can be."""

from __future__ import annotations

import random

import pytest
from machines import device, machine, model, random_machine, random_model

from ciuic_runtime.devices.errors import OutOfMemory
from ciuic_runtime.schedulers.bound import decode_bound
from ciuic_runtime.schedulers.cost import CostModel
from ciuic_runtime.schedulers.scheduler import TaskScheduler
from ciuic_runtime.schedulers.workload import Workload


@pytest.mark.parametrize("seed", range(40))
def test_no_candidate_is_forecast_to_beat_the_bound(seed: int) -> None:
    rng = random.Random(seed)
    graph = random_model(rng)
    topology = random_machine(rng, graph.nbytes)
    work = Workload(rng.randint(1, 64), rng.randint(2, 32), rng.randint(1, 4))
    cost = CostModel(topology, graph.format, workload=work)
    bound = decode_bound(graph, topology, cost)
    try:
        schedule = TaskScheduler(topology, workload=work).schedule(graph)
    except OutOfMemory:
        return
    assert bound is not None
    rates = [c.decode_tokens_per_s for c in schedule.candidates if c.feasible]
    assert rates
    assert max(rate for rate in rates if rate is not None) <= bound * (1 + 1e-6)


def test_it_is_reached_on_one_device_with_room_for_everything() -> None:
    graph, work = model(), Workload(16, 8)
    topology = machine(device("cpu"))
    cost = CostModel(topology, graph.format, workload=work)
    schedule = TaskScheduler(topology, workload=work).schedule(graph)
    assert schedule.predicted is not None
    assert decode_bound(graph, topology, cost) == pytest.approx(schedule.predicted.decode_tokens_per_s, rel=1e-6)


def test_with_passes_at_once_devices_share_the_work() -> None:
    graph, work = model(), Workload(16, 8, 2)
    alone, both = (machine(*(device(f"cpu:{i}") for i in range(n))) for n in (1, 2))
    one = decode_bound(graph, alone, CostModel(alone, graph.format, workload=work), at_once=True)
    two = decode_bound(graph, both, CostModel(both, graph.format, workload=work), at_once=True)
    assert one is not None
    assert two == pytest.approx(2 * one, rel=0.02)


def test_there_is_none_where_nothing_fits() -> None:
    graph = model()
    topology = machine(device("cpu", memory=graph.nbytes // 2))
    assert decode_bound(graph, topology, CostModel(topology, graph.format, workload=Workload(8, 8))) is None
