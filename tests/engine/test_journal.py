"""What is told of passes and requests: in step with the steps that are recorded, and with requests' own times."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from ciuic_runtime.devices.errors import CiuicError
from ciuic_runtime.engine import journal as module
from ciuic_runtime.engine.engine import StageLost
from ciuic_runtime.engine.journal import Journal
from ciuic_runtime.engine.llm import LLM
from ciuic_runtime.engine.request import Request
from ciuic_runtime.engine.sampling import SamplingParams

FIVE = SamplingParams(max_tokens=5, ignore_eos=True, temperature=0)


def test_passes_are_told_beside_their_steps(llm: LLM) -> None:
    outputs = llm.generate([[1] * 50, [2] * 10], FIVE)
    recording = llm.recording()
    assert len(recording.passes) == len(recording.steps)
    for note, info in zip(recording.passes, recording.steps, strict=True):
        assert sum(tokens for _, tokens in note.requests) == info.tokens
        assert len(note.requests) == info.sequences
    tokens = {index: sum(n for p in recording.passes for r, n in p.requests if r == index) for index in (0, 1)}
    assert tokens == {0: 50 + 4, 1: 10 + 4}
    assert (recording.passes[0].running, recording.passes[0].waiting) == (2, 0)
    for note, output in zip(recording.requests, outputs, strict=True):
        assert (note.request, note.prompt_tokens, note.new_tokens) == (output.index, len(output.prompt_token_ids), 5)
        assert note.finish_reason == "length"
        assert note.admitted is not None
        assert note.first_token is not None
        assert note.ended is not None
        assert note.arrived <= note.admitted <= note.first_token < note.ended <= recording.seconds + 0.1
        assert note.first_token - note.arrived == pytest.approx(output.first_token_s)
    assert recording.requests[0].admitted == pytest.approx(recording.steps[0].start, abs=0.05)


def test_who_waits_arrives_before_it_is_admitted(llm: LLM) -> None:
    llm.generate([[i] * 20 for i in range(1, 6)], FIVE)  # three at once
    recording = llm.recording()
    assert recording.passes[0].waiting == 2
    late = recording.requests[-1]
    assert late.admitted is not None
    assert late.admitted > min(r.ended for r in recording.requests if r.ended)


def test_a_stream_that_is_left_early_is_interrupted(llm: LLM) -> None:
    stream = llm.stream([[1] * 5], SamplingParams(max_tokens=50, ignore_eos=True))
    next(stream)
    assert [(r.finish_reason, r.ended) for r in llm.recording().requests] == [(None, None)]
    stream.close()
    [note] = llm.recording().requests
    assert note.finish_reason == "interrupted"
    assert note.ended is not None


def test_passes_that_are_nobodys_have_steps_only(llm: LLM) -> None:
    llm.logits([1, 2, 3])
    recording = llm.recording()
    assert (len(recording.steps), list(recording.passes), list(recording.requests)) == (1, [], [])


def test_a_pass_that_fails_leaves_steps_and_passes_in_step(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    fails = iter([False, True, False])
    draw = llm.engine.runner.draw  # type: ignore[attr-defined]

    def failing(*arguments: Any) -> Any:
        if next(fails, False):
            raise CiuicError("no luck")
        return draw(*arguments)

    monkeypatch.setattr(llm.engine.runner, "draw", failing)
    llm._clear_trace()
    request = llm.request([1, 2, 3], FIVE)
    llm.engine.add(request)
    llm.step()
    with pytest.raises(CiuicError, match="no luck"):
        llm.step()
    while llm.engine.busy:
        llm.step()
    recording = llm.recording()
    assert len(recording.passes) == len(recording.steps) == 5
    assert recording.requests[-1].new_tokens == 5


def test_losses_are_marked_and_those_that_ran_were_preempted(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage is lost once, and is there again at once."""
    begin, lost = llm.engine.runner.begin, iter([None, StageLost(1, "node1", "it died")])

    def failing(*arguments: Any) -> None:
        if (error := next(lost, None)) is not None:
            raise error
        begin(*arguments)

    monkeypatch.setattr(llm.engine.runner, "begin", failing)
    monkeypatch.setattr(llm._host, "recover", lambda lost: llm._setup)
    monkeypatch.setattr(llm._host, "notes", ["stage 1 was started again"])
    [output] = llm.generate([[1, 2, 3]], FIVE)
    recording = llm.recording()
    assert len(output.token_ids) == 5
    assert [mark.kind for mark in recording.marks] == ["lost", "recovered"]
    assert recording.marks[0].text == "stage 1 on node1 was lost: it died"
    assert recording.steps[0].end <= recording.marks[0].time <= recording.marks[1].time <= recording.steps[1].start
    assert recording.requests[0].preemptions == 1


def test_who_still_runs_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_ENDED", 4)
    journal, begin = Journal(), time.perf_counter()
    for index in range(20):
        request: Any = Request(index, (1, 2), SamplingParams(), SimpleNamespace(finish=str), frozenset())  # type: ignore[arg-type]
        journal.arrived(request)
        if index != 1:
            request.finish("length")
            journal.ended(request)
    notes = journal.requests(begin)
    assert (notes[0].request, notes[0].ended) == (1, None)
    assert [note.request for note in notes[1:]] == list(range(20 - len(notes) + 1, 20))
    journal.all_ended("interrupted")
    assert all(note.ended for note in journal.requests(begin))


def test_it_neither_grows_nor_forgets_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_ENDED", 8)
    journal, begin = Journal(), time.perf_counter()
    for index in range(100):
        request: Any = Request(index, (1, 2), SamplingParams(), SimpleNamespace(finish=str), frozenset())  # type: ignore[arg-type]
        journal.arrived(request)
        request.finish("length")
        journal.ended(request)
        told = [note.request for note in journal.requests(begin)]
        assert told == list(range(index + 1 - len(told), index + 1))
        assert min(index + 1, 4) <= len(told) <= 8
        assert [note.request for note in journal.requests(begin, 3)] == told[-3:]
        assert [note.request for note in journal.requests_of([-1, told[0], index + 1], begin)] == told[:1]
        assert journal.num_requests == len(told)
    assert journal.requests(begin, 0) == []
    for _ in range(100):
        journal.mark("lost", "a stage")
    assert 4 <= len(journal.marks(begin)) <= 8
