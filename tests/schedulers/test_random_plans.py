"""Hundreds of small machines and models: every plan is valid, and none chosen is slower than a trivial one."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
from machines import random_machine, random_model

from ciuic_runtime.devices.errors import OutOfMemory
from ciuic_runtime.schedulers import scheduler as scheduler_module
from ciuic_runtime.schedulers.calibration import Calibration
from ciuic_runtime.schedulers.cost import CostModel
from ciuic_runtime.schedulers.draft import ScheduleDraft
from ciuic_runtime.schedulers.graph import TaskGraph
from ciuic_runtime.schedulers.memory import capacity, memory_need
from ciuic_runtime.schedulers.policies.trivial import all_on, by_speed, fastest_first, split_by_speed
from ciuic_runtime.schedulers.predict import predict
from ciuic_runtime.schedulers.schedule import Schedule
from ciuic_runtime.schedulers.scheduler import TaskScheduler
from ciuic_runtime.schedulers.simulate import simulate
from ciuic_runtime.schedulers.workload import Goal, Workload

CASES = 300


def goal_value(schedule: Schedule, graph: TaskGraph, cost: CostModel, goal: Goal) -> float:
    p, work = predict(schedule, graph, cost), cost.workload
    if goal == "first-token":
        return p.first_token_s
    return p.first_token_s + (work.max_tokens - 1) * work.batch / p.decode_tokens_per_s


def fits(schedule: Schedule, graph: TaskGraph) -> bool:
    need = memory_need(schedule, graph, schedule.workload)
    return all(n.total <= capacity(schedule.topology.device(name)) for name, n in need.items())


@pytest.mark.parametrize("seed", range(10))
def test_no_plan_loses_to_a_trivial_one(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_module, "_registered", {})
    planned = 0
    for case in range(CASES // 10):
        rng = random.Random(f"{seed}/{case}")
        graph = random_model(rng)
        work = Workload(rng.choice([1, 20, 700]), rng.choice([1, 2, 100]), rng.choice([1, 3, 16]))
        need = graph.nbytes + graph.working_bytes(work.batch, work.prompt_tokens, work.context)
        topology = random_machine(rng, int(need + graph.kv_bytes_per_token * work.cache_tokens))
        cost = CostModel(topology, workload=work)
        goal: Goal = rng.choice(["latency", "throughput", "first-token"])

        def scattered(g: TaskGraph, t: object, c: CostModel, rng: random.Random = rng) -> Schedule:
            draft = ScheduleDraft(g, topology, c.workload)  # noqa: B023
            for row in g.rows:
                draft.put(row, rng.choice(topology.compute_devices).name)  # noqa: B023
            return draft.freeze("scattered")

        monkeypatch.setitem(scheduler_module._registered, "scattered", scattered)
        trivial = [all_on(graph, topology, cost, device=d.name) for d in by_speed(topology, cost)]
        trivial += [fastest_first(graph, topology, cost), split_by_speed(graph, topology, cost)]
        for schedule in trivial:
            schedule.validate(graph)
        possible = [goal_value(s, graph, cost, goal) for s in trivial if fits(s, graph)]
        error = rng.choice([0.0, 0.4])
        scheduler = TaskScheduler(topology, goal, work, calibration=Calibration(model_error=error))
        try:
            chosen = scheduler.schedule(graph)
        except OutOfMemory:
            assert not possible, f"{seed}/{case}: a trivial plan fits"
            continue
        planned += 1
        chosen.validate(graph)
        assert fits(chosen, graph), f"{seed}/{case}"
        assert chosen.predicted == predict(chosen, graph, replace(cost, calibration=scheduler.calibration))
        value = goal_value(chosen, graph, cost, goal)
        assert value <= min(possible, default=value) * (1 + 1e-9), f"{seed}/{case}: {value} against {possible}"
        assert [c.name for c in chosen.candidates if not c.why_not] == [chosen.policy]
        assert Schedule.from_dict(json.loads(chosen.to_json())) == chosen
        assert str(chosen)
    assert planned >= CASES // 20


@pytest.mark.parametrize("seed", range(20))
def test_random_placements_simulate(seed: int) -> None:
    """Time passes without gaps or overlaps, every task once (or once per device, for experts), copies only between
    devices that differ."""
    rng = random.Random(seed)
    graph = random_model(rng)
    topology = random_machine(rng, graph.nbytes)
    work = Workload(rng.choice([1, 30, 600]), 3, rng.choice([1, 5]))
    draft = ScheduleDraft(graph, topology, work)
    for row in graph.rows:
        draft.put(row, rng.choice(topology.compute_devices).name)
    schedule = draft.freeze("random")
    schedule.validate(graph)
    trace = simulate(schedule, graph, CostModel(topology, workload=work))
    assert trace.events[0].start == 0
    assert all(a.end == b.start for a, b in zip(trace.events, trace.events[1:], strict=False))
    assert trace.tokens("prefill") == work.batch * work.prompt_tokens
    assert trace.tokens("decode") == 2 * work.batch
    for event in trace.events:
        src, arrow, dst = event.lane.partition(" -> ")
        assert (event.kind == "copy") == bool(arrow)
        assert src != dst
        if event.kind == "compute" and not event.task.endswith(".experts"):
            assert event.lane == schedule.device_of(event.task)
    for step in range(len(trace.steps)):
        names = [e.task for e in trace.events if e.step == step and e.kind == "compute"]
        assert list(dict.fromkeys(names)) == [task.name for task in graph]
    assert sum(e.seconds for e in trace.events) == pytest.approx(trace.steps[-1].end)
