"""Batching as the state machine it is: what it decides for a list of requests, without a model."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ciuic_runtime.engine.batching import Batching, Pass
from ciuic_runtime.engine.fair_queue import MOST_IDLE, FairQueue
from ciuic_runtime.engine.request import Request
from ciuic_runtime.engine.sampling import SamplingParams
from ciuic_runtime.engine.text import NoText, TextStream
from ciuic_runtime.memory.kv_cache import BLOCK_TOKENS, blocks_for

EOS = 9


def request(index: int, prompt: int, new: int, ignore_eos: bool = False) -> Request:
    params = SamplingParams(max_tokens=new, ignore_eos=ignore_eos)
    return Request(index, tuple(range(prompt)), params, TextStream(NoText()), frozenset({EOS}))


def give(batching: Batching, todo: Pass, token: int = 1) -> None:
    """What the engine does after a pass."""
    batching.computed(todo)
    for r, chunk in zip(todo.requests, todo.chunks, strict=True):
        if chunk.sample:
            r.append(token)
    batching.release_finished()


def next_pass(batching: Batching) -> Pass:
    todo = batching.next_pass()
    assert todo is not None, "nothing to do"
    return todo


def shape(todo: Pass) -> tuple[str, list[tuple[int, int, int]]]:
    """Phase, and (request, position, tokens) of each chunk."""
    rows = zip(todo.requests, todo.chunks, strict=True)
    return todo.phase, [(r.index, c.position, len(c.token_ids)) for r, c in rows]


def test_one_request_from_prompt_to_end() -> None:
    batching = Batching(4, 2, 10)
    batching.add(request(0, 25, 3))
    seen = []
    while todo := batching.next_pass():
        seen.append((*shape(todo), [c.sample for c in todo.chunks]))
        give(batching, todo)
    assert seen == [
        ("prefill", [(0, 0, 10)], [False]),
        ("prefill", [(0, 10, 10)], [False]),
        ("prefill", [(0, 20, 5)], [True]),
        ("decode", [(0, 25, 1)], [True]),
        ("decode", [(0, 26, 1)], [True]),
    ]
    assert batching.blocks.num_free == 4


def test_a_pass_is_filled_with_several_prompts() -> None:
    batching = Batching(8, 4, 10)
    for i, n in enumerate((3, 4, 8)):
        batching.add(request(i, n, 2))
    todo = next_pass(batching)
    assert shape(todo) == ("prefill", [(0, 0, 3), (1, 0, 4), (2, 0, 3)])
    assert [c.sample for c in todo.chunks] == [True, True, False]
    give(batching, todo)
    todo = next_pass(batching)
    assert shape(todo) == ("prefill", [(2, 3, 5)])
    give(batching, todo)
    assert shape(next_pass(batching)) == ("decode", [(0, 3, 1), (1, 4, 1), (2, 8, 1)])


def test_the_token_that_goes_in_is_the_last_one() -> None:
    batching = Batching(2, 1, 64)
    batching.add(request(0, 5, 4))
    for token in (7, 8):
        todo = next_pass(batching)
        give(batching, todo, token)
    todo = next_pass(batching)
    assert list(todo.chunks[0].token_ids) == [8]
    assert todo.chunks[0].position == 6
    assert not todo.chunks[0].prompt


def test_admission_is_first_come_first_served_and_waits_for_blocks() -> None:
    """The second needs more than is left; the third would fit, but does not overtake."""
    batching = Batching(3, 8, 512)
    for i, n in enumerate((100, 150, 10)):
        batching.add(request(i, n, 10))
    todo = next_pass(batching)
    assert shape(todo)[1] == [(0, 0, 100)]
    assert [r.index for r in batching.waiting] == [1, 2]
    while 0 in [r.index for r in todo.requests]:
        give(batching, todo)
        todo = next_pass(batching)
    assert shape(todo)[1] == [(1, 0, 150)]


def test_end_of_sequence_frees_at_once_and_lets_the_next_in() -> None:
    batching = Batching(1, 1, 64)
    batching.add(request(0, 5, 30))
    batching.add(request(1, 5, 30, ignore_eos=True))
    todo = next_pass(batching)
    give(batching, todo, EOS)
    todo = next_pass(batching)
    assert shape(todo)[1] == [(1, 0, 5)]
    give(batching, todo, EOS)
    assert shape(next_pass(batching)) == ("decode", [(1, 5, 1)])


def test_what_can_never_fit_is_refused() -> None:
    with pytest.raises(AssertionError, match="request 3 can never fit"):
        Batching(1, 1, 64).add(request(3, 60, 5))


@given(
    sizes=st.lists(st.tuples(st.integers(1, 300), st.integers(1, 40)), min_size=1, max_size=12),
    num_blocks=st.integers(6, 12), max_num_seqs=st.integers(1, 5), chunk=st.integers(1, 400), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=80, deadline=None, derandomize=True)
def test_every_batch_finishes(
    sizes: list[tuple[int, int]], num_blocks: int, max_num_seqs: int, chunk: int, seed: int
) -> None:
    """Batches larger than the cache, chunks of every size, ends at random: all finish, none gets another's blocks."""
    batching, r = Batching(num_blocks, max_num_seqs, chunk), random.Random(seed)
    requests = [request(i, p, n) for i, (p, n) in enumerate(sizes)]
    for one in requests:
        batching.add(one)
    cached: dict[int, int] = {}
    for _ in range(20_000):
        todo = batching.next_pass()
        if todo is None:
            break
        check(batching, todo, chunk, max_num_seqs, cached)
        give(batching, todo, EOS if r.random() < 0.05 else 1)
    assert all(one.finish_reason for one in requests)
    assert all(len(one.token_ids) <= one.params.max_tokens for one in requests)
    assert batching.blocks.num_free == num_blocks
    admitted = list(cached)
    assert admitted == sorted(admitted), "somebody overtook"


