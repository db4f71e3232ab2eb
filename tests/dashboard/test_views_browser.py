"""What if, Placement, Memory and Why this plan in a browser: of a saved run, a saved plan and a server at work. What
they show is checked against the command line and against the answers that it comes from."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from chromium import CHROMIUM
from late_run import EVIL

from ciuic_runtime.devices.units import format_bytes
from ciuic_runtime.model import Model
from ciuic_runtime.ops.native import kernels

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM, reason="no chromium here"),
    pytest.mark.skipif(kernels() is None, reason="the native kernels are not built here"),
]
MACHINE = Path(__file__).parents[2] / "examples" / "two_gpus.toml"
SCREENSHOTS = Path(__file__).parents[2] / "build" / "screenshots"
VIEWS = {  # a view, and what is there once it has drawn
    "whatif": ".whatif-top .figure", "placement": ".place-grid td", "memory": ".figure", "why": ".candidates",
}  # fmt: skip
SOURCES = ["run", "plan", "paged"]  # in the order in which the command is given them
RUN, PLAN, PAGED = range(3)
CONTEXT = 192
PIXELS = """canvas => {
    const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data, seen = {};
    for (let i = 0; i < data.length; i += 4) {
        const colour = `rgb(${data[i]}, ${data[i + 1]}, ${data[i + 2]})`;
        seen[colour] = (seen[colour] || 0) + 1;
    }
    return seen;
}"""


def ciuic(*arguments: object, cwd: Path | None = None) -> str:
    command = [sys.executable, "-m", "ciuic_runtime.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@contextmanager
def serving(*arguments: object) -> Iterator[str]:
    """The address of a command that serves, as it says it on its first line."""
    command = [sys.executable, "-m", "ciuic_runtime.cli", *map(str, arguments), "--port", "0", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        line = process.stdout.readline()
        assert line, process.stderr and process.stderr.read()
        yield json.loads(line)["url"].removesuffix("/dashboard")
    finally:
        process.terminate()
        try:
            process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def half(model: Path, rows: int, context: int) -> str:
    """A budget in which half of the pages fit."""
    graph = Model(model).graph
    return f"cpu={int(graph.working_bytes(1, rows, context) + graph.kv_bytes_per_token * context + graph.nbytes / 2)}"


@pytest.fixture(scope="module")
def dashboard(tiny_int4: Path, here_toml: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`ciuic dashboard` with a run whose pages moved, a plan of a known model, and a plan that reads from a disk."""
    folder = tmp_path_factory.mktemp("dashboard")
    files = [folder / f"{name}.json" for name in SOURCES]
    prompt = ("--prompt", "Experts", "--max-tokens", 64, "--ignore-eos")
    ciuic("run", tiny_int4, *prompt, "--devices", here_toml, "--memory", half(tiny_int4, 16, 80), "--trace", files[RUN])
    ciuic("plan", "deepseek-v2-lite", "--format", "int4", "--devices", MACHINE, "--memory", "cuda:0=4GiB,cuda:1=1GiB",
          "--save", files[PLAN])  # fmt: skip
    paged = json.loads(files[PLAN].read_text())
    for row in paged["assignments"]:
        if row["device"] == "cpu" and ".experts." in row["task"] and int(row["task"].rpartition(".")[2]) % 2:
            row["home"] = "disk"
    disk = {"name": "disk", "kind": "DISK", "memory_bytes": 1 << 40, "memory_bandwidth": 2e9, "basis": "estimated"}
    paged["devices"].append(disk)
    paged["paging"] = {"device": "cpu", "disk": "disk", "cache_bytes": 1 << 30, "policy": "auto", "lookahead": 2}
    paged["policy"] = EVIL
    files[PAGED].write_text(json.dumps(paged))
    with serving("dashboard", *files) as url:
        yield url


@pytest.fixture(scope="module")
def live(tiny_int4: Path, here_toml: Path) -> Iterator[str]:
    memory = half(tiny_int4, CONTEXT, CONTEXT)
    machine = ("--devices", here_toml, "--memory", memory, "--threads", 1, "--context", CONTEXT, "--max-num-seqs", 1)
    with serving("serve", tiny_int4, *machine, "--model-name", "tiny") as url:
        generate(url)
        yield url


@pytest.fixture
def server(request: pytest.FixtureRequest) -> str:
    """Of the saved files, or of the model at work."""
    return str(request.getfixturevalue(request.param))


