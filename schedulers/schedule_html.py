"""A schedule as one web page that needs nothing but itself: figures, bars, tables, and its traces as a chart to zoom.
Knows which figures belong together; how they look is in `templates/`, and no figure is worked out there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from ciuic_runtime.devices.units import format_bytes
from ciuic_runtime.schedulers.comparison import Compared
from ciuic_runtime.schedulers.graph import Phase, TaskGraph
from ciuic_runtime.schedulers.memory import capacity, memory_need
from ciuic_runtime.schedulers.trace import Trace
from ciuic_runtime.schedulers.trace_chart import KINDS, trace_chart

if TYPE_CHECKING:
    from ciuic_runtime.schedulers.assignment import Prediction
    from ciuic_runtime.schedulers.schedule import Schedule

TEMPLATES = Path(__file__).with_name("templates")
MEMORY = ("weights", "pages read in", "KV cache", "working", "KV cache and working", "free", "elsewhere")
OWN_COLOURS = {what: what.replace(" ", "-") for what in (*KINDS, *MEMORY)}
PHASES: tuple[Phase, ...] = ("decode", "prefill")


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a bar."""

    label: str
    value: float  # bytes or seconds
    percent: float  # of the bar's length
    colour: str  # its class in templates/schedule.css


@dataclass(frozen=True, slots=True)
class Bar:
    label: str
    total: float  # of its parts, where that means something
    parts: tuple[Part, ...]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Group:
    """Rows of one layer that are computed and stored at the same places."""

    name: str  # layers.3
    device: str
    home: str
    tasks: tuple[str, ...]  # "attention", "experts 0-127 (128)"
    names: tuple[str, ...]  # what is searched: layers.3.attention, layers.3.experts.0-127
    nbytes: int


@dataclass(frozen=True, slots=True)
class Row:
    """Forecast beside actual."""

    label: str
    unit: str
    figures: Compared


def schedule_html(
    schedule: Schedule, forecast: Trace | None = None, actual: Trace | None = None, graph: TaskGraph | None = None
) -> str:
    """`graph` tells the KV cache from working memory, which a schedule states as one."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    pages = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    pages.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    pages.filters |= {"bytes": format_bytes, "figure": _figure, "seconds": _seconds, "count": _count, "error": _error}
    traces = {name: trace for name, trace in (("Forecast", forecast), ("Actual", actual)) if trace is not None}
    return pages.get_template("schedule.html.jinja").render(
        schedule=schedule,
        ranges=_rate_ranges(schedule.predicted),
        memory=_memory(schedule, graph),
        by_kind=_by_kind(schedule),
        by_place=_by_place(forecast) if forecast else [],
        traces=traces,
        lanes=_lanes(traces),
        charts=[trace_chart(name, trace) for name, trace in traces.items()],
        comparison=_comparison(schedule, actual) if actual else [],
        groups=_groups(schedule),
    )


def _rate_ranges(p: Prediction | None) -> dict[str, tuple[float, float]]:
    """The forecast's range is about its decode rate, and as wide for prefill."""
    if p is None or not p.decode_tokens_per_s:
        return {}
    low, high = (end / p.decode_tokens_per_s for end in p.range)
    return {"decode": p.range, "prefill": (low * p.prefill_tokens_per_s, high * p.prefill_tokens_per_s)}


# Memory, by tier


def _memory(schedule: Schedule, graph: TaskGraph | None) -> list[Bar]:
    stored, needs = schedule.weight_bytes(), _needs(schedule, graph)
    total = sum(stored.values())
    bars = []
    for device in schedule.topology.devices:
        here = {"weights": stored.get(device.name, 0), **needs.get(device.name, {})}
        used = sum(here.values())
        if not device.can_compute:
            note = f"of {format_bytes(total)} weights are stored here"
            bars.append(_bar(device.name, {**here, "elsewhere": total - used}, note, total=used))
        elif not device.usable:
            bars.append(_bar(device.name, {}, device.why_not_usable or "cannot be used"))
        else:
            usable = capacity(device)
            lacking = f": {format_bytes(used - usable)} too much" if used > usable else ""
            note = f"of {format_bytes(usable)} usable{lacking}"
            bars.append(_bar(device.name, {**here, "free": usable - used}, note, total=used))
    return bars


def _needs(schedule: Schedule, graph: TaskGraph | None) -> dict[str, dict[str, int]]:
    """Device -> what takes memory there beside the weights stored there."""
    stored = schedule.weight_bytes()
    if graph is not None:
        schedule.validate(graph)
        return {
            name: {
                "pages read in": max(0, need.weights - stored.get(name, 0)),
                "KV cache": need.cache,
                "working": need.working,
            }
            for name, need in memory_need(schedule, graph, schedule.workload).items()
        }
    paging, needs = schedule.paging, {}
    for name, total in (schedule.predicted.memory_bytes if schedule.predicted else {}).items():
        here = stored.get(name, 0)
        pages = max(0, paging.cache_bytes - here) if paging and name == paging.device else 0
        needs[name] = {"pages read in": pages, "KV cache and working": max(0, total - here - pages)}
    return needs


# Time, by what it is spent on


