"""The page of a schedule: its figures are the schedule's, it needs nothing but itself, and no text can break it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from machines import CPU_AND_GPU, DISK, device, machine, model
from pages import Page
from test_schedule import schedules

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.schedulers.assignment import Assignment, Candidate
from ciuic_runtime.schedulers.cost import CostModel
from ciuic_runtime.schedulers.graph import TaskGraph
from ciuic_runtime.schedulers.memory import capacity, memory_need
from ciuic_runtime.schedulers.placement import Placement
from ciuic_runtime.schedulers.schedule import Schedule
from ciuic_runtime.schedulers.schedule_html import schedule_html
from ciuic_runtime.schedulers.scheduler import TaskScheduler
from ciuic_runtime.schedulers.simulate import simulate
from ciuic_runtime.schedulers.trace import Trace
from ciuic_runtime.schedulers.workload import Workload

MODEL = model()
WORK = Workload(16, 6)
ATTACK = "</script><script>alert('1')</script><img src=x onerror=\"alert(2)\">&amp;"


def planned(graph: TaskGraph = MODEL, placement: Placement | None = None) -> Schedule:
    rules = placement or Placement().put("layers.1", "cuda:0").put("layers.2.experts", ["cuda:0", "cpu"], shares=[1, 1])
    return TaskScheduler(CPU_AND_GPU, workload=WORK, placement=rules).schedule(graph)


def forecast(schedule: Schedule, graph: TaskGraph = MODEL) -> Trace:
    return simulate(schedule, graph, CostModel(schedule.topology, graph.format, workload=schedule.workload))


def slower(trace: Trace, factor: float) -> Trace:
    events = (replace(e, start=e.start * factor, end=e.end * factor) for e in trace.events)
    steps = (replace(s, start=s.start * factor, end=s.end * factor) for s in trace.steps)
    return Trace(tuple(events), tuple(steps), "measured", trace.devices, ("a note of the run",))


SCHEDULE = planned()
FORECAST = forecast(SCHEDULE)
ACTUAL = slower(FORECAST, 1.25)
PAGE = Page(schedule_html(SCHEDULE, FORECAST, ACTUAL, MODEL))


def texts(elements: Iterable[object]) -> list[str]:
    return [e.text for e in elements]  # type: ignore[attr-defined]


# Figures


def test_the_header_says_what_the_schedule_is() -> None:
    header = PAGE.root.one("header")
    assert header.one("h1").text == f"{MODEL.name} in bfloat16"
    assert texts(header.all("dd")) == [SCHEDULE.policy, "latency", "1 x (16 prompt + 6 new) tokens", "estimated"]
    p = SCHEDULE.predicted
    assert p is not None
    for figure in ("decode_tokens_per_s", "prefill_tokens_per_s", "first_token_s"):
        assert float(PAGE.id(figure).attributes["value"]) == getattr(p, figure)
    assert PAGE.id("bound_by").text == p.bound_by
    assert f"{p.range[0]:,.0f} to {p.range[1]:,.0f}" in PAGE.id("forecast").text
    assert texts(header.all("p"))[1:] == [" ".join(note.split()) for note in SCHEDULE.notes]


def test_memory_adds_up_on_every_device() -> None:
    bars, needs = PAGE.bars("device"), memory_need(SCHEDULE, MODEL, WORK)
    assert list(bars) == ["cpu", "cuda:0"]
    for name, parts in bars.items():
        need, usable = needs[name], capacity(CPU_AND_GPU.device(name))
        expected = {
            "weights": need.weights,
            "KV cache": need.cache,
            "working": need.working,
            "free": usable - need.total,
        }
        assert parts == {what: nbytes for what, nbytes in expected.items() if nbytes}
        assert need.weights == SCHEDULE.weight_bytes()[name]


def test_without_the_graph_cache_and_working_memory_are_one() -> None:
    p = SCHEDULE.predicted
    assert p is not None
    for name, parts in Page(schedule_html(SCHEDULE)).bars("device").items():
        assert list(parts) == ["weights", "KV cache and working", "free"]
        assert parts["weights"] + parts["KV cache and working"] == p.memory_bytes[name]


def paged() -> Schedule:
    topology = machine(device("cpu", memory=250_000), DISK)
    schedule = TaskScheduler(topology, workload=WORK).schedule(MODEL)
    assert schedule.paging is not None
    return schedule


@pytest.mark.parametrize("graph", [None, MODEL])
def test_of_a_paged_plan_the_disk_is_a_tier(graph: TaskGraph | None) -> None:
    schedule = paged()
    assert schedule.paging is not None
    page = Page(schedule_html(schedule, forecast(schedule), graph=graph))
    bars, stored = page.bars("device"), schedule.weight_bytes()
    assert bars["disk"] == {"weights": stored["disk"], "elsewhere": stored["cpu"]}
    assert bars["cpu"]["weights"] + bars["cpu"]["pages read in"] == schedule.paging.cache_bytes
    assert sum(bars["cpu"].values()) == 250_000
    assert "guessed 2 layers ahead" in page.root.text
    assert "cpu waits" in page.bars("places")["decode"]


def test_a_device_that_is_too_small_or_not_usable_says_so() -> None:
    topology = machine(device("cpu", memory=100_000), device("cuda:0", usable=False, why_not_usable="no driver"))
    page = Page(schedule_html(replace(SCHEDULE, topology=topology)))
    rows = {row.attributes["data-device"]: row.text for row in page.root.all("div") if "data-device" in row.attributes}
    assert "too much" in rows["cpu"]
    assert rows["cuda:0"] == "cuda:0 0 B no driver"


def test_time_by_kind_is_the_forecasts_and_by_place_the_traces() -> None:
    p = SCHEDULE.predicted
    assert p is not None
    assert PAGE.bars("kinds") == {phase: p.seconds_per_token[phase] for phase in ("decode", "prefill")}
    places = PAGE.bars("places")["decode"]
    assert places.keys() == {"cpu", "cuda:0", "cpu -> cuda:0", "cuda:0 -> cpu"}
    assert sum(places.values()) == pytest.approx(FORECAST.seconds("decode") / FORECAST.tokens("decode"))


def test_bars_are_as_long_as_their_figures_say() -> None:
    bars = PAGE.root.all("div", **{"class": "bar"})
    assert len(bars) == 6
    for bar in bars:
        widths = [float(part.attributes["style"][len("width:") : -1]) for part in bar.all("span")]
        assert sum(widths) == pytest.approx(100, abs=0.01)
        assert all(part.attributes["title"] in bar.attributes["aria-label"] for part in bar.all("span"))


def test_candidates_with_their_rates_and_why_not() -> None:
    rows = PAGE.rows("candidates")
    assert texts(row.one("th") for row in rows) == [c.name for c in SCHEDULE.candidates]
    for row, c in zip(rows, SCHEDULE.candidates, strict=True):
        assert row.values == ([c.decode_tokens_per_s, c.prefill_tokens_per_s] if c.feasible else [])
        assert row.text.endswith(c.why_not or "chosen")
        assert ("chosen" in row.classes) == (not c.why_not)
        assert ("does not fit:" in row.text) == (not c.feasible)


def test_plan_against_actual() -> None:
    found = ACTUAL.against(SCHEDULE)
    rows = {row.one("th").text: row.values for row in PAGE.rows("comparison")}
    for phase, c in (("prefill", found.prefill_tokens_per_s), ("decode", found.decode_tokens_per_s)):
        assert rows[f"{phase} tokens/s"] == [c.forecast, c.actual, c.error]
    for phase, kinds in found.seconds_per_token.items():
        for kind, c in kinds.items():
            assert rows[f"{phase}: {kind}"] == [x for x in (c.forecast, c.actual, c.error) if x is not None]
    assert len(rows) == 2 + sum(map(len, found.seconds_per_token.values()))
    assert not Page(schedule_html(SCHEDULE, FORECAST)).has("comparison")


def test_what_is_where_has_every_row_once() -> None:
    rows = PAGE.rows("assignments")
    stored: dict[str, float] = {}
    found = set()
    for row in rows:
        on, home = texts(row.all("td"))[:2]
        stored[home] = stored.get(home, 0) + row.values[0]
        for name in row.attributes["data-names"].split("\n"):
            found |= {(task, on, home) for task in expanded(name)}
    assert stored == SCHEDULE.weight_bytes()
    assert found == {(r.task, r.device, r.home) for r in SCHEDULE.assignments}
    split = [row.all("td")[-1].text for row in rows if row.one("th").text == "layers.2"]
    assert sorted(tasks.rpartition("experts ")[2] for tasks in split) == ["0-3 (4)", "4-7 (4)"]


def expanded(name: str) -> set[str]:
    """layers.1.experts.0-2, 5 -> four names"""
    before, _, last = name.rpartition(".")
    if not re.fullmatch(r"[\d, -]+", last):
        return {name}
    runs = (run.split("-") for run in last.split(", "))
    return {f"{before}.{n}" for run in runs for n in range(int(run[0]), int(run[-1]) + 1)}


def test_lanes_are_busy_as_long_as_the_traces_say() -> None:
    rows = {row.one("th").text: row.values for row in PAGE.rows("lanes")}
    assert set(rows) == set(FORECAST.lanes)
    busy = sum(e.seconds for e in FORECAST.events if e.lane == "cuda:0")
    assert rows["cuda:0"] == pytest.approx([100 * busy / sum(s.end - s.start for s in FORECAST.steps)] * 2)


def test_the_charts_have_the_traces_events() -> None:
    for chart, trace, title in zip(PAGE.charts, (FORECAST, ACTUAL), ("Forecast", "Actual"), strict=True):
        assert (chart["title"], chart["source"], chart["shown"]) == (title, trace.source, len(trace.events))
        assert [lane["name"] for lane in chart["lanes"]] == list(trace.lanes)
        assert sum(len(lane["from"]) for lane in chart["lanes"]) == len(trace.events)
    captions = texts(PAGE.root.all("figcaption"))
    assert captions == ["Forecast (simulated)", "Actual (measured; a note of the run)"]
    assert not PAGE.root.all("p", **{"class": "soft cut"})


# A page that needs nothing but itself


def test_nothing_is_loaded_from_anywhere() -> None:
    text = schedule_html(SCHEDULE, FORECAST, ACTUAL, MODEL)
    assert not re.search(r"\bsrc=|\bhref=|url\(|@import|https?:|fetch\(|XMLHttp|import\(|localStorage", text)
    policy = PAGE.root.one("meta", **{"http-equiv": "Content-Security-Policy"}).attributes["content"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def test_what_is_for_people_who_see_or_work_otherwise() -> None:
    assert PAGE.root.one("html").attributes["lang"] == "en"
    assert "needs JavaScript" in PAGE.root.one("noscript").text
    ids = {e.attributes["id"] for e in PAGE.root.all("*") if "id" in e.attributes}
    sections = PAGE.root.all("section")
    assert {s.attributes["aria-labelledby"] for s in sections} <= ids
    assert len(sections) == 6
    assert all(c.attributes["aria-label"] and c.attributes["tabindex"] == "0" for c in PAGE.root.all("canvas"))
    for kind in ("prefers-color-scheme: dark", "max-width: 640px"):
        assert kind in PAGE.root.one("style").text


def test_a_plan_without_forecast_or_traces_is_a_page_too() -> None:
    bare = replace(SCHEDULE, predicted=None, candidates=(), notes=())
    page = Page(schedule_html(bare))
    assert "This schedule has no forecast." in page.root.text
    assert not any(page.has(name) for name in ("forecast", "candidates", "traces", "timeline", "comparison", "lanes"))
    assert len(page.rows("assignments")) == len(PAGE.rows("assignments"))
    nothing = Trace((), (), "measured")
    assert Page(schedule_html(bare, nothing, nothing)).charts[0]["lanes"] == []


# Text cannot break it


def test_text_of_users_stays_text() -> None:
    rows = (Assignment(f"layers.{ATTACK}", "cpu", "cpu", 5), Assignment(f"layers.1.{ATTACK}", "cpu", "cpu", 5))
    p = SCHEDULE.predicted
    assert p is not None
    schedule = replace(
        SCHEDULE, model=replace(SCHEDULE.model, name=ATTACK, format=ATTACK), notes=(ATTACK,), policy=ATTACK,
        assignments=rows, candidates=(Candidate(ATTACK, True, 1, 1, ATTACK), Candidate(ATTACK, False, 1, 1, ATTACK)),
        predicted=replace(p, bound_by=ATTACK, seconds_per_token={"decode": {ATTACK: 1.0}}),
    )  # fmt: skip
    events = tuple(replace(e, task=ATTACK, lane=ATTACK) for e in FORECAST.events)
    trace = replace(FORECAST, events=events, devices=(ATTACK,), notes=(ATTACK,))
    page = Page(schedule_html(schedule, trace, trace))
    assert len(page.root.all("script")) == 2
    assert not page.root.all("img")
    shown = " ".join(ATTACK.split())
    assert page.root.one("title").text == f"{shown}: {shown}"
    assert page.root.text.count(shown) > 15
    assert page.charts[0]["tasks"] == [ATTACK]
    assert page.rows("assignments")[0].one("th").text == f"layers.{shown}"
    assert all(e.attributes.keys().isdisjoint({"onerror", "src"}) for e in page.root.all("*"))


@settings(max_examples=100, deadline=None)
@given(schedules())
def test_any_schedule_is_a_page(schedule: Schedule) -> None:
    page = Page(schedule_html(schedule, FORECAST))
    stored: dict[str, float] = {}
    for row in page.rows("assignments"):
        home = row.all("td")[1].text
        stored[home] = stored.get(home, 0) + row.values[0]
    assert stored == pytest.approx(schedule.weight_bytes())
    assert len(page.rows("candidates")) == len(schedule.candidates) if schedule.candidates else True


# The file


def test_the_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "plan.html"
    SCHEDULE.to_html(file, FORECAST, ACTUAL, MODEL)
    assert file.read_text(encoding="utf-8") == schedule_html(SCHEDULE, FORECAST, ACTUAL, MODEL)
    before = file.read_bytes()
    with pytest.raises(InvalidInput, match="the schedule leaves"):
        SCHEDULE.to_html(file, graph=model(num_hidden_layers=7))
    assert file.read_bytes() == before
    assert [f.name for f in tmp_path.iterdir()] == ["plan.html"]
    with pytest.raises(InvalidInput, match=r"cannot write .*No such file"):
        SCHEDULE.to_html(tmp_path / "none" / "plan.html")


def test_names_that_are_no_proper_text_are_written(tmp_path: Path) -> None:
    odd = replace(SCHEDULE, model=replace(SCHEDULE.model, name="a\ud800b"))
    odd.to_html(tmp_path / "plan.html")
    assert "a?b in bfloat16" in Page((tmp_path / "plan.html").read_text(encoding="utf-8")).root.one("h1").text
