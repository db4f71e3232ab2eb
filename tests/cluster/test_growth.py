"""Whether a plan over more nodes is worth moving to: decided from forecasts alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import ciuic_runtime as ciuic
from ciuic_runtime.cluster.growth import Choice, choose, nodes_used, seconds
from ciuic_runtime.devices.errors import OutOfMemory
from ciuic_runtime.devices.spec import DeviceSpec, Link, Topology
from ciuic_runtime.engine.config import RuntimeConfig
from ciuic_runtime.engine.setup import Setup, set_up
from ciuic_runtime.models.checkpoint import open_checkpoint
from ciuic_runtime.ops.native import kernels
from ciuic_runtime.schedulers.calibration import ESTIMATED_ERROR
from ciuic_runtime.schedulers.workload import Workload

pytestmark = pytest.mark.skipif(kernels() is None, reason="the native kernels are not built here")

SLOW, FAST = 1e7, 1e11  # operations/s: slow enough that calls between nodes count for little


def nodes(*rates: float) -> Topology:
    """One processor on each, with links of 2 ms between all of them."""
    cpus = tuple(
        DeviceSpec(
            f"node{i}/cpu", "CPU", memory_bytes=1 << 30, memory_bandwidth=20e9, cores=4, threads=4, basis="estimated",
            matrix_rates=dict.fromkeys(("float32", "bfloat16", "int8"), rate), launch_overhead=0.0,
        )
        for i, rate in enumerate(rates)
    )  # fmt: skip
    names = [d.name for d in cpus]
    return Topology(cpus, tuple(Link(a, b, 1e9, 2e-3, "measured") for a in names for b in names if a != b))


def setup(model: Path, topology: Topology, **settings: Any) -> Setup:
    work = Workload(20, 30, 8)
    known = {"max_model_len": 128, "max_num_seqs": 8, "workload": work} | settings
    return set_up(open_checkpoint(model), RuntimeConfig(executor="ray", **known), None, topology)


def grown(model: Path, *rates: float, smaller: bool = False, **settings: Any) -> Choice:
    """From the first node to all of them."""
    whole = nodes(*rates)
    now = setup(model, whole.only(["node0/cpu"]), **settings)
    new = {f"node{i}" for i in range(1, len(rates))}
    return choose(now, whole, new, smaller)


def test_nodes_that_make_it_faster_by_more_than_the_models_error_are_moved_to(tiny_int4: Path) -> None:
    assert ESTIMATED_ERROR == 1.4
    choice = grown(tiny_int4, *[SLOW] * 4)
    assert choice.moves
    assert nodes_used(choice.setup.schedule) == {f"node{i}" for i in range(4)}, "stages that work at the same time"
    assert "% faster" in choice.why


def test_a_gain_within_the_models_error_moves_only_a_plan_that_had_lost_nodes(tiny_int4: Path) -> None:
    stays, moves = (grown(tiny_int4, SLOW, SLOW, smaller=smaller) for smaller in (False, True))
    assert not stays.moves
    assert "takes more than the model's error of 140% to move" in stays.why
    assert nodes_used(stays.setup.schedule) == {"node0"}
    assert [d.name for d in stays.setup.topology.devices] == ["node0/cpu", "node1/cpu"], "a loss may need it"
    assert moves.moves
    assert nodes_used(moves.setup.schedule) == {"node0", "node1"}
    assert seconds(moves.setup.schedule) < seconds(stays.setup.schedule)


def test_a_slower_node_is_not_moved_to(tiny_int4: Path) -> None:
    choice = grown(tiny_int4, FAST, SLOW, smaller=True)
    assert not choice.moves
    assert nodes_used(choice.setup.schedule) == {"node0"}


def test_rules_and_budgets_hold_for_the_plan_that_is_moved_to(tiny_int4: Path) -> None:
    rules = ciuic.Placement().put("layers.0.*", on="node0/cpu").put("embedding", on="node0/cpu")
    choice = grown(tiny_int4, SLOW, FAST, placement=rules, memory={"node0/cpu": 1 << 29})
    assert choice.moves
    schedule = choice.setup.schedule
    assert {schedule.device_of(t.name) for t in choice.setup.model.graph if t.layer == 0} == {"node0/cpu"}
    assert schedule.device_of("head") == "node1/cpu"
    assert choice.setup.schedule.workload == Workload(20, 30, 8)


def test_what_a_lost_node_was_given_no_longer_counts(tiny_int4: Path) -> None:
    both = nodes(SLOW, SLOW)
    rules = ciuic.Placement().put("layers.3.*", on="node1/cpu").put("head", on="node1/cpu")
    now = setup(tiny_int4, both, placement=rules.put("final_norm", on="node1/cpu"), memory={"node1/cpu": 1 << 28})
    left = now.without_nodes({"node1"})
    assert nodes_used(left.schedule) == {"node0"}
    three = replace(both, devices=(both.devices[0], replace(both.devices[1], name="node2/cpu")), links=())
    choice = choose(left, three, {"node2"}, smaller=True)
    assert choice.moves
    assert nodes_used(choice.setup.schedule) == {"node0", "node2"}


def test_a_model_too_large_for_the_nodes_is_not_read_from_this_machines_disk(tiny_int4: Path) -> None:
    small = nodes(FAST, FAST)
    small = replace(small, devices=tuple(replace(d, memory_bytes=1 << 20) for d in small.devices))
    with pytest.raises(OutOfMemory, match="node0/cpu"):
        setup(tiny_int4, small)


def test_a_rule_for_several_nodes_holds_for_those_that_are_left(tiny_int4: Path) -> None:
    both = ["node0/cpu", "node1/cpu"]
    rules = ciuic.Placement().put("*", on=both).put("layers.3", on=both, shares=(0, 1))
    now = setup(tiny_int4, nodes(SLOW, SLOW, SLOW), placement=rules)
    left = now.without_nodes({"node1"})
    assert nodes_used(left.schedule) == {"node0"}, "the third one is not in the rules"


def test_a_model_on_native_kernels_takes_no_gpu_of_a_node_that_joins(tiny_int4: Path) -> None:
    slow = nodes(SLOW, SLOW)
    gpu = replace(slow.devices[1], name="node1/cuda:0", kind="GPU", matrix_rates=dict.fromkeys(("bfloat16",), 1e15))
    now = setup(tiny_int4, slow.only(["node0/cpu"]))
    choice = choose(now, replace(slow, devices=(slow.devices[0], gpu), links=()), {"node1"}, smaller=True)
    assert not choice.moves
    assert f"node1/cuda:0 cannot compute with the {now.kernels} kernels that this model was opened with" in choice.why
    mixed = replace(slow, devices=(*slow.devices, gpu))
    choice = choose(now, mixed, {"node1"}, smaller=True)
    assert choice.moves
    assert set(choice.setup.schedule.devices_used()) == {"node0/cpu", "node1/cpu"}
