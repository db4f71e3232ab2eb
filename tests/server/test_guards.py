"""Who is let in: keys, names, sizes, and the address that is listened at."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import httpx
import openai
import pytest
from running import Running

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.server.config import ServerConfig, check_bind
from ciuic_runtime.server.serve import listening

PROTECTED = ["/v1/models", "/v1/models/tiny", "/metrics", "/v1/chat/completions", "/nothing"]
OPEN = ["/health", "/", "/chat.js", "/chat.css", "/openapi.json"]


@pytest.fixture(scope="module")
def locked(tiny_chat: Any, here: Any) -> Iterator[Running]:
    from running import opened, running

    keys = ("first-key", "second-key")
    with opened(tiny_chat, here) as llm, running(llm, api_keys=keys, max_body_bytes=2000, model_name="tiny") as server:
        yield server


@pytest.mark.parametrize("path", PROTECTED)
@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer wrong", "first-key", "Basic first-key", "Bearer first-key x"]
)
def test_without_a_key_nothing_is_said(locked: Running, path: str, header: str | None) -> None:
    answer = httpx.get(locked.url + path, headers={} if header is None else {"authorization": header})
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert answer.headers["www-authenticate"] == "Bearer"
    assert "first-key" not in answer.text


def test_two_keys_are_none(locked: Running) -> None:
    headers = [("authorization", "Bearer first-key"), ("authorization", "Bearer x")]
    assert httpx.get(f"{locked.url}/v1/models", headers=headers).status_code == 401


@pytest.mark.parametrize("path", OPEN)
def test_the_page_and_the_health_need_no_key(locked: Running, path: str) -> None:
    assert httpx.get(locked.url + path).status_code == 200


@pytest.mark.parametrize("key", ["first-key", "second-key"])
def test_each_key_opens(locked: Running, key: str) -> None:
    client = openai.OpenAI(base_url=f"{locked.url}/v1", api_key=key, max_retries=0)
    done = client.completions.create(model="tiny", prompt="a", max_tokens=2, extra_body={"ignore_eos": True})
    assert done.usage
    assert done.usage.completion_tokens == 2
    assert httpx.get(f"{locked.url}/metrics", headers={"authorization": f"bearer {key}"}).status_code == 200


def test_a_wrong_key_is_what_the_client_calls_it(locked: Running) -> None:
    client = openai.OpenAI(base_url=f"{locked.url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError, match="Authorization: Bearer KEY"):
        client.models.list()


def test_a_body_that_is_too_large_is_not_read(locked: Running) -> None:
    """Whether its length is declared, or it comes in pieces."""
    headers = {"authorization": "Bearer first-key", "content-type": "application/json"}
    body = json.dumps({"model": "tiny", "prompt": "a" * 3000}).encode()

    def pieces() -> Iterator[bytes]:
        for at in range(0, len(body), 100):
            yield body[at : at + 100]

    for content in (body, pieces()):
        answer = httpx.post(f"{locked.url}/v1/completions", content=content, headers=headers)
        assert answer.status_code == 413, answer.text
        assert "2000 bytes" in answer.json()["error"]["message"]


def test_an_endless_body_is_ended(locked: Running) -> None:
    host, port = locked.url.removeprefix("http://").split(":")
    piece = b"400\r\n" + b"a" * 1024 + b"\r\n"
    with socket.create_connection((host, int(port)), timeout=20) as client:
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer first-key\r\n"
            b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n" + piece * 2
        )
        answer = client.recv(4096)
        assert b" 413 " in answer
        with suppress(OSError):  # nobody listens any more
            for _ in range(100_000):
                client.sendall(piece)
            raise AssertionError("it goes on reading")


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "127.0.0.2", "", "localhost:80:80"])
def test_on_this_machine_only_its_own_names_are_answered(tiny_server: Running, host: str) -> None:
    for path in ("/", "/v1/models", "/health"):
        answer = httpx.get(tiny_server.url + path, headers={"host": host})
        assert answer.status_code == 403
        assert answer.json()["error"]["code"] == "host_not_allowed"


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1", "127.0.0.1:1", "[::1]", "[::1]:8000"])
def test_these_are_its_names(tiny_server: Running, host: str) -> None:
    assert httpx.get(f"{tiny_server.url}/health", headers={"host": host}).status_code == 200


def test_a_server_for_other_machines_may_have_any_name(serve: Any) -> None:
    with serve(host="0.0.0.0", insecure=True) as server:
        assert httpx.get(f"{server.url}/health", headers={"host": "models.example.org"}).status_code == 200


def test_other_machines_are_let_in_with_a_key_or_when_said_so() -> None:
    for host in ("0.0.0.0", "::", "", "192.168.1.5", "example.org", "::ffff:127.0.0.1"):
        with pytest.raises(InvalidInput, match="--api-key"):
            check_bind(ServerConfig(host=host))
        check_bind(ServerConfig(host=host, api_keys=("k",)))
        check_bind(ServerConfig(host=host, insecure=True))
    for host in ("localhost", "127.0.0.1", "127.8.8.8", "::1"):
        check_bind(ServerConfig(host=host))


@pytest.mark.parametrize(
    "wrong",
    [{"port": 70000}, {"port": -1}, {"max_seconds": 0.0}, {"max_waiting": 0}, {"max_choices": 0}, {"max_body_bytes": 0}]
    + [{"api_keys": (key,)} for key in ("", "with blank", "ключ", "line\nend")],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        ServerConfig(**wrong)


def test_an_address_in_use_is_named_before_a_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InvalidInput, match=f"{port} cannot be listened at"), listening(ServerConfig(port=port)):
            raise AssertionError("unreachable")
    with (
        pytest.raises(InvalidInput, match="cannot be listened at"),
        listening(ServerConfig(host="192.0.2.1", insecure=True)),
    ):
        raise AssertionError("unreachable")
