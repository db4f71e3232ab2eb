"""A server at work: what happens comes as events to everybody who looks, and only while somebody does."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from running import Running, opened, running, with_template

from ciuic_runtime.dashboard.live import LiveSource
from ciuic_runtime.devices.spec import Topology
from ciuic_runtime.schedulers.blame import step_parts


@pytest.fixture(scope="module")
def server(tiny_int4: Path, here: Topology, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    model = with_template(tiny_int4, tmp_path_factory.mktemp("chat") / "tiny-chat")
    with opened(model, here) as llm, running(llm) as found:
        yield found


def generate(server: Running, tokens: int) -> None:
    body = {"model": server.model, "prompt": "a story", "max_tokens": tokens, "ignore_eos": True}
    assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == 200


@contextmanager
def listening_to(server: Running) -> Iterator[list[dict[str, Any]]]:
    """Events as they come, by another thread; returns when the server has said that it sends."""
    found: list[dict[str, Any]] = []
    stop, begun = threading.Event(), threading.Event()

    def listen() -> None:
        with httpx.stream("GET", f"{server.url}/dashboard/api/0/live", timeout=30) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            begun.set()
            for line in answer.iter_lines():
                if stop.is_set():
                    return
                if line.startswith("data: "):
                    found.append(json.loads(line.removeprefix("data: ")))

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    assert begun.wait(10)
    time.sleep(0.3)  # until it is among those who are told
    yield found
    stop.set()
    generate(server, 1)  # one event more ends it
    thread.join(10)
    assert not thread.is_alive()


def until(what: Any, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not what() and time.monotonic() < end:
        time.sleep(0.05)
    assert what()


def get(server: Running, path: str) -> Any:
    answer = httpx.get(f"{server.url}/dashboard/api/0/{path}", timeout=30)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_everybody_is_told_of_every_step_once(server: Running) -> None:
    generate(server, 3)
    before = get(server, "summary")["num_steps"]
    with listening_to(server) as first, listening_to(server) as second:
        generate(server, 40)

        def steps(events: list[dict[str, Any]]) -> list[int]:
            mine = [e for e in events if e["type"] == "steps"]
            return [n for e in mine for a, b in zip(e["first"], e["last"], strict=True) for n in range(a, b + 1)]

        until(lambda: len(steps(first)) >= 40 and len(steps(second)) >= 40)
        for events in (first, second):
            told = steps(events)
            assert told == list(range(before, before + len(told)))
            assert {"type": "requests"} in events
            for event in (e for e in events if e["type"] == "steps"):
                walls = [b - a for a, b in zip(event["start"], event["end"], strict=True)]
                assert [sum(parts) for parts in event["seconds"]] == pytest.approx(walls, abs=1e-9)


def test_what_is_asked_for_is_what_has_come_in(server: Running) -> None:
    generate(server, 10)
    time.sleep(0.3)
    found = get(server, "summary")
    assert (found["kind"], found["has"]["plan"]) == ("live", True)
    bars = get(server, "steps?most=2000")
    assert bars["total"] == found["num_steps"]
    whole = server.service.llm.recording()
    assert np.array(bars["seconds"]) == pytest.approx(step_parts(whole))
    last = get(server, f"steps/{found['first_step'] + found['num_steps'] - 1}")
    assert last["requests"][0]["tokens"] == 1
    assert get(server, "requests")["new_tokens"][-1] == 10
    tile = get(server, "tiles/36/0")
    assert tile["lanes"]


def test_a_recording_that_began_anew_is_taken_in_anew(server: Running) -> None:
    source = LiveSource(server.service)
    generate(server, 5)
    until(lambda: (source.refresh(), len(source.recording.steps) > 0)[1])
    before, rows = source.recording.began, len(source.recording.rows)
    assert rows > 0
    server.service.llm._host.recorder.clear()
    server.service.llm.engine.journal.clear()
    generate(server, 4)
    time.sleep(0.2)
    until(lambda: (source.refresh(), source.recording.began != before and len(source.recording.steps) >= 4)[1])
    assert source.recording.first_step == 0
    assert source.shown.strip.parts == pytest.approx(step_parts(source.recording))


def test_nobody_is_served_when_nobody_looks(server: Running) -> None:
    names = {thread.name for thread in threading.enumerate()}
    generate(server, 5)
    time.sleep(0.5)
    assert {thread.name for thread in threading.enumerate()} <= names | {"ciuic-dashboard_0"}
    assert httpx.get(f"{server.url}/dashboard").status_code == 200
    assert httpx.get(f"{server.url}/dashboard/api/sources").json()["sources"] == [
        {"id": 0, "name": "live", "kind": "live"}
    ]
