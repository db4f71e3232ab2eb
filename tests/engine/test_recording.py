"""What a model at work tells of itself: whom a wait waited for, what memory held, which pages and experts were used."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from late_page import LatePage

import ciuic_runtime as ciuic
from ciuic_runtime.basis import Basis
from ciuic_runtime.devices.spec import Topology
from ciuic_runtime.engine.routing import RoutingRecorder
from ciuic_runtime.memory.kv_cache import BLOCK_TOKENS
from ciuic_runtime.ops.native import kernels
from ciuic_runtime.schedulers.chrome import nanoseconds, read_recording, write_recording
from ciuic_runtime.schedulers.recording import CACHE, EVICT, MEMORY, NONE, READ, WAIT, WEIGHTS, Recording

pytestmark = pytest.mark.skipif(kernels() is None, reason="the native kernels are not built here")

PROMPT = [5, 250, 17, 99, 3, 42, 200, 7, 31]
GREEDY = ciuic.SamplingParams(max_tokens=6, ignore_eos=True)
DELAY = 0.25  # s


def rows(recording: Recording, kind: int) -> list[dict[str, Any]]:
    names = recording.names
    return [
        {
            "task": names[task], "lane": names[lane], "step": step, "nbytes": nbytes, "start": start, "end": end,
            "cause": names[cause] if cause != NONE else "",
        }
        for task, lane, step, at, nbytes, start, end, cause in recording.rows.tolist()
        if at == kind
    ]  # fmt: skip


@pytest.fixture
def paged(tiny_int4: Path, here: Topology) -> ciuic.LLM:
    """With room for a third of its pages."""
    llm = ciuic.LLM(tiny_int4, devices=here, max_model_len=128, max_num_seqs=2, threads=1)
    llm.memory.set_budget("cpu", llm.memory.reserved + max(llm.memory.minimum, sum(llm.memory.pages.values()) // 3))
    return llm


def test_a_late_page_is_what_the_wait_waited_for(paged: ciuic.LLM, tmp_path: Path) -> None:
    with paged as llm:
        memory, late = llm.memory, "layers.2.attention"
        memory.evict(list(memory.pages))
        memory._source = LatePage(memory._source_of(), late, DELAY)  # type: ignore[assignment]
        llm.generate([PROMPT], GREEDY)
        recording, counts = llm.recording(), llm.memory.page_counts()
    write_recording(recording, tmp_path / "run.json")
    for found in (recording, read_recording(tmp_path / "run.json")):
        waits = [wait for wait in rows(found, WAIT) if wait["end"] - wait["start"] > DELAY / 2]
        assert waits
        assert {(wait["task"], wait["cause"]) for wait in waits} == {(late, late)}
        event = next(e for e in found.trace().events if e.kind == "wait" and e.seconds > DELAY / 2)
        assert event.cause == late
        read = next(r for r in rows(found, READ) if r["task"] == late)
        assert read["end"] - read["start"] == pytest.approx(DELAY, abs=1e-3)
    assert all(wait["cause"] in counts for wait in rows(recording, WAIT))
    assert counts[late].waited_s >= DELAY / 2
    assert max(counts.values(), key=lambda page: page.waited_s) is counts[late]


def test_pages_are_counted_as_they_were_used_and_read_and_left(paged: ciuic.LLM) -> None:
    with paged as llm:
        llm.generate([PROMPT], GREEDY)
        evictions, report = llm.memory.evictions, llm.memory.report
        llm.generate([PROMPT], GREEDY)
        recording, counts = llm.recording(), llm.memory.page_counts()
        assert recording.pages == counts
        assert recording.capacity["cpu", WEIGHTS] == llm.memory.budget
        assert [page for page in counts if counts[page].resident] == [
            page for page in llm.memory.pages if llm.memory.where(page) == "cpu"
        ]
        evictions = llm.memory.evictions - evictions
    left, reads = rows(recording, EVICT), rows(recording, READ)
    assert len(left) == evictions > 0
    assert {row["lane"] for row in left} == {"cpu"}
    assert Counter(row["task"] for row in reads) == {name: c.reads for name, c in counts.items() if c.reads}
    assert sum(r["nbytes"] for r in reads) == sum(phase.bytes_read for phase in report.phases.values())
    experts = [c for name, c in counts.items() if ".experts." in name]
    assert sum(c.hits for c in experts) == sum(phase.hits for phase in report.phases.values())
    assert sum(c.uses for c in experts) == sum(phase.hits + phase.misses for phase in report.phases.values())
    assert all(0 <= c.hits <= c.uses for c in counts.values())
    held = [row for row in rows(recording, MEMORY) if row["task"] == WEIGHTS]
    assert [row["step"] for row in held] == list(range(len(recording.steps)))
    assert all(0 < row["nbytes"] <= llm.memory.budget for row in held)


def test_the_cache_is_told_after_each_pass_with_its_capacity(llm: ciuic.LLM) -> None:
    llm.generate([[7] * 100, [8] * 10], ciuic.SamplingParams(max_tokens=3, ignore_eos=True))
    recording = llm.recording()
    block = sum(t.kv_bytes_per_token for t in llm.model.graph) * BLOCK_TOKENS
    cache = [row for row in rows(recording, MEMORY) if row["task"] == CACHE]
    assert [row["step"] for row in cache] == list(range(len(recording.steps)))
    assert all(row["end"] == info.end for row, info in zip(cache, recording.steps, strict=True))
    assert {row["nbytes"] for row in cache} == {3 * block}
    assert recording.capacity["cpu", CACHE] == llm.engine.batching.num_blocks * block
    [weights] = [row for row in rows(recording, MEMORY) if row["task"] == WEIGHTS]
    assert weights["nbytes"] == llm.model.graph.nbytes < recording.capacity["cpu", WEIGHTS]
    kinds = set(recording.trace().seconds_by_kind("decode"))
    assert kinds <= {task.kind for task in llm.model.graph} | {"sample"}


def test_what_its_forecasts_are_made_with_comes_along(llm: ciuic.LLM, tmp_path: Path) -> None:
    llm.generate([PROMPT], GREEDY)
    recording = llm.recording()
    write_recording(recording, tmp_path / "run.json")
    basis = Basis.from_dict(read_recording(tmp_path / "run.json").basis, "run.json")
    assert basis.schedule == llm.schedule
    steps = [info.step for info in recording.steps if info.step]
    assert basis.forecaster.recost(steps) == llm._setup.recost(llm.schedule, steps)
    assert recording.began is not None
    assert 0 <= time.time() - recording.began < 600


def test_uses_of_experts_are_counted_where_nothing_is_paged(llm: ciuic.LLM) -> None:
    executor = llm._host.executor  # type: ignore[attr-defined]
    routing = RoutingRecorder(llm.model.graph)
    executor.on_routing = routing.record
    try:
        llm.generate([PROMPT, PROMPT[3:]], GREEDY)
    finally:
        executor.on_routing = None
    found = routing.routing()
    for i, layer in enumerate(found.layers):
        uses = llm.recording().expert_uses[f"layers.{layer}.experts"]
        assert uses == np.bincount(found.ids[:, i].ravel(), minlength=found.num_experts).tolist()
    llm.generate([PROMPT], replace(GREEDY, max_tokens=1))
    for uses in llm.recording().expert_uses.values():
        assert sum(uses) == len(PROMPT) * llm.model.spec.moe.experts_per_token  # type: ignore[union-attr]


def test_a_snapshot_from_a_step_on_is_the_end_of_the_whole(llm: ciuic.LLM, tmp_path: Path) -> None:
    llm.generate([PROMPT], GREEDY)
    whole, part = llm.recording(), llm.recording(2)
    assert part.first_step == 2
    assert (part.steps, part.passes) == (whole.steps[2:], whole.passes[2:])
    kept = [row for row in rows(whole, MEMORY) if row["step"] >= 2]
    assert [row for row in rows(part, MEMORY) if row["task"] == CACHE] == kept
    assert len(llm.recording(10**6).steps) == 0
    assert part.trace().events == tuple(replace(e, step=e.step - 2) for e in whole.trace().events if e.step >= 2)


def test_what_is_on_a_lane_does_not_overlap(paged: ciuic.LLM) -> None:
    with paged as llm:
        llm.memory.evict(list(llm.memory.pages))
        llm.generate([PROMPT], GREEDY)
        recording = llm.recording()
    lanes: dict[int, list[tuple[int, int]]] = {}
    spans = recording.rows[recording.rows["kind"] <= READ]
    for lane, start, end in zip(
        spans["lane"].tolist(), nanoseconds(spans["start"]).tolist(), nanoseconds(spans["end"]).tolist(), strict=True
    ):
        lanes.setdefault(lane, []).append((start, end))
    assert len(lanes) > 2
    for mine in lanes.values():
        assert all(a[1] <= b[0] for a, b in pairwise(sorted(mine)))


def test_what_others_do_to_memory_waits_for_the_end_of_the_step(
    paged: ciuic.LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows must not come between those of the step and its end."""
    with paged as llm:
        llm.generate([PROMPT], GREEDY)
        recorder, page, waited = llm._host.recorder, list(llm.memory.pages)[-1], list[bool]()
        end_step, others = recorder.end_step, list[threading.Thread]()

        def ends(*arguments: Any) -> None:
            others.append(threading.Thread(target=llm.memory.evict, args=(page,)))
            others[-1].start()
            others[-1].join(0.05)
            waited.append(others[-1].is_alive())
            end_step(*arguments)

        monkeypatch.setattr(recorder, "end_step", ends)
        llm.generate([PROMPT], GREEDY)
        for other in others:
            other.join()
    assert len(waited) == 6
    assert all(waited)


def test_what_others_do_to_memory_is_recorded_whole(paged: ciuic.LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """With chunks so small that every few rows begin one."""
    with paged as llm:
        memory, stop, failed = llm.memory, threading.Event(), list[Exception]()
        monkeypatch.setattr(llm._host.recorder, "_chunk", 3)
        budget = memory.reserved + memory.budget

        def disturb() -> None:
            names = list(memory.pages)
            try:
                for i in itertools.count():
                    if stop.is_set():
                        return
                    memory.evict(names[i % len(names)])
                    memory.prefetch(names[(7 * i) % len(names)])
                    memory.set_budget("cpu", budget + 4096 * (i % 2))
            except Exception as error:
                failed.append(error)

        other = threading.Thread(target=disturb)
        other.start()
        try:
            [output] = llm.generate([PROMPT], replace(GREEDY, max_tokens=60))
        finally:
            stop.set()
            other.join()
        assert not failed
        llm.generate([PROMPT], GREEDY)  # takes in what is on its way
        recording = llm.recording()
        again = llm.generate([PROMPT], replace(GREEDY, max_tokens=60))[0]
    assert output.token_ids == again.token_ids
    assert (np.diff(recording.rows["step"]) >= 0).all()
    assert len(recording.steps) == 6
