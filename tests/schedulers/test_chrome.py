"""A recording comes back from its file as it was, to the nanosecond; all that is no recording is refused in a line."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.schedulers.chrome import nanoseconds, read_recording, write_recording
from ciuic_runtime.schedulers.graph import Step
from ciuic_runtime.schedulers.recording import (
    COLUMNS,
    COMPUTE,
    EVICT,
    KINDS,
    MEMORY,
    NONE,
    READ,
    WAIT,
    Mark,
    PageCounts,
    PassNote,
    Recording,
    RequestNote,
)  # fmt: skip
from ciuic_runtime.schedulers.trace import StepInfo

NAMES = ("layers.0.attention", "cpu", "disk -> cpu", "layers.1.experts.7", "weight pages", 'odd "name", é', "KV cache")
ROWS = [
    (0, 1, 4, COMPUTE, 0, 0.0, 1.0, NONE),
    (0, 1, 4, WAIT, 0, 1.0, 1.5, 3),
    (3, 2, 4, READ, 4096, 0.25, 1.5, NONE),
    (3, 1, 4, EVICT, 0, 1.75, 1.75, NONE),
    (4, 1, 4, MEMORY, 8192, 2.0, 2.0, NONE),
    (6, 1, 4, MEMORY, 64, 2.0, 2.0, NONE),
    (5, 1, 5, COMPUTE, 0, 2.5, 3.0000000004, NONE),
]
WHOLE = Recording(
    np.array(ROWS, COLUMNS), NAMES,
    (StepInfo("prefill", 7, 1, 0.0, 2.0, Step("prefill", 7, 1, 28.0, 7.0, 1, 2.5, 4096.0)),
     StepInfo("decode", 1, 1, 2.5, 3.0)),
    first_step=4, passes=(PassNote(((3, 7),), 1, 2), PassNote(((3, 1),), 1, 0)),
    requests=(RequestNote(3, 0.0, 7, 0.1, 2.0, 3.0, 0, 2, 0, "length"), RequestNote(4, 2.75, 9)),
    marks=(Mark(1.25, "lost", "stage 1 on node1 was lost"),),
    capacity={("cpu", "weight pages"): 16384, ("cpu", "KV cache"): 128}, devices=("cpu", "idle"),
    notes=("a note", "another"), began=1.7e9, basis={"model": "whatever"},
    pages={"layers.1.experts.7": PageCounts(5, 3, 2, 0.5, False, 8192, 1)}, expert_uses={"layers.1.experts": [0, 7, 9]},
)  # fmt: skip


def seen(recording: Recording) -> list[tuple[Any, ...]]:
    """Its events, with names for numbers and whole nanoseconds for times."""
    names = recording.names
    starts, ends = nanoseconds(recording.rows["start"]).tolist(), nanoseconds(recording.rows["end"]).tolist()
    return [
        (names[task], names[lane], step, kind, nbytes, start, end, "" if cause == NONE else names[cause])
        for (task, lane, step, kind, nbytes, _, _, cause), start, end in zip(
            recording.rows.tolist(), starts, ends, strict=True
        )
    ]


def there_and_back(recording: Recording, folder: Path) -> Recording:
    write_recording(recording, folder / "run.json")
    return read_recording(folder / "run.json")


def test_all_of_it_comes_back(tmp_path: Path) -> None:
    back = there_and_back(WHOLE, tmp_path)
    assert seen(back) == seen(WHOLE)
    for key in ("steps", "passes", "requests", "marks", "devices", "notes"):
        assert tuple(getattr(back, key)) == tuple(getattr(WHOLE, key)), key
    for key in ("first_step", "capacity", "source", "began", "basis", "pages"):
        assert getattr(back, key) == getattr(WHOLE, key), key
    assert {task: list(uses) for task, uses in back.expert_uses.items()} == WHOLE.expert_uses
    assert back.trace() == there_and_back(back, tmp_path).trace()
    assert back.trace().events[1].cause == "layers.1.experts.7"


NAME = st.text(max_size=12)
TIME = st.integers(0, 10**15)  # ns: eleven days
EVENT = st.tuples(
    NAME, NAME, st.integers(0, 2**31 - 1), st.sampled_from(range(len(KINDS))), st.integers(0, 2**60), TIME,
    st.integers(0, 10**13), NAME | st.none(),
)  # fmt: skip


@given(events=st.lists(EVENT, max_size=8), devices=st.lists(NAME, unique=True, max_size=3))
def test_times_are_exact_and_names_are_whatever_they_are(
    tmp_path_factory: pytest.TempPathFactory, events: list[Any], devices: list[str]
) -> None:
    numbers: dict[str, int] = {}
    rows = []
    for task, lane, step, kind, nbytes, start, took, cause in sorted(events, key=lambda event: event[2]):
        moment, place = kind in (MEMORY, EVICT), numbers.setdefault
        rows.append((
            place(task, len(numbers)), place(lane, len(numbers)), step, kind, 0 if kind == EVICT else nbytes,
            start / 1e9, (start if moment else start + took) / 1e9,
            NONE if cause is None or moment else place(cause, len(numbers)),
        ))  # fmt: skip
    recording = Recording(np.array(rows, COLUMNS), list(numbers), devices=devices)
    back = there_and_back(recording, tmp_path_factory.mktemp("chrome"))
    assert seen(back) == seen(recording)
    assert back.devices == tuple(devices)


@pytest.mark.slow
def test_a_million_events_are_read_in_seconds(tmp_path: Path) -> None:
    draw, num = np.random.default_rng(0), 1_000_000
    rows = np.zeros(num, COLUMNS)
    rows["task"], rows["lane"], rows["cause"] = draw.integers(0, 400, num), 400, NONE
    rows["step"] = np.arange(num) // 100
    rows["end"] = np.cumsum(draw.random(num)) * 1e-4
    rows["start"][1:] = rows["end"][:-1]
    ends = rows["end"][99::100].tolist()
    steps = [StepInfo("decode", 1, 1, a, b, Step.decode(1)) for a, b in pairwise([0.0, *ends])]
    names = [*(f"layers.{i}.attention" for i in range(400)), "cpu"]
    write_recording(Recording(rows, names, steps, devices=("cpu",)), tmp_path / "run.json")
    begin = time.perf_counter()
    back = read_recording(tmp_path / "run.json")
    assert time.perf_counter() - begin < 10
    assert (nanoseconds(back.rows["end"]) == nanoseconds(rows["end"])).all()


def test_what_others_see_of_it(tmp_path: Path) -> None:
    write_recording(WHOLE, tmp_path / "run.json")
    rows = json.loads((tmp_path / "run.json").read_text())["traceEvents"]
    waits = [r for r in rows if r.get("cat") == "wait"]
    assert [(r["name"], r["ts"], r["dur"], r["args"]["waits_for"]) for r in waits] == [
        ("layers.0.attention", 1e6, 5e5, "layers.1.experts.7")
    ]
    assert [(r["name"], r["args"]) for r in rows if r["ph"] == "C"] == [
        ("weight pages on cpu", {"bytes": 8192}), ("KV cache on cpu", {"bytes": 64}),
    ]  # fmt: skip
    assert [(r["name"], r["s"]) for r in rows if r["ph"] == "i"] == [("layers.1.experts.7", "t"), ("lost", "g")]
    spans = [(r["tid"], r["name"], r["ts"] / 1e6, r["dur"] / 1e6) for r in rows if r["pid"] == 2 and r["ph"] == "X"]
    assert spans == [
        (1, "queued", 0, pytest.approx(0.1)), (1, "prefill", pytest.approx(0.1), pytest.approx(1.9)),
        (1, "decode", 2, 1), (2, "queued", 2.75, pytest.approx(0.25)),
    ]  # fmt: skip
    assert next(r["args"]["bytes"] for r in rows if r.get("cat") == "read") == 4096


def test_a_file_is_not_left_half_written(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot write"):
        write_recording(WHOLE, tmp_path / "none" / "run.json")
    bad = replace(WHOLE, basis={"model": object()})
    with pytest.raises(TypeError):
        write_recording(bad, tmp_path / "run.json")
    assert list(tmp_path.iterdir()) == []


def test_other_files_are_refused_in_a_line(tmp_path: Path) -> None:
    def refused(text: str, match: str) -> None:
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(InvalidInput, match=match) as found:
            read_recording(tmp_path / "x.json")
        assert "\n" not in str(found.value)

    with pytest.raises(InvalidInput, match="cannot read"):
        read_recording(tmp_path / "none.json")
    refused("{", r"is not JSON .* --trace FILE")
    refused('{"a":' * 10**5, r"is not JSON")
    for other in ("[]", "3", '{"traceEvents": []}', '{"traceEvents": [], "otherData": {"ciuic": 1}}'):
        refused(other, r"not a recording of ours; `ciuic run MODEL --trace FILE`")
    write_recording(WHOLE, tmp_path / "run.json")
    whole = (tmp_path / "run.json").read_text()
    refused(whole.replace('"schema_version": 1', '"schema_version": 99'), "schema_version 99, this version reads 1")
    refused(whole[: len(whole) // 2], "is not JSON")


@given(where=st.integers(0, 10**6), what=st.sampled_from([None, -1, 1.5, "x", [], {}, True, 1e308]))
def test_a_damaged_file_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, where: int, what: Any) -> None:
    """One value of it, wherever that is, replaced by another."""
    folder = tmp_path_factory.mktemp("damaged")
    write_recording(WHOLE, folder / "run.json")
    data = json.loads((folder / "run.json").read_text())
    places: list[tuple[Any, Any]] = []

    def visit(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            visit(node[key])

    visit(data)
    node, key = places[where % len(places)]
    node[key] = what
    (folder / "run.json").write_text(json.dumps(data))
    with suppress(InvalidInput):
        found = read_recording(folder / "run.json")
        found.trace()
        write_recording(found, folder / "again.json")
