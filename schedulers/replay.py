"""Recorded routing, and what each cache policy would have made of it: scored offline by the state machine that runs,
beside Belady's optimum. Knows experts by number; how a recording is made and kept is the engine's business."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush

import numpy as np
import numpy.typing as npt

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.schedulers.graph import TaskGraph
from ciuic_runtime.schedulers.policies.cache import CACHE_POLICIES
from ciuic_runtime.schedulers.residency import PageFacts, Read, Residency

Progress = Callable[[int, int], None]
LEAST_STEPS = 8  # of a recording: two halves, each halved again


@dataclass(frozen=True)
class Routing:
    """Which experts each token used. Tokens of one step go through a layer together."""

    model: str
    layers: tuple[int, ...]  # those with routed experts
    num_experts: int  # in each of them
    ids: npt.NDArray[np.int32]  # [tokens, layers, k]
    step: npt.NDArray[np.int32]  # [tokens], not falling
    expert_nbytes: int  # of one expert's page, bytes
    other_nbytes: int  # of all other pages together

    @property
    def tokens(self) -> int:
        return len(self.ids)

    def popularity(self) -> npt.NDArray[np.float64]:
        """Expected uses per token, [layers, experts]."""
        every = np.zeros((len(self.layers), self.num_experts))
        for i in range(len(self.layers)):
            every[i] = np.bincount(self.ids[:, i].ravel(), minlength=self.num_experts) / max(1, self.tokens)
        return every

    def halves(self) -> tuple[Routing, Routing]:
        """The first half of the steps and the rest."""
        steps = np.unique(self.step)
        first = self.step < steps[len(steps) // 2]
        return (
            replace(self, ids=self.ids[first], step=self.step[first]),
            replace(self, ids=self.ids[~first], step=self.step[~first]),
        )

    def uses(self) -> Iterator[tuple[bool, int, list[int]]]:
        """By step and layer: whether the step begins, tokens in it, and the pages used (layer x experts + expert)."""
        ends = np.flatnonzero(np.diff(self.step)) + 1
        for rows in np.split(self.ids, ends):
            for i in range(len(self.layers)):
                used: npt.NDArray[np.int32] = np.unique(rows[:, i])
                yield i == 0, len(rows), (used + i * self.num_experts).tolist()


def with_popularity(graph: TaskGraph, routing: Routing) -> TaskGraph:
    """The graph, its experts as popular as recorded. Raises InvalidInput for a recording of another model."""
    layers = {t.layer: t for t in graph if t.num_experts}
    if tuple(sorted(n for n in layers if n is not None)) != routing.layers or any(
        t.num_experts != routing.num_experts for t in layers.values()
    ):
        raise InvalidInput(
            f"the recording is of {routing.model}, whose layers with experts are not those of {graph.name}; record "
            "again with this model"
        )
    liked = dict(zip(routing.layers, routing.popularity().tolist(), strict=True))
    tasks = (
        replace(t, popularity=tuple(liked[t.layer])) if t.num_experts and t.layer is not None else t for t in graph
    )
    return replace(graph, tasks=tuple(tasks))


@dataclass(frozen=True, slots=True)
class Score:
    policy: str
    hit_rate: float  # on the half of the recording that nothing was learnt from
    bytes_per_token: float  # read from disk


@dataclass(frozen=True, slots=True)
class Replay:
    """What `ciuic replay` shows."""

    model: str
    capacity: int  # experts that fit
    experts: int  # in all layers together
    chosen: str  # by the first half alone
    scores: tuple[Score, ...]  # policies, best first
    stationary: Score  # the best fixed set, by hindsight
    belady: Score  # the optimum, by hindsight

    @property
    def chosen_score(self) -> Score:
        return next(s for s in self.scores if s.policy == self.chosen)


def replay(routing: Routing, budget: int, progress: Progress | None = None) -> Replay:
    """Scores every policy with `budget` bytes for all pages. Policies warm up on the first half of the recording, from
    which popularity is taken too, and are scored on the second; which to use is chosen on the first half alone.

    Raises InvalidInput where the recording is too short, or the budget leaves no room for a single expert."""
    capacity = (budget - routing.other_nbytes) // routing.expert_nbytes
    experts = len(routing.layers) * routing.num_experts
    if len(np.unique(routing.step)) < LEAST_STEPS:
        raise InvalidInput(f"{routing.tokens} tokens in fewer than {LEAST_STEPS} passes say too little; record more")
    if capacity < 1:
        raise InvalidInput(
            f"{budget} bytes leave no room for an expert: all other pages take {routing.other_nbytes} bytes and one "
            f"expert {routing.expert_nbytes}; give more memory"
        )
    first, second = routing.halves()
    done, total = 0, len(CACHE_POLICIES) * (first.tokens + routing.tokens)

    def rate(policy: str, warm: Routing, scored: Routing) -> float:
        nonlocal done
        found = hit_rate(policy, warm, scored, capacity)
        done += warm.tokens + scored.tokens
        if progress:
            progress(min(done, total), total)
        return found

    chosen = max(CACHE_POLICIES, key=lambda p: rate(p, *first.halves()))
    rates = {p: rate(p, first, second) for p in CACHE_POLICIES}

    def score(name: str, hits: float) -> Score:
        misses = (1 - hits) * sum(len(used) for _, _, used in second.uses())
        return Score(name, hits, misses * routing.expert_nbytes / second.tokens)

    return Replay(
        routing.model, min(capacity, experts), experts, chosen,
        tuple(score(p, r) for p, r in sorted(rates.items(), key=lambda item: -item[1])),
        score("best fixed set", _fixed(second, capacity)), score("Belady", belady(second, capacity)),
    )  # fmt: skip


def hit_rate(policy: str, warm: Routing, scored: Routing, capacity: int) -> float:
    """Of a policy with room for `capacity` experts, on `scored` after `warm`."""
    liked = warm.popularity()
    pages = [
        PageFacts(f"layers.{n}.experts.{e}", 1, i, routed=True, popularity=float(liked[i, e]))
        for i, n in enumerate(warm.layers)
        for e in range(warm.num_experts)
    ]
    state = Residency(pages, capacity, CACHE_POLICIES[policy])
    before = (0, 0)
    for routing in (warm, scored):
        before = (state.counts.hits, state.counts.misses)
        for begins, tokens, used in routing.uses():
            if begins:
                state.begin_step(scanning=tokens * routing.ids.shape[2] >= routing.num_experts)
            _pass(state, used)
    hits, misses = state.counts.hits - before[0], state.counts.misses - before[1]
    return hits / (hits + misses)


def _pass(state: Residency, used: list[int]) -> None:
    """A layer's pages are needed, read one after the other, and released."""
    ready, commands = state.need(used)
    commands += state.release(ready)
    while reads := [c.page for c in commands if isinstance(c, Read)]:
        commands = []
        for page in reads:
            wanted, more = state.arrived(page)
            commands += more
            if wanted:
                commands += state.release([page])


