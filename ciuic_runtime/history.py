"""What runs were forecast to do and what they did, kept as one line each, and how far off the planner was so far.
Knows how records are kept and scored; forecasts and figures come from runs."""

from __future__ import annotations

import json
import logging
import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ciuic_runtime.devices.limits import cache_file
from ciuic_runtime.engine.llm import LLM
from ciuic_runtime.schedulers.comparison import Compared, Comparison
from ciuic_runtime.schedulers.graph import PHASES
from ciuic_runtime.schedulers.trace import Trace

log = logging.getLogger("ciuic")
LEAST_DECODE_STEPS = 4  # runs of fewer say little about decoding


@dataclass(frozen=True, slots=True)
class Rate:
    """tokens/s of one phase of a run."""

    forecast: float
    actual: float
    recosted: float | None = None

    @property
    def factor(self) -> float:
        """How many times too high or too low the forecast was; 1 is right."""
        return max(self.forecast / self.actual, self.actual / self.forecast)


@dataclass(frozen=True, slots=True)
class Record:
    """One run."""

    time: str  # UTC, ISO 8601
    machine: str  # "AMD EPYC, 2 threads, amx"
    model: str
    format: str
    policy: str
    workload: str
    basis: str
    range: tuple[float, float]  # of the decode rate
    prefill: Rate | None
    decode: Rate | None


@dataclass(frozen=True, slots=True)
class Score:
    """The planner's error over some runs: factors, of which 1 is right."""

    runs: int
    median: float
    worst: float
    recent: float  # median of the last RECENT rates
    inside: float | None  # share of decode rates inside the range that was given for them


RECENT = 10


def record_of(llm: LLM, trace: Trace, comparison: Comparison, now: datetime | None = None) -> Record | None:
    """A run of `llm`; None where it had no forecast, or neither phase says anything."""
    schedule = llm.schedule
    if schedule.predicted is None:
        return None
    decode_steps = sum(info.phase == "decode" for info in trace.steps)
    prefill = _rate(comparison.prefill_tokens_per_s)
    decode = _rate(comparison.decode_tokens_per_s) if decode_steps >= LEAST_DECODE_STEPS else None
    if prefill is None and decode is None:
        return None
    devices = ", ".join(schedule.topology.device(n).model or n for n in schedule.devices_used())
    return Record(
        (now or datetime.now(UTC)).isoformat(timespec="seconds"),
        f"{devices}, {llm.threads} threads, {llm.kernels}",
        schedule.model.name,
        schedule.model.format,
        schedule.policy,
        str(schedule.workload),
        schedule.predicted.basis,
        schedule.predicted.range,
        prefill,
        decode,
    )


def _rate(c: Compared) -> Rate | None:
    return Rate(c.forecast, c.actual, c.recosted) if c.forecast and c.actual else None


def history_file() -> Path:
    return cache_file().with_name("history.jsonl")


def remember(record: Record | None) -> None:
    """Adds a line to the history; a history that cannot be written costs nothing else."""
    if record is None:
        return
    file = history_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        line = (json.dumps(asdict(record)) + "\n").encode()
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line)  # one call: lines of two processes do not mix
        finally:
            os.close(descriptor)
    except OSError as error:
        log.warning("this run was not added to the history: %s; set CIUIC_CACHE_DIR to a writable folder", error)


def read_history() -> list[Record]:
    """Every record, the oldest first; lines that are damaged are left out, and said so."""
    try:
        lines = history_file().read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    records = [record for record in map(_record, lines) if record is not None]
    if lost := len(lines) - len(records):
        log.warning("%d of %d lines of %s are damaged and were left out", lost, len(lines), history_file())
    return records


def _record(line: str) -> Record | None:
    try:
        data: dict[str, Any] = json.loads(line)
        low, high = map(float, data.pop("range"))
        prefill, decode = (None if (rate := data.pop(phase)) is None else Rate(**rate) for phase in PHASES)
        record = Record(range=(low, high), prefill=prefill, decode=decode, **data)
        usable = all(rate.factor >= 1 for rate in _rates(record))
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError):
        return None
    return record if usable else None


def score(records: Sequence[Record]) -> Score | None:
    """None of no runs."""
    factors = [rate.factor for record in records for rate in _rates(record)]
    if not factors:
        return None
    decoded = [(record.range, record.decode.actual) for record in records if record.decode]
    inside = [low <= actual <= high for (low, high), actual in decoded]
    return Score(
        len(records),
        statistics.median(factors),
        max(factors),
        statistics.median(factors[-RECENT:]),
        sum(inside) / len(inside) if inside else None,
    )


def _rates(record: Record) -> Iterable[Rate]:
    return filter(None, (record.prefill, record.decode))


def scores(records: Sequence[Record]) -> dict[str, Score]:
    """Of all runs, and by model, format and basis."""
    groups: dict[str, list[Record]] = {"all runs": list(records)}
    for record in records:
        groups.setdefault(f"{record.model}, {record.format}, {record.basis}", []).append(record)
    found = {name: score(members) for name, members in groups.items()}
    return {name: one for name, one in found.items() if one is not None}
