"""The radix tree of blocks beside a plain account of who holds what."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ciuic_runtime.memory.prefix_cache import BlockKey, PrefixCache


def key(*ids: int) -> BlockKey:
    return ids


def sequence(cache: PrefixCache, keys: list[BlockKey]) -> list[int]:
    """A sequence of full blocks, computed and published where it was not found."""
    blocks = cache.hold(keys[: cache.match(keys)])
    found = len(blocks)
    blocks += cache.allocate(len(keys) - found)
    for i in range(found, len(keys)):
        cache.publish(keys[i], blocks, i)
    return blocks


def test_a_prefix_is_found_while_it_is_held_and_after() -> None:
    cache = PrefixCache(8)
    first = sequence(cache, [key(1), key(2), key(3)])
    assert cache.match([key(1), key(2), key(4)]) == 2
    second = sequence(cache, [key(1), key(2), key(4)])
    assert second[:2] == first[:2]
    assert second[2] != first[2]
    assert (cache.num_used, cache.num_cached, cache.num_free) == (4, 0, 4)
    cache.release(first)
    assert (cache.num_used, cache.num_cached) == (3, 1)
    cache.release(second)
    assert (cache.num_used, cache.num_cached, cache.num_free) == (0, 4, 4)
    assert cache.match([key(1), key(2), key(3)]) == 3
    assert cache.match([key(2)]) == 0


def test_equal_blocks_computed_twice_become_one() -> None:
    cache = PrefixCache(6)
    first, second = cache.allocate(2), cache.allocate(2)
    for i, k in enumerate((key(1), key(2))):
        cache.publish(k, first, i)
        cache.publish(k, second, i)
    assert second == first
    assert cache.num_free == 4
    cache.release(first)
    assert cache.num_used == 2
    cache.release(second)
    assert cache.num_cached == 2


def test_what_was_used_least_recently_goes_first_and_leaves_before_their_stem() -> None:
    cache = PrefixCache(4)
    a, b = sequence(cache, [key(1), key(2)]), sequence(cache, [key(1), key(3)])
    cache.release(a)
    cache.release(b)
    assert cache.num_cached == 3
    cache.release(sequence(cache, [key(1), key(2)]))  # used again: the other branch is older now
    held = cache.allocate(2)
    assert cache.match([key(1), key(3)]) == 1
    assert cache.match([key(1), key(2)]) == 2
    more = cache.allocate(1)
    assert cache.match([key(1), key(2)]) == 1
    more += cache.allocate(1)
    assert cache.match([key(1)]) == 0
    assert not cache.can_allocate(1)
    with pytest.raises(AssertionError, match="1 blocks asked, 0 free and 0 cached"):
        cache.allocate(1)
    cache.release(held + more)
    assert cache.num_free == 4


def test_what_is_held_is_never_evicted_and_clear_forgets_the_rest() -> None:
    cache = PrefixCache(4)
    held = sequence(cache, [key(1), key(2)])
    cache.release(sequence(cache, [key(5)]))
    cache.clear()
    assert cache.match([key(5)]) == 0
    assert cache.match([key(1), key(2)]) == 2
    cache.release(held)
    cache.clear()
    assert cache.num_free == 4


def test_long_use_without_eviction_keeps_the_heap_small() -> None:
    cache = PrefixCache(4)
    for _ in range(5_000):
        cache.release(sequence(cache, [key(1)]))
    assert len(cache._leaves) < 200


@given(seed=st.integers(0, 10_000), num_blocks=st.integers(6, 24))
def test_no_block_is_lost_or_given_to_two(seed: int, num_blocks: int) -> None:
    """Random sequences over few keys: contents never change under a holder, and the counts add up."""
    cache, r = PrefixCache(num_blocks), random.Random(seed)
    content: dict[int, list[BlockKey]] = {}  # block -> the keys up to it, as last published
    held: list[tuple[list[int], list[BlockKey], int]] = []
    for _ in range(200):
        if held and (r.random() < 0.4 or not cache.can_allocate(5)):
            blocks, keys, full = held.pop(r.randrange(len(held)))
            for i in range(full):
                assert content[blocks[i]] == keys[: i + 1], "somebody wrote into a held block"
            cache.release(blocks)
            continue
        keys = [key(r.randrange(3)) for _ in range(r.randrange(1, 5))]
        found = cache.match(keys)
        blocks = cache.hold(keys[:found])
        for i, block in enumerate(blocks):
            assert content[block] == keys[: i + 1], "another prefix was found"
        private = cache.allocate(len(keys) - found + 1)
        assert not {*private} & {b for other, _, _ in held for b in other}
        blocks += private
        full = r.randrange(found, len(keys) + 1)
        for i in range(found, full):
            content[blocks[i]] = keys[: i + 1]
            cache.publish(keys[i], blocks, i)
        held.append((blocks, keys, full))
        in_use = {b for other, _, _ in held for b in other}
        assert cache.num_used == len(in_use)
        assert cache.num_free + cache.num_used + cache.num_cached == num_blocks
    for blocks, _, _ in held:
        cache.release(blocks)
    assert cache.num_used == 0
    cache.clear()
    assert cache.num_free == num_blocks
