"""`ciuic dashboard` as a process, and files that it cannot show."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest


def test_it_says_where_it_is_and_ends_by_a_signal(run_file: Path, plan_file: Path) -> None:
    command = [sys.executable, "-m", "ciuic_runtime.cli", "dashboard", str(run_file), str(plan_file)]
    process = subprocess.Popen(
        [*command, "--port", "0", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout
        line = process.stdout.readline()
        assert line, process.stderr and process.stderr.read()
        ready = json.loads(line)
        assert ready["files"] == [str(run_file), str(plan_file)]
        assert httpx.get(ready["url"]).text.startswith("<!doctype html>")
        sources = httpx.get(f"{ready['url']}/api/sources").json()["sources"]
        assert [(s["name"], s["kind"]) for s in sources] == [("run.json", "trace"), ("plan.json", "schedule")]
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=20)
        assert "Traceback" not in said
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "cannot read"),
        ("", "neither a trace nor a schedule"),
        ("{}", "neither a trace nor a schedule"),
        ('{"traceEvents": []}', "not a recording of ours"),
        ('{"traceEvents": [', "not JSON"),
        ('{"assignments": []}', "is not a schedule"),
    ],
)
def test_files_that_cannot_be_shown(ciuic: Any, tmp_path: Path, text: str | None, says: str) -> None:
    file = tmp_path / "file.json"
    if text is not None:
        file.write_text(text)
    done = ciuic("dashboard", file, "--port", 0)
    assert (done.code, says in done.err, len(done.err.splitlines())) == (2, True, 1), done.err


def test_others_are_not_let_in_without_a_key(ciuic: Any, plan_file: Path) -> None:
    done = ciuic("dashboard", plan_file, "--host", "0.0.0.0", "--port", 0)
    assert (done.code, "--api-key" in done.err) == (2, True)
