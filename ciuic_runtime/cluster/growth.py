"""Whether a plan over more nodes is worth moving to, and what such plans there are.
Knows plans and their forecasts; who looks for the nodes, and how a model is moved, is `host.py`'s business."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from ciuic_runtime.curves import load_calibration
from ciuic_runtime.devices.errors import OutOfMemory
from ciuic_runtime.devices.spec import Topology
from ciuic_runtime.devices.threads import with_threads
from ciuic_runtime.engine.setup import Setup, what_counts
from ciuic_runtime.schedulers.cost import CostModel
from ciuic_runtime.schedulers.memory import limit_memory, node_of
from ciuic_runtime.schedulers.policies.pipeline import pipeline_throughput
from ciuic_runtime.schedulers.schedule import Schedule


@dataclass(frozen=True)
class Choice:
    setup: Setup  # to go on with; its schedule is the one before where that stays
    moves: bool
    why: str
    known: Setup  # that knows the new nodes, with the schedule before


def choose(now: Setup, topology: Topology, new: Collection[str], smaller: bool) -> Choice:
    """Over a topology that has the nodes `new` besides. `smaller`: the plan lost nodes, and any gain is worth it, where
    else it has to be more than the model may be wrong."""
    known = replace(now, topology=with_threads(topology, now.config.threads))
    known = replace(known, calibration=load_calibration(now.model, known.topology, now.config.kernels))
    current = replace(known, schedule=known.forecast(now.schedule.workload))
    nodes = ", ".join(sorted(new))
    able = [one for one in _plans(known) if one.schedule.predicted and set(new) & nodes_used(one.schedule)]
    if not able or current.schedule.predicted is None:
        because = "".join(f"; {why}" for why in [known.left_out(known.topology)] if why)
        why = f"no plan that the stages of a cluster can carry out would use {nodes}{because}"
        return Choice(known, False, why, known)
    best = min(able, key=lambda one: seconds(one.schedule))
    gain = seconds(current.schedule) / seconds(best.schedule) - 1
    error = 0.0 if smaller else known.calibration.model_error
    if gain <= error:
        within = "" if smaller else f", and it takes more than the model's error of {error:.0%} to move"
        return Choice(known, False, f"a plan with {nodes} is forecast {_times(gain)}{within}", known)
    return Choice(best, True, f"a plan with {nodes} is forecast {_times(gain)}", known)


def seconds(schedule: Schedule) -> float:
    """What the goal minimises, as forecast: the first token, or the whole workload."""
    assert schedule.predicted is not None, "asked for where forecasts are known"
    work, first = schedule.workload, schedule.predicted.first_token_s
    if schedule.goal == "first-token":
        return first
    return first + (work.max_tokens - 1) * work.batch / schedule.predicted.decode_tokens_per_s


def nodes_used(schedule: Schedule) -> set[str]:
    return {node_of(name) for name in schedule.places_used()}


def _plans(known: Setup) -> list[Setup]:
    """The planner's, and stages that are equally busy: it weighs one pass at a time, and here several are under way."""
    try:
        planned = known.over(known.topology)
    except OutOfMemory:  # which the plan before does, too
        return []
    found = [planned]
    try:
        balanced = replace(planned, schedule=_balanced(planned))
    except OutOfMemory:
        return found
    return [*found, replace(balanced, schedule=balanced.forecast(known.schedule.workload))]


def _balanced(planned: Setup) -> Schedule:
    config, graph, room, able = planned.config, planned.model.graph, planned.room, planned.able(planned.topology)
    rules, budgets = what_counts(config.placement, config.memory, able)
    topology = limit_memory(able, budgets)
    fixed = rules.resolve(graph, topology, room) if rules else {}
    cost = CostModel(topology, planned.model.format, planned.calibration, room)
    return replace(pipeline_throughput(graph, topology, cost, fixed), goal=planned.schedule.goal)


def _times(gain: float) -> str:
    return f"{gain:.0%} faster" if gain >= 0 else f"{1 / (1 + gain) - 1:.0%} slower"
