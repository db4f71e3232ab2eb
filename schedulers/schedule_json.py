"""A schedule as JSON and back. Knows which keys and types there are; anything else is one line that names the place.
What the rows mean is checked against a graph, by `Schedule.validate`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.devices.toml import topology_from_dict, topology_to_dict
from ciuic_runtime.schedulers.assignment import Assignment, Candidate, ModelSummary, Paging, Prediction
from ciuic_runtime.schedulers.reading import LARGEST, read_as, shown
from ciuic_runtime.schedulers.workload import Goal, Workload

if TYPE_CHECKING:
    from ciuic_runtime.schedulers.schedule import Schedule

SCHEMA_VERSION = 1
_ROW_KEYS = {"task", "device", "home", "bytes"}


def schedule_to_dict(schedule: Schedule) -> dict[str, Any]:
    topology = topology_to_dict(schedule.topology)
    return {
        "schema_version": SCHEMA_VERSION,
        "workload": asdict(schedule.workload),
        "goal": schedule.goal,
        "policy": schedule.policy,
        "model": asdict(schedule.model),
        "devices": topology["device"],
        "links": topology["link"],
        "domains": topology.get("domain", []),
        "assignments": [
            {"task": r.task, "device": r.device, "home": r.home, "bytes": r.nbytes} for r in schedule.assignments
        ],
        "predicted": _prediction(schedule.predicted) if schedule.predicted else None,
        "candidates": [asdict(c) for c in schedule.candidates],
        "notes": list(schedule.notes),
        "paging": asdict(schedule.paging) if schedule.paging else None,
    }


def read_schedule(data: Any, source: str) -> dict[str, Any]:
    """The fields of the Schedule that `data` stands for; InvalidInput for what `to_dict` would not have written."""
    if not isinstance(data, dict) or "schema_version" not in data:
        raise InvalidInput(f"{source} is not a schedule; `ciuic plan MODEL --save FILE` writes one")
    if data["schema_version"] != SCHEMA_VERSION:
        raise InvalidInput(
            f"{source} has schema_version {shown(data['schema_version'])}, this version reads {SCHEMA_VERSION}; "
            "plan again"
        )
    keys = {"goal": Goal, "policy": str, "model": ModelSummary, "workload": Workload, "predicted": Prediction | None,
            "candidates": tuple[Candidate, ...], "notes": tuple[str, ...]}  # fmt: skip
    if missing := [key for key in (*keys, "devices", "links", "assignments") if key not in data]:
        raise InvalidInput(f"{source} has no {missing[0]}; `ciuic plan MODEL --save FILE` writes one that has")
    data = {"paging": None, "domains": [], **data}  # absent in files of before there was either
    keys["paging"] = Paging | None
    if strange := data.keys() - {*keys, "schema_version", "devices", "links", "domains", "assignments"}:
        raise InvalidInput(f"{source} has an unknown key {min(strange, key=str)}; remove it")
    values = {key: read_as(kind, data[key], f"{source}: {key}") for key, kind in keys.items()}
    parts = {"device": data["devices"], "link": data["links"], "domain": data["domains"]}
    topology = topology_from_dict(parts, source)
    rows = _rows(data["assignments"], {d.name for d in topology.devices}, source)
    return {**values, "topology": topology, "assignments": rows}


def _prediction(predicted: Prediction) -> dict[str, Any]:
    return {**asdict(predicted), "range": list(predicted.range)}


def _rows(value: Any, devices: set[str], source: str) -> tuple[Assignment, ...]:
    if not isinstance(value, list):
        raise InvalidInput(f"{source}: assignments is not a list of rows")
    return tuple(_row(row, devices, f"{source}: assignment {i}") for i, row in enumerate(value, 1))


def _row(row: Any, devices: set[str], where: str) -> Assignment:
    if not isinstance(row, dict) or row.keys() != _ROW_KEYS:
        raise InvalidInput(f"{where} is {shown(row)}; it must have {', '.join(sorted(_ROW_KEYS))}")
    task, device, home, nbytes = row["task"], row["device"], row["home"], row["bytes"]
    if not isinstance(task, str):
        raise InvalidInput(f"{where}: task is {shown(task)}; it must be a text")
    for key, name in (("device", device), ("home", home)):
        if not isinstance(name, str) or name not in devices:
            raise InvalidInput(f"{where} ({task}): {key} is {shown(name)}; there are {', '.join(sorted(devices))}")
    if type(nbytes) is not int or not 0 <= nbytes <= LARGEST:
        raise InvalidInput(f"{where} ({task}): bytes is {shown(nbytes)}; it must be a whole number from 0 to 2**60")
    return Assignment(task, device, home, nbytes)
