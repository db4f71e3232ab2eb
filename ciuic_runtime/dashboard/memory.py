"""Memory over time: what each tier holds, what was read and evicted, and what came too late.
Knows the rows of a recording that tell it."""

from __future__ import annotations

from typing import Any

import numpy as np

from ciuic_runtime.dashboard.counts import Counts
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
    rows, names = recording.rows[recording.rows["kind"] == MEMORY], recording.names
    keys = rows["lane"].astype(np.int64) * len(names) + rows["task"]
    some, first = np.unique(keys, return_index=True)
    samples = {
        (names[key // len(names)], names[key % len(names)]): rows[keys == key]
        for key in some[np.argsort(first)].tolist()
    }
    found = []
    for device, what in dict.fromkeys((*recording.capacity, *samples)):
        mine = _thinned(samples.get((device, what), rows[:0]), most)
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
    """Since the recording began, as the engine counted; of a recording without its counts, that of the rows. None where
    nothing is paged."""
    counts, recording = source.counts(), source.recording
    found = _counted(counts) if "bytes_read" in counts.counted else _of_rows(recording)
    if not found["bytes_read"]:
        return None
    uses, hits = counts.total("uses"), counts.total("hits")
    misses = uses - hits if uses is not None and hits is not None else None
    return {**found, "hits": hits, "misses": misses, "hit_rate": hits / uses if hits is not None and uses else None}


def _counted(counts: Counts) -> dict[str, Any]:
    return {key: counts.total(key) for key in ("bytes_read", "evictions", "waited_s")}


def _of_rows(recording: Recording) -> dict[str, Any]:
    """Nothing of it is forgotten: what forgets, counts."""
    rows = recording.rows
    reads, waits = rows[rows["kind"] == READ], rows[rows["kind"] == WAIT]
    return {
        "bytes_read": int(reads["nbytes"].sum()), "evictions": int((rows["kind"] == EVICT).sum()),
        "waited_s": float((waits["end"] - waits["start"]).sum()),
    }  # fmt: skip
