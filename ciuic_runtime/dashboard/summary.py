"""What a source is, and which views have something to show of it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ciuic_runtime.dashboard.source import Source, nodes_of
from ciuic_runtime.schedulers.lanes import SHOWN, lane_kind
from ciuic_runtime.schedulers.recording import MEMORY

SCHEMA_VERSION = 1


def summary(source: Source) -> dict[str, Any]:
    recording, schedule, basis = source.recording, source.schedule, source.basis
    lanes = source.shown.timeline.lanes
    title = f"{schedule.model.name} in {schedule.model.format}" if schedule else source.name
    return {
        "schema_version": SCHEMA_VERSION, "kind": source.kind,
        "measured": "simulated" if source.kind == "schedule" else recording.source,
        "model": asdict(schedule.model) if schedule else None,
        "title": title, "policy": schedule.policy if schedule else None,
        "lanes": [{"name": lane, "kind": lane_kind(lane, recording.devices)} for lane in lanes],
        "kinds": list(SHOWN), "began": recording.began, "seconds": recording.seconds,
        "num_events": len(recording.rows), "first_step": recording.first_step, "num_steps": len(recording.steps),
        "devices": [
            {"name": d.name, "kind": d.kind, "model": d.model, "simulated": d.simulated}
            for d in (schedule.topology.devices if schedule else ())
        ],
        "notes": list(dict.fromkeys([*recording.notes, *(schedule.notes if schedule else ()), *_missing(source)])),
        "has": {
            "steps": bool(recording.steps), "requests": source.num_requests > 0,
            "memory": bool((recording.rows["kind"] == MEMORY).any()), "schedule": schedule is not None,
            "plan": basis is not None,
        },
        "marks": [asdict(mark) for mark in recording.marks],
        "nodes": _nodes(source), "ray_dashboard": source.ray_dashboard,
    }  # fmt: skip


def _missing(source: Source) -> list[str]:
    return [source.why_no_basis] if source.why_no_basis else []


def _nodes(source: Source) -> list[dict[str, Any]]:
    """Of a cluster: those that compute now, and those that an earlier plan had."""
    now = nodes_of(source.basis) if source.basis else {}
    gone = [name for name in source.nodes_before if name not in now]
    return [
        *({"name": name, "stages": stages, "alive": True} for name, stages in now.items()),
        *({"name": name, "stages": [], "alive": False} for name in gone),
    ]
