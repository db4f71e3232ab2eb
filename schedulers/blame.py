"""What a step's time was lost to: its wall time in five parts, what was hidden behind computing, and who idled why.
Knows the rows of a recording; which of them is late, and against which plan, is `late.py`'s."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from ciuic_runtime.schedulers.lanes import LaneKind, lane_kind
from ciuic_runtime.schedulers.recording import COMPUTE, COPY, NONE, READ, SAMPLE, WAIT, Recording, Rows

Cause = Literal["compute", "disk", "copy", "network", "waiting"]
CAUSES: tuple[Cause, ...] = get_args(Cause)
COMPUTES, DISK, COPIES, NETWORK, WAITING = range(len(CAUSES))
Times = npt.NDArray[np.float64]
IdleCause = Literal["disk", "copy", "network", "nothing to do"]


@dataclass(frozen=True, slots=True)
class Overlap:
    """Reads from disk that went on while something was computed."""

    read_s: float
    hidden_s: float

    @property
    def percent(self) -> float:
        return 100 * self.hidden_s / self.read_s if self.read_s else 100.0


@dataclass(frozen=True, slots=True)
class Idle:
    lane: str
    cause: IdleCause
    seconds: float


def lane_kinds(recording: Recording) -> dict[int, LaneKind]:
    """By the number of each lane that has a row."""
    lanes = recording.rows["lane"]
    used: list[int] = np.flatnonzero(np.bincount(lanes)).tolist() if len(lanes) else []
    return {n: lane_kind(recording.names[n], recording.devices) for n in used}


def step_parts(recording: Recording, first: int | None = None) -> Times:
    """Seconds of each step from number `first` on, [steps, causes]; they add up to its wall time. At each moment of a
    step it computes if any lane computes, else it waits for the disk if a task waits for a page, else it copies, else
    something is on the network, else it waits for whatever there is no event of."""
    begin = recording.first_step if first is None else max(first, recording.first_step)
    infos = recording.steps[begin - recording.first_step :]
    if not len(infos):
        return np.zeros((0, len(CAUSES)))
    starts, ends = np.array([i.start for i in infos]), np.array([i.end for i in infos])
    rows = recording.rows[np.searchsorted(recording.rows["step"], begin) :]
    causes = causes_of(recording, rows)
    rows, causes = rows[causes != NONE], causes[causes != NONE]
    step = rows["step"] - begin
    # All steps one after the other: those of a pipeline overlap, and here each has a place of its own.
    wall = np.maximum(0.0, ends - starts)
    place = np.concatenate([[0.0], np.cumsum(wall)])
    shift = place[:-1] - starts
    low = np.clip(rows["start"], starts[step], ends[step]) + shift[step]
    high = np.clip(rows["end"], starts[step], ends[step]) + shift[step]
    order = np.argsort(low, kind="stable")
    low, high, step, causes = low[order], high[order], step[order], causes[order]
    parts, before = np.zeros((len(infos), len(CAUSES))), np.zeros(len(infos))
    for cause in range(WAITING):
        if not (causes == cause).any():
            continue
        some = causes <= cause
        covered = np.bincount(step[some], _uncovered(low[some], high[some]), len(infos)).astype(np.float64)
        parts[:, cause] = np.maximum(0.0, covered - before)
        before = covered
    parts[:, WAITING] = np.maximum(0.0, wall - before)
    return parts


def causes_of(recording: Recording, rows: Rows) -> npt.NDArray[np.int8]:
    """What each row is, a place in CAUSES; NONE: it takes nobody's time (a read, what is in memory)."""
    table = np.full(len(recording.names) or 1, COPIES, np.int8)
    for lane, way in lane_kinds(recording).items():
        if way == "network":
            table[lane] = NETWORK
    kind = rows["kind"]
    found = np.full(len(rows), NONE, np.int8)
    found[(kind == COMPUTE) | (kind == SAMPLE)] = COMPUTES
    found[kind == WAIT] = DISK
    copies = kind == COPY
    found[copies] = table[rows["lane"][copies]]
    return found