def _by_kind(schedule: Schedule) -> list[Bar]:
    times = schedule.predicted.seconds_per_token if schedule.predicted else {}
    return [_bar(phase, times[phase]) for phase in PHASES if times.get(phase)]


def _by_place(forecast: Trace) -> list[Bar]:
    """Per token, on each device and link. Reads from a disk go on beside all that; what counts is waiting for them."""
    bars, colours = [], {lane: f"colour{i % 6}" for i, lane in enumerate(forecast.devices)}
    for phase in PHASES:
        spent, tokens = dict[str, float](), forecast.tokens(phase)
        for event in forecast.events if tokens else ():
            if event.phase == phase and event.kind != "read":
                what = f"{event.lane} waits" if event.kind == "wait" else event.lane
                spent[what] = spent.get(what, 0.0) + event.seconds / tokens
        if spent:
            bars.append(_bar(phase, spent, colours=colours))
    return bars


def _lanes(traces: Mapping[str, Trace]) -> list[tuple[str, list[float | None]]]:
    """Lane -> percent of the time of all steps that it is busy, in each trace. The chart in figures."""
    lanes = dict.fromkeys(lane for trace in traces.values() for lane in trace.lanes)
    columns = []
    for trace in traces.values():
        total, busy = sum(step.end - step.start for step in trace.steps), dict.fromkeys(trace.lanes, 0.0)
        for event in trace.events:
            if event.kind != "wait":
                busy[event.lane] += event.seconds
        columns.append({lane: 100 * seconds / total for lane, seconds in busy.items() if total > 0})
    return [(lane, [column.get(lane) for column in columns]) for lane in lanes]


def _comparison(schedule: Schedule, actual: Trace) -> list[Row]:
    found = actual.against(schedule)
    rows = [
        Row("prefill", "tokens/s", found.prefill_tokens_per_s),
        Row("decode", "tokens/s", found.decode_tokens_per_s),
    ]
    for phase, kinds in found.seconds_per_token.items():
        rows += [Row(f"{phase}: {kind}", "s/token", figures) for kind, figures in kinds.items()]
    return rows


# Assignments


def _groups(schedule: Schedule) -> list[Group]:
    found: dict[tuple[str, str, str], list[tuple[str, int]]] = {}
    for row in schedule.assignments:
        parts = row.task.split(".")
        layer = ".".join(parts[:2]) if parts[0] == "layers" and len(parts) > 2 else row.task
        rest = row.task[len(layer) + 1 :]
        found.setdefault((layer, row.device, row.home), []).append((rest, row.nbytes))
    return [_group(*key, rows) for key, rows in found.items()]


def _group(name: str, device: str, home: str, rows: Sequence[tuple[str, int]]) -> Group:
    numbered: dict[str, list[int]] = {}  # experts -> 0, 1, 2; of others no numbers
    for rest, _ in rows:
        kind, _, number = rest.rpartition(".")
        if kind and re.fullmatch("0|[1-9][0-9]{0,5}", number):
            numbered.setdefault(kind, []).append(int(number))
        elif rest:
            numbered.setdefault(rest, [])
    tasks = (f"{kind} {_ranges(n)} ({len(n)})" if n else kind for kind, n in numbered.items())
    names = (f"{name}.{kind}.{_ranges(n)}" if n else f"{name}.{kind}" for kind, n in numbered.items())
    return Group(name, device, home, tuple(tasks), tuple(names) or (name,), sum(nbytes for _, nbytes in rows))


# Figures


def _bar(
    label: str, values: Mapping[str, float], note: str = "", total: float | None = None,
    colours: Mapping[str, str] = OWN_COLOURS,
) -> Bar:  # fmt: skip
    """Parts in the order of `values`, without those that are nothing."""
    kept = {what: value for what, value in values.items() if value > 0}
    length = sum(kept.values())
    parts = [Part(what, value, 100 * value / length, _colour(what, colours)) for what, value in kept.items()]
    return Bar(label, length if total is None else total, tuple(parts), note)


def _colour(what: str, colours: Mapping[str, str]) -> str:
    """Waits and links have that of waits and copies."""
    if what in colours:
        return colours[what]
    return "wait" if what.endswith(" waits") else "copy" if " -> " in what else "other"


def _ranges(numbers: Iterable[int]) -> str:
    """0, 1, 2, 5 -> "0-2, 5" """
    runs = [[n for _, n in run] for _, run in groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0])]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _figure(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.3g}"


def _seconds(value: float | None) -> str:
    if value is None:
        return "–"
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if abs(value) * scale >= 1:
            return f"{_figure(value * scale)} {unit}"
    return f"{_figure(value * 1e9)} ns"


def _count(number: int) -> str:
    """671026404352 -> "671 billion" """
    for unit, scale in (("billion", 10**9), ("million", 10**6), ("thousand", 10**3)):
        if number >= scale:
            return f"{number / scale:.4g} {unit}"
    return str(number)


def _error(value: float) -> str:
    shown = f"{value:+.1%}" if abs(value) < 0.1 else f"{value:+,.0%}"
    return "0.0%" if shown in ("-0.0%", "+0.0%") else shown
