"""The what-if figures are those of `ciuic plan`, run with the command and the device file that came with them."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import pytest
from late_run import Client

from ciuic_runtime.dashboard.source import Source, open_file

WHATIF = "/dashboard/api/0/whatif"
CPU_GIB = 64


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"workload": {"batch": 8, "prompt_tokens": 2000}, "goal": "throughput"},
        {"format": "bfloat16", "add": ["rtx-4090"]},
        {"memory": {"cuda:0": 8 * 2**30}, "ram": {"cpu": 2 * CPU_GIB * 2**30}},
        {"bandwidth": {"cuda:0": 2e12, "cpu": 3e11}},
    ],
)
def test_the_same_figures_as_the_command(
    plan_file: Path, client: Client, ciuic: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any
) -> None:
    with client(open_file(plan_file)) as http:
        found = http.post(WHATIF, json=change).json()
    assert found["feasible"], found["error"]
    monkeypatch.chdir(tmp_path)
    Path("whatif.toml").write_text(found["devices_toml"])
    program, *arguments = shlex.split(found["command"])
    assert program == "ciuic"
    plan = ciuic(*arguments, "--json").json
    assert (plan["predicted"], plan["policy"]) == (found["predicted"], found["policy"])
    assert [c["name"] for c in plan["candidates"]] == [c["name"] for c in found["candidates"]]
    if not change:
        assert set(found["delta"].values()) == {0.0}


def test_a_run_is_planned_again_from_its_file(run: Source, client: Client) -> None:
    with client(run) as http:
        choices = http.get(WHATIF).json()
        assert choices["formats"] == ["int4"]
        assert [d["name"] for d in choices["devices"]] == ["cpu", "disk"]
        little = {"memory": {"cpu": 680_000}}
        slower, faster = (http.post(WHATIF, json={**little, "bandwidth": {"disk": rate}}).json() for rate in (1e7, 1e9))
        assert "paged from disk" in slower["policy"]
        assert slower["bound_by"] == "reads from disk"
        assert 3 * slower["predicted"]["decode_tokens_per_s"] < faster["predicted"]["decode_tokens_per_s"]
        assert slower["delta"]["decode_tokens_per_s"] < faster["delta"]["decode_tokens_per_s"] < 0
        less = http.post(WHATIF, json={"memory": {"cpu": 100_000}}).json()
        assert not less["feasible"]
        assert "needs at least" in less["error"]
        assert os.path.basename(less["command"].split()[2]) == "tiny-int4"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"colour": 1}, "unknown key colour"),
        ({"ram": {"cpu": 1.5}}, "whole number"),
        ({"ram": {"gpu": 2**30}}, "no device named gpu"),
        ({"memory": {"cpu": 2**50}}, "more than can be used"),
        ({"bandwidth": {"cpu": 0}}, "from 1e6"),
        ({"add": ["Voodoo 2"]}, "catalogue has no hardware"),
        ({"add": ["EPYC 9654"]}, "add a GPU"),
        ({"add": ["T4"] * 17}, "at most 16"),
        ({"goal": "beauty"}, "goal"),
        ({"workload": {"batch": 0}}, "batch is 0"),
        ({"format": "int3"}, "int3"),
        ([], "an object"),
    ],
)
def test_what_cannot_be_asked(plan_file: Path, client: Client, change: Any, says: str) -> None:
    with client(open_file(plan_file)) as http:
        answer = http.post(WHATIF, json=change)
    assert (answer.status_code, says in answer.json()["error"]["message"]) == (400, True), answer.text


def test_a_body_that_is_no_json(plan_file: Path, client: Client) -> None:
    with client(open_file(plan_file)) as http:
        json = {"Content-Type": "application/json"}
        assert http.post(WHATIF, content="{", headers=json).status_code == 400
        for kind in ({}, {"Content-Type": "text/plain"}):
            answer = http.post(WHATIF, content="{}", headers=kind)
            assert (answer.status_code, "send Content-Type" in answer.json()["error"]["message"]) == (415, True)
        assert http.post(WHATIF, content="{}", headers={"Content-Type": "Application/JSON; charset=utf-8"}).is_success
