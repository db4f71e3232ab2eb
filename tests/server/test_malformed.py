"""Bodies and requests that no client library would send: refused in OpenAI's shape, never a mistake of ours."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from running import Running

JSON = {"content-type": "application/json"}
DEEP = b'{"model":"tiny-chat","messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
PATHS = ["/v1/chat/completions", "/v1/completions"]
BODIES = {
    "empty": b"",
    "no object": b"[]",
    "a number": b"1",
    "null": b"null",
    "cut off": b'{"model": "tiny-chat", "prompt": "a',
    "twice": b"{}{}",
    "not UTF-8": b'{"model": "\xff\xfe"}',
    "UTF-16": '{"model": "a"}'.encode("utf-16"),
    "NaN": b'{"model": "tiny-chat", "prompt": "a", "temperature": NaN}',
    "infinite": b'{"model": "tiny-chat", "prompt": "a", "temperature": 1e999}',
    "deep": DEEP,
    "huge int": b'{"model": "tiny-chat", "prompt": "a", "seed": ' + b"9" * 10_000 + b"}",
    "large int": b'{"model": "tiny-chat", "prompt": "a", "seed": ' + b"9" * 400 + b"}",
    "large id": b'{"model": "tiny-chat", "prompt": [99999999999999999999999]}',
    "lone surrogate": b'{"model": "tiny-chat", "prompt": "\\ud800", "messages": []}',
    "name without quotes": b'{1: 2, "model": "tiny-chat"}',
    "model is a number": b'{"model": 5, "prompt": "a", "messages": []}',
    "a bool as a number": b'{"model": "tiny-chat", "prompt": "a", "messages": [], "n": true}',
    "a fraction": b'{"model": "tiny-chat", "prompt": "a", "max_tokens": 1.5}',
    "mixed ids": b'{"model": "tiny-chat", "prompt": [1, "a"]}',
    "an unknown name with escapes": b'{"model": "tiny-chat", "prompt": "a", "\\u0000\\u001b[31m": 1}',
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
def test_a_body_that_is_not_a_request_is_refused(tiny_server: Running, path: str, body: bytes) -> None:
    answer = httpx.post(tiny_server.url + path, content=body, headers=JSON)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["message"].isprintable()
    assert len(error["message"]) < 500


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded", "application/jsonx"])
def test_other_kinds_of_bodies_are_not_read(tiny_server: Running, kind: str) -> None:
    headers = {"content-type": kind} if kind else {}
    answer = httpx.post(f"{tiny_server.url}/v1/completions", content=b"{}", headers=headers)
    assert answer.status_code == 415
    assert "application/json" in answer.json()["error"]["message"]


def test_a_charset_may_be_declared(tiny_server: Running) -> None:
    body = json.dumps({"model": tiny_server.model, "prompt": "ä", "max_tokens": 1}, ensure_ascii=False).encode()
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert httpx.post(f"{tiny_server.url}/v1/completions", content=body, headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/v1/models/", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/health", 405),
        ("POST", "/v1/models", 405),
        ("GET", "/docs", 404),
        ("GET", "/chat.js/../../etc/passwd", 404),
    ],
)
def test_paths_and_methods_that_are_not_there(tiny_server: Running, method: str, path: str, status: int) -> None:
    answer = httpx.request(method, tiny_server.url + path)
    assert answer.status_code == status
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
    assert ("allow" in answer.headers) == (status == 405)


def test_a_mistake_of_ours_says_nothing_of_itself(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(model_name="tiny") as server:

        def broken(*arguments: object, **named: object) -> None:
            raise RuntimeError("the secret is 42")

        monkeypatch.setattr(server.service, "submit", broken)
        body = {"model": "tiny", "prompt": "a"}
        answer = httpx.post(f"{server.url}/v1/completions", json=body)
        assert answer.status_code == 500
        assert answer.json()["error"] == {
            "message": "the server made a mistake; its log says which", "type": "server_error", "param": None,
            "code": "internal_error",
        }  # fmt: skip
        monkeypatch.undo()
        assert httpx.post(f"{server.url}/v1/completions", json=body).status_code == 200


def test_an_error_in_a_stream_is_an_event_and_the_end(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(model_name="tiny") as server:
        runner = server.service.llm.engine.runner
        real, passes = runner.draw, []

        def fails_later(draws: Any, logits: Any) -> Any:
            passes.append(1)
            if len(passes) > 3:
                logits.fill_(float("nan"))
            return real(draws, logits)

        monkeypatch.setattr(runner, "draw", fails_later)
        body = {"model": "tiny", "prompt": "a", "stream": True, "ignore_eos": True}
        answer = httpx.post(f"{server.url}/v1/completions", json=body)
        assert answer.status_code == 200
        events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
        assert "[DONE]" not in events
        assert json.loads(events[-1])["error"]["type"] == "server_error"
        assert "NaN" not in events[-1]
        assert all(json.loads(event)["choices"] for event in events[:-1])
        first = httpx.post(f"{server.url}/v1/completions", json=body)  # fails before anything was sent
        assert first.status_code == 500
