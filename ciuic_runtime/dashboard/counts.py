"""How often pages were used, found in memory, read and waited for: as the engine counted them, else as far as the rows
of a recording tell. Knows pages by their names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any

import numpy as np

from ciuic_runtime.schedulers.recording import NONE, READ, WAIT, PageCounts, Recording

KEYS = ("uses", "hits", "reads", "waited_s", "resident")  # what is told of one page
ALL = tuple(field.name for field in fields(PageCounts))
_all_of = attrgetter(*ALL)


@dataclass(frozen=True)
class Counts:
    """What `counted` does not name is not known; a page that is missing had none of it."""

    pages: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # page -> count by key
    counted: frozenset[str] = frozenset()

    @staticmethod
    def of(recording: Recording) -> Counts:
        if recording.pages:
            pages = {name: dict(zip(ALL, _all_of(one), strict=True)) for name, one in recording.pages.items()}
            return Counts(pages, frozenset(ALL))
        pages, counted = _in_rows(recording)
        for task, uses in recording.expert_uses.items():
            counted.add("uses")
            for e, number in enumerate(uses):
                pages.setdefault(f"{task}.{e}", {})["uses"] = int(number)
        return Counts(pages, frozenset(counted))

    def about(self, name: str) -> dict[str, Any]:
        """Of a page, or of all pages whose names begin so, together; None: not known."""
        mine = [one for page, one in self.pages.items() if page == name or page.startswith(name + ".")]
        known = [key for key in KEYS if key in self.counted]
        total: dict[str, Any] = {key: sum(one.get(key, 0) for one in mine) for key in known}
        if "resident" in total:
            total["resident"] = all(one["resident"] for one in mine) if mine else None
        return {key: total.get(key) for key in KEYS}

    def total(self, key: str) -> int | None:
        return sum(one.get(key, 0) for one in self.pages.values()) if key in self.counted else None

    def table(self, key: str, layers: Sequence[int], number: int) -> list[list[Any]] | None:
        """Of routed experts, layers by experts; None: not known."""
        if key not in self.counted:
            return None
        none: Any = False if key == "resident" else 0
        names = [[f"layers.{layer}.experts.{e}" for e in range(number)] for layer in layers]
        return [[self.pages.get(name, {}).get(key, none) for name in line] for line in names]


def _in_rows(recording: Recording) -> tuple[dict[str, dict[str, Any]], set[str]]:
    """Reads, and what was waited for them."""
    rows, names = recording.rows, recording.names
    reads, waits = rows[rows["kind"] == READ], rows[(rows["kind"] == WAIT) & (rows["cause"] != NONE)]
    if not len(reads):
        return {}, set()
    count = np.bincount(reads["task"], minlength=len(names))
    waited = np.bincount(waits["cause"], waits["end"] - waits["start"], len(names))
    some = np.flatnonzero((count > 0) | (waited > 0)).tolist()
    return {names[n]: {"reads": int(count[n]), "waited_s": float(waited[n])} for n in some}, {"reads", "waited_s"}
