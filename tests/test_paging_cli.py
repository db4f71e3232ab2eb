"""Paging on the command line: what `run` records and reports, what `replay` says of it, plans that read from disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import ciuic_runtime as ciuic
from ciuic_runtime.engine.routing import read_routing
from ciuic_runtime.ops.native import kernels

pytestmark = pytest.mark.skipif(kernels() is None, reason="the native kernels are not built here")


@pytest.fixture(scope="module")
def small(tiny_int4: Path) -> str:
    """A budget in which half of the pages fit."""
    pages = ciuic.Model(tiny_int4).graph
    work = pages.working_bytes(1, 16, 64) + pages.kv_bytes_per_token * 64
    return f"cpu={int(work + pages.nbytes / 2)}"


def options(here_toml: Path, *more: object) -> tuple[object, ...]:
    return ("--prompt", "Experts", "--max-tokens", 24, "--ignore-eos", "--devices", here_toml, *more)


def test_a_run_from_disk_reports_what_it_read_and_gives_the_same_tokens(
    ciuic, tiny_int4: Path, small: str, here_toml: Path
) -> None:
    whole = ciuic("run", tiny_int4, *options(here_toml, "--json"))
    assert whole.code == 0
    assert whole.json["paging"] is None
    done = ciuic("run", tiny_int4, *options(here_toml, "--memory", small, "--json"))
    assert done.code == 0, done.out
    assert done.json["token_ids"] == whole.json["token_ids"]
    decode = done.json["paging"]["decode"]
    assert decode["tokens"] == 23
    assert decode["bytes_read"] > 0
    assert 0 < decode["hit_rate"] < 1
    assert set(decode["stall_s"]) == {"disk", "verify", "room"}
    assert done.json["schedule"]["paging"]["disk"] == "disk"
    text = ciuic("run", tiny_int4, *options(here_toml, "--memory", small))
    [line] = [row for row in text.err.splitlines() if row.startswith("paging: ")]
    assert "per token from disk, hit rate" in line


def test_a_recorded_run_is_replayed_and_says_which_policy_to_use(
    ciuic, tiny_int4: Path, small: str, here_toml: Path, tmp_path: Path
) -> None:
    recording = tmp_path / "routing"
    done = ciuic("run", tiny_int4, *options(here_toml, "--record-routing", recording, "--json"))
    assert done.code == 0
    found = read_routing(recording)
    assert found.tokens == len(done.json["prompt_token_ids"]) + 23
    assert found.popularity().sum(axis=1) == pytest.approx(found.ids.shape[2])
    memory = f"cpu={found.other_nbytes + 10 * found.expert_nbytes}"
    replayed = ciuic("replay", recording, "--memory", memory, "--json")
    assert replayed.code == 0
    assert replayed.json["capacity"] == 10
    rates = {s["policy"]: s["hit_rate"] for s in replayed.json["scores"]}
    assert replayed.json["chosen"] in rates
    assert replayed.json["belady"]["hit_rate"] >= max(rates.values())
    table = ciuic("replay", recording, "--memory", memory)
    assert f"use: --cache-policy {replayed.json['chosen']}" in table.out
    again = ciuic(
        "run", tiny_int4, *options(here_toml, "--routing", recording, "--cache-policy", "popularity"),
        "--memory", small, "--json",
    )  # fmt: skip
    assert again.code == 0, again.out
    assert again.json["token_ids"] == done.json["token_ids"]


def test_bad_recordings_and_options_are_one_line(ciuic, tiny_int4: Path, here_toml: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.write_bytes(b"not a recording")
    other = tmp_path / "other"
    assert ciuic("run", tiny_int4, *options(here_toml, "--record-routing", other)).code == 0
    for command in (
        ("replay", bad, "--memory", "cpu=1GiB"),
        ("replay", tmp_path / "none", "--memory", "cpu=1GiB"),
        ("replay", other, "--memory", "cpu=1KiB"),
        ("replay", other, "--memory", "cpu=1GiB,sim:0=1GiB"),
        ("run", tiny_int4, *options(here_toml, "--routing", bad)),
        ("run", tiny_int4, *options(here_toml, "--cache-policy", "best")),
        ("run", tiny_int4, *options(here_toml, "--lookahead", -1)),
        ("run", tiny_int4, *options(here_toml, "--io-threads", 0)),
        ("run", tiny_int4, *options(here_toml, "--memory", "cpu=64KiB")),
    ):
        done = ciuic(*command)
        assert done.code == 2, command
        assert len(done.err.strip().splitlines()) == 1, done.err


def test_a_plan_from_disk_is_saved_edited_and_carried_out(
    ciuic, tiny_int4: Path, small: str, here_toml: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "plan.json"
    done = ciuic(
        "plan", tiny_int4, "--devices", here_toml, "--memory", small, "--prompt-tokens", 8, "--max-tokens", 24,
        "--save", saved,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "paged from disk" in done.out
    document = json.loads(saved.read_text())
    assert document["paging"]["lookahead"] == 2
    document["paging"] |= {"policy": "lru", "lookahead": 0}
    saved.write_text(json.dumps(document))
    ran = ciuic(
        "run", tiny_int4, "--prompt", "Experts", "--max-tokens", 24, "--ignore-eos", "--schedule", saved, "--json"
    )
    assert ran.code == 0, ran.out
    assert ran.json["schedule"]["paging"]["policy"] == "lru"
    whole = ciuic("run", tiny_int4, *options(here_toml, "--json"))
    assert ran.json["token_ids"] == whole.json["token_ids"]
    del document["paging"]
    saved.write_text(json.dumps(document))
    refused = ciuic("run", tiny_int4, "--prompt", "x", "--schedule", saved)
    assert refused.code == 2
    assert "stored on disk and computed on cpu" in refused.err


def test_what_a_rule_stores_on_disk_is_read_from_there_though_everything_would_fit(
    ciuic, tiny_int4: Path, here_toml: Path, tmp_path: Path
) -> None:
    rules = tmp_path / "rules.toml"
    rules.write_text('[[put]]\npattern = "layers.*.experts.*"\non = "cpu"\nstore = "disk"\n')
    whole = ciuic("run", tiny_int4, *options(here_toml, "--json"))
    done = ciuic("run", tiny_int4, *options(here_toml, "--placement", rules, "--json"))
    assert done.code == 0, done.out
    assert {row["home"] for row in done.json["schedule"]["assignments"] if ".experts." in row["task"]} == {"disk"}
    assert done.json["token_ids"] == whole.json["token_ids"]
