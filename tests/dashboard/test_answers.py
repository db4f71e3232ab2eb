"""What the page asks for, by HTTP: a real run with one late page, a saved plan, and what cannot be answered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import DELAY, LATE, Client

from ciuic_runtime.dashboard.pages import ADDRESSES
from ciuic_runtime.dashboard.source import Source, open_file
from ciuic_runtime.schedulers.late import late_task
from ciuic_runtime.schedulers.recording import READ, WAIT

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
    assert found["totals"]["waited_s"] == pytest.approx((waits["end"] - waits["start"]).sum())
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


@pytest.mark.parametrize(
    ("path", "status", "says"),
    [
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
