"""The KV cache: blocks of 64 tokens, handed out to sequences through block tables; one tensor per layer.
Knows what an entry is in size only: the latent for MLA, keys and values otherwise."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping

import torch

BLOCK_TOKENS = 64


def blocks_for(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS)


class BlockAllocator:
    """Which blocks are free. Hands out the lowest numbers first, so that a lone sequence gets neighbouring blocks."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def can_allocate(self, count: int) -> bool:
        return count <= len(self._free)

    def allocate(self, count: int) -> list[int]:
        assert self.can_allocate(count), f"{count} blocks asked, {len(self._free)} of {self.num_blocks} free"
        return [heapq.heappop(self._free) for _ in range(count)]

    def free(self, blocks: list[int]) -> None:
        for block in blocks:
            assert block not in self._free, f"block {block} freed twice"
            heapq.heappush(self._free, block)


class KVCache:
    """Entries of every layer, on the device that computes the layer's attention.

    `allocate(layer, nbytes)` gives the memory (uint8, on that device)."""

    def __init__(
        self,
        values_per_token: Mapping[int, int],  # layer -> cached values per token
        num_blocks: int,
        dtype: torch.dtype,
        allocate: Callable[[int, int], torch.Tensor],
    ) -> None:
        self.num_blocks, self.dtype = num_blocks, dtype
        self._layers: dict[int, torch.Tensor] = {}  # layer -> [num_blocks x BLOCK_TOKENS, values]
        for layer, values in values_per_token.items():
            rows = num_blocks * BLOCK_TOKENS
            memory = allocate(layer, rows * values * dtype.itemsize)
            self._layers[layer] = memory.view(dtype).view(rows, values)

    @property
    def num_positions(self) -> int:
        """That all blocks together hold: no sequence is longer."""
        return self.num_blocks * BLOCK_TOKENS

    def memory(self, layer: int) -> torch.Tensor:
        """Every entry of a layer, [num_blocks x BLOCK_TOKENS, values]."""
        return self._layers[layer]

    def clear(self) -> None:
        """Lets go of the memory; nothing can be written or read after this."""
        self._layers.clear()

    def write(self, layer: int, slots: torch.Tensor, entries: torch.Tensor) -> None:
        """entries [tokens, values] to slots [tokens] (block x BLOCK_TOKENS + offset)."""
        self._layers[layer][slots] = entries

    def read(self, layer: int, blocks: tuple[int, ...], length: int) -> torch.Tensor:
        """The first `length` entries of a sequence, [length, values]; a view where its blocks are neighbours."""
        rows = self._layers[layer]
        if blocks == tuple(range(blocks[0], blocks[0] + len(blocks))):
            first = blocks[0] * BLOCK_TOKENS
            return rows[first : first + length]
        table = torch.tensor(blocks, device=rows.device)
        return rows.view(self.num_blocks, BLOCK_TOKENS, -1)[table].flatten(0, 1)[:length]
