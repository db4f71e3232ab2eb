"""Several chunks of one prompt on their way through stages at once: what each finds in the cache, and what comes of a
request that is cancelled, preempted or lost meanwhile, is what it would be alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ciuic_runtime.devices.spec import Topology
from ciuic_runtime.engine.batching import Batching, Pass
from ciuic_runtime.engine.draw import Draw, Drawn
from ciuic_runtime.engine.engine import LocalRunner
from ciuic_runtime.engine.llm import LLM
from ciuic_runtime.engine.request import Request
from ciuic_runtime.engine.sampling import SamplingParams
from ciuic_runtime.engine.text import NoText, TextStream
from ciuic_runtime.memory.kv_cache import BLOCK_TOKENS
from ciuic_runtime.models.batch import Chunk
from ciuic_runtime.ops.native import kernels

EOS = 96


def request(index: int, prompt: Sequence[int], new: int, client: str = "", told: bool = False) -> Request:
    params = SamplingParams(max_tokens=new, prompt_logprobs=0 if told else None)
    return Request(index, tuple(prompt), params, TextStream(NoText()), frozenset({EOS}), client)


def entry(before: int, token: int, prompt: bool) -> int:
    """What a token's cache entry is made of: all tokens up to it, and the form in which it is computed."""
    return hash((before, token, prompt))


def drawn(entry: int) -> int:
    return entry % (EOS + 1)


def alone(prompt: Sequence[int], new: int) -> list[int]:
    """The tokens of a request that nothing befalls."""
    last, tokens = 0, list[int]()
    for token in prompt:
        last = entry(last, token, True)
    while len(tokens) < new and EOS not in tokens:
        tokens.append(drawn(last))
        last = entry(last, tokens[-1], False)
    return tokens


