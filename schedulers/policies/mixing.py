"""How many tokens of prompts share a pass with sequences that decode: time per token for these against time to first
token for those. Knows forecast times only; which requests these are, the engine decides."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ciuic_runtime.schedulers.cost import CostModel
from ciuic_runtime.schedulers.graph import Step, TaskGraph
from ciuic_runtime.schedulers.passes import Run
from ciuic_runtime.schedulers.schedule import Schedule

ROUNDED = 256  # positions: contexts are told apart by so many
FINEST = 16  # tokens: so are chunks
MOST_KNOWN = 1 << 14
NEAR_CHEAPEST = 1.5
LEAST_STRETCH = 1.8  # of the time per token of those who decode: twice, less what forecasts may be wrong by


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

    def of_step(self, step: Step) -> float:
        """Of a pass as the cost model sees it, whose tokens are all of its phase."""
        mean = int(step.positions / step.sequences)
        if step.phase == "decode":
            return self.seconds(Size(step.sequences, mean))
        return self.seconds(Size(0, 0, step.tokens, max(0, mean - step.tokens // step.sequences)))

    def _simulated(self, size: Size) -> float:
        decodes = Step.decode(size.context, size.decodes) if size.decodes else None
        run = Run(self._schedule, self._graph, self._cost)
        if size.tokens:
            run.step(Step.of("prefill", [(size.at, size.tokens)], 1), decodes)
        elif decodes:
            run.step(decodes)
        return run.engine.now


class Mixing:
    """The policy as the engine asks it: how many tokens of prompts go into the next pass, `most` at most."""

    def __init__(self, seconds: Callable[[Size], float], most: int) -> None:
        self._seconds, self._most = seconds, most

    def __call__(self, decoding: Sequence[int], waiting: Sequence[tuple[int, int]], since: int) -> int:
        """From the contexts of the sequences that decode, (tokens in the cache, tokens to be computed) of the requests
        that wait, and the number of passes since the last one with a share."""
        decodes = Size(len(decoding), sum(decoding) // len(decoding))
        left = sum(tokens for _, tokens in waiting)
        share = prompt_share(self._seconds, decodes, len(waiting), left, waiting[0][0], self._most)
        return share.tokens if since >= share.pause else 0


@dataclass(frozen=True, slots=True)
class Share:
    tokens: int  # of prompts, in a pass
    pause: int  # passes without any, until the next one


def prompt_share(seconds: Callable[[Size], float], decodes: Size, waiting: int, left: int, at: int, most: int) -> Share:
    """Of the `left` tokens of the prompts of `waiting` requests.

    How many at a time: the fewest that cost, beyond the pass without them, not much more per token than the cheapest
    number does. Every pass with prompts reads nearly all experts and expands the whole context anew, so that many small
    shares would delay everybody; large ones are a long gap between two tokens of those who decode.

    How often: for D who decode at s times their undisturbed time per token, prompts take s / (s - 1) as long as they
    would between two passes, and Q who wait feel that. D s + Q c s / (s - 1), with prompts that cost c times what they
    cost alone, is least at s = 1 + sqrt(Q c / D). Prompts get about half of the time at least."""
    alone = seconds(decodes)
    extra = {n: seconds(Size(decodes.decodes, decodes.context, n, at)) - alone for n in shares(min(left, most))}
    cheapest = min(cost / n for n, cost in extra.items())
    tokens = min(n for n, cost in extra.items() if cost / n <= NEAR_CHEAPEST * cheapest)
    undisturbed = -(-left // most) * seconds(Size(0, 0, min(left, most), at))
    dearer = left / tokens * extra[tokens] / undisturbed
    stretch = max(LEAST_STRETCH, 1 + math.sqrt(waiting * dearer / decodes.decodes))
    return Share(tokens, max(0, math.ceil(extra[tokens] / alone / (stretch - 1) - 1)))


def shares(most: int) -> list[int]:
    """Shares to choose from: powers of two, and everything."""
    return [n for n in (FINEST << i for i in range(20)) if n < most] + [most]
