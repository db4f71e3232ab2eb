"""Why this plan: what it was chosen among, what binds it, and forecast, recosted and measured side by side.
Knows a source's schedule and what its forecasts are made with."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from ciuic_runtime.basis import Basis
from ciuic_runtime.dashboard.explain import schedule_of
from ciuic_runtime.dashboard.placement import candidates
from ciuic_runtime.dashboard.source import Source
from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.history import read_history, score
from ciuic_runtime.schedulers.bound import decode_bound
from ciuic_runtime.schedulers.comparison import Compared, compare
from ciuic_runtime.schedulers.graph import PHASES
from ciuic_runtime.schedulers.schedule import Schedule
from ciuic_runtime.schedulers.trace import Trace

MOST_PASSES = 16  # recosted, of each phase


def why_answer(source: Source) -> dict[str, Any]:
    schedule, predicted = schedule_of(source), schedule_of(source).predicted
    bound = _bound(source.basis)
    rate = predicted.decode_tokens_per_s if predicted else None
    return {
        "policy": schedule.policy, "goal": schedule.goal, "workload": asdict(schedule.workload),
        "workload_text": str(schedule.workload), "predicted": schedule.to_dict()["predicted"],
        "candidates": candidates(schedule), "bound": bound,
        "gap": bound["decode_tokens_per_s"] / rate - 1 if bound and rate else None,
        "binding": predicted.bound_by if predicted else "", "figures": _figures(source, schedule),
        "calibration": _calibration(source), "history": _history(schedule),
        "notes": [*schedule.notes, *([source.why_no_basis] if source.why_no_basis else [])],
    }  # fmt: skip


def _bound(basis: Basis | None) -> dict[str, Any] | None:
    """None: not known, or nothing fits."""
    if basis is None:
        return None
    forecaster, at_once = basis.forecaster, basis.pipelining is not None
    try:
        rate = decode_bound(basis.model.graph, forecaster.carried_out.topology, forecaster.cost, at_once)
    except InvalidInput:  # a device's speed is not known: the plan has no forecast either
        return None
    if rate is None:
        return None
    return {
        "decode_tokens_per_s": rate,
        "text": f"no placement on these devices decodes faster than {rate:.4g} tokens/s, by the same cost model",
    }


def _figures(source: Source, schedule: Schedule) -> list[dict[str, Any]]:
    """Of a plan alone, its forecast; of a run, what came beside it."""
    recording = source.recording
    if not recording.steps:
        predicted = schedule.predicted
        rates = [
            ("prefill", "tokens/s", Compared(predicted.prefill_tokens_per_s if predicted else None, None)),
            ("decode", "tokens/s", Compared(predicted.decode_tokens_per_s if predicted else None, None)),
        ]
        return [_figure(*one) for one in rates]
    summed = recording.summed()
    found = compare(summed, schedule, _recosted(source.basis, summed))
    rows = [("prefill", "tokens/s", found.prefill_tokens_per_s), ("decode", "tokens/s", found.decode_tokens_per_s)]
    for phase, kinds in found.seconds_per_token.items():
        rows += [(f"{phase}: {kind}", "s/token", figures) for kind, figures in kinds.items()]
    return [_figure(*one) for one in rows]


def _figure(label: str, unit: str, figures: Compared) -> dict[str, Any]:
    return {
        "label": label, "unit": unit, "forecast": figures.forecast, "recosted": figures.recosted,
        "actual": figures.actual, "error": figures.error,
    }  # fmt: skip


def _recosted(basis: Basis | None, trace: Trace) -> Trace | None:
    """Passes as they came, of many some."""
    if basis is None:
        return None
    passes = [step for phase in PHASES for step in trace.passes(phase, MOST_PASSES)]
    try:
        return basis.forecaster.recost(passes) if passes else None
    except InvalidInput:
        return None


def _calibration(source: Source) -> dict[str, Any]:
    """How old it is; of a saved recording, how old it was when that began."""
    basis, began = source.basis, source.recording.began if source.kind == "trace" else None
    known = basis.calibration if basis else None
    used = set(basis.schedule.devices_used()) if basis else set()
    curves = [c for c in known.curves if c.device in used] if known else []
    spreads = sorted(c.spread for c in curves if c.points)
    dates = [c.measured for c in curves if c.measured is not None]
    return {
        "basis": "measured" if curves else known.basis if known else "estimated",
        "age_s": max(0.0, (began or time.time()) - min(dates)) if dates else None,
        "model_error": known.model_error if known else None,
        "spread": spreads[len(spreads) // 2] if spreads else None,
        "curves": [
            {
                "device": c.device, "operator": c.operator, "format": c.format, "threads": c.threads, "size": c.size,
                "spread": c.spread,
                "points": [{"rows": p.rows, "compute": p.compute, "memory": p.memory} for p in c.points],
            }
            for c in curves
        ],
    }  # fmt: skip


def _history(schedule: Schedule) -> dict[str, Any] | None:
    """Of this model in this format, on this machine."""
    records = [r for r in read_history() if (r.model, r.format) == (schedule.model.name, schedule.model.format)]
    found = score(records)
    return asdict(found) if found else None
