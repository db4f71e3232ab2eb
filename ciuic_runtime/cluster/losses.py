"""How often each machine lost a stage lately: what tells one that cannot from one that had a bad day.
Knows names and times as it is given them, no clock and no cluster."""

from __future__ import annotations

from collections import deque

WINDOW = 3600.0  # s


class Losses:
    """A loss counts for an hour, so that three in a week give up no machine."""

    def __init__(self, window: float = WINDOW) -> None:
        self.window = window
        self._when: dict[str, deque[float]] = {}  # by machine, the oldest first

    def add(self, machine: str, now: float) -> None:
        self._when.setdefault(machine, deque()).append(now)

    def of(self, machine: str, now: float) -> int:
        """Within the last hour."""
        when = self._when.get(machine, deque[float]())
        while when and when[0] <= now - self.window:
            when.popleft()
        return len(when)

    def total(self, now: float) -> int:
        return sum(self.of(machine, now) for machine in self._when)
