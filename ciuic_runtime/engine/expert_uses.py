"""How many tokens used each expert of a layer. Knows what routers choose; what it is good for, others know."""

from __future__ import annotations

import numpy as np
import torch


class ExpertUses:
    def __init__(self, num_experts: int) -> None:
        self._num_experts = num_experts
        self.clear()

    def clear(self) -> None:
        # Apart, because a decode step must not notice: a list is quickest for a few, an array for many.
        self._by_one = [0] * self._num_experts  # tokens that were alone in their pass
        self._by_many = np.zeros(self._num_experts, np.int64)

    def add(self, ids: torch.Tensor) -> int:
        """A pass has chosen, ids [tokens, k] on the host, each row without repetition: how many different ones."""
        if len(ids) == 1:
            uses = self._by_one
            chosen = ids.tolist()[0]
            for expert in chosen:
                uses[expert] += 1
            return len(chosen)
        counts = np.bincount(ids.numpy().ravel(), minlength=self._num_experts)
        self._by_many += counts
        return int(np.count_nonzero(counts))

    def counts(self) -> list[int]:
        """By expert."""
        return [int(one + many) for one, many in zip(self._by_one, self._by_many.tolist(), strict=True)]
