"""How many tokens of prompts share a pass with sequences that decode: time per token for these against time to first
token for those. Knows forecast times only; which requests these are, the engine decides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ciuic_runtime.schedulers.cost import CostModel
from ciuic_runtime.schedulers.graph import Step, TaskGraph
from ciuic_runtime.schedulers.passes import Run
from ciuic_runtime.schedulers.schedule import Schedule

ROUNDED = 256  # positions: contexts are told apart by so many
FINEST = 16  # tokens: so are chunks
MOST_KNOWN = 1 << 14


@dataclass(frozen=True, slots=True)
class Size:
    """Of a pass: `decodes` sequences of a mean context get a token each; beside them `tokens` of prompts from position
    `at` on are computed."""

    decodes: int
    context: int
    tokens: int = 0
    at: int = 0

    @property
    def rounded(self) -> Size:
        tokens = self.tokens if self.tokens <= FINEST else -(-self.tokens // FINEST) * FINEST
        at = self.at // ROUNDED * ROUNDED if tokens else 0
        return Size(self.decodes, -(-self.context // ROUNDED) * ROUNDED if self.decodes else 0, tokens, at)


class PassTimes:
    """Forecast seconds of passes, by rounded size; each is simulated once."""

    def __init__(self, schedule: Schedule, graph: TaskGraph, cost: CostModel) -> None:
        self._schedule, self._graph, self._cost = schedule, graph, cost
        self._known: dict[Size, float] = {}

    def seconds(self, size: Size) -> float:
        """Raises InvalidInput where a device's speed is not known."""
        size = size.rounded
        if size not in self._known:
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            self._known[size] = self._simulated(size)
        return self._known[size]

    def _simulated(self, size: Size) -> float:
        decodes = Step.decode(size.context, size.decodes) if size.decodes else None
        run = Run(self._schedule, self._graph, self._cost)
        if size.tokens:
            run.step(Step.of("prefill", [(size.at, size.tokens)], 1), decodes)
        elif decodes:
            run.step(decodes)
        return run.engine.now


class Mixing:
    """The policy as the engine asks it: contexts of the sequences that decode, and (tokens in the cache, tokens to be
    computed) of the requests that wait, to how many tokens of these go into the next pass, `most` at most."""

    def __init__(self, seconds: Callable[[Size], float], most: int) -> None:
        self._seconds, self._most = seconds, most

    def __call__(self, decoding: Sequence[int], waiting: Sequence[tuple[int, int]]) -> int:
        decodes = Size(len(decoding), sum(decoding) // len(decoding))
        left = sum(tokens for _, tokens in waiting)
        return prompt_share(self._seconds, decodes, len(waiting), left, waiting[0][0], self._most)


def prompt_share(seconds: Callable[[Size], float], decodes: Size, waiting: int, left: int, at: int, most: int) -> int:
    """How many of the `left` tokens of the prompts of `waiting` requests go into the next pass, `most` at most.

    The share for which everybody's slowdown adds up to least: of a sequence that decodes, a pass's time over what it
    would take without prompts; of a request that waits, the time until its prompts are done over what that would take
    if nobody decoded. With passes of a + b n seconds for n tokens, that is n = (a / b) sqrt(waiting / decodes)."""
    alone = seconds(decodes)
    undisturbed = -(-left // most) * seconds(Size(0, 0, min(left, most), at))

    def slowdown(tokens: int) -> float:
        one = seconds(Size(decodes.decodes, decodes.context, tokens, at))
        return decodes.decodes * one / alone + waiting * -(-left // tokens) * one / undisturbed

    return min(shares(min(left, most)), key=slowdown)


def shares(most: int) -> list[int]:
    """Shares to choose from: powers of two, and everything."""
    return [n for n in (FINEST << i for i in range(20)) if n < most] + [most]