def check(batching: Batching, todo: Pass, chunk: int, max_num_seqs: int, cached: dict[int, int]) -> None:
    tokens = sum(len(c.token_ids) for c in todo.chunks)
    assert tokens <= (chunk if todo.phase == "prefill" else max_num_seqs)
    assert len(batching.running) <= max_num_seqs
    held = [b for one in batching.running for b in one.blocks]
    assert len(held) == len(set(held)) == batching.blocks.num_blocks - batching.blocks.num_free
    for one, part in zip(todo.requests, todo.chunks, strict=True):
        assert part.position == cached.get(one.index, 0), "a gap or an overlap in the cache"
        cached[one.index] = part.position + len(part.token_ids)
        assert cached[one.index] <= len(part.blocks) * BLOCK_TOKENS
        assert part.blocks == tuple(one.blocks)
        assert len(one.blocks) == max(blocks_for(cached[one.index]), blocks_for(len(one.prompt)))


# Serving: mixed passes, preemption, shared prefixes, fair turns


def serving(num_blocks: int, max_num_seqs: int, chunk: int = 512, share: int = 32, **settings: bool) -> Batching:
    return Batching(
        num_blocks, max_num_seqs, chunk, lambda decoding, behind, since: share, shared_prefixes=True, **settings
    )


def test_a_prompt_comes_in_shares_beside_those_that_decode() -> None:
    batching = serving(16, 4, share=10)
    batching.add(request(0, 5, 9))
    give(batching, next_pass(batching))
    batching.add(request(1, 25, 3))
    seen = []
    for _ in range(4):
        todo = next_pass(batching)
        seen.append((*shape(todo), [bool(c.sample) for c in todo.chunks]))
        give(batching, todo)
    assert seen == [
        ("prefill", [(0, 5, 1), (1, 0, 10)], [True, False]),
        ("prefill", [(0, 6, 1), (1, 10, 10)], [True, False]),
        ("prefill", [(0, 7, 1), (1, 20, 5)], [True, True]),
        ("decode", [(0, 8, 1), (1, 25, 1)], [True, True]),
    ]


def test_the_last_one_let_in_gives_way_and_catches_up_in_the_forms_of_its_tokens() -> None:
    """Blocks for 192 positions; two sequences grow into them, the second is put back and computed again: its prompt as
    prompt, what it had generated as generated, many tokens per pass, the last of them sampled."""
    batching = Batching(3, 4, 512, lambda decoding, behind, since: 512)
    first, second = request(0, 60, 130, ignore_eos=True), request(1, 62, 60, ignore_eos=True)
    batching.add(first)
    batching.add(second)
    for _ in range(4):
        give(batching, next_pass(batching))
    assert (first.computed, second.computed) == (63, 65)
    give(batching, next_pass(batching))
    give(batching, next_pass(batching))
    assert batching.preemptions == 1
    assert (len(first.blocks), second.blocks, second.computed) == (2, [], 0)
    assert [r.index for r in batching.waiting] == [1]
    first.finish("stop")
    batching.release_finished()
    had = list(second.token_ids)
    todo = next_pass(batching)
    assert [(c.position, c.token_ids, c.prompt, c.sample) for c in todo.chunks] == [(0, second.prompt, True, False)]
    give(batching, todo)
    todo = next_pass(batching)
    assert [(c.position, list(c.token_ids), c.prompt, c.sample) for c in todo.chunks] == [(62, had, False, True)]
    give(batching, todo)
    assert len(second.token_ids) == len(had) + 1
    assert next_pass(batching).phase == "decode"


