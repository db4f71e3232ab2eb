"""What one forward pass is asked to do: a ragged list of tokens of several sequences, and where their cache entries go.
Knows nothing of requests, sampling or devices' order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from ciuic_runtime.memory.kv_cache import BLOCK_TOKENS


class SequenceSlice(NamedTuple):
    """The new tokens of one sequence in a batch."""

    start: int  # first row in the batch
    length: int
    position: int  # of the first new token
    blocks: tuple[int, ...]  # block table, covering position + length tokens
    prompt: bool  # prompt tokens are computed in the expanded form, generated ones in the absorbed form

    @property
    def context(self) -> int:
        return self.position + self.length

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.length)


@dataclass(frozen=True, slots=True)
class Batch:
    token_ids: torch.Tensor  # int64 [tokens]
    positions: torch.Tensor  # int64 [tokens]
    slots: torch.Tensor  # int64 [tokens]: where each token's cache entry goes
    sequences: tuple[SequenceSlice, ...]
    sampled_rows: torch.Tensor  # int64 [sampled]: rows whose logits are wanted

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]

    def to(self, device: torch.device) -> Batch:
        if device == self.token_ids.device:
            return self
        ids, positions, slots = self.token_ids.to(device), self.positions.to(device), self.slots.to(device)
        return Batch(ids, positions, slots, self.sequences, self.sampled_rows.to(device))


class Chunk(NamedTuple):
    """One sequence's share of a batch, before it is laid out."""

    token_ids: Sequence[int]
    position: int
    blocks: tuple[int, ...]
    prompt: bool
    sample: bool | str = True  # the logits of its last token are wanted; "all": of every token


def make_batch(chunks: Sequence[Chunk]) -> Batch:
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    sampled: list[int] = []
    sequences = []
    for chunk in chunks:
        start, n = len(ids), len(chunk.token_ids)
        span = range(chunk.position, chunk.position + n)
        ids += chunk.token_ids
        positions += span
        slots += [chunk.blocks[p // BLOCK_TOKENS] * BLOCK_TOKENS + p % BLOCK_TOKENS for p in span]
        used = chunk.blocks[: -(-(chunk.position + n) // BLOCK_TOKENS)]
        sequences.append(SequenceSlice(start, n, chunk.position, used, chunk.prompt))
        if chunk.sample:
            sampled += range(start, start + n) if chunk.sample == "all" else [start + n - 1]
    tokens, at, entries, rows = (torch.from_numpy(np.array(v, np.int64)) for v in (ids, positions, slots, sampled))
    return Batch(tokens, at, entries, tuple(sequences), rows)
