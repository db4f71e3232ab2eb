"""A schedule cut into stages: whole layers, each task in one of them, names as their node knows them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.devices.spec import DeviceSpec, Link, Topology
from ciuic_runtime.model import Model
from ciuic_runtime.schedulers.draft import schedule_of
from ciuic_runtime.schedulers.graph import TaskGraph
from ciuic_runtime.schedulers.schedule import Schedule
from ciuic_runtime.schedulers.stages import stages_of
from ciuic_runtime.schedulers.workload import Workload

GRAPH = Model("deepseek-v2-lite", "int4").graph
LAYERS = [t.layer for t in GRAPH if t.layer is not None]
LAST = max(LAYERS)


def cpu(name: str) -> DeviceSpec:
    return DeviceSpec(
        name=name, kind="CPU", memory_bytes=64 << 30, memory_bandwidth=5e10, matrix_rates={"bfloat16": 1e12},
        basis="estimated",
    )  # fmt: skip


def split(graph: TaskGraph, *ends: int, names: tuple[str, ...] = ("node0/cpu", "node1/cpu", "node2/cpu")) -> Schedule:
    """Layers up to the first end on the first device, and so on; the head with the last layer."""
    devices = [cpu(name) for name in names]
    links = (Link("node0/cpu", "node1/cpu", 1e9, 1e-4),) if len(names) > 1 else ()

    def device(layer: int | None, kind: str) -> str:
        layer = layer if layer is not None else (0 if kind == "embedding" else LAST)
        return names[sum(layer > end for end in ends)]

    where = {row: device(task.layer, task.kind) for task in graph for row, _ in task.rows}
    return schedule_of(graph, Topology(tuple(devices), links), Workload(), where, "by hand")


def test_runs_of_layers_on_a_node_are_stages_with_names_of_their_own() -> None:
    stages = stages_of(split(GRAPH, 3, 20), GRAPH)
    assert [s.node for s in stages] == ["node0", "node1", "node2"]
    assert [sorted({t.layer for t in s.graph if t.layer is not None}) for s in stages] == [
        list(range(4)), list(range(4, 21)), list(range(21, LAST + 1)),
    ]  # fmt: skip
    assert [t.name for s in stages for t in s.graph] == [t.name for t in GRAPH]
    assert [s.graph.given for s in stages] == [(), ("layers.3.experts",), ("layers.20.experts",)]
    for stage in stages:
        stage.schedule.validate(stage.graph)
        assert stage.schedule.devices_used() == ("cpu",)
        assert not stage.schedule.topology.links
    assert sum(s.graph.nbytes for s in stages) == GRAPH.nbytes


@pytest.mark.parametrize("count", [1, 2, 4, 27])
def test_one_device_is_cut_into_as_many_as_are_asked_for(count: int) -> None:
    schedule = split(GRAPH, names=("cpu",))
    stages = stages_of(schedule, GRAPH, count)
    assert len(stages) == count
    assert [t.name for s in stages for t in s.graph] == [t.name for t in GRAPH]
    sizes = [s.graph.nbytes for s in stages]
    if count in (2, 4):
        assert max(sizes) < 1.35 * min(sizes)


def test_more_stages_than_nodes_cut_the_largest() -> None:
    stages = stages_of(split(GRAPH, 3), GRAPH, 3)
    assert [s.node for s in stages] == ["node0", "node1", "node1"]


@pytest.mark.parametrize(
    ("schedule", "count", "says"),
    [
        (split(GRAPH, 3, 20), 2, "2 stages were asked for, and the schedule has 3"),
        (split(GRAPH, names=("cpu",)), 28, "there are 27 layers"),
    ],
)
def test_what_cannot_be_cut_so_is_refused(schedule: Schedule, count: int, says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        stages_of(schedule, GRAPH, count)


def test_a_layer_that_is_spread_over_nodes_is_refused() -> None:
    schedule = split(GRAPH, 3)
    rows = tuple(
        replace(r, device="node0/cpu", home="node0/cpu") if r.task == "layers.9.experts.5" else r
        for r in schedule.assignments
    )
    with pytest.raises(InvalidInput, match=r"layers.9.attention_norm to layers.9.experts are spread over node0, node1"):
        stages_of(replace(schedule, assignments=rows), GRAPH)