def prompted(index: int, ids: list[int], new: int = 4, client: str = "") -> Request:
    params = SamplingParams(max_tokens=new, ignore_eos=True)
    return Request(index, tuple(ids), params, TextStream(NoText()), frozenset({EOS}), client)


def finish(batching: Batching) -> None:
    while todo := batching.next_pass():
        give(batching, todo)


def test_a_prefix_that_was_computed_is_not_computed_again() -> None:
    batching, system = serving(16, 4), list(range(150))
    batching.add(prompted(0, [*system, 1]))
    finish(batching)
    second = prompted(1, [*system, 2])
    batching.add(second)
    todo = next_pass(batching)
    assert shape(todo)[1] == [(1, 128, 23)]
    assert second.cached == 128
    give(batching, todo)
    finish(batching)
    whole = prompted(2, [*system[:128]])
    batching.add(whole)
    todo = next_pass(batching)
    assert shape(todo)[1] == [(2, 64, 64)], "the last token is computed in any case"
    give(batching, todo)
    finish(batching)
    assert (batching.blocks.num_used, batching.blocks.num_free + batching.blocks.num_cached) == (0, 16)


def test_generated_tokens_are_found_by_the_form_in_which_they_were_computed() -> None:
    """A conversation goes on: what the model said is a prompt now, and has other bits where there are two forms."""
    for two_forms, found in ((True, 64), (False, 128)):
        batching, first = serving(16, 4, two_forms=two_forms), prompted(0, list(range(64)), 80)
        batching.add(first)
        finish(batching)
        assert first.computed == 64 + 79
        batching.add(again := prompted(1, [*range(64), *first.token_ids, 7]))
        next_pass(batching)
        assert again.cached == found


def test_one_whose_prefix_is_being_computed_waits_for_it_and_others_go_first() -> None:
    batching, system = serving(32, 8, chunk=100), list(range(200))
    for i in range(3):
        batching.add(prompted(i, [*system, i], client="a"))
    batching.add(prompted(3, list(range(500, 520)), client="b"))
    todo = next_pass(batching)
    assert shape(todo)[1] == [(0, 0, 100)]
    assert [r.index for r in batching.running] == [0, 3]
    give(batching, todo)
    finish(batching)
    assert batching.blocks.num_used == 0


def test_prompts_whose_logprobs_are_wanted_are_computed_whole_and_in_small_pieces() -> None:
    batching = serving(16, 4)
    batching.add(prompted(0, list(range(130))))
    finish(batching)
    params = SamplingParams(max_tokens=0, prompt_logprobs=1)
    batching.add(Request(1, tuple(range(130)), params, TextStream(NoText()), frozenset()))
    todo = next_pass(batching)
    assert shape(todo)[1] == [(1, 0, 64)]
    assert todo.chunks[0].sample == "all"


def test_cancelling_frees_at_once_wherever_the_request_is() -> None:
    batching = serving(8, 1)
    running, waiting = request(0, 100, 10), request(1, 10, 10)
    batching.add(running)
    batching.add(waiting)
    give(batching, next_pass(batching))
    assert batching.cancel(waiting)
    assert batching.cancel(running)
    assert not batching.cancel(running)
    assert (batching.blocks.num_used, batching.running, len(batching.waiting)) == (0, [], 0)
    assert batching.next_pass() is None


def test_clients_take_turns_by_what_they_have_had() -> None:
    """One client has ten requests before the other comes with one: it is not behind all of them."""
    batching = serving(64, 1)
    for i in range(10):
        batching.add(prompted(i, [5] * 20, client="many"))
    order = []
    for step in range(12):
        if step == 2:
            batching.add(prompted(10, [6] * 20, client="one"))
        before = list(batching.running)
        todo = batching.next_pass()
        if todo is None:
            break
        order += [r.index for r in batching.running if r not in before]
        while batching.running:
            give(batching, todo)
            if not batching.running:
                break
            todo = next_pass(batching)
    assert order[:2] == [0, 1]
    assert 10 in order[2:4]


def test_who_was_away_is_not_owed_for_that_time_and_counters_stay_few() -> None:
    queue = FairQueue()
    old = prompted(0, [1], client="old")
    queue.add(old)
    queue.let_in(old)
    queue.served("old", 1000, 0)
    new, more = prompted(1, [1], client="new"), prompted(2, [1], client="old")
    queue.add(new)
    queue.add(more)
    assert [r.client for r in queue.heads()] == ["new", "old"], "equal from now on, in the order of coming"
    for i in range(3000):
        one = prompted(10 + i, [1], client=f"c{i}")
        queue.add(one)
        queue.remove(one)
    assert len(queue._served) <= MOST_IDLE + 3


