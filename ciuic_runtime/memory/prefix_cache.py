"""Blocks of the KV cache that sequences share: a radix tree whose edges are blocks of tokens, over all the blocks there
are. Knows token ids and block numbers; that a block's content is a function of the tokens up to its end is its user's
promise."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

from ciuic_runtime.memory.kv_cache import BLOCK_TOKENS, BlockAllocator

BlockKey = tuple[int, ...]  # BLOCK_TOKENS token ids; a token that was computed in another form has another number


@dataclass(eq=False, slots=True)
class _Node:
    """A block that is full, under the block before it. Whoever holds it holds its ancestors too."""

    key: BlockKey
    block: int
    parent: _Node | None
    holders: int = 0
    last_used: int = 0
    children: dict[BlockKey, _Node] = field(default_factory=dict)


class PrefixCache:
    """A block is free, or private to one sequence, or in the tree: held by any number of sequences, or by none until
    its room is needed. What was used least recently goes first, leaves before what they hang on."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._allocator = BlockAllocator(num_blocks)
        self._roots: dict[BlockKey, _Node] = {}
        self._nodes: dict[int, _Node] = {}  # block -> where it is in the tree
        self._leaves: list[tuple[int, int, _Node]] = []  # a heap: (last use, block, leaf that nobody held then)
        self._uses = 0
        self.num_cached = 0  # blocks in the tree that nobody holds

    @property
    def num_free(self) -> int:
        return self._allocator.num_free

    @property
    def num_used(self) -> int:
        """Blocks that sequences hold."""
        return self.num_blocks - self.num_free - self.num_cached

    def can_allocate(self, count: int) -> bool:
        return count <= self.num_free + self.num_cached

    def match(self, keys: Sequence[BlockKey]) -> int:
        """How many blocks from the first on are in the tree."""
        children, count = self._roots, 0
        while count < len(keys) and (node := children.get(keys[count])):
            children, count = node.children, count + 1
        return count

    def hold(self, keys: Sequence[BlockKey]) -> list[int]:
        """The blocks of a prefix that is in the tree (`match`), held from now on."""
        blocks, children = [], self._roots
        for key in keys:
            node = children[key]
            self._hold(node)
            blocks.append(node.block)
            children = node.children
        return blocks

    def allocate(self, count: int) -> list[int]:
        """Private blocks; what nobody holds gives way."""
        assert self.can_allocate(count), f"{count} blocks asked, {self.num_free} free and {self.num_cached} cached"
        while self.num_free < count:
            self._evict()
        return self._allocator.allocate(count)

    def publish(self, key: BlockKey, blocks: list[int], index: int) -> None:
        """The block at `index` of a sequence that holds `blocks` is full; those before it are in the tree. Where the
        tree has the same already, that takes the block's place in the list."""
        parent = self._nodes[blocks[index - 1]] if index else None
        children = parent.children if parent else self._roots
        if (same := children.get(key)) is not None:
            self._allocator.free([blocks[index]])
            blocks[index] = same.block
            self._hold(same)
            return
        node = children[key] = _Node(key, blocks[index], parent, holders=1)
        self._nodes[node.block] = node

    def release(self, blocks: Sequence[int]) -> None:
        """A sequence gives back what it holds: private blocks are free, the others stay until their room is needed."""
        self._uses += 1
        for block in reversed(blocks):
            node = self._nodes.get(block)
            if node is None:
                self._allocator.free([block])
                continue
            node.holders -= 1
            node.last_used = self._uses
            if not node.holders:
                self.num_cached += 1
                self._offer(node)

    def clear(self) -> None:
        """Forgets what nobody holds."""
        while self.num_cached:
            self._evict()

    def _hold(self, node: _Node) -> None:
        self.num_cached -= not node.holders
        node.holders += 1

    def _offer(self, node: _Node) -> None:
        """It may be evicted, if it is a leaf that nobody holds."""
        if node.holders or node.children:
            return
        if len(self._leaves) > 2 * len(self._nodes) + BLOCK_TOKENS:
            self._leaves = [leaf for leaf in self._leaves if _is_current(leaf)]
            heapq.heapify(self._leaves)
        heapq.heappush(self._leaves, (node.last_used, node.block, node))

    def _evict(self) -> None:
        leaf = heapq.heappop(self._leaves)
        while not _is_current(leaf):
            leaf = heapq.heappop(self._leaves)
        node = leaf[2]
        parent = node.parent
        del (parent.children if parent else self._roots)[node.key]
        del self._nodes[node.block]
        node.last_used = -1  # other entries of the heap that mean it are of the past
        self.num_cached -= 1
        self._allocator.free([node.block])
        if parent is not None:
            self._offer(parent)


def _is_current(leaf: tuple[int, int, _Node]) -> bool:
    last_used, _, node = leaf
    return node.last_used == last_used and not node.holders and not node.children
