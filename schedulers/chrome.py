"""A recording as one file, Chrome trace JSON ("Trace Event Format"), which Perfetto opens too; and back.
Knows the format; what has no place in it goes under `otherData`, so that nothing but less than a nanosecond is lost."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

import numpy as np

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.devices.files import write_whole
from ciuic_runtime.schedulers.graph import PHASES, Step
from ciuic_runtime.schedulers.reading import read_as, shown
from ciuic_runtime.schedulers.recording import (
    COLUMNS,
    EVICT,
    KINDS,
    MEMORY,
    NONE,
    Mark,
    PageCounts,
    PassNote,
    Recording,
    RequestNote,
)
from ciuic_runtime.schedulers.trace import StepInfo

SCHEMA_VERSION = 1
LATEST = 2.0**52  # us
ENGINE, REQUESTS = 1, 2  # processes in the file
WRITE_ONE = "`ciuic run MODEL --trace FILE` and `ciuic plan MODEL --trace FILE` write one"


def write_recording(recording: Recording, path: str | Path) -> None:
    """Complete events have one thread per lane, on which they do not overlap; samples of memory are counters,
    evictions and marks are instants, and requests are a process of their own with a thread for each."""
    write_whole(path, recording_text(recording))


def recording_text(recording: Recording) -> str:
    """What `write_recording` writes."""
    lines = [*_heads(recording), *_events(recording), *_marks(recording), *_requests(recording)]
    other = json.dumps({"notes": "; ".join(recording.notes), "ciuic": _beside(recording)})
    return "".join((
        '{"displayTimeUnit":"ms","traceEvents":[\n', ",\n".join(lines), '\n],\n"otherData":', other, "}\n",
    ))  # fmt: skip


def read_recording(path: str | Path) -> Recording:
    """What `write_recording` wrote. Raises InvalidInput for anything else."""
    try:
        data = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{path} is not JSON ({error}); {WRITE_ONE}") from error
    try:
        beside = data["otherData"]["ciuic"]
        version, events = beside["schema_version"], data["traceEvents"]
    except (LookupError, TypeError):
        raise InvalidInput(f"{path} is not a recording of ours; {WRITE_ONE}") from None
    if version != SCHEMA_VERSION:
        raise InvalidInput(
            f"{path} has schema_version {shown(version)}, this version reads {SCHEMA_VERSION}; record again"
        )
    try:
        return _recording(events, beside, str(path))
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        what = f"{type(error).__name__}: {error}"
        raise InvalidInput(f"{path} is damaged ({what[:120]}); {WRITE_ONE}") from error


# Writing


def nanoseconds(seconds: Any) -> Any:
    """Whole ones. Both ends of an event are rounded: neighbours do not overlap by an error of the difference."""
    return np.rint(np.asarray(seconds, dtype=float) * 1e9).astype(np.int64)


def lanes_of(recording: Recording) -> list[str]:
    """Of its rows, devices first."""
    numbers, first = np.unique(recording.rows["lane"], return_index=True)
    used = [recording.names[n] for n in numbers[np.argsort(first)].tolist()]
    return list(dict.fromkeys((*recording.devices, *used)))


def _heads(recording: Recording) -> Iterator[str]:
    def head(what: str, pid: int, tid: int, **args: Any) -> str:
        return json.dumps({"ph": "M", "name": what, "pid": pid, "tid": tid, "args": args})

    yield head("process_name", ENGINE, 0, name=f"ciuic ({recording.source})")
    for tid, lane in enumerate(lanes_of(recording), 1):
        yield head("thread_name", ENGINE, tid, name=lane)
        yield head("thread_sort_index", ENGINE, tid, sort_index=tid)
    if recording.requests:
        yield head("process_name", REQUESTS, 0, name="requests")
    for tid, request in enumerate(recording.requests, 1):
        yield head("thread_name", REQUESTS, tid, name=f"request {request.request}")
        yield head("thread_sort_index", REQUESTS, tid, sort_index=tid)


def _events(recording: Recording) -> Iterator[str]:
    """A row each, in their order."""
    rows, steps, first = recording.rows, recording.steps, recording.first_step
    names = [json.dumps(name) for name in recording.names]
    counters = [json.dumps(f"{what} on ")[:-1] for what in recording.names]
    tids = {lane: tid for tid, lane in enumerate(lanes_of(recording), 1)}
    tid_of = [tids.get(name, 0) for name in recording.names]
    phase_of = {number: info.phase for number, info in enumerate(steps, first)}
    starts, ends = nanoseconds(rows["start"]), nanoseconds(rows["end"])
    columns = (rows[name].tolist() for name in ("task", "lane", "step", "kind", "nbytes", "cause"))
    for task, lane, step, kind, nbytes, cause, start, took in zip(
        *columns, (starts / 1000).tolist(), ((ends - starts) / 1000).tolist(), strict=True
    ):
        if kind == MEMORY:
            yield (
                f'{{"ph":"C","name":{counters[task]}{names[lane][1:]},"cat":"memory","pid":{ENGINE},'
                f'"tid":{tid_of[lane]},"ts":{start},"step":{step},"args":{{"bytes":{nbytes}}}}}'
            )
            continue
        args = f'"step":{step},"phase":"{phase_of.get(step, "decode")}"'
        if nbytes:
            args += f',"bytes":{nbytes}'
        if cause != NONE:
            args += f',"waits_for":{names[cause]}'
        how = '"ph":"i","s":"t"' if kind == EVICT else f'"ph":"X","dur":{took}'
        yield (
            f'{{{how},"name":{names[task]},"cat":"{KINDS[kind]}","pid":{ENGINE},"tid":{tid_of[lane]},"ts":{start},'
            f'"args":{{{args}}}}}'
        )


def _marks(recording: Recording) -> Iterator[str]:
    for mark in recording.marks:
        at = int(nanoseconds(mark.time)) / 1000
        yield json.dumps({
            "ph": "i", "s": "g", "name": mark.kind, "cat": "mark", "pid": ENGINE, "tid": 0, "ts": at,
            "args": {"text": mark.text},
        })  # fmt: skip


def _requests(recording: Recording) -> Iterator[str]:
    """Spans of what is known, as far as they lie in the recording; what has not ended goes on until that ends."""
    for tid, r in enumerate(recording.requests, 1):
        ended = max(r.arrived, recording.seconds) if r.ended is None else r.ended
        reached = [at for at in (r.arrived, r.admitted, r.first_token) if at is not None]
        for name, start, end in zip(("queued", "prefill", "decode"), reached, (*reached[1:], ended), strict=False):
            at, to = nanoseconds((max(0.0, start), max(0.0, start, end))).tolist()
            yield json.dumps({
                "ph": "X", "name": name, "cat": "request", "pid": REQUESTS, "tid": tid, "ts": at / 1000,
                "dur": (to - at) / 1000, "args": {"request": r.request},
            })  # fmt: skip


def _beside(recording: Recording) -> dict[str, Any]:
    """All that is not in the events. Steps are rows, for there are many; their times are whole nanoseconds."""
    starts = nanoseconds([info.start for info in recording.steps]).tolist()
    ends = nanoseconds([info.end for info in recording.steps]).tolist()
    return {
        "schema_version": SCHEMA_VERSION,
        "source": recording.source,
        "devices": list(recording.devices),
        "lanes": lanes_of(recording),
        "first_step": recording.first_step,
        "steps": [
            [info.phase, info.tokens, info.sequences, start, end, astuple(info.step) if info.step else None]
            for info, start, end in zip(recording.steps, starts, ends, strict=True)
        ],
        "passes": [[note.requests, note.running, note.waiting] for note in recording.passes],
        "requests": [asdict(note) for note in recording.requests],
        "marks": [asdict(mark) for mark in recording.marks],
        "capacity": [[device, what, nbytes] for (device, what), nbytes in recording.capacity.items()],
        "notes": list(recording.notes),
        "began": recording.began,
        "basis": recording.basis,
        "pages": {name: asdict(counts) for name, counts in recording.pages.items()},
        "expert_uses": {task: list(uses) for task, uses in recording.expert_uses.items()},
    }


# Reading


def _recording(events: Any, beside: dict[str, Any], path: str) -> Recording:
    def read(kind: Any, key: str) -> Any:
        return read_as(kind, beside[key], f"{path}: {key}")

    lanes, basis = read(tuple[str, ...], "lanes"), beside["basis"]
    if not isinstance(basis, dict | None):
        raise InvalidInput(f"{path}: basis is {shown(basis)}; it must be an object or null")
    capacity = {(str(device), str(what)): _whole(nbytes) for device, what, nbytes in beside["capacity"]}
    source = beside["source"]
    if source not in ("simulated", "measured"):
        raise InvalidInput(f"{path}: source is {shown(source)}; it must be simulated or measured")
    names: dict[str, int] = {}
    rows, first, steps = _rows(events, lanes, names), _whole(beside["first_step"]), [_step(r) for r in beside["steps"]]
    if first < 0 or (steps and not ((first <= rows["step"]) & (rows["step"] < first + len(steps))).all()):
        raise ValueError("an event is of no step")
    return Recording(
        rows, list(names), steps, first, [_pass(row) for row in beside["passes"]],
        read(tuple[RequestNote, ...], "requests"), read(tuple[Mark, ...], "marks"), capacity, source,
        read(tuple[str, ...], "devices"),
        read(tuple[str, ...], "notes"), read(float | None, "began"), basis,
        read(Mapping[str, PageCounts], "pages"), read(Mapping[str, tuple[int, ...]], "expert_uses"),
    )  # fmt: skip


def _rows(events: Sequence[Any], lanes: Sequence[str], names: dict[str, int]) -> Any:
    """The engine's events as rows; `names` is filled on the way."""
    kinds = {kind: number for number, kind in enumerate(KINDS)}

    def number(name: Any) -> int:
        if (found := names.get(name)) is None:
            if not isinstance(name, str):
                raise ValueError(f"{shown(name)} is no name")
            found = names[name] = len(names)
        return found

    lane_numbers = [NONE, *map(number, lanes)]
    found = []
    for event in events:
        if event["pid"] != ENGINE or (kind := kinds.get(event.get("cat"), NONE)) == NONE:
            continue
        tid, args, start = event["tid"], event["args"], event["ts"]
        if kind == MEMORY:
            what, step, took = event["name"].removesuffix(f" on {lanes[tid - 1]}"), event["step"], 0.0
        else:
            what, step, took = event["name"], args["step"], event.get("dur", 0.0)
        cause = args.get("waits_for")
        lane, nbytes = lane_numbers[tid], args.get("bytes", 0)
        found.append((number(what), lane, step, kind, nbytes, start, took, NONE if cause is None else number(cause)))
    rows = np.array(found, COLUMNS)
    if not ((np.abs(rows["start"]) < LATEST) & (rows["end"] >= 0) & (rows["end"] < LATEST)).all():
        raise ValueError("an event has no time that can be")
    if (rows["lane"] == NONE).any() or (np.diff(rows["step"]) < 0).any():
        raise ValueError("an event has no lane, or steps are not in order")
    start, took = np.rint(rows["start"] * 1000), np.rint(rows["end"] * 1000)
    rows["start"], rows["end"] = start / 1e9, (start + took) / 1e9
    return rows


def _step(row: Any) -> StepInfo:
    phase, tokens, sequences, start, end, size = row
    if phase not in PHASES:
        raise ValueError(f"{shown(phase)} is no phase")
    step = None
    if size is not None:
        step = Step(*size)
        if step.phase not in PHASES:
            raise ValueError(f"{shown(step.phase)} is no phase")
        numbers = [step.pairs, step.positions, step.touched or 0.0, step.read_bytes or 0.0]
        _whole(step.tokens), _whole(step.sequences), _whole(step.sampled), [0.0 + n for n in numbers]
    return StepInfo(phase, _whole(tokens), _whole(sequences), _whole(start) / 1e9, _whole(end) / 1e9, step)


def _pass(row: Any) -> PassNote:
    requests, running, waiting = row
    return PassNote(tuple((_whole(r), _whole(n)) for r, n in requests), _whole(running), _whole(waiting))


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise ValueError(f"{shown(value)} is no whole number")
    return value
