"""The planner's own error: what is kept of runs, what is made of it, and what does not disturb it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from ciuic_runtime.history import Rate, Record, history_file, read_history, remember, score, scores

RECORD = Record(
    "2026-11-26T12:00:00+00:00", "a CPU, 2 threads, avx2", "tiny", "int4", "all on cpu", "1 x (8 + 4) tokens",
    "measured", (8.0, 12.0), Rate(100.0, 80.0, 90.0), Rate(10.0, 11.0),
)  # fmt: skip


@pytest.fixture(autouse=True)
def _own_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIUIC_CACHE_DIR", str(tmp_path / "cache"))


def test_records_come_back_in_their_order() -> None:
    assert read_history() == []
    later = replace(RECORD, time="2026-11-27T12:00:00+00:00", prefill=None)
    remember(RECORD)
    remember(None)
    remember(later)
    assert read_history() == [RECORD, later]


def test_damaged_lines_are_left_out_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    remember(RECORD)
    good = asdict(RECORD)
    for bad in ({"range": [1]}, {"decode": {"forecast": 1}}, {"strange": 1}, {"decode": {"forecast": 0, "actual": 1}}):
        with history_file().open("a") as file:
            file.write(json.dumps(good | bad) + "\n")
    with history_file().open("ab") as file:
        file.write(b"\xff\xfe\n[]\n")
    remember(RECORD)
    assert read_history() == [RECORD, RECORD]
    assert "6 of 8 lines" in caplog.text


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_history_that_cannot_be_written_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CIUIC_CACHE_DIR", "/proc/none")
    remember(RECORD)
    assert "was not added to the history" in caplog.text


def test_factors_are_the_same_for_too_high_and_too_low() -> None:
    assert Rate(100.0, 80.0).factor == Rate(80.0, 100.0).factor == 1.25
    assert score([]) is None
    found = score([RECORD, replace(RECORD, decode=Rate(10.0, 20.0), prefill=None)])
    assert found is not None
    assert (found.runs, found.median, found.worst) == (2, 1.25, 2.0)
    assert found.inside == 0.5


def test_recent_error_is_of_the_last_runs() -> None:
    bad, good = replace(RECORD, prefill=None, decode=Rate(30.0, 10.0)), replace(RECORD, prefill=None)
    found = score([bad] * 20 + [good] * 10)
    assert found is not None
    assert (found.median, found.recent) == (3.0, 1.1)


def test_scores_are_by_model_format_and_basis() -> None:
    found = scores([RECORD, replace(RECORD, model="other"), RECORD])
    assert {name: one.runs for name, one in found.items()} == {
        "all runs": 3, "tiny, int4, measured": 2, "other, int4, measured": 1,
    }  # fmt: skip
