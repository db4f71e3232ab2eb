"""How often a routed expert is expected to be in memory when a pass needs it: from how popular experts are, how many
fit, and which of them the cache policy keeps. Knows expectations only; what happens is `residency.py`'s business."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def hit_rates(uses: Array, room: float, policy: str) -> Array:
    """The probability that each expert is there, in [0, 1]. `uses` are uses per pass that are expected of each (>= 0),
    in the order of a pass; `room` is how many of them fit."""
    if room >= len(uses):
        return np.ones(len(uses))
    if room <= 0:
        return np.zeros(len(uses))
    return _RATES.get(policy, _most_used)(uses, room)


def _most_used(uses: Array, room: float) -> Array:
    """The most used stay (LFU, or a recorded popularity, once counts have settled); equally used ones share."""
    rates, left = np.zeros(len(uses)), room
    for level in np.unique(uses)[::-1]:
        same = uses == level
        rates[same] = min(1.0, left / same.sum())
        left -= rates[same].sum()
        if left <= 0:
            break
    return rates


def _first(uses: Array, room: float) -> Array:
    """The first of a pass stay."""
    return np.clip(room - np.arange(len(uses)), 0.0, 1.0)


def _recently_used(uses: Array, room: float) -> Array:
    """Che's approximation of LRU (Che, Tung & Wang 2002; Fricker, Robert & Roberts 2012): an expert stays if it was
    used again within the time T that the cache takes to be filled, sum over experts of 1 - exp(-uses x T) = room."""
    if (uses > 0).sum() <= room:
        return (uses > 0).astype(float)
    low, high = 0.0, 1.0
    while _kept(uses, high).sum() < room:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _kept(uses, middle).sum() < room else (low, middle)
    return _kept(uses, high)


def _kept(uses: Array, time: float) -> Array:
    kept: Array = -np.expm1(-uses * time)
    return kept


_RATES: dict[str, Callable[[Array, float], Array]] = {
    "lfu": _most_used, "popularity": _most_used, "lru": _recently_used, "pin": _first,
}  # fmt: skip
