"""`ciuic serve` as a process: it says when it is ready, and ends without losing what it was asked."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

LONG = {"prompt": "a long story", "max_tokens": 480, "ignore_eos": True, "stream": True}


@contextmanager
def served(*arguments: object) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    command = [sys.executable, "-m", "ciuic_runtime.cli", "serve", *map(str, arguments)]
    process = subprocess.Popen(
        [*command, "--port", "0", "--context", "512", "--threads", "1", "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout
        line = process.stdout.readline()
        assert line, process.stderr and process.stderr.read()
        yield process, json.loads(line)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def events(lines: Iterator[str]) -> Iterator[str]:
    return (line.removeprefix("data: ") for line in lines if line)


def refused(url: str, body: dict[str, Any]) -> int | None:
    """The status, or None where nobody listens."""
    try:
        return httpx.post(f"{url}/v1/completions", json=body).status_code
    except httpx.TransportError:
        return None


def test_sigterm_lets_what_runs_end_and_nothing_begin(tiny_chat: Path, here_toml: Path) -> None:
    with served(tiny_chat, "--devices", here_toml) as (process, ready):
        assert ready == {"schema_version": 1, "url": ready["url"], "model": "tiny-chat"}
        url, body = ready["url"], LONG | {"model": "tiny-chat", "logprobs": 5}
        assert httpx.get(f"{url}/health").json() == {"status": "ok"}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
            lines = events(answer.iter_lines())
            got = [next(lines)]
            process.send_signal(signal.SIGTERM)
            statuses = {refused(url, body | {"stream": False, "max_tokens": 1}) for _ in range(20)}
            assert statuses <= {200, 503, None}  # 200: it was faster than the signal
            assert statuses & {503, None}
            got += lines
        assert got[-1] == "[DONE]"
        assert json.loads(got[-2])["choices"][0]["finish_reason"] == "length"
        assert sum(len(json.loads(one)["choices"][0]["logprobs"]["tokens"]) for one in got[:-1]) == 480
        assert process.wait(20) == 0
        assert process.stderr
        said = process.stderr.read()
        assert "ready at http://127.0.0.1:" in said
        assert "Traceback" not in said


def test_a_second_ctrl_c_cancels_what_runs(tiny_chat: Path, here_toml: Path) -> None:
    """One choice at a time, so that there is always something left."""
    with served(tiny_chat, "--devices", here_toml, "--model-name", "a b/c", "--max-num-seqs", 1) as (process, ready):
        assert ready["model"] == "a b/c"
        body = LONG | {"model": "a b/c", "n": 16}
        with httpx.stream("POST", f"{ready['url']}/v1/completions", json=body, timeout=60) as answer:
            lines = events(answer.iter_lines())
            next(lines)
            process.send_signal(signal.SIGINT)
            assert process.stderr
            while "once more" not in process.stderr.readline():
                pass
            process.send_signal(signal.SIGINT)
            last = list(lines)[-1]
        assert "shut down" in json.loads(last)["error"]["message"]
        assert process.wait(20) == 130


def test_a_key_may_come_from_the_environment(ciuic: Any, tiny_chat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With it, only the address is what is wrong."""
    with socket.create_server(("0.0.0.0", 0)) as taken:
        asked = ("serve", tiny_chat, "--host", "0.0.0.0", "--port", taken.getsockname()[1])
        assert "no key is asked for" in ciuic(*asked).err
        monkeypatch.setenv("CIUIC_API_KEY", "hidden")
        assert "cannot be listened at" in ciuic(*asked).err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--host", "0.0.0.0"), "--api-key"),
        (("--max-body", "much"), "much"),
        (("--port", "99999"), "0 to 65535"),
        (("--max-seconds", "0"), "max_seconds"),
        (("--max-num-seqs", "0"), "max_num_seqs"),
    ],
)
def test_what_cannot_be_served_is_refused_at_once(ciuic: Any, tiny_chat: Path, arguments: Any, says: str) -> None:
    done = ciuic("serve", tiny_chat, *arguments)
    assert done.code == 2
    assert says in done.err
