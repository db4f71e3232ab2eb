"""A server at work: what happens comes as events to everybody who looks, and only while somebody does."""

from __future__ import annotations

import asyncio
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

from ciuic_runtime.dashboard import live, routes
from ciuic_runtime.dashboard.live import LiveSource
from ciuic_runtime.dashboard.routes import Dashboard
from ciuic_runtime.dashboard.source import open_file
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
                assert event["since"] == earliest(server, event["first"][0], event["last"][-1])
                walls = [b - a for a, b in zip(event["start"], event["end"], strict=True)]
                assert [sum(parts) for parts in event["seconds"]] == pytest.approx(walls, abs=1e-9)


def earliest(server: Running, first: int, last: int) -> float:
    """When the first event of these steps began, of what the engine has recorded."""
    rows = server.service.llm.recording().rows
    return float(rows["start"][(rows["step"] >= first) & (rows["step"] <= last)].min())


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


def test_pages_are_counted_for_those_views_that_tell_them(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    host, asked = server.service.llm._host, []
    count = host.page_counts
    monkeypatch.setattr(host, "page_counts", lambda: (asked.append(1), count())[1])
    generate(server, 3)
    last = get(server, "summary")["num_steps"] - 1
    for path in ("summary", "steps", f"steps/{last}", "tiles/36/0", "requests", "why"):
        get(server, path)
    assert not asked
    get(server, "memory")
    assert asked == [1]


def test_the_newest_requests_are_told_and_how_many_there_are(server: Running) -> None:
    for tokens in (2, 3, 4):
        generate(server, tokens)
    found = get(server, "requests?most=2")
    assert found["new_tokens"] == [3, 4]
    assert found["total"] == len(server.service.llm.recording().requests) > 2
    assert get(server, "requests?most=100000")["new_tokens"][-3:] == [2, 3, 4]
    assert get(server, "summary")["has"]["requests"]


def test_the_trace_of_a_server_is_all_that_it_recorded(server: Running, tmp_path: Path) -> None:
    generate(server, 5)
    answer = httpx.get(f"{server.url}/dashboard/api/0/trace", timeout=30)
    (tmp_path / "live.json").write_bytes(answer.content)
    source, whole = open_file(tmp_path / "live.json"), server.service.llm.recording()
    assert source.recording.rows["step"].tolist() == whole.rows["step"].tolist()
    assert [note.new_tokens for note in source.recording.requests] == [note.new_tokens for note in whole.requests]
    assert source.basis is not None
    assert source.basis.schedule == server.service.llm.schedule


def test_what_nobody_looks_at_any_more_is_forgotten(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "KEPT", 0.4)
    monkeypatch.setattr(routes, "KEPT", 0.4)
    source = LiveSource(server.service)

    async def act() -> None:
        dashboard = Dashboard([source])
        stream = live.Stream(source, dashboard.answer)
        assert dashboard.source("0") is source
        await dashboard.answer(source.refresh)
        number = len(source.recording.steps)
        events = stream.events()
        waiting = asyncio.ensure_future(anext(events))
        await asyncio.sleep(1.0)
        assert len(source.recording.steps) == number > 0, "somebody looks"
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await stream.close()
        await asyncio.sleep(1.2)
        assert not source.recording.steps
        assert not source.shown.timeline.lanes
        assert dashboard.source("0") is source
        await dashboard.answer(source.refresh)
        assert len(source.recording.steps) == number
        await dashboard.close()

    asyncio.run(act())


def test_who_takes_no_events_is_left_and_the_others_go_on(server: Running) -> None:
    async def act() -> None:
        stream = live.Stream(LiveSource(server.service), asyncio.to_thread)
        slow, quick = stream.events(), stream.events()
        first = [asyncio.ensure_future(anext(events)) for events in (slow, quick)]
        while len(stream._queues) < 2:
            await asyncio.sleep(0.01)
        stream._tell({"type": "requests"})
        await asyncio.gather(*first)
        for number in range(3 * live.MOST_WAITING):
            stream._tell({"type": "marks", "marks": [number]})
            assert await anext(quick) == {"type": "marks", "marks": [number]}
        assert len(stream._queues) == 1
        assert [event async for event in slow] == []
        await stream.close()

    asyncio.run(act())


def test_a_mistake_ends_the_view_of_those_who_look_and_not_that_of_the_next(
    server: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = LiveSource(server.service)

    async def act() -> None:
        stream = live.Stream(source, asyncio.to_thread)
        with monkeypatch.context() as patch:
            patch.setattr(stream, "_news", lambda: 1 / 0)
            for _ in range(2):  # a new poller each time
                assert [event async for event in stream.events()] == []
        assert "ZeroDivisionError" in caplog.text
        events = stream.events()
        waiting = asyncio.ensure_future(anext(events))
        while not stream._queues:
            await asyncio.sleep(0.01)
        await asyncio.to_thread(generate, server, 2)
        told = await asyncio.wait_for(waiting, 10)
        assert told is not None
        assert told["type"] in ("steps", "requests")
        await stream.close()

    asyncio.run(act())