def overlap(recording: Recording, step: int) -> Overlap | None:
    """None: nothing was read."""
    info = recording.steps[step - recording.first_step]
    rows = recording.of_step(step)
    reads = _spans(rows[rows["kind"] == READ], info.start, info.end)
    total = _length(reads)
    if not total:
        return None
    causes = causes_of(recording, rows)
    computes = _spans(rows[causes == COMPUTES], info.start, info.end)
    waits = _minus(_spans(rows[causes == DISK], info.start, info.end), computes)
    lost = total + _length(waits) - _length(np.concatenate([reads, waits]))  # of reads, while waiting
    return Overlap(total, max(0.0, total - lost))


def idle(recording: Recording, step: int) -> list[Idle]:
    """Of every lane that computes, by cause, the longest first."""
    info = recording.steps[step - recording.first_step]
    rows = _meanwhile(recording, step)
    causes, found = causes_of(recording, rows), []
    lanes = {n: k for n, k in lane_kinds(recording).items() if k == "compute"}
    names = {recording.names[n]: n for n in lanes}
    whole = np.array([[info.start, info.end]])
    moving = {
        cause: _spans(rows[causes == place], info.start, info.end)
        for cause, place in (("copy", COPIES), ("network", NETWORK))
    }
    for name in dict.fromkeys((*recording.devices, *names)):
        mine = rows["lane"] == names.get(name, NONE)
        left = _minus(whole, _spans(rows[mine & (causes == COMPUTES)], info.start, info.end))
        kinds: list[tuple[IdleCause, Times]] = [
            ("disk", _spans(rows[mine & (causes == DISK)], info.start, info.end)),
            ("copy", moving["copy"]),
            ("network", moving["network"]),
        ]
        for cause, spans in kinds:
            rest = _minus(left, spans)
            if (seconds := _length(left) - _length(rest)) > 0:
                found.append(Idle(name, cause, seconds))
            left = rest
        if (seconds := _length(left)) > 0:
            found.append(Idle(name, "nothing to do", seconds))
    return sorted(found, key=lambda one: -one.seconds)


def _meanwhile(recording: Recording, step: int) -> Rows:
    """Rows of a pass, and of those that were on their way at the same time."""
    at, infos = step - recording.first_step, recording.steps
    first = last = at
    while first > 0 and infos[first - 1].end > infos[at].start:
        first -= 1
    while last + 1 < len(infos) and infos[last + 1].start < infos[at].end:
        last += 1
    low, high = np.searchsorted(recording.rows["step"], np.array([first, last + 1]) + recording.first_step)
    return recording.rows[low:high]


# Spans: [n, 2], start and end


def _spans(rows: Rows, start: float, end: float) -> Times:
    """The part of rows that lies between, in order of start."""
    spans = np.stack([rows["start"], rows["end"]], axis=1).clip(start, end)
    spans = spans[spans[:, 1] > spans[:, 0]]
    ordered: Times = spans[np.argsort(spans[:, 0], kind="stable")]
    return ordered


def _uncovered(low: Times, high: Times) -> Times:
    """Of each span, what those before it do not cover; in order of `low`."""
    if not len(low):
        return low
    reached = np.concatenate([[-np.inf], np.maximum.accumulate(high)[:-1]])
    left: Times = np.maximum(0.0, high - np.maximum(low, reached))
    return left


def _length(spans: Times) -> float:
    """Of their union."""
    spans = spans[np.argsort(spans[:, 0], kind="stable")]
    return float(_uncovered(spans[:, 0], spans[:, 1]).sum())


def _minus(spans: Times, others: Times) -> Times:
    """What of `spans`, which do not overlap, is in none of the others; both in order of start."""
    kept: list[tuple[float, float]] = []
    cuts, i = others.tolist(), 0
    for low, high in spans.tolist():
        at = low
        while i < len(cuts) and cuts[i][0] < high:
            start, end = cuts[i]
            if start > at:
                kept.append((at, start))
            at = max(at, end)
            if end > high:
                break
            i += 1
        if at < high:
            kept.append((at, high))
    return np.array(kept, np.float64).reshape(-1, 2)
