"""What the stages of a cluster recorded is brought together: under the forecast's names, on one axis, and while they
work, without anybody but the engine's thread asking them."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ciuic_runtime as ciuic
from ciuic_runtime.cluster.gathering import Gathered, StageRecord
from ciuic_runtime.cluster.runner import PlacedStage
from ciuic_runtime.cluster.stage_worker import StagePlan
from ciuic_runtime.devices.spec import Topology
from ciuic_runtime.engine.service import EngineService
from ciuic_runtime.schedulers.chrome import nanoseconds, read_recording, write_recording
from ciuic_runtime.schedulers.graph import Step
from ciuic_runtime.schedulers.recording import COLUMNS, COMPUTE, COPY, MEMORY, NONE, READ, Recording

PROMPTS = [[1] * 30, [2] * 20, [3] * 10, [4] * 5]
GREEDY = ciuic.SamplingParams(max_tokens=8, ignore_eos=True, temperature=0)
MOST_EVENTS = 8000
HOP = "stage0/cpu -> stage1/cpu"


def opened(tiny_int4: Path, here: Topology, **settings: Any) -> ciuic.LLM:
    return ciuic.LLM(
        tiny_int4, devices=here, max_model_len=192, max_num_seqs=4, threads=1, executor="ray", stages=2, **settings
    )


def lanes_of(recording: Recording) -> dict[str, list[tuple[int, int]]]:
    rows = recording.rows[recording.rows["kind"] <= READ]
    lanes: dict[str, list[tuple[int, int]]] = {}
    for lane, start, end in zip(
        rows["lane"].tolist(), nanoseconds(rows["start"]).tolist(), nanoseconds(rows["end"]).tolist(), strict=True
    ):
        lanes.setdefault(recording.names[lane], []).append((start, end))
    return lanes


@pytest.mark.slow
def test_two_stages_on_a_machine_have_the_lanes_of_the_forecast(
    ray: Any, tiny_int4: Path, here: Topology, tmp_path: Path
) -> None:
    with opened(tiny_int4, here) as llm:
        llm.generate(PROMPTS, GREEDY)
        recording, forecast = llm.recording(), llm.forecast_trace()
        assert llm.trace.devices == forecast.devices == ("stage0/cpu", "stage1/cpu")
        uses = {task: sum(n) for task, n in recording.expert_uses.items()}
    lanes = lanes_of(recording)
    assert lanes.keys() - {"host"} == set(forecast.lanes)
    for mine in lanes.values():
        assert all(a[1] <= b[0] for a, b in pairwise(sorted(mine)))
    assert len(recording.passes) == len(recording.steps)
    rows = recording.rows
    assert (np.diff(rows["step"]) >= 0).all()
    for step, info in enumerate(recording.steps):
        mine = recording.of_step(step)
        computed = mine[mine["kind"] == COMPUTE]
        assert {recording.names[n] for n in computed["task"]} == {task.name for task in llm.model.graph}
        assert computed["end"].max() <= info.end + 1e-3
    hops = rows[(rows["kind"] == COPY) & (rows["lane"] == list(recording.names).index(HOP))]
    assert len(hops)
    tokens = np.array([info.tokens for info in recording.steps])
    assert (hops["nbytes"] == tokens[hops["step"]] * llm.model.spec.hidden_size * 4).all()
    assert {recording.names[n] for n in rows[rows["kind"] == MEMORY]["lane"]} == {"stage0/cpu", "stage1/cpu"}
    assert llm.model.spec.moe
    assert set(uses.values()) == {tokens.sum() * llm.model.spec.moe.experts_per_token}
    write_recording(recording, tmp_path / "run.json")
    assert lanes_of(read_recording(tmp_path / "run.json")) == lanes


@pytest.mark.slow
def test_it_comes_while_the_stages_work_and_the_newest_is_kept(
    ray: Any, tiny_int4: Path, here: Topology, monkeypatch: Any
) -> None:
    monkeypatch.setattr("ciuic_runtime.engine.service.MOST_EVENTS", MOST_EVENTS)
    monkeypatch.setattr("ciuic_runtime.engine.service.GATHER_SECONDS", 0.1)
    with opened(tiny_int4, here, serving=True) as llm:
        service = EngineService(llm)
        runner, threads = llm._host.runner, set[str]()
        answers = runner._answers  # type: ignore[attr-defined]

        def watched(refs: Any) -> Any:
            threads.add(threading.current_thread().name)
            return answers(refs)

        monkeypatch.setattr(runner, "_answers", watched)
        service.start()
        seen: list[Recording] = []

        async def act() -> None:
            params = ciuic.SamplingParams(max_tokens=160, ignore_eos=True)
            submissions = [service.submit(prompt, params) for prompt in PROMPTS]
            updates = [asyncio.create_task(_whole(one)) for one in submissions]
            since = 0
            while not all(task.done() for task in updates):
                seen.append(await asyncio.to_thread(llm.recording, since))
                since = seen[-1].first_step + len(seen[-1].steps)
                await asyncio.sleep(0.05)
            limit = time.monotonic() + 20
            while since < service.stats().passes and time.monotonic() < limit:
                seen.append(await asyncio.to_thread(llm.recording, since))
                since = seen[-1].first_step + len(seen[-1].steps)
                await asyncio.sleep(0.05)
            await service.drain()

        asyncio.run(act())
        passes = service.stats().passes
        service.close()
        last = llm.recording()
    parts = [part for part in seen if len(part.steps)]
    assert len(parts) > 2
    assert [part.first_step for part in parts] == np.cumsum([0, *(len(part.steps) for part in parts)])[:-1].tolist()
    assert sum(len(part.steps) for part in parts) == passes
    assert all(len(part.passes) == len(part.steps) for part in parts)
    assert threads == {"ciuic-engine"}
    assert last.first_step + len(last.steps) == passes
    assert last.first_step > 0, "nothing was forgotten"
    assert len(last.rows) <= 2 * MOST_EVENTS


async def _whole(submission: Any) -> None:
    async for _ in submission:
        pass


def stage(index: int, shares: bool = False) -> PlacedStage:
    plan = StagePlan(index, "", "int4", 64, (f"task {index}",), (), "", 1, "", 1)
    return PlacedStage(plan, f"node{index}", None, 1.0, shares=shares)


def record(passes: list[int], spans: list[tuple[float, float]], names: tuple[str, str]) -> StageRecord:
    """One event in each pass, as long as that."""
    rows = np.array([(0, 1, i, COMPUTE, 0, a, b, NONE) for i, (a, b) in enumerate(spans)], COLUMNS)
    starts, ends = [a for a, _ in spans], [b for _, b in spans]
    return StageRecord(rows, list(names), passes, starts, ends, [8] * len(passes), {}, {})


def test_a_hop_is_what_the_next_stage_was_kept_waiting(monkeypatch: Any) -> None:
    """Passes 3 and 5 ended; 4 was abandoned, and one stage was busy when 5 came."""
    monkeypatch.setattr("ciuic_runtime.cluster.gathering.wall_offset", lambda: 1000.0)
    gathered = Gathered()
    gathered.clear(3)
    for number in (3, 5):
        gathered.ended(number, Step.decode(1), 0.0)
    first = record([3, 4, 5], [(1000, 1001), (1001, 1002), (1002, 1003)], ("a", "cpu"))
    second = record([3, 5], [(1001.5, 1004), (1004.25, 1005)], ("b", "cpu"))
    gathered.take(6, [stage(0, shares=True), stage(1)], [first, second])
    found = gathered.recorder.snapshot()
    begin, names = gathered.recorder.begin, found.names
    events = [
        (names[task], names[lane], step, kind, nbytes, round(start + begin, 6), round(end + begin, 6))
        for task, lane, step, kind, nbytes, start, end, _ in found.rows.tolist()
    ]
    lane = "node0/stage0/cpu -> node1/cpu"
    assert events == [
        ("a", "node0/stage0/cpu", 0, COMPUTE, 0, 0, 1), ("b", "node1/cpu", 0, COMPUTE, 0, 1.5, 4),
        ("task 0", lane, 0, COPY, 8, 1, 1.5),
        ("a", "node0/stage0/cpu", 1, COMPUTE, 0, 2, 3), ("b", "node1/cpu", 1, COMPUTE, 0, 4.25, 5),
        ("task 0", lane, 1, COPY, 8, 4, 4.25),
    ]  # fmt: skip
    assert gathered.since == 6


def test_passes_that_nobody_asks_for_do_not_pile_up() -> None:
    gathered = Gathered()
    gathered.recorder.most = 64 * 16
    for number in range(1000):
        gathered.ended(number, Step.decode(1), 0.0)
    gathered.take(1000, [stage(0)], [None])
    found = gathered.recorder.snapshot()
    assert 8 <= len(found.steps) <= 16
    assert found.first_step + len(found.steps) == 1000


def test_stages_that_go_on_under_another_number_keep_what_is_known_of_them() -> None:
    gathered = Gathered()
    uses = [{"layers.0.experts": [1, 2]}, {"layers.1.experts": [3, 4]}, {"layers.2.experts": [5, 6]}]
    known = [replace(record([], [], ("a", "cpu")), expert_uses=one) for one in uses]
    gathered.take(0, [stage(i) for i in range(3)], known)
    gathered.renumber({0: 0, 2: 1})
    assert gathered.expert_uses() == uses[0] | uses[2]
    gathered.take(0, [stage(1)], [replace(known[2], expert_uses={"layers.2.experts": [7, 8]})])
    assert gathered.expert_uses() == uses[0] | {"layers.2.experts": [7, 8]}
