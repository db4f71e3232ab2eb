"""Which routed experts are worth keeping in memory: each policy gives every page a number, and the lowest goes first.
Policies see how pages were used, nothing else; what must stay, and when room is made, `residency.py` decides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ciuic_runtime.devices.errors import InvalidInput

Values = npt.NDArray[np.float64]  # [pages]


@dataclass(frozen=True)
class PageUse:
    """How pages were used so far, a row for each."""

    last: Values  # step of the last use; -1: never
    uses: Values  # uses, each counting half as much as one HALF_LIFE steps later
    order: Values  # place in a forward pass, from 0
    popularity: Values  # expected uses per token by a recording; 0 where there is none
    away: Values  # how much of a pass will go by until its turn comes: from 0, the next, to 1, the one just over


CachePolicy = Callable[[PageUse], Values]
PHASE = 0.5  # how much less a page is worth whose turn has just been than one whose turn comes now
HALF_LIFE = 1024  # steps; long against the noise of counting, short against a conversation that changes its subject


def lru(use: PageUse) -> Values:
    """Least recently used goes first. Scans larger than the cache get no hit at all."""
    latest: Values = use.last + use.order / (use.order.max() + 1)
    return latest


def lfu(use: PageUse) -> Values:
    """Least frequently used goes first, where old uses fade; of pages that are used about as often, the one whose turn
    comes last. (Else a layer, refilled in its turn and robbed by all others until the next, would have least when it is
    needed: with evenly chosen experts that costs some points of the hit rate.)"""
    return use.uses * (1.0 - PHASE * use.away)


def popularity(use: PageUse) -> Values:
    """The most popular of a recording stay, of about equal ones as in `lfu`; without a recording, `pin`."""
    return use.popularity * (1.0 - PHASE * use.away) if use.popularity.any() else pin(use)


def pin(use: PageUse) -> Values:
    """A fixed set stays, the first of a pass: what a scan of everything, over and over, wants."""
    return -use.order


CACHE_POLICIES: dict[str, CachePolicy] = {"lfu": lfu, "lru": lru, "popularity": popularity, "pin": pin}


def cache_policy(name: str) -> tuple[str, CachePolicy]:
    """The policy of that name; "auto" is `lfu`, which is within a point of the best on stationary routing
    (`ciuic replay` says which is best for a recording)."""
    if name == "auto":
        name = "lfu"
    if name not in CACHE_POLICIES:
        raise InvalidInput(f"cache policy {name!r} is not one of auto, {', '.join(CACHE_POLICIES)}")
    return name, CACHE_POLICIES[name]