def generate(url: str, tokens: int = 60) -> None:
    body = {"model": "tiny", "prompt": "Experts", "max_tokens": tokens, "ignore_eos": True}
    httpx.post(f"{url}/v1/completions", json=body, timeout=60).raise_for_status()


Open = Callable[..., Any]


@pytest.fixture
def opened(browser: Any) -> Iterator[Open]:
    """Opens a view; at the end nothing may have gone wrong in it, nor been asked of other hosts."""
    wrong: list[str] = []
    contexts = []

    def one(
        url: str, view: str, width: int = 1400, ready: str | None = None, refused: str = "-", **context: Any
    ) -> Any:
        """`refused`: what the server does not have; browsers report that by themselves."""
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, **context))
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda said: None if refused in said.location["url"] else wrong.append(said.text))
        page.on("request", lambda asked: wrong.append(asked.url) if not is_own(asked.url, url) else None)
        page.goto(f"{url}/dashboard/{view}")
        page.wait_for_selector(ready or VIEWS[view.partition("?")[0]])
        return page

    yield one
    for context in contexts:
        context.close()
    assert wrong == []


def is_own(asked: str, url: str) -> bool:
    return asked.startswith((url, "data:", "blob:"))


def got(url: str, path: str, source: int = 0) -> Any:
    return httpx.get(f"{url}/dashboard/api/{source}/{path}", timeout=60).raise_for_status().json()


def figure(page: Any, label: str) -> str:
    return str(page.locator(".figure", has=page.get_by_text(label, exact=True)).locator("b").first.inner_text())


def rate(text: str) -> float:
    number, unit = text.split()
    assert unit == "tokens/s"
    return float(number.replace(",", ""))


def until(page: Any, true: str) -> None:
    """Asked from here: the page's policy forbids to evaluate text in it again and again."""
    end = time.monotonic() + 30
    while not page.evaluate(true):
        assert time.monotonic() < end, f"still not: {true}"
        page.wait_for_timeout(20)


# All views


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1400])
@pytest.mark.parametrize("view", VIEWS)
def test_every_view_fits_the_window_and_follows_the_theme(
    opened: Open, dashboard: str, view: str, width: int, scheme: str
) -> None:
    """What it looks like is put where it can be looked at."""
    for source in (RUN, PLAN):
        page = opened(dashboard, f"{view}?source={source}", width, ready=f".view-{view} > *", color_scheme=scheme)
        page.wait_for_load_state("networkidle")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it does not scroll sideways"
        light = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert light == (scheme == "light")
        page.screenshot(path=SCREENSHOTS / f"{view}-{SOURCES[source]}-{width}-{scheme}.png", full_page=True)


def test_what_a_file_says_never_becomes_part_of_the_page(opened: Open, dashboard: str) -> None:
    page = opened(dashboard, f"why?source={PAGED}")
    assert EVIL in page.inner_text(".view-why h2 >> nth=0")
    page = opened(dashboard, f"placement?source={PAGED}&name=layers.20.experts.17", ready=".why-answer h2")
    assert EVIL in page.inner_text(".why-answer")
    assert page.evaluate("window.hit") is None


# Placement


@pytest.mark.parametrize("server", ["dashboard", "live"], indirect=True)
def test_the_grid_has_every_part_of_every_layer(opened: Open, server: str) -> None:
    found = got(server, "placement")
    page = opened(server, "placement")
    held = [f"layers.{layer}.{part}: {format_bytes(cell['bytes'])}"
            for layer, line in zip(found["layers"], found["cells"], strict=True)
            for part, cell in zip(found["parts"], line, strict=True) if cell]  # fmt: skip
    labels = page.locator(".place-grid td").evaluate_all("cells => cells.map(cell => cell.ariaLabel)")
    assert [label.partition(";")[0] for label in labels if "has none" not in label] == held
    assert len(held) > 20


