"""Clients that go away, read slowly or wait too long: what they held is free again, and others go on."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable
from signal import SIGTERM
from typing import Any

import httpx
import pytest
from running import Running

from ciuic_runtime.engine.sampling import SamplingParams
from ciuic_runtime.engine.service import Submission
from ciuic_runtime.server import exchange

LONG = {"prompt": "a long story", "max_tokens": 240, "ignore_eos": True}


def eventually(holds: Callable[[], bool], seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while not (found := holds()) and time.monotonic() < end:
        time.sleep(0.01)
    return found


def slowed(server: Running, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.01) -> None:
    """Each token takes so long, so that something can happen while a request runs."""
    runner = server.service.llm.engine.runner
    real = runner.draw  # type: ignore[attr-defined]

    def slow(draws: Any, logits: Any) -> Any:
        time.sleep(seconds * len(draws))
        return real(draws, logits)

    monkeypatch.setattr(runner, "draw", slow)


def generated(server: Running) -> int:
    return server.service.stats().generated_tokens


@pytest.mark.parametrize("n", [1, 4, 6])
def test_a_stream_that_is_left_is_cancelled(tiny_server: Running, monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    """All of its choices, those that wait for their turn too."""
    slowed(tiny_server, monkeypatch)
    before = generated(tiny_server)
    body = {**LONG, "model": tiny_server.model, "stream": True, "n": n}
    with httpx.stream("POST", f"{tiny_server.url}/v1/completions", json=body) as answer:
        next(answer.iter_lines())
    assert eventually(lambda: tiny_server.idle)
    assert generated(tiny_server) - before < n * 240 / 2


@pytest.mark.parametrize("n", [1, 6])
def test_an_answer_nobody_waits_for_is_cancelled(tiny_server: Running, monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    slowed(tiny_server, monkeypatch)
    before = generated(tiny_server)
    body = {**LONG, "model": tiny_server.model, "n": n}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{tiny_server.url}/v1/completions", json=body, timeout=0.2)
    assert eventually(lambda: tiny_server.idle)
    assert generated(tiny_server) - before < n * 240 / 2


def test_others_do_not_notice(tiny_server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {**LONG, "model": tiny_server.model, "temperature": 1, "seed": 3}
    alone = httpx.post(f"{tiny_server.url}/v1/completions", json=body).json()["choices"]
    answers: list[Any] = []
    stays = threading.Thread(
        target=lambda: answers.append(httpx.post(f"{tiny_server.url}/v1/completions", json=body, timeout=60).json())
    )
    stays.start()
    for _ in range(5):
        with httpx.stream("POST", f"{tiny_server.url}/v1/completions", json=body | {"stream": True}) as leaves:
            next(leaves.iter_lines())
    stays.join()
    assert answers[0]["choices"] == alone


def test_a_client_that_does_not_read_is_left(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it does not read fills the system's buffers, and no more: it is left, not piled up for."""
    monkeypatch.setattr(exchange, "STALL_SECONDS", 0.3)
    with serve(model_name="tiny", llm={"max_num_seqs": 8}) as server:
        slowed(server, monkeypatch, 0.002)
        listener = server.server.servers[0].sockets[0]
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # inherited by what it accepts
        host, port = listener.getsockname()
        body = json.dumps({**LONG, "model": "tiny", "stream": True, "n": 8, "logprobs": 20}).encode()
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect((host, port))
            head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
            client.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
            assert eventually(lambda: server.service.stats().generated_tokens > 0)
            assert eventually(lambda: server.idle)
            client.settimeout(20)
            got = b""
            while piece := client.recv(65536):
                got += piece
        assert b"data: " in got
        assert b"[DONE]" not in got
        assert len(got) < 300_000


def test_a_full_queue_says_when_to_come_back(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(model_name="tiny", max_waiting=2, llm={"max_num_seqs": 1}) as server:
        slowed(server, monkeypatch)
        body = {**LONG, "model": "tiny", "max_tokens": 60}
        url = f"{server.url}/v1/completions"
        with httpx.stream("POST", url, json=body | {"stream": True}) as first:
            lines = first.iter_lines()  # kept, since it ends the stream when it goes
            next(lines)
            waiting = threading.Thread(target=lambda: httpx.post(url, json=body | {"n": 2}, timeout=60))
            waiting.start()
            assert eventually(lambda: server.service.stats().waiting == 2)
            refused = httpx.post(url, json=body)
            assert refused.status_code == 429
            assert refused.json()["error"]["code"] == "queue_full"
            assert refused.headers["retry-after"] == "1"
            partly = httpx.post(url, json=body | {"n": 2})
            assert partly.status_code == 429
        waiting.join()
        assert eventually(lambda: server.idle)
        assert httpx.post(url, json=body | {"max_tokens": 2}).status_code == 200


def test_a_request_ends_as_it_is_when_its_time_is_over(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(model_name="tiny", max_seconds=0.5) as server:
        slowed(server, monkeypatch)
        body = {**LONG, "model": "tiny", "n": 6}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()
        assert [choice["finish_reason"] for choice in answer["choices"]] == ["length"] * 6
        assert 0 < answer["usage"]["completion_tokens"] < 6 * 240 / 2
        events = httpx.post(f"{server.url}/v1/completions", json=body | {"stream": True}, timeout=60).text
        assert events.endswith("data: [DONE]\n\n")
        assert eventually(lambda: server.idle)


def test_a_request_whose_turn_does_not_come_is_refused(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(model_name="tiny", max_seconds=0.2, llm={"max_num_seqs": 1}) as server:
        slowed(server, monkeypatch)

        async def occupy() -> Submission:
            return server.service.submit(list(b"a"), SamplingParams(240, ignore_eos=True))

        first = asyncio.run_coroutine_threadsafe(occupy(), server.server.loop).result()
        assert eventually(lambda: server.service.stats().running == 1)
        for stream in (False, True):
            body = {**LONG, "model": "tiny", "stream": stream}
            answer = httpx.post(f"{server.url}/v1/completions", json=body)
            assert answer.status_code == 429, answer.text
            assert answer.json()["error"]["code"] == "time_limit"
            assert "retry-after" in answer.headers
        server.server.loop.call_soon_threadsafe(first.cancel)
        assert eventually(lambda: server.idle)


def test_while_it_ends_a_server_says_so(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what it was asked before, waiting or running, it finishes."""
    with serve(model_name="tiny", llm={"max_num_seqs": 1}) as server:
        slowed(server, monkeypatch)
        body = {**LONG, "model": "tiny", "max_tokens": 40, "n": 2, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.server.handle_exit(SIGTERM)
            assert eventually(lambda: httpx.get(f"{server.url}/health").status_code == 503)
            refused = httpx.post(f"{server.url}/v1/completions", json=body)
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "shutting_down"
            got = [line for line in lines if line]
        assert got[-1] == "data: [DONE]"
        assert sum('"finish_reason":"length"' in line for line in got) == 2
