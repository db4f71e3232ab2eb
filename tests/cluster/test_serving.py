"""A model that is served from a cluster: where it cannot go on, the server ends with the reason, and its job begins
again."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from raylets import ON_TWO_NODES, put_back, wait_until

from ciuic_runtime.cluster import host, run_job
from ciuic_runtime.cluster.job import read_job
from ciuic_runtime.cluster.run_job import Driver
from ciuic_runtime.devices.errors import CiuicError
from ciuic_runtime.engine.llm import LLM
from ciuic_runtime.ops.native import kernels
from ciuic_runtime.server.serve import serve

pytestmark = pytest.mark.skipif(kernels() is None, reason="the native kernels are not built here")

JOB = """
model = "model"
context = 64
threads = 1
restarts = 1

[serve]
port = 0
"""
ASKED = {"prompt": "A", "max_tokens": 5, "temperature": 0, "ignore_eos": True}


@pytest.mark.slow
def test_a_server_whose_model_cannot_go_on_ends_and_is_begun_again(
    cluster: Any, tiny_int4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_back(cluster, 2)
    (tmp_path / "model").symlink_to(tiny_int4)
    (tmp_path / "job.toml").write_text(JOB + ON_TWO_NODES)
    opened: list[LLM] = []
    urls: list[str] = []

    def watched(llm: LLM, config: Any, address: Any, ready: Callable[[str], None]) -> None:
        opened.append(llm)
        serve(llm, config, address, lambda url: (ready(url), urls.append(url))[0])  # type: ignore[func-returns-value]

    monkeypatch.setattr(run_job, "serve", watched)
    monkeypatch.setattr(run_job, "PAUSE", 1.0)
    monkeypatch.setattr(host, "MOST_LOSSES", 0)
    driver, ended = Driver(read_job(tmp_path / "job.toml"), cluster.address), list[Exception]()

    def drive() -> None:
        try:
            driver.run()
        except CiuicError as error:
            ended.append(error)

    thread = threading.Thread(target=drive, daemon=True)
    thread.start()

    def answer(number: int) -> httpx.Response:
        wait_until(lambda: len(urls) == number or not thread.is_alive(), "no server comes up")
        return httpx.post(f"{urls[number - 1]}/v1/completions", json=ASKED | {"model": tiny_int4.name}, timeout=60)

    def lose_a_stage() -> None:
        os.kill(opened[-1]._host.runner.processes()[1], signal.SIGKILL)  # type: ignore[attr-defined]

    said = answer(1).json()["choices"][0]["text"]
    lose_a_stage()
    failed = answer(1)
    assert failed.status_code >= 500
    again = answer(2)
    assert (driver.restarts, len(driver.lost)) == (1, 1)
    assert driver.lost[0].startswith("stage 1 on node1 was lost: ")
    assert again.json()["choices"][0]["text"] == said
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{urls[0]}/health")

    lose_a_stage()
    assert answer(2).status_code >= 500
    thread.join(60)
    assert not thread.is_alive(), "a server stays whose model has ended"
    [error] = ended
    assert str(error).startswith("stage 1 on node1 was lost: ")