def test_where_a_page_lives_is_seen_in_its_colours(opened: Open, dashboard: str) -> None:
    """A disk's grey, hatched, over the colour of the device that computes; and totals that add up."""
    found = got(dashboard, "placement", PAGED)
    page = opened(dashboard, f"placement?source={PAGED}")
    legend = page.locator(".places li").all_inner_texts()
    stored: dict[str, int] = {}
    rows = [where for line in found["cells"] for cell in line if cell for where in cell["where"]] + found["others"]
    for row in rows:
        device, home = row["device"], row["home"]
        said = f"on {device}" if device == home else f"computed on {device}, stored on {home}"
        stored[said] = stored.get(said, 0) + row["bytes"]
    assert sorted(legend) == sorted(f"{said}: {format_bytes(nbytes)}" for said, nbytes in stored.items())
    assert "computed on cpu, stored on disk" in stored
    colour = {name: page.evaluate(f"Colours.css('{name}')") for name in ("place-0", "place-1", "place-2", "place-disk")}
    seen = page.eval_on_selector(".place-experts canvas", PIXELS)
    assert all(seen.get(each, 0) > 100 for each in colour.values()), "every device and the disk are on the map"
    sample = page.locator(".places li:has-text('stored on disk') i")
    assert sample.evaluate("one => getComputedStyle(one).backgroundImage").count("gradient") == 2, "halves, and a hatch"
    assert "comes into 1 GiB of cpu's memory" in page.inner_text(".place-main")


def test_a_cell_is_reached_by_keys_and_tells_why_its_page_is_there(opened: Open, dashboard: str) -> None:
    page = opened(dashboard, f"placement?source={PLAN}")
    found = got(dashboard, "placement", PLAN)
    page.focus(".place-grid td[tabindex='0']")
    for key in ("ArrowDown", "ArrowRight"):
        page.keyboard.press(key)
    name = f"layers.{found['layers'][1]}.{found['parts'][1]}"
    assert page.inner_text(".told").startswith(f"{name}: {format_bytes(found['cells'][1][1]['bytes'])}")
    page.keyboard.press("Enter")
    page.wait_for_selector(".why-answer h2")
    assert page.inner_text(".why-answer p >> nth=0") == got(dashboard, f"explain?name={name}", PLAN)["text"]
    assert parse_qs(urlsplit(page.url).query) == {"source": [str(PLAN)], "name": [name]}
    assert page.locator(".place-grid td[tabindex='0']").count() == 1, "one stop of the tab key"


def test_an_expert_is_pointed_at_and_picked_on_the_map(opened: Open, dashboard: str) -> None:
    found = got(dashboard, "placement", PLAN)["experts"]
    page = opened(dashboard, f"placement?source={PLAN}")
    page.focus(".place-experts canvas")
    for key in ("ArrowDown", "ArrowRight", "ArrowRight"):
        page.keyboard.press(key)
    name = f"layers.{found['layers'][1]}.experts.2"
    assert page.inner_text(".told").startswith(f"{name}: on ")
    page.keyboard.press("Enter")
    until(page, f"document.querySelector('.why-answer h2')?.textContent === '{name}'")
    box = page.locator(".place-experts canvas").bounding_box()
    page.mouse.click(box["x"] + box["width"] - 3, box["y"] + box["height"] - 5)
    last = f"layers.{found['layers'][-1]}.experts.{found['num_experts'] - 1}"
    until(page, f"document.querySelector('.why-answer h2')?.textContent === '{last}'")


def test_a_name_that_is_not_there_is_told_and_another_can_be_sought(opened: Open, dashboard: str) -> None:
    page = opened(dashboard, f"placement?source={PLAN}", refused="layers.99")
    answers = {"layers.99.experts.1": ".why-answer .note", "layers.3.experts.17": ".why-answer h2"}
    for name, there in answers.items():
        page.fill("#page-name", name)
        page.press("#page-name", "Enter")
        page.wait_for_selector(there)
        assert name in page.inner_text(there)


def test_the_map_shows_what_was_counted_of_a_server_at_work(opened: Open, live: str) -> None:
    page = opened(live, "placement")
    experts = got(live, "placement")["experts"]
    assert experts["uses"] is not None
    assert sum(map(sum, experts["uses"])) > 100
    ways = page.locator("#expert-way option").evaluate_all("options => options.map(option => option.value)")
    assert ways == ["where", *(way for way in ("popularity", "uses", "hits", "resident") if experts[way])]
    pictures = set()
    for way in ways:
        page.select_option("#expert-way", way)
        page.wait_for_timeout(100)
        pictures.add(page.eval_on_selector(".place-experts canvas", "canvas => canvas.toDataURL()"))
        assert page.is_hidden(".scale") == (way == "where")
    assert len(pictures) == len(ways), "each way is another picture"
    page.focus(".place-experts canvas")
    assert f"used {experts['uses'][0][0]} time" in page.inner_text(".told") or "used once" in page.inner_text(".told")
    page.keyboard.press("Enter")
    page.wait_for_selector(".why-answer h2")
    assert "in memory now" in page.inner_text(".why-answer")