def _fixed(routing: Routing, capacity: int) -> float:
    """The hit rate of the fixed set that would have been best."""
    counts: dict[int, int] = {}
    for _, _, used in routing.uses():
        for page in used:
            counts[page] = counts.get(page, 0) + 1
    return sum(sorted(counts.values(), reverse=True)[:capacity]) / sum(counts.values())


def belady(routing: Routing, capacity: int) -> float:
    """The hit rate of evicting what is used again last (Belady 1966), beginning with what is used first."""
    order = [page for _, _, used in routing.uses() for page in used]
    following, later = [0] * len(order), dict[int, int]()
    for at in range(len(order) - 1, -1, -1):
        following[at] = later.get(order[at], len(order))
        later[order[at]] = at
    held = dict(sorted(later.items(), key=lambda item: item[1])[:capacity])  # page -> its next use
    farthest = [(-at, page) for page, at in held.items()]
    heapify(farthest)
    hits = 0
    for at, page in enumerate(order):
        if page in held:
            hits += 1
        elif len(held) >= capacity:
            while (entry := heappop(farthest)) and held.get(entry[1]) != -entry[0]:
                pass  # an older use of a page that was used since
            del held[entry[1]]
        held[page] = following[at]
        heappush(farthest, (-following[at], page))
    return hits / len(order)
