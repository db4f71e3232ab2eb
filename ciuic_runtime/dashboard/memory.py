"""Memory over time: what each tier holds, what was read and evicted, and what came too late.
Knows the rows of a recording that tell it."""

from __future__ import annotations

from typing import Any

import numpy as np

from ciuic_runtime.dashboard.source import Source
from ciuic_runtime.schedulers.recording import EVICT, MEMORY, NONE, READ, WAIT, Recording, Rows

BINS = 200
MOST_LATE = 200


def memory_answer(source: Source, most: int) -> dict[str, Any]:
    recording, schedule = source.recording, source.schedule
    peak = dict(schedule.predicted.memory_bytes) if schedule and schedule.predicted else {}
    return {
        "tiers": _tiers(recording, most), "events": _bins(recording, min(BINS, most)), "late": _late(recording),
        "simulated_peak": peak, "totals": _totals(source),
    }  # fmt: skip


def _tiers(recording: Recording, most: int) -> list[dict[str, Any]]:
    rows = recording.rows[recording.rows["kind"] == MEMORY]
    names = recording.names
    keys = dict.fromkeys((names[lane], names[task]) for lane, task in zip(rows["lane"], rows["task"], strict=True))
    found = []
    for device, what in dict.fromkeys((*recording.capacity, *keys)):
        mine = rows[[names[n] == device for n in rows["lane"]]] if len(rows) else rows
        mine = mine[[names[n] == what for n in mine["task"]]] if len(mine) else mine
        mine = _thinned(mine, most)
        found.append({
            "name": device, "what": what, "unit": "bytes", "capacity": recording.capacity.get((device, what)),
            "time": mine["start"].tolist(), "used": mine["nbytes"].tolist(),
        })  # fmt: skip
    return found


def _thinned(rows: Rows, most: int) -> Rows:
    """So many at most: of each few samples that which differs most from the one before, so that peaks stay."""
    each = -(-len(rows) // most)
    if each <= 1:
        return rows
    groups = np.arange(len(rows)) // each
    change = np.abs(np.diff(rows["nbytes"], prepend=rows["nbytes"][:1]))
    order = np.lexsort((change, groups))
    last = np.flatnonzero(np.diff(groups, append=groups[-1] + 1))
    return rows[np.sort(order[last])]


def _bins(recording: Recording, number: int) -> dict[str, list[Any]]:
    rows, end = recording.rows, max(recording.seconds, 1e-9)
    width = end / number
    waits, reads, evictions = (rows[rows["kind"] == kind] for kind in (WAIT, READ, EVICT))

    def bins(mine: Rows, key: str = "end", weights: Any = None) -> list[int]:
        places = np.clip((mine[key] / width).astype(int), 0, number - 1)
        return np.bincount(places, weights, number).astype(int).tolist() if len(mine) else [0] * number

    return {
        "time": [i * width for i in range(number)], "evictions": bins(evictions), "reads": bins(reads),
        "late": bins(waits), "bytes": bins(reads, weights=reads["nbytes"].astype(float)),
    }  # fmt: skip


def _late(recording: Recording) -> list[dict[str, Any]]:
    """The longest waits, the longest first."""
    waits, names = recording.rows[recording.rows["kind"] == WAIT], recording.names
    took = waits["end"] - waits["start"]
    return [
        {
            "time": float(row["start"]), "page": names[row["cause"]] if row["cause"] != NONE else None,
            "task": names[row["task"]], "waited_s": float(row["end"] - row["start"]), "step": int(row["step"]),
        }
        for row in waits[np.argsort(-took, kind="stable")[:MOST_LATE]]
    ]  # fmt: skip


def _totals(source: Source) -> dict[str, Any] | None:
    """None where nothing is paged. Hits and misses are known of an engine that counts them."""
    rows = source.recording.rows
    reads, waits = rows[rows["kind"] == READ], rows[rows["kind"] == WAIT]
    if not len(reads):
        return None
    counts = source.counts()
    uses, hits = counts.total("uses"), counts.total("hits")
    misses = uses - hits if uses is not None and hits is not None else None
    return {
        "bytes_read": int(reads["nbytes"].sum()), "hits": hits,
        "misses": misses, "hit_rate": hits / uses if hits is not None and uses else None,
        "evictions": int((rows["kind"] == EVICT).sum()), "waited_s": float((waits["end"] - waits["start"]).sum()),
    }  # fmt: skip
