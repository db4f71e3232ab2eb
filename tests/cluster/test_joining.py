"""Nodes that join a cluster while a model runs there: used where that is faster, with the tokens of one process."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from raylets import put_back, wait_until

import ciuic_runtime as ciuic
from ciuic_runtime.cluster import asking, seats, watch
from ciuic_runtime.cluster.asking import Mailbox, name_of_this_run
from ciuic_runtime.devices.errors import CiuicError, InvalidInput
from ciuic_runtime.devices.ray_nodes import NODE_ID, nodes_of
from ciuic_runtime.devices.ray_session import join
from ciuic_runtime.devices.spec import Topology
from ciuic_runtime.engine.config import RuntimeConfig
from ciuic_runtime.engine.engine import StageLost
from ciuic_runtime.engine.service import EngineService, Submission
from ciuic_runtime.engine.setup import set_up
from ciuic_runtime.models.checkpoint import open_checkpoint
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


def found_or_moved(host: Any) -> bool:
    return host._found is not None or len(host.runner.stages) > 1


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
            wait_until(lambda: found_or_moved(llm._host), "nobody sees the node that joined")  # in the midst of it
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


@pytest.mark.slow
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


@pytest.mark.slow
@native
def test_a_node_without_room_ends_no_stage_and_is_used_when_there_is(
    cluster: Any, tiny_int4: Path, here: Topology, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seats, "RESERVE_SECONDS", 0.0)
    put_back(cluster, 2)
    with ciuic.LLM(tiny_int4, devices=here, **SETTINGS) as llm:
        expected = outcome(llm.generate(PROMPTS, PARAMS))
    with ciuic.LLM(
        tiny_int4, devices=slow_head(cluster, here), executor="ray", address=cluster.address, placement=FIRST,
        **SETTINGS,
    ) as llm:  # fmt: skip
        host, ray = llm._host, join(None)
        pids = host.runner.processes()
        taken = seats.Seats(ray)
        taken.reserve([replace(host.runner.stages[0], node="node1", node_id=nodes_of(ray)[1]["NodeID"], cores=2.0)], ())
        assert host._look(True)[0]
        assert outcome(llm.generate(PROMPTS, PARAMS)) == expected
        assert host.runner.processes() == pids, "a healthy stage was ended"
        [note] = joined(llm)
        assert re.match(
            r"node1 joined, and could not be used: stage \d needs 1 cores on node1 \(.*\), where 0 of 2", note
        )
        assert not llm.recording().marks
        assert "node1 failed: " in host._look(False)[1]

        taken.close()
        assert host._look(True)[0], "it is tried again when somebody asks"
        service = EngineService(llm)
        service.start()
        assert asyncio.run(served(service)) == [(tokens, reason) for tokens, _, reason in expected]
        service.close()
        assert [s.node for s in host.runner.stages] == ["node0", "node1"]
        assert [mark.kind for mark in llm.recording().marks] == ["joined", "replanned"]


async def served(service: EngineService) -> list[Any]:
    """What comes of the prompts, all at once."""

    async def whole(submission: Submission) -> Any:
        tokens = [token async for update in submission for token in update.token_ids]
        return tuple(tokens), submission.request.finish_reason

    return await asyncio.gather(*[whole(service.submit(prompt, PARAMS)) for prompt in PROMPTS])


@pytest.mark.slow
@native
def test_a_node_that_joins_takes_the_place_of_one_that_died_unnoticed(
    cluster: Any, tiny_int4: Path, here: Topology
) -> None:
    """Each has memory for its half, and no pass has missed the one that died when another joins."""
    with ciuic.LLM(tiny_int4, devices=here, **SETTINGS) as llm:
        expected = outcome(llm.generate(PROMPTS, PARAMS))
    put_back(cluster, 2)
    nodes = ciuic.DeviceManager.from_ray(cluster.address).topology
    halves = FIRST.put("layers.1.*", on="node0/cpu").put("layers.2-3.*", on="node1/cpu")
    halves = halves.put("final_norm", on="node1/cpu").put("head", on="node1/cpu")
    config = RuntimeConfig(placement=halves, executor="ray", **SETTINGS)
    planned = set_up(open_checkpoint(tiny_int4), config, None, nodes).schedule
    need = {device: int(1.05 * nbytes) for device, nbytes in planned.predicted.memory_bytes.items()}
    with ciuic.LLM(
        tiny_int4, devices=nodes, executor="ray", address=cluster.address, placement=halves, memory=need, **SETTINGS
    ) as llm:  # fmt: skip
        assert outcome(llm.generate(PROMPTS, PARAMS)) == expected
        assert [s.node for s in llm._host.runner.stages] == ["node0", "node1"]
        [node] = cluster.worker_nodes
        cluster.remove_node(node, allow_graceful=False)
        put_back(cluster, 2)
        wait_until(lambda: len(nodes_of(join(None))) == 2, "the node that was killed is still there")
        llm._host._look(True)
        assert outcome(llm.generate(PROMPTS, PARAMS)) == expected
        assert [s.node for s in llm._host.runner.stages] == ["node0", "node2"]


def test_who_looks_for_long_still_hears_and_who_is_silent_stands_in_nobodys_way(
    cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = join(cluster.address)
    monkeypatch.setattr(asking, "HEARD_SECONDS", 1.0)
    monkeypatch.setattr(watch, "PERIOD", 0.1)
    looks = threading.Event()

    def look(asked: bool) -> tuple[bool, str]:
        looks.set()
        time.sleep(2.0)
        return asked, "nothing new"

    silent, live = Mailbox(ray, "a", {}), Mailbox(ray, "b", {})
    watching = watch.Watch(look, live, always=True)
    assert looks.wait(5)
    first, second = asking.ask(ray, None, print)
    assert (first.id, first.heard, first.moves) == ("a", False, False)
    assert "is taken for ended after " in first.text
    assert (second.id, second.heard, second.moves, second.text) == ("b", True, True, "nothing new")

    # Who was taken for ended by mistake is there again when it hears.
    assert silent.asked() is not None
    with pytest.raises(CiuicError, match="a did not hear"):  # and not that there is no such model
        asking.ask(ray, "a", print)
    watching.close()
    silent.close()
    with pytest.raises(InvalidInput, match="no model runs on this cluster"):
        asking.ask(ray, None, print)


def test_two_models_of_a_process_have_two_names(cluster: Any) -> None:
    ray = join(cluster.address)
    one, two = Mailbox(ray, "x", {}), Mailbox(ray, "x", {})
    assert (one.id, two.id) == ("x", "x-2")
    one.close()
    again = Mailbox(ray, "x", {})
    assert again.id == "x"
    for each in (two, again):
        each.close()


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
