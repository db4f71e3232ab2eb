"""Where a source's pages are and why, and what became of them.
Knows a source; how a placement is shown is in `placement.py`."""

from __future__ import annotations

from typing import Any

from ciuic_runtime.dashboard.placement import placement
from ciuic_runtime.dashboard.source import Source
from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.schedulers.schedule import Schedule
from ciuic_runtime.server.errors import ApiError


def placement_answer(source: Source) -> dict[str, Any]:
    schedule = schedule_of(source)
    return placement(schedule, source.basis.model.graph if source.basis else None, source.counts())


def explain_answer(source: Source, name: str) -> dict[str, Any]:
    schedule = schedule_of(source)
    try:
        text = schedule.explain(name)
    except InvalidInput as error:
        raise ApiError(404, str(error), code="not_found") from error
    rows = [row for row in schedule.assignments if row.task == name or row.task.startswith(name + ".")]
    return {
        "name": name, "text": text, "bytes": sum(row.nbytes for row in rows),
        "device": ", ".join(sorted({row.device for row in rows})),
        "home": ", ".join(sorted({row.home for row in rows})),
        **source.counts().about(name),
    }  # fmt: skip


def schedule_of(source: Source) -> Schedule:
    if source.schedule is None:
        raise ApiError(
            409, f"{source.name} has no schedule, so nothing says what is where; traces of `ciuic run --trace` of this "
            "version have one, and `ciuic plan --save` writes one", code="no_schedule",
        )  # fmt: skip
    return source.schedule
