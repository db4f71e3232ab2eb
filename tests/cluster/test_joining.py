"""Nodes that join a cluster while a model runs there: used where that is faster, with the tokens of one process."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from raylets import put_back

import ciuic_runtime as ciuic
from ciuic_runtime.cluster import asking, watch
from ciuic_runtime.cluster.asking import Mailbox, name_of_this_run
from ciuic_runtime.devices.errors import CiuicError, InvalidInput
from ciuic_runtime.devices.ray_nodes import NODE_ID, nodes_of
from ciuic_runtime.devices.ray_session import join
from ciuic_runtime.devices.spec import Topology
from ciuic_runtime.engine.engine import StageLost
from ciuic_runtime.ops.native import kernels

native = pytest.mark.skipif(kernels() is None, reason="the native kernels are not built here")

PROMPTS = [[5, 250, 17, 99, 3, 3, 42] * 12, [7], list(range(60, 100)), [9, 8]]
PARAMS = ciuic.SamplingParams(max_tokens=60, ignore_eos=True, logprobs=2, temperature=1.0, seed=3)
SETTINGS: dict[str, Any] = {"max_model_len": 192, "max_num_seqs": 4, "threads": 1}
CIUIC = [sys.executable, "-c", "import sys; from ciuic_runtime.cli import main; main()"]
FIRST = ciuic.Placement().put("embedding", on="node0/cpu").put("layers.0.*", on="node0/cpu")


def outcome(outputs: list[Any]) -> list[Any]:
    return [(o.token_ids, o.logprobs, o.finish_reason) for o in outputs]


def slow_head(cluster: Any, here: Topology) -> Topology:
    """The head alone, declared so slow that whatever joins is worth a hop."""
    [cpu], [head, *_] = here.by_kind("CPU"), nodes_of(join(cluster.address))
    rates = {"memory_bandwidth": 2e6, "matrix_rates": {"float32": 1e9, "bfloat16": 1e9, "int8": 1e9}}
    return Topology((replace(cpu, name="node0/cpu", facts={**cpu.facts, NODE_ID: head["NodeID"]}, **rates),))


def joined(llm: ciuic.LLM) -> list[str]:
    return [note for note in llm.trace.notes if " joined" in note]


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "PERIOD", 0.5)


@native
def test_a_node_that_joins_is_used_at_once_and_changes_no_token(cluster: Any, tiny_int4: Path, here: Topology) -> None:
    with ciuic.LLM(tiny_int4, devices=here, **SETTINGS) as llm:
        expected = outcome(llm.generate(PROMPTS, PARAMS))
    put_back(cluster, 1)
    with ciuic.LLM(
        tiny_int4, devices=slow_head(cluster, here), executor="ray", address=cluster.address, placement=FIRST,
        use_new_nodes=True, **SETTINGS,
    ) as llm:  # fmt: skip
        assert [s.node for s in llm._host.runner.stages] == ["node0"]
        put_back(cluster, 2)
        outputs: dict[int, Any] = {}
        for _, output in llm.stream(PROMPTS, PARAMS):
            outputs[output.index] = output
            if len(llm._host.runner.stages) == 1:
                time.sleep(0.05)  # so that the node joins in the midst of it
        assert outcome([outputs[i] for i in sorted(outputs)]) == expected
        assert [s.node for s in llm._host.runner.stages] == ["node0", "node1"]
        [note] = joined(llm)
        assert note.startswith("node1 joined: a plan with node1 is forecast ")
        trace = llm.trace
        assert {"node0/cpu", "node1/cpu"} <= {e.lane for e in trace.events}
        assert {e.step for e in trace.events} == set(range(len(trace.steps))), "what was recorded before is kept"
        assert llm.schedule.devices_used() == ("node0/cpu", "node1/cpu")
        assert outcome(llm.generate(PROMPTS, PARAMS)) == expected


def replan(cluster: Any, *id: str) -> subprocess.Popen[str]:
    """From a shell."""
    command = [*CIUIC, "replan", *id, "--address", cluster.address, "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def said(process: subprocess.Popen[str], code: int = 0) -> Any:
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == code, printed
    return json.loads(printed)


@native
def test_replan_has_a_node_used_that_joined(cluster: Any, tiny_int4: Path, here: Topology, tmp_path: Path) -> None:
    with ciuic.LLM(tiny_int4, devices=here, **SETTINGS) as llm:
        expected = outcome(llm.generate(PROMPTS, PARAMS))
    put_back(cluster, 2)
    model = Path(shutil.copytree(tiny_int4, tmp_path / "model"))
    with ciuic.LLM(
        model, devices=slow_head(cluster, here), executor="ray", address=cluster.address, placement=FIRST, **SETTINGS
    ) as llm:  # fmt: skip
        with pytest.raises(
            InvalidInput, match=f"no model 'nobody' runs on this cluster; there are {name_of_this_run()}"
        ):
            asking.ask(join(None), "nobody", print)

        # The node has no such model: nothing changes, and it is said why.
        model.rename(tmp_path / "elsewhere")
        [refused] = asking.ask(join(None), None, print)
        assert (refused.id, refused.moves) == (name_of_this_run(), False)
        assert "node1 cannot run the model: " in refused.text
        assert outcome(llm.generate(PROMPTS, PARAMS)) == expected
        (tmp_path / "elsewhere").rename(model)

        # It has: the plan changes between two passes.
        outputs: dict[int, Any] = {}
        for tokens, (_, output) in enumerate(llm.stream(PROMPTS, PARAMS)):
            outputs[output.index] = output
            if tokens == 20:
                assert [s.node for s in llm._host.runner.stages] == ["node0"]
                [answer] = said(replan(cluster, refused.id))["models"]
        assert answer["moves"]
        assert answer["text"].startswith("a plan with node1 is forecast ")
        assert outcome([outputs[i] for i in sorted(outputs)]) == expected
        assert [s.node for s in llm._host.runner.stages] == ["node0", "node1"]
        assert len(joined(llm)) == 1

        [known] = asking.ask(join(None), None, print)
        assert known.text == "there is no node that the plan does not know: node0, node1"
    with pytest.raises(InvalidInput, match="no model runs on this cluster"):
        asking.ask(join(None), None, print)


@native
@pytest.mark.slow
def test_a_node_that_fails_as_it_is_moved_to_changes_nothing(
    cluster: Any, tiny_int4: Path, here: Topology, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_back(cluster, 2)
    with ciuic.LLM(tiny_int4, devices=here, **SETTINGS) as llm:
        expected = outcome(llm.generate(PROMPTS, PARAMS))
    with ciuic.LLM(
        tiny_int4, devices=slow_head(cluster, here), executor="ray", address=cluster.address, placement=FIRST,
        **SETTINGS,
    ) as llm:  # fmt: skip
        host = llm._host
        begin, fails = host.runner.begin_stages, [StageLost(1, "node1", "it ran out of memory")]

        def begin_and_fail(*arguments: Any) -> None:
            begin(*arguments)
            if fails:
                raise fails.pop()

        monkeypatch.setattr(host.runner, "begin_stages", begin_and_fail)
        assert host._look(True)[0]
        assert outcome(llm.generate(PROMPTS, PARAMS)) == expected
        assert not fails
        assert [s.node for s in host.runner.stages] == ["node0"]
        [note] = joined(llm)
        assert note.startswith("node1 joined, and could not be used: stage 1 on node1 was lost: it ran out of memory")
        assert host._look(False) == (False, host._look(False)[1]), "it is not tried again until somebody asks"
        assert "node1 failed: " in host._look(False)[1]


def test_a_model_that_does_not_hear_is_taken_for_ended(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = join(cluster.address)
    monkeypatch.setattr(asking, "HEARD_SECONDS", 0.3)
    Mailbox(ray, "killed", {})
    with pytest.raises(CiuicError, match="killed did not hear, and is taken for ended after 0 s"):
        asking.ask(ray, None, print)
    with pytest.raises(InvalidInput, match="no model runs on this cluster"):
        asking.ask(ray, None, print)


def test_new_nodes_are_of_a_cluster(tiny_int4: Path) -> None:
    with pytest.raises(InvalidInput, match="give --executor ray and its --address"):
        ciuic.LLM(tiny_int4, executor="ray", use_new_nodes=True)
