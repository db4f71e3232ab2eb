"""One step as JSON: its lanes, planned above actual, and in words what it was lost to and what would make it faster.
Knows shapes; the figures are worked out in `schedulers/`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from ciuic_runtime.dashboard.faster import faster
from ciuic_runtime.dashboard.source import Source
from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.schedulers.binding import binding
from ciuic_runtime.schedulers.blame import CAUSES, idle, overlap
from ciuic_runtime.schedulers.graph import Step
from ciuic_runtime.schedulers.lanes import lane_kind, lane_order, shown_as
from ciuic_runtime.schedulers.late import Late, late_task
from ciuic_runtime.schedulers.recording import NONE, READ, Recording, Rows


def step_answer(source: Source, number: int) -> dict[str, Any]:
    around = source.shown.growing.around(number)
    whole = source.recording
    info = whole.steps[number - whole.first_step]
    parts = dict(zip(CAUSES, source.shown.strip.parts[number - whole.first_step].tolist(), strict=True))
    planned = source.plans.of(info.step)
    hidden, bound = overlap(around, number), binding(around, number, parts, source.plans.forecaster)
    late = late_task(around, number, planned)
    return {
        "step": number, "phase": info.phase, "tokens": info.tokens, "sequences": info.sequences,
        "start": info.start, "end": info.end, "seconds": parts,
        "planned": _planned(source, planned),
        "recosted": _recosted(source, info.step),
        "overlap": {**asdict(hidden), "percent": hidden.percent} if hidden else None,
        "idle": [asdict(one) for one in idle(around, number)],
        "binds": asdict(bound),
        "lanes": _lanes(around, number, planned, info.start),
        "late": _late(late),
        "faster": [asdict(one) for one in faster(source, number, parts, late)],
        "requests": _requests(source, number),
        "notes": [source.plans.why_none] if planned is None and source.plans.why_none else [],
    }  # fmt: skip


def _planned(source: Source, planned: Recording | None) -> dict[str, Any] | None:
    forecaster = source.plans.forecaster
    if planned is None or forecaster is None:
        return None
    basis = forecaster.cost.basis(set(forecaster.carried_out.places_used()))
    return {"seconds": planned.steps[0].end - planned.steps[0].start, "basis": basis}


def _recosted(source: Source, step: Step | None) -> dict[str, float] | None:
    """What the cost model makes of the pass with the experts and reads that came."""
    forecaster = source.plans.forecaster
    if forecaster is None or step is None:
        return None
    try:
        [info] = forecaster.recost([step]).steps
    except InvalidInput:  # said where the plan is
        return None
    return {"seconds": info.end - info.start}


def _lanes(around: Recording, number: int, planned: Recording | None, start: float) -> list[dict[str, Any]]:
    actual = around.of_step(number)
    actual = actual[actual["kind"] <= READ]
    there = _by_lane(around, actual)
    ghosts = _by_lane(planned, planned.rows) if planned else {}
    shift = start - planned.steps[0].start if planned else 0.0
    found = []
    for lane in lane_order({*there, *ghosts}, list(around.devices)):
        kind, mine = lane_kind(lane, around.devices), there.get(lane, actual[:0])
        one: dict[str, Any] = {"name": lane, "kind": kind, "actual": _columns(around, mine, 0.0)}
        one["actual"] |= {
            "kind": _kinds(around, mine, lane), "bytes": mine["nbytes"].tolist(),
            "waits_for": [None if c == NONE else around.names[c] for c in mine["cause"].tolist()],
        }  # fmt: skip
        if planned is not None:
            those = ghosts.get(lane, planned.rows[:0])
            one["planned"] = _columns(planned, those, shift) | {"kind": _kinds(planned, those, lane)}
        else:
            one["planned"] = {"from": [], "to": [], "task": [], "kind": []}
        found.append(one)
    return found


def _by_lane(recording: Recording, rows: Rows) -> dict[str, Rows]:
    rows = rows[np.argsort(rows["start"], kind="stable")]
    return {recording.names[n]: rows[rows["lane"] == n] for n in np.unique(rows["lane"]).tolist()}


def _columns(recording: Recording, rows: Rows, shift: float) -> dict[str, Any]:
    return {
        "from": (rows["start"] + shift).tolist(), "to": (rows["end"] + shift).tolist(),
        "task": [recording.names[n] for n in rows["task"].tolist()],
    }  # fmt: skip


def _kinds(recording: Recording, rows: Rows, lane: str) -> list[str]:
    kind, names = lane_kind(lane, recording.devices), recording.names
    return [shown_as(names[n], k, kind) for n, k in zip(rows["task"].tolist(), rows["kind"].tolist(), strict=True)]


def _late(late: Late | None) -> dict[str, Any] | None:
    if late is None:
        return None
    read = late.read
    shown = {"page": read.page, "start": read.start, "end": read.end, "bytes": read.nbytes} if read else None
    return {**asdict(late), "read": shown, "text": late.text}


def _requests(source: Source, number: int) -> list[dict[str, Any]]:
    """Whose tokens it computed. A request is in its prompt until its first token has come."""
    recording = source.recording
    if not recording.passes:
        return []
    at = number - recording.first_step
    info, note = recording.steps[at], recording.passes[at]
    first = {one.request: one.first_token for one in source.request_notes_of({request for request, _ in note.requests})}
    found = []
    for request, tokens in note.requests:
        known = first.get(request, NONE)
        decodes = known is not None and known != NONE and known <= info.start
        mine = info.phase if known == NONE else "decode" if decodes else "prefill"
        found.append({"request": request, "tokens": tokens, "phase": mine})
    return found