# Memory


@pytest.mark.parametrize("server", ["dashboard", "live"], indirect=True)
def test_tiers_and_events_are_charted_and_the_totals_are_those_of_the_run(opened: Open, server: str) -> None:
    found = got(server, "memory")
    page = opened(server, "memory", ready=".time-chart canvas")
    titles = page.locator(".u-title").all_inner_texts()
    assert found["tiers"]
    assert titles[: len(found["tiers"])] == [f"{one['name']}: {one['what']}" for one in found["tiers"]]
    assert titles[-3:] == ["pages read", "pages evicted", "reads that were late: a task waited"]
    assert figure(page, "read from disk") == format_bytes(found["totals"]["bytes_read"])
    assert found["totals"]["bytes_read"] == sum(found["events"]["bytes"]) > 0
    tier = page.locator(".time-chart").first
    assert format_bytes(found["tiers"][0]["capacity"]) in tier.locator(".u-legend").inner_text()
    colour = page.evaluate("Colours.css('place-1')")
    assert page.eval_on_selector(".time-chart canvas", PIXELS).get(colour, 0) > 50, "the line is drawn"


def test_waits_lead_to_their_step_and_to_their_page(opened: Open, dashboard: str) -> None:
    late = got(dashboard, "memory")["late"]
    page = opened(dashboard, "memory", ready=".time-chart canvas")
    assert late, "half of the pages fit: something is waited for"
    rows = page.locator(".waits tbody tr")
    assert rows.count() == len(late)
    first = rows.first.locator("a")
    assert first.nth(0).get_attribute("href") == f"/dashboard/placement?name={late[0]['page']}"
    assert first.nth(1).get_attribute("href") == f"/dashboard/tokens?step={late[0]['step']}"
    first.nth(0).click()
    until(page, f"document.querySelector('.why-answer h2')?.textContent === '{late[0]['page']}'")


def test_charts_zoom_together_by_mouse_and_keys(opened: Open, dashboard: str) -> None:
    page = opened(dashboard, "memory", ready=".time-chart canvas")
    before = page.locator(".time-chart canvas").evaluate_all("all => all.map(one => one.toDataURL())")
    box = page.locator(".time-chart .u-over").first.bounding_box()
    y = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] * 0.25, y)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.5, y, steps=5)
    page.mouse.up()
    page.wait_for_timeout(200)
    zoomed = page.locator(".time-chart canvas").evaluate_all("all => all.map(one => one.toDataURL())")
    assert all(a != b for a, b in zip(before, zoomed, strict=True)), "all of them"
    page.focus(".time-charts")
    page.keyboard.press("Home")
    page.wait_for_timeout(200)
    assert page.locator(".time-chart canvas").evaluate_all("all => all.map(one => one.toDataURL())") == before


def test_a_server_at_work_is_followed_but_not_pressed(opened: Open, live: str) -> None:
    page = opened(live, "memory", ready=".time-chart canvas")
    asked: list[float] = []
    page.on("request", lambda request: asked.append(1) if request.url.endswith("/memory") else None)
    text = figure(page, "read from disk")
    generate(live, 100)
    generate(live, 100)
    until(page, f"[...document.querySelectorAll('.figure')].some(one => one.innerText.startsWith('read from disk')"
                f" && !one.innerText.includes('{text}'))")  # fmt: skip
    page.wait_for_timeout(2000)
    assert figure(page, "read from disk") == format_bytes(got(live, "memory")["totals"]["bytes_read"])
    assert 0 < len(asked) <= 6


# Why this plan


@pytest.mark.parametrize(("source", "says"), [(RUN, "2.0 h before this run"), (PLAN, "2.0 h ago")])
def test_the_age_of_the_costs_counts_from_when_they_were_used(
    opened: Open, dashboard: str, source: int, says: str
) -> None:
    """Of a recording that is when it began, however old it is itself."""
    found = got(dashboard, "why", source)
    found["calibration"]["age_s"] = 7200.0  # this machine's rates are declared here, so they have no age
    page = opened(dashboard, "memory?source=" + str(source), ready=".figure")
    page.route("**/why", lambda route: route.fulfill(json=found))
    page.click("#views [data-view=why]")
    page.wait_for_selector(".view-why .figure")
    assert figure(page, "measured") == says


