"""A trace as a chart to zoom: the steps that are worth looking at, as columns of whole nanoseconds, small enough for a
web page. Knows nothing of how it is drawn; that is in `templates/`."""

from __future__ import annotations

from typing import Any

from ciuic_runtime.schedulers.graph import task_kind
from ciuic_runtime.schedulers.trace import Event, StepInfo, Trace

MOST_EVENTS = 20_000  # of a trace that a page holds: about 0.6 MB, drawn in a few milliseconds
FIRST_DECODES = 3  # steps that are in view at first, after a prefill pass
# Those with a colour of their own, in templates/schedule.css.
KINDS = ("attention", "experts", "shared_experts", "mlp", "router", "norm", "embedding", "head", "copy", "read", "wait",
         "sample")  # fmt: skip


def trace_chart(title: str, trace: Trace) -> dict[str, Any]:
    """Whole steps, or of one that is too long its beginning; times since the first event that is kept."""
    steps = _window(trace)
    events = [e for e in trace.events if e.step in steps or not trace.steps][:MOST_EVENTS]
    begin = min((e.start for e in events), default=0.0)
    tasks = {name: i for i, name in enumerate(dict.fromkeys(e.task for e in events))}
    kinds = {kind: i for i, kind in enumerate(dict.fromkeys(kind_of(e) for e in events))}
    shown = {i: trace.steps[i] for i in steps}
    lanes: dict[str, list[Event]] = {lane: [] for lane in trace.lanes}
    for event in events:
        lanes[event.lane].append(event)
    return {
        "title": title,
        "source": trace.source,
        "shown": len(events),
        "total": len(trace.events),
        "tasks": list(tasks),
        "kinds": list(kinds),
        "end": max((_ns(e.end - begin) for e in events), default=0),
        "firstView": _ns(_first_view(list(shown.values())) - begin),
        "steps": [
            {"number": i, "phase": s.phase, "tokens": s.tokens, "from": _ns(s.start - begin), "to": _ns(s.end - begin)}
            for i, s in shown.items()
        ],
        "lanes": [_lane(lane, mine, begin, tasks, kinds) for lane, mine in lanes.items()],
    }


def kind_of(event: Event) -> str:
    """What its colour is chosen by."""
    kind = task_kind(event.task) if event.kind == "compute" else event.kind
    return kind if kind in KINDS else "other"


def _lane(name: str, events: list[Event], begin: float, tasks: dict[str, int], kinds: dict[str, int]) -> dict[str, Any]:
    events.sort(key=lambda e: (e.start, e.end))
    return {
        "name": name,
        "from": [_ns(e.start - begin) for e in events],
        "to": [_ns(e.end - begin) for e in events],
        "task": [tasks[e.task] for e in events],
        "kind": [kinds[kind_of(e)] for e in events],
        "step": [e.step for e in events],
        "bytes": [e.nbytes for e in events],
    }


def _window(trace: Trace) -> range:
    """From the last pass before the first decode step on, as many steps as there is room for, then as many as possible
    before it; one at least."""
    counts = [0] * len(trace.steps)
    for event in trace.events:
        if event.step < len(counts):
            counts[event.step] += 1
    first = max(0, next((i for i, step in enumerate(trace.steps) if step.phase == "decode"), 0) - 1)
    low = high = first
    left = MOST_EVENTS
    while high < len(counts) and (high == first or counts[high] <= left):
        left -= counts[high]
        high += 1
    while low > 0 and counts[low - 1] <= left:
        low -= 1
        left -= counts[low]
    return range(low, high)


def _first_view(steps: list[StepInfo]) -> float:
    """s at which the steps that are in view at first end."""
    decodes = [step.end for step in steps if step.phase == "decode"]
    ends = decodes[:FIRST_DECODES] or [step.end for step in steps]
    return ends[-1] if ends else 0.0


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
