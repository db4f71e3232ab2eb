"""How many tokens used each expert of a layer. Knows what routers choose; what it is good for, others know."""

from __future__ import annotations

import numpy as np
import torch

FEW = 32  # tokens, of which lists are quicker than arrays: a decode step must not notice that somebody counts


class ExpertUses:
    def __init__(self, num_experts: int) -> None:
        self._num_experts = num_experts
        self.clear()

    def clear(self) -> None:
        self._by_few = [0] * self._num_experts  # of passes of a few tokens
        self._by_many = np.zeros(self._num_experts, np.int64)

    def add(self, ids: torch.Tensor) -> list[int]:
        """A pass has chosen, ids [tokens, k] on the host, each row without repetition; gives what `different` does."""
        if len(ids) > FEW:
            counts = np.bincount(ids.numpy().ravel(), minlength=self._num_experts)
            self._by_many += counts
            many: list[int] = np.flatnonzero(counts).tolist()
            return many
        uses, rows = self._by_few, ids.tolist()
        for row in rows:
            for expert in row:
                uses[expert] += 1
        return _union(rows)

    def counts(self) -> list[int]:
        """By expert."""
        return [int(few + many) for few, many in zip(self._by_few, self._by_many.tolist(), strict=True)]


def different(ids: torch.Tensor) -> list[int]:
    """The experts in ids [tokens, k] on the host, each once: one token's in its order, others sorted."""
    if len(ids) > FEW:
        many: list[int] = np.unique(ids.numpy()).tolist()
        return many
    return _union(ids.tolist())


def _union(rows: list[list[int]]) -> list[int]:
    """Those of each row are different."""
    return rows[0] if len(rows) == 1 else sorted(set().union(*rows))
