"""The queue as the state machine it is: what it decides for a list of requests, without a model."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ciuic_runtime.engine.queue import Decision, RequestQueue
from ciuic_runtime.engine.request import Request
from ciuic_runtime.engine.sampling import SamplingParams
from ciuic_runtime.engine.text import NoText, TextStream
from ciuic_runtime.memory.kv_cache import BLOCK_TOKENS, blocks_for

EOS = 9


def request(index: int, prompt: int, new: int, ignore_eos: bool = False) -> Request:
    params = SamplingParams(max_tokens=new, ignore_eos=ignore_eos)
    return Request(index, tuple(range(prompt)), params, TextStream(NoText()), frozenset({EOS}))


def give(queue: RequestQueue, decision: Decision, token: int = 1) -> None:
    """What the engine does after a pass."""
    queue.computed(decision)
    for r, chunk in zip(decision.requests, decision.chunks, strict=True):
        if chunk.sample:
            r.append(token)
    queue.release_finished()


def decide(queue: RequestQueue) -> Decision:
    decision = queue.decide()
    assert decision is not None, "nothing to do"
    return decision


def shape(decision: Decision) -> tuple[str, list[tuple[int, int, int]]]:
    """Phase, and (request, position, tokens) of each chunk."""
    rows = zip(decision.requests, decision.chunks, strict=True)
    return decision.phase, [(r.index, c.position, len(c.token_ids)) for r, c in rows]


def test_one_request_from_prompt_to_end() -> None:
    queue = RequestQueue(4, 2, 10)
    queue.add(request(0, 25, 3))
    seen = []
    while decision := queue.decide():
        seen.append((*shape(decision), [c.sample for c in decision.chunks]))
        give(queue, decision)
    assert seen == [
        ("prefill", [(0, 0, 10)], [False]),
        ("prefill", [(0, 10, 10)], [False]),
        ("prefill", [(0, 20, 5)], [True]),
        ("decode", [(0, 25, 1)], [True]),
        ("decode", [(0, 26, 1)], [True]),
    ]
    assert queue.blocks.num_free == 4


def test_a_pass_is_filled_with_several_prompts() -> None:
    queue = RequestQueue(8, 4, 10)
    for i, n in enumerate((3, 4, 8)):
        queue.add(request(i, n, 2))
    decision = decide(queue)
    assert shape(decision) == ("prefill", [(0, 0, 3), (1, 0, 4), (2, 0, 3)])
    assert [c.sample for c in decision.chunks] == [True, True, False]
    give(queue, decision)
    decision = decide(queue)
    assert shape(decision) == ("prefill", [(2, 3, 5)])
    give(queue, decision)
    assert shape(decide(queue)) == ("decode", [(0, 3, 1), (1, 4, 1), (2, 8, 1)])


def test_the_token_that_goes_in_is_the_last_one() -> None:
    queue = RequestQueue(2, 1, 64)
    queue.add(request(0, 5, 4))
    for token in (7, 8):
        decision = decide(queue)
        give(queue, decision, token)
    decision = decide(queue)
    assert list(decision.chunks[0].token_ids) == [8]
    assert decision.chunks[0].position == 6
    assert not decision.chunks[0].prompt


def test_admission_is_first_come_first_served_and_waits_for_blocks() -> None:
    """The second needs more than is left; the third would fit, but does not overtake."""
    queue = RequestQueue(3, 8, 512)
    for i, n in enumerate((100, 150, 10)):
        queue.add(request(i, n, 10))
    decision = decide(queue)
    assert shape(decision)[1] == [(0, 0, 100)]
    assert [r.index for r in queue.waiting] == [1, 2]
    while 0 in [r.index for r in decision.requests]:
        give(queue, decision)
        decision = decide(queue)
    assert shape(decision)[1] == [(1, 0, 150)]


def test_end_of_sequence_frees_at_once_and_lets_the_next_in() -> None:
    queue = RequestQueue(1, 1, 64)
    queue.add(request(0, 5, 30))
    queue.add(request(1, 5, 30, ignore_eos=True))
    decision = decide(queue)
    give(queue, decision, EOS)
    decision = decide(queue)
    assert shape(decision)[1] == [(1, 0, 5)]
    give(queue, decision, EOS)
    assert shape(decide(queue)) == ("decode", [(1, 5, 1)])


def test_clear_drops_everything_and_frees() -> None:
    queue = RequestQueue(2, 1, 64)
    first, second = request(0, 70, 10), request(1, 5, 5)
    queue.add(first)
    queue.add(second)
    assert queue.decide() is not None
    assert queue.clear() == [first, second]
    assert queue.blocks.num_free == 2
    assert queue.decide() is None


def test_what_can_never_fit_is_refused() -> None:
    with pytest.raises(AssertionError, match="request 3 can never fit"):
        RequestQueue(1, 1, 64).add(request(3, 60, 5))


@given(
    sizes=st.lists(st.tuples(st.integers(1, 300), st.integers(1, 40)), min_size=1, max_size=12),
    num_blocks=st.integers(6, 12), max_num_seqs=st.integers(1, 5), chunk=st.integers(1, 400), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=80, deadline=None, derandomize=True)
def test_every_batch_finishes(
    sizes: list[tuple[int, int]], num_blocks: int, max_num_seqs: int, chunk: int, seed: int
) -> None:
    """Batches larger than the cache, chunks of every size, ends at random: all finish, none gets another's blocks."""
    queue, r = RequestQueue(num_blocks, max_num_seqs, chunk), random.Random(seed)
    requests = [request(i, p, n) for i, (p, n) in enumerate(sizes)]
    for one in requests:
        queue.add(one)
    cached: dict[int, int] = {}
    for _ in range(20_000):
        decision = queue.decide()
        if decision is None:
            break
        check(queue, decision, chunk, max_num_seqs, cached)
        give(queue, decision, EOS if r.random() < 0.05 else 1)
    assert all(one.finish_reason for one in requests)
    assert all(len(one.token_ids) <= one.params.max_tokens for one in requests)
    assert queue.blocks.num_free == num_blocks
    admitted = list(cached)
    assert admitted == sorted(admitted), "somebody overtook"


def check(queue: RequestQueue, decision: Decision, chunk: int, max_num_seqs: int, cached: dict[int, int]) -> None:
    tokens = sum(len(c.token_ids) for c in decision.chunks)
    assert tokens <= (chunk if decision.phase == "prefill" else max_num_seqs)
    assert len(queue.running) <= max_num_seqs
    held = [b for one in queue.running for b in one.blocks]
    assert len(held) == len(set(held)) == queue.blocks.num_blocks - queue.blocks.num_free
    for one, part in zip(decision.requests, decision.chunks, strict=True):
        assert part.position == cached.get(one.index, 0), "a gap or an overlap in the cache"
        cached[one.index] = part.position + len(part.token_ids)
        assert cached[one.index] <= len(part.blocks) * BLOCK_TOKENS
        assert part.blocks == tuple(one.blocks)
        assert len(one.blocks) == blocks_for(one.most_tokens)