@pytest.mark.parametrize("server", ["dashboard", "live"], indirect=True)
def test_the_plan_is_explained_with_its_figures(opened: Open, server: str) -> None:
    found = got(server, "why")
    page = opened(server, "why")
    assert page.inner_text(".view-why h2 >> nth=0") == f"Plan: {found['policy']}"
    assert rate(figure(page, "decode")) == pytest.approx(found["predicted"]["decode_tokens_per_s"], rel=0.01)
    names = page.locator(".candidates tbody td:first-child").all_inner_texts()
    assert names == [one["name"] for one in found["candidates"]]
    assert page.locator(".candidates tr.chosen td:first-child").all_inner_texts() == [
        one["name"] for one in found["candidates"] if one["chosen"]
    ]
    assert page.get_by_text(found["binding"], exact=True).count() >= 1
    table = page.locator("[aria-label='Forecast, recosted and measured'] tbody tr")
    assert table.locator("td:first-child").all_inner_texts() == [one["label"] for one in found["figures"]]
    row = dict(
        zip(
            ("label", "forecast", "recosted", "actual", "error"),
            table.nth(1).locator("td").all_inner_texts(),
            strict=True,
        )
    )
    assert rate(row["actual"]) == pytest.approx(found["figures"][1]["actual"], rel=0.01)
    for note in found["notes"]:
        assert note in page.locator(".note").all_inner_texts()


# What if


def test_the_figures_are_those_of_ciuic_plan_with_the_command_of_the_page(
    opened: Open, dashboard: str, tmp_path: Path
) -> None:
    """Turned by keys: less memory on one GPU, a faster memory, a larger batch, and a GPU more."""
    page = opened(dashboard, f"whatif?source={PLAN}")
    for dial, key, times in (
        ("memory-cuda-0", "ArrowLeft", 9), ("bandwidth-cpu", "ArrowRight", 30), ("workload-batch", "ArrowRight", 40),
    ):  # fmt: skip
        page.focus(f"#dial-{dial}")
        for _ in range(times):
            page.keyboard.press(key)
    page.select_option("#dial-add", "RTX 3090")
    with page.expect_response(
        lambda answer: answer.request.method == "POST" and "RTX 3090" in answer.request.post_data
    ) as held:
        page.click("#dial-add-one")
    answer = held.value.json()
    until(page, "!document.querySelector('.view-whatif').hasAttribute('aria-busy')")
    change = held.value.request.post_data_json
    assert set(change) == {"memory", "bandwidth", "workload", "add"}
    assert json.loads(parse_qs(urlsplit(page.url).query)["change"][0]) == change, "it can be shared"

    (tmp_path / "whatif.toml").write_text(page.locator("#whatif-toml-text").text_content())
    words = shlex.split(page.inner_text("#whatif-command"))
    assert words[0] == "ciuic"
    planned = json.loads(ciuic(*words[1:], "--json", cwd=tmp_path))
    assert answer["predicted"] == planned["predicted"]
    assert answer["policy"] == planned["policy"]
    assert page.locator(".candidates td:first-child").all_inner_texts() == [
        one["name"] for one in planned["candidates"]
    ]
    top = {label: figure(page, label) for label in ("decode", "prefill", "first token after", "what binds")}
    assert rate(top["decode"]) == pytest.approx(planned["predicted"]["decode_tokens_per_s"], rel=0.01)
    assert rate(top["prefill"]) == pytest.approx(planned["predicted"]["prefill_tokens_per_s"], rel=0.01)
    assert top["what binds"] == planned["predicted"]["bound_by"]
    held_there: dict[str, int] = {}
    for row in planned["assignments"]:
        held_there[row["home"]] = held_there.get(row["home"], 0) + row["bytes"]
    rows = page.locator(".memory-row").evaluate_all(
        "rows => rows.map(row => [...row.children].map(one => one.textContent))"
    )
    assert {name: text.partition(" weights")[0] for name, _, text in rows} == {
        device["name"]: format_bytes(held_there.get(device["name"], 0)) for device in planned["devices"]
    }


