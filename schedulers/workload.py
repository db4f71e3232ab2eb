"""What a plan is made for: prompt and output lengths, batch size, and what counts as good.
Knows no model and no device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.schedulers.graph import Step

Goal = Literal["latency", "throughput", "first-token"]


@dataclass(frozen=True, slots=True)
class Workload:
    prompt_tokens: int = 512
    max_tokens: int = 128  # new tokens per sequence
    batch: int = 1  # sequences at once

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "max_tokens", "batch"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 2**31:
                raise InvalidInput(f"workload: {name} is {value!r}; it must be a whole number of at least 1")

    @property
    def context(self) -> int:
        """Positions each sequence ends up with."""
        return self.prompt_tokens + self.max_tokens

    @property
    def prefill(self) -> Step:
        return Step.prefill(self.prompt_tokens, self.batch)

    @property
    def mean_decode(self) -> Step:
        """A decode step in the middle of the generation; cost is linear in context, so this is the mean step."""
        return Step.decode(self.prompt_tokens + (self.max_tokens + 1) / 2, self.batch)


def parse_goal(goal: str) -> Goal:
    if goal not in get_args(Goal):
        raise InvalidInput(f"goal {goal!r} is not one of {', '.join(get_args(Goal))}")
    return goal  # type: ignore[return-value]
