"""What the page asks for, by HTTP: a real run with one late page, a saved plan, and what cannot be answered."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from late_run import DELAY, LATE, Client

from ciuic_runtime.dashboard.growing import Growing
from ciuic_runtime.dashboard.memory import memory_answer
from ciuic_runtime.dashboard.pages import ADDRESSES
from ciuic_runtime.dashboard.source import Source, open_file
from ciuic_runtime.devices.toml import read_topology
from ciuic_runtime.schedulers.late import in_words, late_task
from ciuic_runtime.schedulers.recording import EVICT, READ, WAIT

API = "/dashboard/api"


@pytest.fixture
def ask(run: Source, client: Client) -> Any:
    with client(run) as http:

        def get(path: str) -> Any:
            answer = http.get(f"{API}/0/{path}")
            assert answer.status_code == 200, answer.text
            return answer.json()

        yield get


def test_the_slowest_bar_leads_to_the_late_page(ask: Any, run: Source) -> None:
    bars = ask("steps?most=2000")
    assert bars["total"] == len(run.recording.steps) == len(bars["first"])
    disk = [parts[bars["causes"].index("disk")] for parts in bars["seconds"]]
    slowest = bars["worst"][int(np.argmax(disk))]
    step = ask(f"steps/{slowest}")
    late = step["late"]
    assert (late["task"], late["waits_for"], late["read"]["page"]) == (LATE, LATE, LATE)
    assert late["waited_s"] > DELAY / 2
    assert late["read"]["end"] - late["read"]["start"] == pytest.approx(DELAY, rel=0.1)
    assert LATE in late["text"]
    assert "waited" in late["text"]
    assert step["seconds"]["disk"] > DELAY / 2
    assert step["binds"]["resource"] == "reads from disk"
    assert step["idle"][0]["cause"] == "disk"
    assert step["faster"][0]["text"].startswith("Without waiting for pages")
    assert sum(step["seconds"].values()) == pytest.approx(step["end"] - step["start"], abs=1e-9)
    assert {r["phase"] for r in step["requests"]} == {"decode"}
    without = late_task(run.shown.growing.around(slowest), slowest, None)
    assert without is not None
    assert without.waits_for == LATE


def test_planned_bars_begin_where_the_step_began(ask: Any) -> None:
    step = ask("steps/5")
    planned = [at for lane in step["lanes"] for at in lane["planned"]["from"]]
    assert min(planned) == pytest.approx(step["start"], abs=1e-6)
    ends = [at for lane in step["lanes"] if lane["kind"] == "compute" for at in lane["planned"]["to"]]
    assert max(ends) - step["start"] == pytest.approx(step["planned"]["seconds"], rel=0.05)
    assert step["planned"]["basis"] == "estimated"
    tasks = {task for lane in step["lanes"] if lane["kind"] == "compute" for task in lane["actual"]["task"]}
    assert tasks == {task for lane in step["lanes"] if lane["kind"] == "compute" for task in lane["planned"]["task"]}
    bars = ask("steps?from=5&to=5")
    assert bars["planned"] == pytest.approx([step["planned"]["seconds"]], rel=0.05)


def test_memory_is_that_of_the_rows(ask: Any, run: Source) -> None:
    found, rows = ask("memory"), run.recording.rows
    reads, waits = rows[rows["kind"] == READ], rows[rows["kind"] == WAIT]
    assert found["totals"]["bytes_read"] == reads["nbytes"].sum() == sum(found["events"]["bytes"])
    assert sum(found["events"]["reads"]) == len(reads)
    assert sum(found["events"]["late"]) == len(waits)
    assert found["totals"]["evictions"] == (rows["kind"] == EVICT).sum() > 0
    recorded = (waits["end"] - waits["start"]).sum()  # with what was done about the page when it had come
    assert 0 < found["totals"]["waited_s"] <= recorded
    assert found["late"][0]["page"] == LATE
    assert found["late"][0]["waited_s"] == max(one["waited_s"] for one in found["late"])
    tiers = {(tier["name"], tier["what"]): tier for tier in found["tiers"]}
    pages = tiers["cpu", "weight pages"]
    assert 0 < max(pages["used"]) <= pages["capacity"]
    assert len(ask("memory?most=3")["tiers"][0]["time"]) <= 3


def test_placement_holds_every_page_once(ask: Any, run: Source) -> None:
    found = ask("placement")
    assert run.schedule is not None
    in_cells = sum(cell["bytes"] for line in found["cells"] for cell in line if cell)
    others = sum(row["bytes"] for row in found["others"])
    assert in_cells + others == sum(row.nbytes for row in run.schedule.assignments)
    experts = found["experts"]
    assert np.array(experts["device"]).shape == np.array(experts["uses"]).shape == (3, 8)
    assert sum(map(sum, experts["hits"])) <= sum(map(sum, experts["uses"]))
    one = ask("explain?name=layers.3.experts.4")
    assert one["uses"] == experts["uses"][experts["layers"].index(3)][4]
    assert ask(f"explain?name={LATE}")["waited_s"] > DELAY / 2


def test_why_has_forecast_recosted_and_measured(ask: Any) -> None:
    found = ask("why")
    decode = next(one for one in found["figures"] if one["label"] == "decode")
    assert all(decode[key] > 0 for key in ("forecast", "recosted", "actual"))
    assert decode["error"] == pytest.approx(decode["actual"] / decode["forecast"] - 1)
    assert found["bound"]["decode_tokens_per_s"] > 0
    assert found["gap"] == pytest.approx(
        found["bound"]["decode_tokens_per_s"] / found["predicted"]["decode_tokens_per_s"] - 1
    )
    assert found["calibration"]["basis"] == "estimated"
    assert ask("requests")["new_tokens"] == [12, 12]


def test_a_plan_alone(plan_file: Path, client: Client) -> None:
    with client(open_file(plan_file)) as http:
        said = http.get(f"{API}/0/summary").json()
        assert (said["kind"], said["measured"], said["has"]["steps"], said["has"]["plan"]) == (
            "schedule", "simulated", False, True,
        )  # fmt: skip
        assert sum(c["chosen"] for c in http.get(f"{API}/0/why").json()["candidates"]) == 1
        assert http.get(f"{API}/0/placement").json()["experts"]["num_experts"] == 64
        assert http.get(f"{API}/0/steps").json()["total"] == 0


def test_totals_are_of_all_that_happened_also_where_rows_are_forgotten(ask: Any, run: Source) -> None:
    whole = ask("memory")["totals"]
    half = Growing(run.recording).of_steps(len(run.recording.steps) // 2, len(run.recording.steps))
    assert 0 < len(half.rows) < len(run.recording.rows)
    assert memory_answer(Source("half", "trace", half), 10)["totals"] == whole
    rows_only = replace(run.recording, pages={}, expert_uses={})
    found = memory_answer(Source("rows", "trace", rows_only), 10)["totals"]
    assert (found["bytes_read"], found["evictions"]) == (whole["bytes_read"], whole["evictions"])
    assert (found["hits"], found["misses"], found["hit_rate"]) == (None, None, None)


def test_a_disk_twice_as_fast_is_the_one_of_the_what_if_view(run: Source, client: Client, tmp_path: Path) -> None:
    """Its figure is what the cost model makes of the step on the topology that its patch gives there."""
    assert run.basis is not None
    with client(run) as http:
        steps = [http.get(f"{API}/0/steps/{n}").json() for n in range(len(run.recording.steps))]
        twice = "With a disk twice as fast"
        number, found = next((s["step"], f) for s in steps for f in s["faster"] if f["text"].startswith(twice))
        assert found["whatif"] == {"bandwidth": {"disk": 4e9}}
        toml = http.post(f"{API}/0/whatif", json=found["whatif"]).json()["devices_toml"]
    (tmp_path / "whatif.toml").write_text(toml)
    topology = read_topology(tmp_path / "whatif.toml")
    assert (topology.device("disk").memory_bandwidth, topology.link("disk", "cpu").bandwidth) == (4e9, 4e9)
    forecaster, step = run.basis.forecaster, run.recording.steps[number].step
    assert step is not None
    again = replace(forecaster, schedule=replace(forecaster.schedule, topology=topology))
    [info] = again.recost([step]).steps
    assert f"puts this step at {in_words(info.end - info.start)} instead of" in found["text"]


def test_answers_are_never_those_of_another_run(run: Source, client: Client) -> None:
    """An address says neither file nor run, so nothing under it may be kept."""
    with client(run) as http:
        for path in ("summary", "steps", "steps/1", "tiles/36/0", "memory", "save", "trace"):
            assert http.get(f"{API}/0/{path}").headers["cache-control"] == "no-store", path


def test_the_whole_trace_can_be_had(run: Source, plan_file: Path, client: Client, tmp_path: Path) -> None:
    with client(run, open_file(plan_file)) as http:
        answer, none = http.get(f"{API}/0/trace"), http.get(f"{API}/1/trace")
    assert answer.headers["content-disposition"] == 'attachment; filename="run.json-trace.json"'
    (tmp_path / "again.json").write_bytes(answer.content)
    again = open_file(tmp_path / "again.json")
    assert again.recording.rows.tolist() == run.recording.rows.tolist()
    assert (again.recording.pages, again.recording.basis) == (run.recording.pages, run.recording.basis)
    assert again.basis is not None
    assert (none.status_code, "has no passes" in none.json()["error"]["message"]) == (409, True)


@pytest.mark.parametrize(
    ("path", "status", "says"),
    [
        ("0/steps/0000000000001x", 404, "there is no step"),
        ("0/steps/0000000000000000000", 404, "there is no step"),
        ("0/steps/%D9%A3", 404, "there is no step"),
        ("0000000001/summary", 404, "there is no source 0000000001"),
        ("%D9%A3/summary", 404, "there is no source"),
        ("0//[", 404, "there is nothing at"),
        ("0/[::1/steps", 404, "there is nothing at"),
        ("0/steps%3Fmost=0", 400, "most is 0"),
        ("0/steps/999", 404, "steps 0 to"),
        ("0/steps/x", 404, "there is no step x"),
        ("0/tiles/3/0", 404, "there is no tile"),
        ("0/tiles/x/0", 400, "whole number"),
        ("0/steps?most=0", 400, "most is 0"),
        ("0/steps?from=-1", 400, "from is"),
        ("0/explain", 400, "needs a name"),
        ("0/explain?name=layers.99.mlp", 404, "nothing named"),
        ("0/nothing", 404, "nothing at"),
        ("7/summary", 404, "there is no source 7"),
        ("0/live", 409, "not live"),
    ],
)
def test_what_cannot_be_answered_is_one_line(run: Source, client: Client, path: str, status: int, says: str) -> None:
    with client(run) as http:
        answer = http.get(f"{API}/{path}")
    assert (answer.status_code, says in answer.json()["error"]["message"]) == (status, True), answer.text


def test_a_key_opens_the_answers_and_the_page_is_open(run: Source, client: Client) -> None:
    with client(run, api_keys=("opensesame",)) as http:
        assert http.get(f"{API}/sources").status_code == 401
        assert http.get(f"{API}/0/summary").status_code == 401
        assert http.post(f"{API}/0/whatif", json={}).status_code == 401
        assert http.get(f"{API}/0/save").status_code == 401
        key = {"Authorization": "Bearer opensesame"}
        assert http.get(f"{API}/sources", headers=key).json()["sources"][0]["kind"] == "trace"
        assert b"opensesame" not in http.get(f"{API}/0/save", headers=key).content
        for path in ADDRESSES:
            page = http.get(path)
            assert page.status_code == 200
            assert "style-src 'self'" in page.headers["content-security-policy"]
    with client(run) as http:
        assert http.get(f"{API}/sources", headers={"Host": "evil.example"}).status_code == 403
