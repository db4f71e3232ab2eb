"""What a plan is made for: prompt and output lengths, batch size, and what counts as good.
Knows no model and no device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.schedulers.graph import Step

Goal = Literal["latency", "throughput", "first-token"]
CACHE_BLOCK_TOKENS = 64  # the KV cache grows by blocks of this size (ARCHITECTURE.md, "KV cache")
LARGEST = 2**31


@dataclass(frozen=True, slots=True)
class Workload:
    prompt_tokens: int = 512
    max_tokens: int = 128  # new tokens per sequence
    batch: int = 1  # sequences at once
    kv_tokens: int | None = None  # positions that the cache holds; None: the whole context of each sequence

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "max_tokens", "batch"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST:
                raise InvalidInput(f"workload: {name} is {value!r}; it must be a whole number from 1 to {LARGEST}")
        if self.kv_tokens is not None and self.kv_tokens < self.context:
            raise InvalidInput(
                f"workload: a cache of {self.kv_tokens} positions does not hold one sequence of {self.context}; "
                "make it larger, or the context shorter"
            )

    @property
    def context(self) -> int:
        """Positions each sequence ends up with."""
        return self.prompt_tokens + self.max_tokens

    @property
    def cache_tokens(self) -> int:
        return cache_tokens(self.context, self.batch, self.kv_tokens)

    @property
    def mean_decode(self) -> Step:
        """The mean of the decode steps, whose contexts run from prompt + 1 to prompt + max_tokens - 1."""
        return Step.decode(self.prompt_tokens + max(1.0, self.max_tokens / 2), self.batch)

    def __str__(self) -> str:
        return f"{self.batch} x ({self.prompt_tokens} prompt + {self.max_tokens} new) tokens"


def cache_tokens(context: int, batch: int, most: int | None = None) -> int:
    """Positions that the cache has room for: whole blocks, for every sequence's whole context, or `most` in all."""
    each = -(-context // CACHE_BLOCK_TOKENS) * CACHE_BLOCK_TOKENS
    every = batch * each
    return every if most is None else min(every, max(each, most // CACHE_BLOCK_TOKENS * CACHE_BLOCK_TOKENS))


def parse_goal(goal: str) -> Goal:
    if goal not in get_args(Goal):
        raise InvalidInput(f"goal {goal!r} is not one of {', '.join(get_args(Goal))}")
    return goal  # type: ignore[return-value]
