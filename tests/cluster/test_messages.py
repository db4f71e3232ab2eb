"""Results are on stdout and nothing else is, whatever Ray has to say of the cluster."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

import ciuic_runtime as ciuic
from ciuic_runtime.ops.native import kernels

pytestmark = pytest.mark.skipif(kernels() is None, reason="the native kernels are not built here")

CIUIC = [sys.executable, "-c", "import sys; from ciuic_runtime.cli import main; main()"]
TOKENS, PATIENCE = 400, 60.0


def stages(of: int) -> list[psutil.Process]:
    """Processes that compute a pass just now."""
    found = psutil.Process(of).children(recursive=True)
    return [p for p in found if p.name().startswith("ray::StageWorke") and p.cmdline()[:1] == ["ray::StageWorker.run"]]


@pytest.mark.slow
def test_a_stage_is_killed_and_stdout_has_one_json_object(ray: Any, tiny_int4: Path, tmp_path: Path) -> None:
    out, err = tmp_path / "out", tmp_path / "err"
    run = f"run {tiny_int4} --prompt A --max-tokens {TOKENS} --ignore-eos --threads 1 --executor ray --stages 2 --json"
    with open(out, "w") as stdout, open(err, "w") as stderr:
        process = subprocess.Popen([*CIUIC, *run.split()], stdout=stdout, stderr=stderr)
    try:
        limit = time.monotonic() + PATIENCE
        while "ciuic: " not in err.read_text() or not (found := stages(process.pid)):
            assert process.poll() is None, err.read_text()
            assert time.monotonic() < limit, err.read_text()
        os.kill(found[0].pid, signal.SIGKILL)
        assert process.wait(PATIENCE) == 0, err.read_text()
    finally:
        process.terminate()
        process.wait(PATIENCE)
    assert "was lost" in err.read_text()
    assert "(raylet)" in err.read_text(), "Ray has something to say of it"
    printed = json.loads(out.read_text())
    with ciuic.LLM(tiny_int4, max_model_len=TOKENS + 2, threads=1) as llm:
        [expected] = llm.generate(["A"], ciuic.SamplingParams(max_tokens=TOKENS, ignore_eos=True))
    assert printed["token_ids"] == list(expected.token_ids)