@given(
    seed=st.integers(0, 100_000),
    num_blocks=st.integers(5, 14),
    max_num_seqs=st.integers(1, 6),
    share=st.integers(1, 80),
)
@settings(max_examples=60, deadline=None)
def test_whoever_comes_goes_and_is_preempted_everybody_is_served_and_every_block_comes_back(
    seed: int, num_blocks: int, max_num_seqs: int, share: int
) -> None:
    r, batching = random.Random(seed), serving(num_blocks, max_num_seqs, chunk=100, share=share)
    todo_list = [
        prompted(i, [r.randrange(2)] * r.choice([3, 64, 70, 130]), r.choice([1, 30, 90]), r.choice("abc"))
        for i in range(15)
    ]
    alive: list[Request] = []
    cancelled: set[int] = set()
    for _ in range(30_000):
        if todo_list and r.random() < 0.3:
            alive.append(todo_list[-1])
            batching.add(todo_list.pop())
        if alive and r.random() < 0.01:
            one = r.choice(alive)
            if batching.cancel(one):
                cancelled.add(one.index)
        todo = batching.next_pass()
        if todo is None:
            if not todo_list:
                break
            continue
        behind = sum(len(c.token_ids) for one, c in zip(todo.requests, todo.chunks, strict=True) if one.catching_up)
        assert behind <= (share if any(not one.catching_up for one in todo.requests) else 100)
        private = [b for one in batching.running for b in one.blocks[one.computed // BLOCK_TOKENS :]]
        assert len(private) == len(set(private)), "two would write into one block"
        for one, chunk in zip(todo.requests, todo.chunks, strict=True):
            assert chunk.position == one.computed
            assert tuple(chunk.token_ids) == one.tokens(chunk.position, chunk.position + len(chunk.token_ids))
            assert chunk.prompt == (chunk.position < len(one.prompt)), "in the form that first made it"
            assert chunk.position + len(chunk.token_ids) <= len(chunk.blocks) * BLOCK_TOKENS
        give(batching, todo, r.randrange(2))
    for one in alive:
        assert one.index in cancelled or len(one.token_ids) == one.params.max_tokens, "somebody was forgotten"
    assert batching.blocks.num_used == 0
    batching.blocks.clear()
    assert batching.blocks.num_free == num_blocks


def test_those_who_decode_go_on_alone_while_prompts_pause() -> None:
    batching = Batching(16, 4, 512, lambda decoding, behind, since: 10 if since >= 2 else 0)
    batching.add(request(0, 5, 9))
    give(batching, next_pass(batching))
    batching.add(request(1, 20, 3))
    seen = []
    for _ in range(6):
        todo = next_pass(batching)
        seen.append(shape(todo))
        give(batching, todo)
    decode, shared = [("decode", 1)], [("prefill", 2)]
    assert [(phase, len(rows)) for phase, rows in seen] == decode * 2 + shared + decode * 2 + shared


def test_one_that_is_cancelled_while_it_is_computed_is_gone_when_its_pass_is_done() -> None:
    batching = serving(8, 2)
    batching.add(one := request(0, 100, 10))
    todo = next_pass(batching)
    assert batching.cancel(one)
    one.finish("interrupted")
    assert batching.blocks.num_used == 2
    batching.computed(todo)
    batching.release_finished()
    assert (batching.blocks.num_free, batching.running) == (8, [])


def test_several_passes_on_their_way_share_no_request() -> None:
    batching = Batching(32, 8, 512)
    batching.depth = 2
    for i in range(4):
        batching.add(request(i, 20, 5))
    first, second = next_pass(batching), next_pass(batching)
    assert [[r.index for r in p.requests] for p in (first, second)] == [[0, 1], [2, 3]]
    assert batching.next_pass() is None
    give(batching, first)
    assert [r.index for r in next_pass(batching).requests] == [0, 1]
    give(batching, second)
    assert [r.index for r in next_pass(batching).requests] == [2, 3]


def test_what_was_computed_may_be_lost_and_everybody_catches_up() -> None:
    batching = serving(16, 4)
    requests = [request(i, 70, 9, ignore_eos=True) for i in range(3)]
    for one in requests:
        batching.add(one)
    for _ in range(5):
        give(batching, next_pass(batching))
    before = [list(one.token_ids) for one in requests]
    assert batching.next_pass() is not None  # and it never comes back
    batching.restart()
    assert batching.blocks.num_free == 16
    assert [r.index for r in batching.waiting] == [0, 1, 2]
    finish(batching)
    assert [one.token_ids[: len(had)] for one, had in zip(requests, before, strict=True)] == before
    assert all(len(one.token_ids) == 9 for one in requests)
