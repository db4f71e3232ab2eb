"""A cluster in the dashboard: its stages have lanes and hops, and the loss of one and the recovery are
marked on the axis while a request goes on."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chromium import CHROMIUM

import ciuic_runtime as ciuic
from ciuic_runtime.devices.spec import Topology
from ciuic_runtime.ops.native import kernels

sys.path.append(str(Path(__file__).parents[1] / "server"))

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM, reason="no chromium here"),
    pytest.mark.skipif(kernels() is None, reason="the native kernels are not built here"),
]
PICTURES = Path("build/screenshots")


def until(true: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def test_a_loss_and_the_recovery_are_marked(ray: Any, browser: Any, tiny_int4: Path, here: Topology) -> None:
    from running import running

    settings: dict[str, Any] = {"max_model_len": 512, "max_num_seqs": 2, "threads": 1, "serving": True}
    with (
        ciuic.LLM(tiny_int4, devices=here, executor="ray", stages=2, **settings) as llm,
        running(llm) as server,
    ):
        page = browser.new_context(viewport={"width": 1400, "height": 900}).new_page()
        wrong: list[str] = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text))
        page.goto(f"{server.url}/dashboard")
        found: list[Any] = []

        def ask() -> None:
            create, more = server.client.completions.create, {"ignore_eos": True}
            found.append(create(model=server.model, prompt=[5, 250, 17], max_tokens=500, extra_body=more))

        thread = threading.Thread(target=ask)
        thread.start()
        until(lambda: int(page.evaluate("Strip.state ? Strip.state.size : 0")) > 20, "no steps came")
        os.kill(llm._host.runner.processes()[1], signal.SIGKILL)  # type: ignore[attr-defined]
        thread.join(60)
        [answer] = found
        assert answer.usage.completion_tokens == 500

        def summary() -> Any:
            with urllib.request.urlopen(f"{server.url}/dashboard/api/0/summary") as came:
                return json.load(came)

        until(lambda: len(summary()["marks"]) == 2, "marks are missing")
        until(lambda: "stage1" in page.inner_text("#status"), "stages are not named")
        lanes = {lane["name"]: lane["kind"] for lane in summary()["lanes"]}
        assert lanes["stage0/cpu"] == lanes["stage1/cpu"] == "compute"
        assert lanes["stage0/cpu -> stage1/cpu"] == "network"
        page.click("#whole-trace")
        until(lambda: int(page.evaluate("Gantt.state.bars")) > 50, "no bars are drawn")
        texts = page.evaluate("Gantt.state.marks.map((mark) => mark.kind)")
        assert texts == ["lost", "recovered"]  # the same plan goes on: its node is still there
        PICTURES.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=PICTURES / "tokens-cluster-1400-light.png")
        assert wrong == []
