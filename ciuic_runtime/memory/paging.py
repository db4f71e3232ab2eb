"""What paging cost a run: pages found and read, bytes moved, and what passes waited for, by phase.
Counts only; nothing is decided by it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ciuic_runtime.devices.units import format_bytes
from ciuic_runtime.schedulers.graph import Phase
from ciuic_runtime.schedulers.residency import Counts


@dataclass(slots=True)
class Stalls:
    """Seconds that passes have waited."""

    disk: float = 0.0  # for a read to end
    verify: float = 0.0  # for a page's checksum
    room: float = 0.0  # for memory that other reads have taken

    @property
    def total(self) -> float:
        return self.disk + self.verify + self.room


@dataclass(slots=True)
class PhasePaging:
    tokens: int = 0
    steps: int = 0
    hits: int = 0  # uses of routed pages (of all pages where none is routed) that were in memory before anybody asked
    misses: int = 0  # those that had to be read, ahead of time or not
    bytes_read: int = 0  # from disk, pages read in vain included
    stall_s: Stalls = field(default_factory=Stalls)

    @property
    def hit_rate(self) -> float | None:
        return self.hits / (self.hits + self.misses) if self.hits + self.misses else None

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "hit_rate": self.hit_rate}


class PagingReport:
    """Of everything since it was last cleared."""

    @property
    def hit_rate(self) -> float | None:
        """Of all phases."""
        hits, misses = (sum(getattr(p, name) for p in self.phases.values()) for name in ("hits", "misses"))
        return hits / (hits + misses) if hits + misses else None

    def __init__(self) -> None:
        self.phases: dict[str, PhasePaging] = {}
        self._before = (Counts(), 0, Stalls())

    def begin(self, counts: Counts, bytes_read: int, stalls: Stalls) -> None:
        """What was before does not count: these are the totals now."""
        self._before = (replace(counts), bytes_read, replace(stalls))

    def add(self, phase: Phase, tokens: int, counts: Counts, bytes_read: int, stalls: Stalls) -> None:
        """A pass has ended, and these are the totals now."""
        before, bytes_before, stalled = self._before
        hits, misses = counts.routed_hits - before.routed_hits, counts.routed_misses - before.routed_misses
        if not counts.routed_hits + counts.routed_misses:
            hits, misses = counts.hits - before.hits, counts.misses - before.misses
        found = self.phases.setdefault(phase, PhasePaging())
        found.tokens, found.steps = found.tokens + tokens, found.steps + 1
        found.hits, found.misses = found.hits + hits, found.misses + misses
        found.bytes_read += bytes_read - bytes_before
        for cause in ("disk", "verify", "room"):
            now = getattr(found.stall_s, cause) + getattr(stalls, cause) - getattr(stalled, cause)
            setattr(found.stall_s, cause, now)
        self.begin(counts, bytes_read, stalls)

    @property
    def anything(self) -> bool:
        """Whether anything was read."""
        return any(p.bytes_read for p in self.phases.values())

    def clear(self) -> None:
        self.phases.clear()

    def to_dict(self) -> dict[str, Any]:
        return {phase: found.to_dict() for phase, found in self.phases.items()}

    def __str__(self) -> str:
        """One line: per token and phase, what was read, how much was hit, and what was waited for."""
        return "paging: " + "; ".join(_line(phase, found) for phase, found in self.phases.items())


def _line(phase: str, p: PhasePaging) -> str:
    tokens = max(1, p.tokens)
    rate = f", hit rate {p.hit_rate:.1%}" if p.hit_rate is not None else ""
    each = {cause: 1e3 * s / tokens for cause, s in asdict(p.stall_s).items()}
    causes = ", ".join(f"{cause} {ms:.3g}" for cause, ms in each.items())
    return (
        f"{phase} read {format_bytes(p.bytes_read / tokens)} per token from disk{rate}, waited "
        f"{sum(each.values()):.3g} ms per token ({causes})"
    )
