"""A schedule as a table that people read in a terminal. Knows how figures are written, not where they come from."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ciuic_runtime.devices.units import format_bytes
from ciuic_runtime.schedulers.assignment import Candidate, Paging, Prediction
from ciuic_runtime.schedulers.memory import capacity

if TYPE_CHECKING:
    from ciuic_runtime.schedulers.schedule import Schedule

WIDTH = 100


def schedule_text(schedule: Schedule) -> str:
    model = schedule.model
    lines = [
        f"{model.name} in {model.format}: {_count(model.parameters)} parameters, "
        f"{_count(model.active_parameters)} active per token",
        f"plan: {schedule.policy}; goal {schedule.goal}, {schedule.workload}",
        "",
        *_devices(schedule),
    ]
    if schedule.paging:
        lines += ["", *_paging(schedule, schedule.paging)]
    if schedule.predicted:
        lines += ["", *_forecast(schedule.predicted)]
    if schedule.candidates:
        lines += ["", *_candidates(schedule.candidates)]
    for note in schedule.notes:
        lines += ["", *textwrap.wrap(f"note: {note}", WIDTH, subsequent_indent="      ")]
    return "\n".join(lines)


def _devices(schedule: Schedule) -> list[str]:
    weights = schedule.weight_bytes()
    needs = schedule.predicted.memory_bytes if schedule.predicted else {}
    rows: list[tuple[str, ...]] = [("device", "weights", "needs", "usable", "computes")]
    for device in schedule.topology.devices:
        if not device.can_compute:
            continue
        need = format_bytes(needs[device.name]) if device.name in needs else "-"
        held = format_bytes(weights.get(device.name, 0))
        does = _computes(schedule, device.name) if device.usable else device.why_not_usable or "cannot be used"
        rows.append((device.name, held, need, format_bytes(capacity(device)), does))
    return _table(rows, "<>>><")


def _paging(schedule: Schedule, paging: Paging) -> list[str]:
    on_disk = schedule.weight_bytes().get(paging.disk, 0)
    stays = schedule.weight_bytes().get(paging.device, 0)
    ahead = f"guessed {paging.lookahead} layers ahead" if paging.lookahead else "read when they are needed"
    return [
        f"paging: {format_bytes(on_disk)} of weights have their home on {paging.disk} and share "
        f"{format_bytes(max(0, paging.cache_bytes - stays))} of {paging.device}'s memory;",
        f"        policy {paging.policy}, routed experts {ahead}",
    ]


def _forecast(p: Prediction) -> list[str]:
    low, high = p.range
    prefill, decode = p.prefill_tokens_per_s, p.decode_tokens_per_s
    return [
        f"forecast ({p.basis})",
        f"  first token  {p.first_token_s:.3g} s",
        f"  prefill      {prefill:.3g} tokens/s ({prefill * low / decode:.3g} to {prefill * high / decode:.3g})",
        f"  decode       {p.decode_tokens_per_s:.3g} tokens/s ({low:.3g} to {high:.3g})",
        f"  bound by     {p.bound_by}",
    ]


def _candidates(candidates: Sequence[Candidate]) -> list[str]:
    rows: list[tuple[str, ...]] = [("candidate", "decode/s", "prefill/s", "")]
    for c in candidates:
        verdict = c.why_not.partition(" (")[0] or "chosen"
        rates = (c.decode_tokens_per_s, c.prefill_tokens_per_s)
        shown = ["-" if rate is None or not c.feasible else f"{rate:.3g}" for rate in rates]
        rows.append((c.name, *shown, verdict))
    return _table(rows, "<>><")


def _table(rows: Sequence[tuple[str, ...]], align: str) -> list[str]:
    """Columns as wide as they must be; the last one is wrapped at the width of the screen."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(align) - 1)]
    indent = " " * (sum(widths) + 2 * len(widths))
    lines = []
    for row in rows:
        cells = [f"{cell:{a}{w}}  " for cell, a, w in zip(row, align, widths, strict=False)]
        rest = textwrap.wrap(row[-1], max(30, WIDTH - len(indent)), max_lines=3, placeholder=" ...") or [""]
        lines += [("".join(cells) + rest[0]).rstrip(), *(indent + more for more in rest[1:])]
    return lines


def _computes(schedule: Schedule, device: str) -> str:
    """embedding, layers 0-3, part of layers 4-7 (812 experts)"""
    layers: dict[int, set[str]] = {}
    others, experts = [], 0
    for row in schedule.assignments:
        parts = row.task.split(".")
        if parts[0] == "layers" and len(parts) > 1 and parts[1].isdecimal():
            layers.setdefault(int(parts[1]), set()).add(row.device)
        elif row.device == device:
            others.append(row.task)
        experts += row.device == device and ".experts." in row.task
    whole = [n for n, devices in layers.items() if devices == {device}]
    partly = [n for n, devices in layers.items() if device in devices and len(devices) > 1]
    said = [f"layers {_ranges(whole)}"] if whole else []
    said += [f"part of layers {_ranges(partly)}"] if partly else []
    counted = f" ({experts} expert{'s' * (experts > 1)})" if experts else ""
    return ", ".join([*others, ", ".join(said) + counted] if said else others) or "nothing"


def _count(number: int) -> str:
    """671026404352 -> "671 B" """
    value = float(number)
    for unit in ("", " k", " M"):
        if value < 1000:
            return f"{value:.4g}{unit}"
        value /= 1000
    return f"{value:.4g} B"


def _ranges(numbers: Iterable[int]) -> str:
    """0, 1, 2, 5 -> "0-2, 5" """
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)