@pytest.mark.parametrize("server", ["dashboard", "live"], indirect=True)
def test_the_present_plan_is_shown_first_and_a_turn_beside_it(opened: Open, server: str) -> None:
    can = got(server, "whatif")
    page = opened(server, "whatif")
    assert rate(figure(page, "decode")) == pytest.approx(can["base"]["predicted"]["decode_tokens_per_s"], rel=0.01)
    assert page.locator(".better, .worse").count() == 0
    page.focus("#dial-workload-prompt_tokens")
    with page.expect_response(lambda answer: answer.request.method == "POST") as held:
        for _ in range(20):
            page.keyboard.press("ArrowLeft")
    answer = held.value.json()
    assert answer["took_s"] < 1
    page.wait_for_selector(".better")
    words = page.inner_text(".figure:has-text('first token after') .better")
    arrow, number, *rest = words.split()
    assert (arrow, rest) == ("▼", ["%", "sooner"])
    assert float(number) == pytest.approx(-100 * answer["delta"]["first_token_s"], abs=0.5)
    page.click(".dial:has(#dial-workload-prompt_tokens) button")
    until(page, "!document.querySelector('.better, .worse')")
    assert "change" not in page.url


def test_what_does_not_fit_is_told_and_the_dials_stay(opened: Open, dashboard: str) -> None:
    page = opened(dashboard, f"whatif?source={PLAN}")
    for dial in ("batch", "prompt_tokens"):
        page.focus(f"#dial-workload-{dial}")
        page.keyboard.press("End")
    page.wait_for_selector("#whatif-error")
    assert "can be used" in page.inner_text("#whatif-error")
    assert figure(page, "decode") == "–"
    assert page.locator(".place-grid").count() == 0
    page.click("#whatif-reset")
    page.wait_for_selector(".place-grid")
    assert page.locator("#whatif-error").count() == 0
    assert page.input_value("#dial-workload-batch") == "0"


def test_a_change_in_the_address_is_planned_and_set_on_the_dials(opened: Open, dashboard: str) -> None:
    change = {"workload": {"batch": 8}, "add": ["RTX 4090"], "goal": "throughput"}
    page = opened(dashboard, f"whatif?source={PLAN}&change={json.dumps(change)}")
    answer = httpx.post(f"{dashboard}/dashboard/api/{PLAN}/whatif", json=change, timeout=60).json()
    assert rate(figure(page, "decode")) == pytest.approx(answer["predicted"]["decode_tokens_per_s"], rel=0.01)
    assert page.inner_text(".dial:has(#dial-workload-batch) output") == "8 requests"
    assert page.input_value("#dial-goal") == "throughput"
    assert page.locator(".added li").all_inner_texts() == ["RTX 4090\n×"]
    page.click(".added button")
    until(page, "!document.querySelector('.added li')")
    assert "RTX" not in page.url
    page = opened(dashboard, f"whatif?source={PLAN}&change=nonsense")
    assert "present plan is shown" in page.inner_text("#error")


def test_of_many_turns_the_newest_wins(opened: Open, dashboard: str) -> None:
    page = opened(dashboard, f"whatif?source={PLAN}")
    asked: list[Any] = []
    dropped: list[Any] = []
    page.on("requestfailed", lambda request: dropped.append(request.post_data_json))

    def slow(route: Any) -> None:
        asked.append(route)
        if len(asked) > 1:  # the first one is never answered
            route.continue_()

    page.route("**/whatif", lambda route: slow(route) if route.request.method == "POST" else route.continue_())
    page.select_option("#dial-goal", "throughput")
    until(page, "document.querySelector('.whatif-state').textContent === 'Planning…'")
    page.wait_for_timeout(300)
    assert len(asked) == 1
    page.select_option("#dial-format", "int8")
    until(page, "document.querySelector('#whatif-command').textContent.includes('int8')")
    assert len(asked) == 2
    assert dropped == [{"goal": "throughput"}]


# Nothing to show


def test_what_a_plan_alone_cannot_show_says_what_is_missing(opened: Open, dashboard: str) -> None:
    page = opened(dashboard, f"memory?source={PLAN}", ready=".empty")
    assert "ciuic run MODEL --trace FILE" in page.inner_text(".empty")
    assert "planned peak of cuda:0" in page.inner_text(".figures")
