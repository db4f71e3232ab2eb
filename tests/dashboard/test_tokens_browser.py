"""The Tokens view in a browser, over a real server: from a file, live, with a key, by keyboard, on a phone, saved."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chromium import CHROMIUM

from ciuic_runtime.dashboard.growing import Growing
from ciuic_runtime.dashboard.live import LiveSource
from ciuic_runtime.dashboard.serve import DashboardServer
from ciuic_runtime.dashboard.source import Source, open_file
from ciuic_runtime.devices.spec import Topology
from ciuic_runtime.engine.llm import LLM
from ciuic_runtime.engine.service import EngineService
from ciuic_runtime.schedulers.chrome import read_recording, write_recording
from ciuic_runtime.schedulers.recording import Mark, PassNote, Recording, RequestNote
from ciuic_runtime.schedulers.trace import Event, StepInfo, Trace
from ciuic_runtime.server.config import ServerConfig
from ciuic_runtime.server.serve import Server, listening

pytestmark = [pytest.mark.browser, pytest.mark.skipif(not CHROMIUM, reason="no chromium here")]
STEPS, LAYERS, SLOW = 120, 6, 73
PAGE = "layers.3.experts.17"
ROWS = """canvas => {  // the colours in the middle of each lane's row, by lane, without what is as good as transparent
    const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext('2d', {willReadFrequently: true});
    const ratio = devicePixelRatio, found = {};
    copy.drawImage(canvas, 0, 0);
    Gantt.state.lanes.forEach((name, lane) => {
        const y = Math.round((Gantt.state.y(lane) - 6) * ratio);
        const data = copy.getImageData(0, y, canvas.width, 1).data;
        found[name] = {};
        for (const kind of Colours.KINDS) {
            const [r, g, b] = Colours.rgb(kind);
            for (let i = 0; i < data.length; i += 4)
                if (data[i] === r && data[i + 1] === g && data[i + 2] === b)
                    found[name][kind] = (found[name][kind] || 0) + 1;
        }
    });
    return found;
}"""
COLOURS = """canvas => {
    const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data, seen = {};
    for (let i = 0; i < data.length; i += 4) {
        const name = `rgb(${data[i]}, ${data[i + 1]}, ${data[i + 2]})`;
        seen[name] = (seen[name] || 0) + 1;
    }
    return seen;
}"""


def made() -> Recording:
    """120 passes of 1 ms; in one of them a page came 40 ms late."""
    events: list[Event] = []
    steps: list[StepInfo] = []
    now = 0.0

    def event(task: str, lane: str, seconds: float, kind: Any = "compute", nbytes: int = 0, cause: str = "") -> None:
        nonlocal now
        phase = "decode" if step else "prefill"
        events.append(Event(task, lane, now, now + seconds, step, phase, kind, nbytes, cause))
        now += seconds

    for step in range(STEPS):
        begin = now
        for layer in range(LAYERS):
            event(f"layers.{layer}.attention", "cpu", 60e-6)
            event(f"layers.{layer}.router", "cpu", 10e-6)
            if step == SLOW and layer == 3:
                events.append(Event(PAGE, "disk -> cpu", now, now + 39.9e-3, step, "decode", "read", 5_800_000))
                event("layers.3.experts", "cpu", 40e-3, "wait", cause=PAGE)
            event(f"layers.{layer}.experts", "cpu", 80e-6)
        event("head", "cpu", 100e-6)
        steps.append(StepInfo("decode" if step else "prefill", 1 if step else 16, 1, begin, now))
        now += 50e-6
    recording = Recording.of(Trace(tuple(events), tuple(steps), "measured", ("cpu",)))
    request = RequestNote(7, 0.0, 16, 1e-5, steps[0].end, steps[-1].end, 0, STEPS, 0, "length")
    mark = Mark(steps[30].start, "lost", "node1 is lost")
    passes = tuple(PassNote(((7, info.tokens),), 1, 0) for info in steps)
    return replace(recording, requests=(request,), marks=(mark,), passes=passes)


@contextmanager
def served(files: list[Path], sources: Sequence[Source] = (), **settings: Any) -> Iterator[str]:
    """The address of `ciuic dashboard FILES`, and of what else is a source."""
    config = ServerConfig(port=0, **settings)
    with listening(config) as address:
        urls: list[str] = []
        ready = threading.Event()

        def up(url: str) -> None:
            urls.append(url)
            ready.set()

        server = DashboardServer([*(open_file(file) for file in files), *sources], config, up)
        thread = threading.Thread(target=lambda: server.run(sockets=[address]))
        thread.start()
        try:
            assert ready.wait(30), "the server does not come up"
            yield urls[0]
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive(), "the server does not end"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recordings") / "run.json"
    write_recording(made(), path)
    return path


@pytest.fixture(scope="module")
def url(file: Path) -> Iterator[str]:
    with served([file]) as address:
        yield address


def opened(browser: Any, url: str, width: int = 1400, **context: Any) -> tuple[Any, list[str]]:
    """The page, and what went wrong or was asked of other hosts."""
    page = browser.new_context(viewport={"width": width, "height": 900}, **context).new_page()
    page.set_default_timeout(30_000)
    host = url.split("/dashboard")[0]
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(f"{message.text} {message.location}"))
    here = (host, "blob:", "data:")
    page.on("request", lambda request: wrong.append(request.url) if not request.url.startswith(here) else None)
    page.goto(url)
    return page, wrong


def until(true: Callable[[], Any], seconds: float = 20) -> Any:
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.02)
    return found


def drawn(page: Any) -> None:
    """Waits for the strip's and the chart's bars."""
    until(lambda: page.evaluate("Boolean(Strip.state?.size && Gantt.state?.bars)"))
    settled(page)


def settled(page: Any) -> None:
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def click_step(page: Any, step: int) -> None:
    page.locator(".strip canvas").click(position={"x": page.evaluate(f"Strip.state.x({step})"), "y": 120})


def span(page: Any) -> float:
    return float(page.evaluate("Gantt.state.view.to - Gantt.state.view.from"))


def test_strip_and_chart_show_what_was_recorded(browser: Any, url: str) -> None:
    page, wrong = opened(browser, url)
    drawn(page)
    assert page.evaluate("Strip.state.size") == STEPS
    assert page.evaluate("Strip.state.steps") == STEPS
    assert page.evaluate("Gantt.state.lanes") == ["cpu", "disk -> cpu"]
    recorded = made().seconds
    assert page.evaluate("Gantt.state.view.from") <= 0
    assert page.evaluate("Gantt.state.view.to") >= recorded * 1e9
    strip = page.eval_on_selector(".strip canvas", COLOURS)
    disk, compute = (strip.get(page.evaluate(f"Colours.of('{cause}')"), 0) for cause in ("disk", "compute"))
    assert disk > 100, "the wait for the disk is seen"
    assert compute > 1000
    chart = page.eval_on_selector(".gantt canvas", COLOURS)
    assert chart.get(page.evaluate("Colours.of('read')"), 0) > 100
    assert "120 steps" in page.inner_text("#status")
    assert wrong == []


def test_from_opening_the_page_one_click_names_the_late_page(browser: Any, url: str) -> None:
    page, wrong = opened(browser, url)
    drawn(page)
    click_step(page, SLOW)
    page.wait_for_selector(f"#verdict:has-text('{PAGE}')")
    assert page.inner_text(".answer h2") == f"Step {SLOW}: 41.0 ms"
    assert page.locator("#verdict a").inner_text() == PAGE
    assert page.locator("#verdict a").get_attribute("href") == f"/dashboard/placement?name={PAGE}"
    late = until(lambda: page.evaluate("Gantt.state.late"))
    assert late["task"] == "layers.3.experts"
    assert PAGE in late["text"]
    assert page.locator(".parts i").count() >= 2
    assert f"step={SLOW}" in page.url
    assert wrong == []


def test_the_page_says_which_was_slowest_and_opens_it(browser: Any, url: str) -> None:
    page, wrong = opened(browser, url)
    page.click("#slowest")
    page.wait_for_selector(f"#verdict:has-text('{PAGE}')")
    page.go_back()
    page, _ = opened(browser, f"{url}/tokens?step={SLOW}")
    page.wait_for_selector(f"#verdict:has-text('{PAGE}')")
    page.click("#tasks summary")
    table = page.inner_text("#tasks table")
    assert PAGE in table
    assert "layers.5.attention" in table
    assert wrong == []


def test_all_of_it_works_by_keyboard(browser: Any, url: str) -> None:
    page, wrong = opened(browser, url)
    drawn(page)
    page.focus(".strip canvas")
    for key in ("Home", "ArrowRight", "ArrowRight", "Enter"):
        page.keyboard.press(key)
    page.wait_for_selector(".answer h2:has-text('Step 2:')")
    assert page.get_attribute(".strip canvas", "aria-valuenow") == "2"
    assert "Step 2: decode, 1 token" in str(page.get_attribute(".strip canvas", "aria-valuetext"))
    page.keyboard.press("s")
    page.wait_for_selector(f".answer h2:has-text('Step {SLOW}:')")
    page.keyboard.press("/")
    page.keyboard.type("experts.17")
    assert page.inner_text(".found") == "1 match in this step"
    page.keyboard.press("Enter")
    assert page.inner_text(".found").startswith(f"1 of 1: {PAGE}")
    page.keyboard.press("Escape")
    assert page.input_value("#find") == ""
    page.focus(".gantt canvas")
    before = span(page)
    page.keyboard.press("+")
    settled(page)
    assert span(page) < before
    page.keyboard.press("Home")
    settled(page)
    assert span(page) > made().seconds * 1e9
    page.keyboard.press("?")
    assert page.is_visible("#help-text")
    page.keyboard.press("Escape")
    page.keyboard.press("3")
    until(lambda: page.url.endswith("/placement"))
    assert page.get_attribute("#views a[aria-current=page]", "data-view") == "placement"
    page.go_back()
    page.wait_for_selector(f".answer h2:has-text('Step {SLOW}:')")
    assert wrong == []


def test_zooming_fetches_finer_tiles_and_clicking_one_opens_its_step(browser: Any, url: str) -> None:
    page, wrong = opened(browser, url)
    drawn(page)
    tiles = page.evaluate("Gantt.state.tiles.tiles")
    box = page.locator(".gantt canvas").bounding_box()
    page.mouse.move(box["x"] + 600, box["y"] + box["height"] - 60)
    page.keyboard.down("Control")
    for _ in range(12):
        page.mouse.wheel(0, -240)
        settled(page)
    page.keyboard.up("Control")
    until(lambda: page.evaluate("Gantt.state.tiles.asked === 0 && Gantt.state.tiles.wanted === 0"))
    assert span(page) < 2e6
    assert page.evaluate("Gantt.state.tiles.tiles") > tiles
    before = page.evaluate("Gantt.state.view.from")
    page.mouse.down()
    page.mouse.move(box["x"] + 500, box["y"] + box["height"] - 60, steps=4)
    page.mouse.up()
    settled(page)
    assert page.evaluate("Gantt.state.view.from") > before
    lane = box["y"] + page.evaluate("Gantt.state.y(0)")
    for x in range(150, 900, 40):
        page.mouse.move(box["x"] + x, lane)
        if page.is_visible("#tip") and "on cpu, step" in page.inner_text("#tip"):
            break
    says = page.inner_text("#tip")
    page.mouse.down()
    page.mouse.up()
    step = says.split("step ")[1].split("\n")[0]
    page.wait_for_selector(f".answer h2:has-text('Step {step}:')")
    page.click("#whole-trace")
    settled(page)
    assert span(page) > made().seconds * 1e9
    assert wrong == []


def test_requests_and_marks_are_on_the_axis(browser: Any, url: str) -> None:
    page, wrong = opened(browser, url)
    drawn(page)
    until(lambda: page.evaluate("Gantt.state.requests") == 1)
    box = page.locator(".gantt canvas").bounding_box()
    left = page.evaluate("Gantt.state.x(0.05)")
    said = set()
    for y in range(30, 110, 4):
        page.mouse.move(box["x"] + left, box["y"] + y)
        said.add(page.inner_text("#tip") if page.is_visible("#tip") else "")
    assert any(text.startswith("Request 7: 16 prompt tokens") and "first token after" in text for text in said)
    assert "1 running, 0 waiting" in said
    page.mouse.move(box["x"] + page.evaluate(f"Gantt.state.x({made().marks[0].time})"), box["y"] + 44)
    assert "node1 is lost" in page.inner_text("#tip")
    assert wrong == []


@pytest.mark.parametrize("width", [360, 768, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_every_window_in_both_colour_schemes(browser: Any, url: str, width: int, scheme: str) -> None:
    page, wrong = opened(browser, f"{url}/tokens?step={SLOW}", width, color_scheme=scheme)
    drawn(page)
    page.wait_for_selector("#verdict")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    light = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert light == (scheme == "light")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    colours = page.eval_on_selector(".gantt canvas", COLOURS)
    assert max(colours, key=colours.get) in (background, page.evaluate("Colours.css('card')"))
    assert wrong == []


def test_the_theme_can_be_chosen_and_is_kept(browser: Any, url: str) -> None:
    page, wrong = opened(browser, url)
    drawn(page)
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    page.click("#theme")
    assert page.get_attribute("#theme", "aria-label") == "Colours: dark"
    settled(page)
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    colours = page.eval_on_selector(".strip canvas", COLOURS)
    assert dark in colours
    assert light not in colours
    page.reload()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == dark
    assert wrong == []


def test_a_step_that_is_not_there_is_told_of(browser: Any, url: str) -> None:
    page, wrong = opened(browser, f"{url}/tokens?step=999")
    page.wait_for_selector(".answer h2:has-text('Step 999')")
    assert "999" in page.inner_text(".answer p")
    page.wait_for_selector(".strip canvas")
    assert all("404" in text for text in wrong), "the browser itself notes the status, nothing else went wrong"


def test_a_saved_page_opens_from_disk_and_shows_the_same(browser: Any, url: str, tmp_path: Path) -> None:
    page, wrong = opened(browser, f"{url}/tokens?step={SLOW}")
    page.wait_for_selector("#verdict a")
    with page.expect_download() as download:
        page.click("#save")
    file = tmp_path / "saved.html"
    download.value.save_as(file)
    with page.expect_download() as download:
        page.click("#trace")
    download.value.save_as(tmp_path / "trace.json")
    assert len(read_recording(tmp_path / "trace.json").steps) == STEPS
    assert file.stat().st_size <= 5_000_000
    assert wrong == []
    saved, wrong = opened(browser, file.as_uri())
    drawn(saved)
    assert "saved page" in saved.inner_text("#status")
    saved.wait_for_selector("#verdict a")
    assert saved.inner_text("#verdict") == page.inner_text("#verdict")
    assert saved.inner_text(".answer .facts") == page.inner_text(".answer .facts")
    assert saved.url.endswith(f"#/tokens?step={SLOW}")
    assert saved.evaluate("Gantt.state.late.text") == page.evaluate("Gantt.state.late.text")
    saved.click("#whole-trace")
    until(lambda: saved.evaluate("Gantt.state.bars") > 100)
    saved.click("#verdict a")
    until(lambda: saved.get_attribute("#views a[aria-current=page]", "data-view") == "placement")
    assert wrong == []


def test_a_key_is_asked_for_and_kept_in_the_tab(browser: Any, file: Path) -> None:
    with served([file], api_keys=("sesame",)) as url:
        page, _ = opened(browser, url)
        for key in ("wrong", "sesame"):
            page.wait_for_selector("#key[open]")
            page.fill("#key-text", key)
            page.press("#key-text", "Enter")
            if key == "wrong":
                page.wait_for_selector("#key-says:has-text('does not know this API key')")
        drawn(page)
        assert page.evaluate("sessionStorage.getItem('ciuic.key')") == "sesame"
        assert "sesame" not in page.url


def test_a_server_that_goes_away_is_told_of(browser: Any, file: Path) -> None:
    with served([file]) as url:
        page, _ = opened(browser, url)
        drawn(page)
    click_step(page, SLOW)
    page.wait_for_selector(".answer:has-text('The server cannot be reached')")
    page.keyboard.press("Escape")


def test_text_of_a_recording_is_shown_as_text(browser: Any, tmp_path: Path) -> None:
    evil = '<img src=x onerror="window.hit = 1">'
    recording = made()
    names = [evil if name == PAGE else name for name in recording.names]
    write_recording(replace(recording, names=names), tmp_path / "evil.json")
    with served([tmp_path / "evil.json"]) as url:
        page, wrong = opened(browser, f"{url}/tokens?step={SLOW}")
        page.wait_for_selector("#verdict a")
        page.click("#tasks summary")
        assert evil in page.inner_text("#tasks table")
        assert page.locator("#view img").count() == 0
        assert page.evaluate("window.hit") is None
        assert wrong == []


@contextmanager
def serving(llm: LLM) -> Iterator[str]:
    """The address of the dashboard that `ciuic serve` has."""
    config = ServerConfig(port=0)
    with listening(config) as address:
        service = EngineService(llm, max_waiting=config.max_waiting)
        urls: list[str] = []
        ready = threading.Event()

        def up(url: str) -> None:
            urls.append(url)
            ready.set()

        server = Server(service, config, up)
        thread = threading.Thread(target=lambda: server.run(sockets=[address]))
        thread.start()
        try:
            assert ready.wait(30), "the server does not come up"
            yield f"{urls[0]}/dashboard"
        finally:
            server.should_exit = True
            thread.join(30)


def test_steps_arrive_live(browser: Any, tiny_int4: Path, here: Topology) -> None:
    with (
        LLM(tiny_int4, devices=here, max_model_len=256, max_num_seqs=4, threads=1, serving=True) as llm,
        serving(llm) as url,
    ):
        page, wrong = opened(browser, url)
        page.wait_for_selector("#status:has-text('live')")
        page.wait_for_selector(".answer:has-text('No step is recorded yet')")
        generate(url, tiny_int4.name)
        until(lambda: page.evaluate("Strip.state.steps") >= 40)
        seen = page.evaluate("Strip.state.steps")
        generate(url, tiny_int4.name)
        until(lambda: page.evaluate("Strip.state.steps") >= seen + 40)
        assert page.evaluate("Strip.state.follow")
        until(lambda: page.evaluate("Gantt.state.requests") == 2)
        page.click("#slow button")
        page.wait_for_selector(".answer h2:has-text('Step ')")
        until(lambda: page.evaluate("Gantt.state.bars") > 0)
        asked = page.evaluate(
            "performance.getEntriesByName(location.origin + '/dashboard/api/0/steps?most=2000').length"
        )
        assert asked == 1, "new steps are added, not all of them asked for again"
        assert wrong == []


def test_lanes_that_came_after_the_page_was_opened_have_their_bars(
    browser: Any, tiny_int4: Path, with_disk: Topology
) -> None:
    """Whatever brought them first: tiles, or the answer of a step, which has them in another order."""
    settings: dict[str, Any] = {"memory": {"cpu": "1100KiB"}, "max_model_len": 128, "max_num_seqs": 2, "threads": 1}
    with LLM(tiny_int4, devices=with_disk, serving=True, **settings) as llm, serving(llm) as url:
        page, wrong = opened(browser, url)
        page.wait_for_selector("#status:has-text('live')")
        page.wait_for_selector(".answer:has-text('No step is recorded yet')")
        assert page.evaluate("Gantt.state.lanes") == []
        generate(url, tiny_int4.name)
        until(lambda: page.evaluate("Strip.state.steps") >= 40)
        page.click("#whole-trace")
        until(lambda: page.evaluate("Gantt.state.bars") > 100)
        assert set(page.evaluate("Gantt.state.lanes")) >= {"cpu", "host", "disk -> cpu", "disk -> cpu (2)"}
        bars_are_on_their_lanes(page, url)
        page.click("#views [data-view=memory]")
        page.wait_for_selector(".view-memory .figure")
        page.click("#views [data-view=tokens]")
        page.wait_for_selector("#slow button")
        page.click("#slow button")
        page.wait_for_selector(".answer h2:has-text('Step ')")
        bars_are_on_their_lanes(page, url)
        page.click("#whole-trace")
        until(lambda: page.evaluate("Gantt.state.bars") > 100)
        assert wrong == []


def bars_are_on_their_lanes(page: Any, url: str) -> None:
    """What tiles show of the fifth step, which is not the chosen one, is what that step has on each lane."""
    step = got(url, "steps/5")
    begin, end = step["start"], step["end"]
    page.evaluate(f"Gantt.current.show({begin * 1e9}, {end * 1e9})")
    wide = (end - begin) / 100  # s: about 10 px
    for lane in step["lanes"]:
        if not lane["actual"]["from"]:
            continue
        spans = zip(*(lane["actual"][key] for key in ("from", "to", "kind")), strict=True)
        kinds = {kind for start, end, kind in spans if end - start > wide} - {"wait"}  # which is hatched
        until(lambda lane=lane, kinds=kinds: kinds <= set(painted(page)[lane["name"]]))  # type: ignore[misc]
    for lane, seen in painted(page).items():
        if lane.startswith("disk"):
            assert set(seen) <= {"read"}, lane
        else:
            assert "read" not in seen, lane
        assert ("sample" in seen) <= (lane == "host"), lane


def painted(page: Any) -> dict[str, dict[str, int]]:
    """Of each lane the kinds of task that are seen there, and how many pixels of its row they take."""
    settled(page)
    found: dict[str, dict[str, int]] = page.eval_on_selector(".gantt canvas", ROWS)
    return found


class Replayed(LiveSource):
    """An engine whose passes have ended when the test says so; everything else is as it is of one at work."""

    stages, ended = (0,), False  # type: ignore[assignment]
    ray_dashboard = None  # type: ignore[assignment]
    num_requests, request_notes = Source.num_requests, Source.request_notes
    request_notes_of, whole = Source.request_notes_of, Source.whole

    def __init__(self, recording: Recording, passes: int) -> None:
        Source.__init__(self, "live", "live")
        self.passes, self._all = passes, Growing(recording)
        self.seen()

    def refresh(self, counts: bool = False) -> None:
        with self.lock:
            self.shown = self.shown.add(self._all.of_steps(self.shown.growing.next_step, self.passes))


def overlapping() -> Recording:
    """Passes of a pipeline: while the second one ended, the third one had a page read, by a second lane."""
    attention, lane, other = "layers.0.attention", "cpu", "disk -> cpu (2)"
    events = [
        Event(attention, lane, 0.0, 0.4, 0, "prefill", "compute", 0, ""),
        Event(attention, lane, 0.4, 1.0, 1, "decode", "compute", 0, ""),
        Event(PAGE, other, 0.7, 1.2, 2, "decode", "read", 5_800_000, ""),
        Event(attention, lane, 1.2, 1.4, 2, "decode", "compute", 0, ""),
        Event(attention, lane, 1.4, 1.6, 3, "decode", "compute", 0, ""),
    ]
    times = [(0.0, 0.4), (0.3, 1.0), (0.6, 1.4), (1.3, 1.6)]
    steps = [StepInfo("decode" if i else "prefill", 1, 1, start, end) for i, (start, end) in enumerate(times)]
    return Recording.of(Trace(tuple(events), tuple(steps), "measured", ("cpu",)))


def test_what_began_before_now_and_ended_later_is_drawn(browser: Any) -> None:
    source = Replayed(overlapping(), 2)
    with served([], sources=[source]) as url:
        page, wrong = opened(browser, url)
        drawn(page)
        page.evaluate("Gantt.current.show(0.4e9, 1.0e9)")
        settled(page)
        until(lambda: page.evaluate("Gantt.state.tiles.asked === 0 && Gantt.state.tiles.wanted === 0"))
        assert page.evaluate("Gantt.state.lanes") == ["cpu"]
        tiles = page.evaluate("Gantt.state.tiles.tiles")
        assert tiles > 2, "some lie in the past"
        source.passes = 3
        until(lambda: page.evaluate("Strip.state.steps") == 3)
        until(lambda: painted(page).get("disk -> cpu (2)", {}).get("read", 0) > 300)
        assert page.evaluate("Gantt.state.view.to") == 1e9, "it was looked for where it is"
        # A stream that the server ends is taken up again.
        source.ended = True  # type: ignore[misc]
        page.wait_for_selector("#status:has-text('not connected')")
        source.ended, source.passes = False, 4  # type: ignore[misc]
        until(lambda: page.evaluate("Strip.state.steps") == 4)
        page.wait_for_selector("#status:has-text('4 steps')")
        assert wrong == []


def got(url: str, path: str) -> Any:
    with urllib.request.urlopen(f"{url}/api/0/{path}", timeout=30) as answer:
        return json.loads(answer.read())


def generate(url: str, model: str) -> None:
    """40 tokens, over the API."""
    body = {"model": model, "prompt": "hello there", "max_tokens": 40, "temperature": 0, "ignore_eos": True}
    asked = urllib.request.Request(
        url.replace("/dashboard", "/v1/completions"), json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(asked, timeout=30) as answer:
        assert json.loads(answer.read())["usage"]["completion_tokens"] == 40
