"""Stages in processes of their own: the tokens and log probabilities of one process, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import ciuic_runtime as ciuic
from ciuic_runtime.devices.spec import Topology
from ciuic_runtime.ops.native import kernels

pytestmark = pytest.mark.skipif(kernels() is None, reason="the native kernels are not built here")

PROMPTS = [
    [5, 250, 17, 99, 3, 3, 42] * 12, [7], list(range(60, 100)), [77] * 65, [9, 8], [4] * 30, [1, 2, 3], [250] * 3,
]  # fmt: skip
PARAMS = [
    ciuic.SamplingParams(
        max_tokens=6 + 3 * i, ignore_eos=True, logprobs=2, temperature=1.0 * (i % 2), seed=i,
        repetition_penalty=1.2 if i == 5 else 1.0,
    )
    for i in range(len(PROMPTS))
]  # fmt: skip


LONG = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3] * 15
TOLD = ciuic.SamplingParams(max_tokens=4, ignore_eos=True, logprobs=2, prompt_logprobs=1, temperature=0.0)


def outcome(outputs: list[Any]) -> list[Any]:
    return [(o.token_ids, o.logprobs, o.prompt_logprobs, o.finish_reason) for o in outputs]


@pytest.fixture(scope="module")
def expected(tiny_int4: Path, here: Topology) -> list[Any]:
    with ciuic.LLM(tiny_int4, devices=here, max_model_len=192, max_num_seqs=8, threads=1) as llm:
        return outcome([*llm.generate(PROMPTS, PARAMS), *llm.generate(LONG, TOLD)])


class Counting:
    """The engine's runner, with how many passes were on their way at once at most."""

    def __init__(self, runner: Any) -> None:
        self.runner, self.depth = runner, runner.depth
        self.under_way = self.most = 0

    def begin(self, *given: Any) -> None:
        self.runner.begin(*given)
        self.under_way += 1
        self.most = max(self.most, self.under_way)

    def end(self) -> Any:
        self.under_way -= 1
        return self.runner.end()

    def abandon(self) -> None:
        self.runner.abandon()


def test_any_number_of_stages(cluster: Any, tiny_int4: Path, here: Topology, expected: list[Any]) -> None:
    for stages in (1, 2, 4):
        with ciuic.LLM(
            tiny_int4,
            devices=here,
            max_model_len=192,
            max_num_seqs=8,
            threads=1,
            executor="ray",
            stages=stages,
            prefill_chunk=16,
            address=cluster.address,
        ) as llm:
            assert outcome(llm.generate(PROMPTS, PARAMS)) == expected[:-1], f"{stages} stages"
            assert outcome(llm.generate(PROMPTS[0], PARAMS[0])) == expected[:1]
            trace = llm.trace
            assert {e.task for e in trace.events} >= {t.name for t in llm.model.graph}
            assert llm.comparison is not None
            llm.engine.runner = counting = Counting(llm.engine.runner)
            assert outcome(llm.generate(LONG, TOLD)) == expected[-1:], f"a long prompt in {stages} stages"
            assert counting.most == stages, "its chunks are on their way at once"


def test_unequal_stages_on_the_nodes_of_a_cluster(cluster: Any, tiny_int4: Path, expected: list[Any]) -> None:
    hw = ciuic.DeviceManager.from_ray(cluster.address)
    assert [d.name for d in hw.get_devices("CPU")] == ["node0/cpu", "node1/cpu", "node2/cpu"]
    links = {(link.src, link.dst) for link in hw.topology.links}
    assert links >= {("node0/cpu", "node2/cpu"), ("node2/cpu", "node1/cpu")}
    assert all(link.basis == "measured" and link.bandwidth > 1e6 and link.latency > 0 for link in hw.topology.links)
    placement = ciuic.Placement().put("*", on="node2/cpu")
    for pattern in ("embedding", "layers.0.*"):
        placement = placement.put(pattern, on="node0/cpu")
    with ciuic.LLM(
        tiny_int4, devices=hw, max_model_len=192, max_num_seqs=8, threads=1, executor="ray", placement=placement,
        address=cluster.address, micro_batches=2,
    ) as llm:  # fmt: skip
        assert outcome(llm.generate(PROMPTS, PARAMS)) == expected[:-1]
        lanes = {e.lane for e in llm.trace.events}
        assert {"node0/cpu", "node2/cpu"} <= lanes
