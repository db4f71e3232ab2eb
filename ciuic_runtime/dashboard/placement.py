"""Where everything is: layers by parts, and the experts.
Knows a schedule; what the graph and a run add (popularity, uses), it shows where they are known."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ciuic_runtime.dashboard.counts import Counts
from ciuic_runtime.schedulers.assignment import Assignment
from ciuic_runtime.schedulers.graph import TaskGraph
from ciuic_runtime.schedulers.schedule import Schedule


def placement(schedule: Schedule, graph: TaskGraph | None, counts: Counts | None = None) -> dict[str, Any]:
    """Parts of layers in the order of their tasks; rows that belong to no layer beside them."""
    cells: dict[tuple[int, str], dict[tuple[str, str], list[int]]] = defaultdict(dict)
    parts: dict[str, None] = {}
    experts: dict[int, dict[int, Assignment]] = defaultdict(dict)
    others = []
    for row in schedule.assignments:
        place = _place(row.task)
        if place is None:
            others.append({"task": row.task, "device": row.device, "home": row.home, "bytes": row.nbytes})
            continue
        layer, part, expert = place
        parts.setdefault(part)
        held = cells[layer, part].setdefault((row.device, row.home), [0, 0])
        held[0], held[1] = held[0] + row.nbytes, held[1] + 1
        if expert is not None:
            experts[layer][expert] = row
    layers = sorted({layer for layer, _ in cells})
    return {
        "devices": [{"name": d.name, "kind": d.kind, "tier": _tier(d.kind)} for d in schedule.topology.devices],
        "layers": layers, "parts": list(parts),
        "cells": [[_cell(cells.get((layer, part))) for part in parts] for layer in layers],
        "others": others, "experts": _experts(schedule, graph, experts, counts) if experts else None,
        "paging": asdict(schedule.paging) if schedule.paging else None,
    }  # fmt: skip


def candidates(schedule: Schedule) -> list[dict[str, Any]]:
    """What it was chosen among."""
    return [
        {**asdict(c), "chosen": c.feasible and not c.why_not and c.name == schedule.policy} for c in schedule.candidates
    ]


def _place(task: str) -> tuple[int, str, int | None] | None:
    """layers.3.experts.17 -> (3, "experts", 17); layers.3.attention -> (3, "attention", None); of others None."""
    parts = task.split(".")
    if len(parts) < 3 or parts[0] != "layers" or not parts[1].isdecimal():
        return None
    if len(parts) > 3 and parts[-1].isdecimal():
        return int(parts[1]), ".".join(parts[2:-1]), int(parts[-1])
    return int(parts[1]), ".".join(parts[2:]), None


def _tier(kind: str) -> str:
    return "disk" if kind == "DISK" else "memory"


def _cell(held: Mapping[tuple[str, str], list[int]] | None) -> dict[str, Any] | None:
    if held is None:
        return None
    where = [
        {"device": device, "home": home, "bytes": nbytes, "count": count}
        for (device, home), (nbytes, count) in sorted(held.items(), key=lambda item: -item[1][0])
    ]
    return {"bytes": sum(one["bytes"] for one in where), "where": where}


def _experts(
    schedule: Schedule, graph: TaskGraph | None, experts: Mapping[int, Mapping[int, Assignment]],
    counts: Counts | None,
) -> dict[str, Any]:  # fmt: skip
    """Layers by experts; an expert that the schedule leaves out (of a part of a model) is null."""
    layers = sorted(experts)
    number = max(max(mine) for mine in experts.values()) + 1
    places = {d.name: i for i, d in enumerate(schedule.topology.devices)}
    rows = [[experts[layer].get(e) for e in range(number)] for layer in layers]
    liked = {t.layer: t.popularity for t in graph or () if t.num_experts and t.popularity}
    found: dict[str, Any] = {
        "layers": layers, "num_experts": number,
        "device": [[places[row.device] if row else None for row in line] for line in rows],
        "home": [[places[row.home] if row else None for row in line] for line in rows],
        "popularity": [list(liked.get(layer, ())) for layer in layers] if liked else None,
    }  # fmt: skip
    for key in ("uses", "hits", "resident"):
        table = None if counts is None else counts.table(key, layers, number)
        found[key] = table
    return found
