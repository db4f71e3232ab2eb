"""The page of a schedule in a browser: opened from a file, drawn, searched, zoomed, on a phone and without scripts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from chromium import CHROMIUM

from ciuic_runtime.devices.toml import read_topology
from ciuic_runtime.model import Model
from ciuic_runtime.schedulers.cost import CostModel
from ciuic_runtime.schedulers.schedule import Schedule
from ciuic_runtime.schedulers.scheduler import TaskScheduler
from ciuic_runtime.schedulers.simulate import simulate
from ciuic_runtime.schedulers.trace import Event, StepInfo, Trace
from ciuic_runtime.schedulers.workload import Workload

pytestmark = [pytest.mark.browser, pytest.mark.skipif(not CHROMIUM, reason="no chromium here")]
MACHINE = Path(__file__).parent.parent / "examples" / "two_gpus.toml"
PIXELS = """canvas => {
    const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data, seen = new Set();
    for (let i = 0; i < data.length; i += 4) seen.add(`rgb(${data[i]}, ${data[i + 1]}, ${data[i + 2]})`);
    return [...seen];
}"""


@pytest.fixture(scope="module")
def planned() -> tuple[Schedule, Trace]:
    known, work = Model("deepseek-v2-lite", "int4"), Workload(64, 8)
    schedule = TaskScheduler(read_topology(MACHINE), workload=work, memory={"cuda:0": "3GiB", "cuda:1": 0}).schedule(
        known.graph
    )
    return schedule, simulate(schedule, known.graph, CostModel(schedule.topology, known.format, workload=work))


@pytest.fixture(scope="module")
def file(planned: tuple[Schedule, Trace], tmp_path_factory: pytest.TempPathFactory) -> Path:
    schedule, trace = planned
    path = tmp_path_factory.mktemp("pages") / "plan.html"
    schedule.to_html(path, trace, trace)
    return path


def opened(browser: Any, file: Path, width: int = 1400, **context: Any) -> tuple[Any, list[str]]:
    """The page, and what went wrong or was asked of the network."""
    page = browser.new_context(viewport={"width": width, "height": 900}, **context).new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text))
    page.on("request", lambda request: wrong.append(request.url) if request.url != file.as_uri() else None)
    page.goto(file.as_uri())
    page.wait_for_timeout(200)
    return page, wrong


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_opens_from_a_file_and_asks_nothing_of_the_network(
    browser: Any, file: Path, width: int, scheme: str
) -> None:
    page, wrong = opened(browser, file, width, color_scheme=scheme)
    assert wrong == []
    assert page.evaluate("document.documentElement.scrollWidth") == width, "the page does not scroll sideways"
    light = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert light == (scheme == "light")
    for canvas in page.query_selector_all("canvas"):
        assert {"rgb(0, 114, 178)", "rgb(230, 159, 0)"} <= set(canvas.evaluate(PIXELS)), "attention and experts"


def test_the_chart_is_zoomed_panned_and_says_what_is_under_the_pointer(
    browser: Any, file: Path, planned: tuple[Schedule, Trace]
) -> None:
    page, wrong = opened(browser, file)
    canvas, tip = page.locator("canvas").first, page.locator("#tip")
    canvas.scroll_into_view_if_needed()

    def picture() -> str:
        page.wait_for_timeout(100)
        return str(canvas.evaluate("canvas => canvas.toDataURL()"))

    pictures = [picture()]
    page.click("button[data-view=decode]")
    pictures.append(picture())
    for _ in range(3):
        page.click("button[data-view=in]")
    pictures.append(picture())
    box = canvas.bounding_box()
    for lane in range(2):  # one of the two computes at any time
        page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 53 + 26 * lane)
        if tip.is_visible():
            break
    task, what, when = tip.inner_text().split("\n")
    assert task in planned[0].rows or task.removesuffix(".experts") + ".router" in planned[0].rows
    assert " on cpu, step 1" in what or " on cuda:0, step 1" in what
    assert " from " in when
    page.mouse.down()
    page.mouse.move(box["x"] + 0.7 * box["width"], box["y"] + 53)
    page.mouse.up()
    pictures.append(picture())
    page.keyboard.down("Control")
    page.mouse.wheel(0, 200)
    page.keyboard.up("Control")
    pictures.append(picture())
    canvas.focus()
    for key in ("ArrowLeft", "+"):
        page.keyboard.press(key)
        pictures.append(picture())
    page.click("button[data-view=all]")
    pictures.append(picture())
    assert len(set(pictures)) == len(pictures), "each of them shows something else"
    page.mouse.move(5, 5)
    assert not tip.is_visible()
    assert wrong == []


def test_what_is_where_is_searched(browser: Any, file: Path, planned: tuple[Schedule, Trace]) -> None:
    page, wrong = opened(browser, file)
    rows = planned[0].rows

    def shown(sought: str) -> list[str]:
        page.fill("#find", sought)
        visible = page.locator("#assignments tbody tr:visible")
        return [" ".join(text.split()) for text in visible.all_inner_texts()]

    every = len(shown(""))
    found = shown("layers.3.experts.17")
    assert page.inner_text("#found") == f"1 of {every} rows"
    assert f"layers.3 {rows['layers.3.experts.17'].device} " in found[0]
    assert shown("layers.3.experts.64") == []
    assert shown("nothing") == []
    assert [text.split()[0] for text in shown("HEAD")] == ["head"]
    assert all("router" in text for text in shown("router"))
    assert len(shown("")) == every
    assert wrong == []


def test_without_scripts_there_are_all_figures(browser: Any, file: Path) -> None:
    page, wrong = opened(browser, file, java_script_enabled=False)
    assert "needs JavaScript" in page.inner_text("noscript")
    assert not page.locator("canvas").first.is_visible()
    assert not page.locator("#find").is_visible()
    for table in ("candidates", "lanes", "comparison", "assignments"):
        assert page.locator(f"#{table} tbody tr").first.is_visible()
    assert wrong == []


def test_traces_as_long_as_a_page_holds(browser: Any, planned: tuple[Schedule, Trace], tmp_path: Path) -> None:
    events = tuple(
        Event(f"layers.{i % 61}.experts", f"cuda:{i % 8}", i * 1e-6, (i + 8) * 1e-6, i // 500, "decode")
        for i in range(50_000)
    )
    steps = tuple(StepInfo("decode", 1, 1, i * 5e-4, (i + 1) * 5e-4) for i in range(100))
    trace = Trace(events, steps, "measured")
    planned[0].to_html(tmp_path / "long.html", trace, trace)
    page, wrong = opened(browser, tmp_path / "long.html")
    assert "has 20,000 of 50,000 events, of 40 steps out of 100" in page.inner_text("p.cut >> nth=0")
    page.click("button[data-view=all]")
    page.wait_for_timeout(200)
    assert "rgb(230, 159, 0)" in page.locator("canvas").first.evaluate(PIXELS)
    assert wrong == []