class Cache:
    """Of a stage, which carries passes out in the order in which they were sent."""

    def __init__(self) -> None:
        self._slots: dict[tuple[int, int], int] = {}  # (block, place) -> entry

    def compute(self, chunk: Chunk, entries: Sequence[int]) -> int:
        """The last entry of a chunk of a sequence that has these."""
        end = chunk.position + len(chunk.token_ids)
        for p in range(end):
            slot = chunk.blocks[p // BLOCK_TOKENS], p % BLOCK_TOKENS
            if p >= chunk.position:
                self._slots[slot] = entries[p]
            assert self._slots.get(slot) == entries[p], f"position {p} is not in the cache"
        return entries[end - 1]


class ManyOnTheirWay(RuleBasedStateMachine):
    @initialize(
        depth=st.integers(1, 4), num_blocks=st.integers(6, 10), seqs=st.integers(1, 5), chunk=st.integers(5, 100),
        share=st.sampled_from([None, 7, 40]), prefixes=st.booleans(),
    )  # fmt: skip
    def begin(self, depth: int, num_blocks: int, seqs: int, chunk: int, share: int | None, prefixes: bool) -> None:
        part = None if share is None else (lambda decoding, behind, since: share if since >= 1 else 0)
        self.batching = Batching(num_blocks, seqs, chunk, part, shared_prefixes=prefixes)
        self.batching.depth, self.chunk = depth, chunk
        self.cache, self.way = Cache(), deque[Pass]()
        self.requests: list[Request] = []
        self.made: list[list[int]] = []  # entries of each one's tokens
        self.cancelled: set[int] = set()

    @rule(
        token=st.integers(0, 1), length=st.sampled_from([1, 3, 64, 70, 130]), new=st.sampled_from([1, 3, 70, 200]),
        client=st.sampled_from("ab"), told=st.booleans(),
    )  # fmt: skip
    def add(self, token: int, length: int, new: int, client: str, told: bool) -> None:
        self.made.append([])
        self.requests.append(request(len(self.requests), [token] * length, new, client, told))
        self.batching.add(self.requests[-1])

    @precondition(lambda self: len(self.way) < self.batching.depth)
    @rule()
    def send(self) -> None:
        flying = self.flying()
        todo = self.batching.next_pass()
        if todo is None:
            return
        waiting = [r for r in self.batching.running if r.unsent and r.index not in flying and r not in todo.requests]
        assert len(set(map(id, todo.requests))) == len(todo.requests)
        assert sum(len(c.token_ids) for r, c in zip(todo.requests, todo.chunks, strict=True) if c.prompt) <= self.chunk
        for one, chunk in zip(todo.requests, todo.chunks, strict=True):
            end = chunk.position + len(chunk.token_ids)
            ahead = flying.get(one.index, [])
            assert not one.finish_reason
            assert chunk.position == (ahead[-1].position + len(ahead[-1].token_ids) if ahead else one.computed)
            assert tuple(chunk.token_ids) == one.tokens(chunk.position, end)
            assert chunk.prompt == (chunk.position < len(one.prompt))
            assert bool(chunk.sample) == (end == one.num_tokens or chunk.sample == "all")
            assert not ahead or not waiting, "one that is in a pass goes before others that are in none"
        self.way.append(todo)

    @precondition(lambda self: self.way)
    @rule()
    def come_back(self) -> None:
        done = self.way.popleft()
        entries = self.compute(done)
        self.batching.computed(done)
        for one, chunk, last in zip(done.requests, done.chunks, entries, strict=True):
            if one.finish_reason:
                continue
            assert one.computed == chunk.position + len(chunk.token_ids)
            if one.computed == one.num_tokens:
                assert chunk.sample
                one.append(drawn(last))
        self.batching.release_finished()

    def compute(self, todo: Pass) -> list[int]:
        rows = zip(todo.requests, todo.chunks, strict=True)
        return [self.cache.compute(c, self.entries(r)) for r, c in rows]

    def entries(self, one: Request) -> list[int]:
        found, known = self.made[one.index], one.history
        for p in range(len(found), len(known)):
            found.append(entry(found[-1] if p else 0, known[p], p < len(one.prompt)))
        return found

    @precondition(lambda self: self.way)
    @rule()
    def fill(self) -> None:
        """One comes back, and all that can be sent is."""
        self.come_back()
        before = -1
        while before < len(self.way) < self.batching.depth:
            before = len(self.way)
            self.send()

    @precondition(lambda self: any(not r.finish_reason for r in self.requests))
    @rule(data=st.data())
    def cancel(self, data: Any) -> None:
        one = data.draw(st.sampled_from([r for r in self.requests if not r.finish_reason]))
        assert self.batching.cancel(one)
        one.finish("interrupted")
        self.cancelled.add(one.index)
        assert (one in self.batching.running) == (one.index in self.flying())

    @rule(computed=st.integers(0, 4) | st.none())
    def lose(self, computed: int | None) -> None:
        """What is on its way: the first so many passes are computed all the same; None: with all that was computed."""
        for todo in list(self.way)[: computed or 0]:
            self.compute(todo)
        self.way.clear()
        if computed is None:
            self.cache = Cache()
            self.batching.restart()
        else:
            self.batching.abandon()

    def flying(self) -> dict[int, list[Chunk]]:
        found: dict[int, list[Chunk]] = {}
        for todo in self.way:
            for one, chunk in zip(todo.requests, todo.chunks, strict=True):
                found.setdefault(one.index, []).append(chunk)
        return found

    @invariant()
    def all_is_in_order(self) -> None:
        flying, running = self.flying(), self.batching.running
        for one in running:
            chunks = flying.get(one.index, [])
            assert len(chunks) <= self.batching.depth
            assert all(a.position + len(a.token_ids) == b.position for a, b in pairwise(chunks))
            assert one.finish_reason or one.sent == one.computed + sum(len(c.token_ids) for c in chunks)
            assert one.num_tokens not in [c.position + len(c.token_ids) for c in chunks[:-1]], "it follows its last one"
        assert flying.keys() <= {r.index for r in running}
        held = {b for r in running for b in r.blocks}
        assert len(held) == self.batching.blocks.num_used
        private = [b for r in running for b in r.blocks[r.computed // BLOCK_TOKENS :]]
        assert len(private) == len(set(private)), "two would write into one block"

    def teardown(self) -> None:
        while self.way or self.batching.running or self.batching.waiting:
            if not self.way:
                self.send()
                assert self.way, "nothing goes on"
            self.fill()
        for one in self.requests:
            expected = alone(one.prompt, one.params.max_tokens)
            assert one.token_ids == (expected[: len(one.token_ids)] if one.index in self.cancelled else expected)
        assert self.batching.blocks.num_used == 0


TestManyOnTheirWay = ManyOnTheirWay.TestCase
TestManyOnTheirWay.settings = settings(max_examples=80, stateful_step_count=60, deadline=None)


def sent(batching: Batching) -> list[list[tuple[int, int, int]]]:
    """Of the passes that can be sent now: (request, position, tokens) of each chunk."""
    found = []
    while len(found) < batching.depth and (todo := batching.next_pass()) is not None:
        chunks = zip(todo.requests, todo.chunks, strict=True)
        found.append([(r.index, c.position, len(c.token_ids)) for r, c in chunks])
    return found


def test_a_prompt_alone_fills_all_stages_up_to_its_last_chunk() -> None:
    batching = Batching(16, 4, 10)
    batching.depth = 4
    batching.add(request(0, [1] * 25, 5))
    assert sent(batching) == [[(0, 0, 10)], [(0, 10, 10)], [(0, 20, 5)]]


def test_of_a_cancelled_prompt_nothing_more_is_sent_and_its_blocks_are_free_when_all_its_passes_are_back() -> None:
    batching = Batching(16, 4, 10)
    batching.depth = 2
    batching.add(one := request(0, [1] * 70, 5))
    first, second = batching.next_pass(), batching.next_pass()
    assert batching.cancel(one)
    one.finish("interrupted")
    held = []
    for done in (first, second):
        assert done is not None
        batching.computed(done)
        batching.release_finished()
        assert batching.next_pass() is None
        held.append(batching.blocks.num_used)
    assert held == [2, 0]


def test_what_is_abandoned_begins_anew_and_who_was_cancelled_in_it_is_gone() -> None:
    batching = Batching(16, 4, 10)
    batching.depth = 2
    batching.add(one := request(0, [1] * 25, 5))
    batching.add(other := request(1, [2] * 25, 5))
    assert len(sent(batching)) == 2
    assert batching.cancel(other)
    other.finish("interrupted")
    batching.abandon()
    assert batching.running == [one]
    assert sent(batching) == [[(0, 0, 10)], [(0, 10, 10)]]


def test_others_that_wait_get_a_pass_before_a_prompt_gets_its_second() -> None:
    batching = Batching(16, 4, 10)
    batching.depth = 3
    batching.add(request(0, [1] * 90, 5))
    batching.add(request(1, [2] * 90, 5))
    assert sent(batching) == [[(0, 0, 10)], [(1, 0, 10)], [(0, 10, 10)]]


def test_chunks_keep_to_their_share_where_others_decode_in_another_pass() -> None:
    batching = Batching(16, 4, 64, lambda decoding, behind, since: 10 * len(decoding))
    batching.depth = 2
    batching.add(first := request(0, [1] * 5, 9))
    todo = batching.next_pass()
    assert todo is not None
    batching.computed(todo)
    first.append(1)
    batching.add(request(1, [2] * 90, 5))
    assert sent(batching) == [[(0, 5, 1), (1, 0, 10)], [(1, 10, 10)]]


class Ahead(LocalRunner):
    """Computes passes in their order, and hands them back later, as a chain of stages does."""

    depth = 3

    def __init__(self, runner: LocalRunner) -> None:
        super().__init__(runner.executor)
        self._way = deque[tuple[Pass, list[Drawn]]]()
        self.most = 0  # passes on their way that one request was in

    def begin(self, todo: Pass, draws: Sequence[Draw]) -> None:
        super().begin(todo, draws)
        self._way.append(super().end())
        self.most = max(self.most, *(sum(r in other.requests for other, _ in self._way) for r in todo.requests))

    def end(self) -> tuple[Pass, list[Drawn]]:
        return self._way.popleft()

    def abandon(self) -> None:
        self._way.clear()


@pytest.mark.skipif(kernels() is None, reason="the native kernels are not built here")
def test_tokens_and_log_probabilities_are_those_of_one_pass_at_a_time(
    tiny_int4: Path, here: Topology, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [[5, 250, 17, 99, 3, 3, 42] * 40, [7], list(range(60, 200))]
    params = [
        SamplingParams(max_tokens=n, ignore_eos=True, seed=n, logprobs=2, prompt_logprobs=told)
        for n, told in ((6, 1), (20, None), (0, 0))
    ]
    with LLM(tiny_int4, devices=here, max_model_len=320, max_num_seqs=3, prefill_chunk=40, threads=1) as llm:

        def outcome(first: int = 0) -> list[Any]:
            outputs = llm.generate(prompts[first:], params[first:])
            return [(o.token_ids, o.logprobs, o.prompt_logprobs) for o in outputs]

        expected = outcome()
        assert [len(told) for _, _, told in expected] == [280, 0, 140]
        runner = llm.engine.runner
        assert isinstance(runner, LocalRunner)
        ahead = Ahead(runner)
        monkeypatch.setattr(llm.engine, "runner", ahead)
        monkeypatch.setattr(llm.engine.batching, "depth", Ahead.depth)
        assert outcome() == expected
        assert ahead.most == Ahead.depth - 1, "the other long prompt has one pass of three"
        assert outcome(2) == expected[2:]
        assert ahead.most == Ahead.depth
