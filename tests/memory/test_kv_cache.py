"""Blocks are handed out once and come back, whatever the order; entries read back the same from any block table."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ciuic_runtime.memory.kv_cache import BLOCK_TOKENS, BlockAllocator, KVCache, blocks_for
from ciuic_runtime.models.batch import Chunk, make_batch

VALUES, BLOCKS = 6, 9


def cache(num_layers: int = 2) -> KVCache:
    """Filled with NaN, so that reading what was not written shows."""

    def allocate(layer: int, nbytes: int) -> torch.Tensor:
        return torch.full((nbytes // 4,), float("nan")).view(torch.uint8)

    return KVCache(dict.fromkeys(range(num_layers), VALUES), BLOCKS, torch.float32, allocate)


def written(kv: KVCache, layer: int, blocks: tuple[int, ...], entries: torch.Tensor, sizes: list[int]) -> None:
    """The entries through the slots that a batch gives its tokens, chunk by chunk."""
    at = 0
    for size in sizes:
        n = min(size, len(entries) - at)
        if n > 0:
            kv.write(layer, make_batch([Chunk(range(n), at, blocks, prompt=True)]).slots, entries[at : at + n])
            at += n
    assert at == len(entries)


@given(st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_block_table_reads_back_what_was_written(data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 5 * BLOCK_TOKENS))
    table = tuple(data.draw(st.permutations(range(BLOCKS)))[: blocks_for(length)])
    sizes = [*data.draw(st.lists(st.integers(1, 100), max_size=5)), length]
    entries = torch.arange(length * VALUES, dtype=torch.float32).view(length, VALUES)
    scattered, neighbours = cache(), cache()
    written(scattered, 1, table, entries, sizes)
    written(neighbours, 1, tuple(range(blocks_for(length))), entries, [length])
    for upto in {1, length, min(length, BLOCK_TOKENS), data.draw(st.integers(1, length))}:
        used = blocks_for(upto)
        assert torch.equal(scattered.read(1, table[:used], upto), entries[:upto])
        assert torch.equal(neighbours.read(1, tuple(range(used)), upto), entries[:upto])


def test_neighbouring_blocks_are_read_without_copying() -> None:
    kv = cache()
    assert kv.read(0, (3, 4, 5), 130).data_ptr() == kv.read(0, (3,), 1).data_ptr()
    assert kv.read(0, (3, 5, 4), 130).data_ptr() != kv.read(0, (3,), 1).data_ptr()
    assert kv.read(0, (3, 2, 1), 130).data_ptr() != kv.read(0, (3,), 1).data_ptr()


def test_layers_and_sequences_do_not_touch_each_other() -> None:
    kv = cache()
    mine, theirs = torch.ones(100, VALUES), torch.full((70, VALUES), 2.0)
    written(kv, 0, (0, 2), mine, [100])
    written(kv, 0, (1, 3), theirs, [70])
    written(kv, 1, (0, 2), mine * 5, [100])
    assert torch.equal(kv.read(0, (0, 2), 100), mine)
    assert torch.equal(kv.read(0, (1, 3), 70), theirs)
    assert torch.equal(kv.read(1, (0, 2), 100), mine * 5)
    assert kv.read(1, (1, 3), 70).isnan().all()


def test_blocks_for() -> None:
    assert [blocks_for(n) for n in (1, 63, 64, 65, 128, 129)] == [1, 1, 1, 2, 2, 3]


@given(st.lists(st.one_of(st.integers(0, 6), st.integers(-40, -1)), max_size=40))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_allocator_never_gives_a_block_twice(steps: list[int]) -> None:
    """A step takes n blocks, or gives back what the |n|-th living holder has."""
    allocator, held = BlockAllocator(12), []
    for step in steps:
        if step < 0 and held:
            allocator.free(held.pop(-step % len(held)))
        elif step >= 0:
            free = allocator.num_free
            assert allocator.can_allocate(step) == (step <= free)
            if step <= free:
                blocks = allocator.allocate(step)
                assert len(blocks) == step
                assert blocks == sorted(blocks), "lowest first"
                held.append(blocks)
        out = [b for blocks in held for b in blocks]
        assert len(out) == len(set(out))
        assert set(out) <= set(range(12))
        assert allocator.num_free == 12 - len(out)


def test_allocator_refuses_mistakes() -> None:
    allocator = BlockAllocator(3)
    blocks = allocator.allocate(2)
    with pytest.raises(AssertionError, match="2 blocks asked, 1 of 3 free"):
        allocator.allocate(2)
    allocator.free(blocks)
    with pytest.raises(AssertionError, match="freed twice"):
        allocator.free(blocks[:1])
    assert allocator.allocate(3) == [0, 1, 2]


def test_a_lone_sequence_gets_neighbours_again_after_others_left() -> None:
    allocator = BlockAllocator(6)
    first, second = allocator.allocate(2), allocator.allocate(2)
    allocator.free(first)
    allocator.free(second)
    assert allocator.allocate(4) == [0, 1, 2, 3]
