"""Who may join what: no cluster without a token, unless that is said to be fine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from raylets import free_ports

from ciuic_runtime.cluster.submit import Jobs, _asked
from ciuic_runtime.devices.errors import CiuicError, InvalidInput
from ciuic_runtime.devices.ray_session import ALLOW, asks_for_token, join

pytestmark = pytest.mark.usefixtures("ray")

CIUIC = [sys.executable, "-c", "import sys; from ciuic_runtime.cli import main; main()"]
OPEN = """
import sys
from ray.cluster_utils import Cluster
node = {"num_cpus": 1, "object_store_memory": 100 << 20, "include_dashboard": True, "dashboard_port": int(sys.argv[1])}
cluster = Cluster(initialize_head=True, head_node_args=node)
print(cluster.address, cluster.webui_url, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


def environment(home: Path, **more: str) -> dict[str, str]:
    """Of somebody who has no token."""
    return {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"HOME": str(home)} | more


@pytest.fixture
def open_cluster(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """The addresses of a cluster that asks for no token, and of its dashboard."""
    command = [sys.executable, "-c", OPEN, str(free_ports("dashboard")["dashboard"])]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env=environment(tmp_path, RAY_AUTH_MODE="disabled"),
    )  # fmt: skip
    try:
        assert process.stdout is not None
        address, dashboard = process.stdout.readline().split()
        yield address, f"http://{dashboard}"
    finally:
        process.communicate(timeout=60)


def ciuic(env: dict[str, str], *arguments: str) -> tuple[int, Any]:
    """The exit code, and what is printed as JSON."""
    done = subprocess.run([*CIUIC, *arguments, "--json"], env=env, capture_output=True, text=True, timeout=90)
    return done.returncode, json.loads(done.stdout)


def test_without_a_token_nothing_is_joined(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with pytest.raises(InvalidInput, match="would be joined without a token, so that anybody could"):
        join("127.0.0.1:1")
    with pytest.raises(InvalidInput, match="jobs would be sent without a token, so that anybody could; copy the token"):
        Jobs("127.0.0.1:1")


def test_a_cluster_that_asks_for_a_token_is_known_from_one_that_does_not(cluster: Any) -> None:
    assert asks_for_token(cluster.address)
    assert _asked(f"http://{cluster.webui_url}") == 401


def test_what_is_no_answer_is_not_taken_for_one(cluster: Any) -> None:
    nobody = f"127.0.0.1:{free_ports('nobody')['nobody']}"
    with pytest.raises(CiuicError, match="asks for a token could not be found out: UNAVAILABLE"):
        asks_for_token(nobody)
    join(cluster.address)
    _, _, port = cluster.address.rpartition(":")
    assert join(f"localhost:{port}") is join(cluster.address), "the same one by another name"
    with pytest.raises(InvalidInput, match=f"this process has joined the cluster at .*, and {nobody} was asked for"):
        join(nobody)


@pytest.mark.slow
def test_a_cluster_is_joined_with_a_token_that_it_asks_for(
    open_cluster: tuple[str, str], tiny_int4: Path, tmp_path: Path
) -> None:
    address, dashboard = open_cluster
    without = environment(tmp_path)
    knows_one = environment(tmp_path, RAY_AUTH_TOKEN="0" * 64)

    code, said = ciuic(without, "devices", "--address", address)
    assert (code, said["error"]["type"]) == (2, "InvalidInput")
    assert f"the cluster at {address} would be joined without a token" in said["error"]["message"]

    code, said = ciuic(without, "jobs", "--address", dashboard)
    assert code == 2
    assert "jobs would be sent without a token" in said["error"]["message"]

    code, said = ciuic(knows_one, "devices", "--address", address)
    assert code == 2
    assert f"the cluster at {address} asks for no token, so that anybody can use it" in said["error"]["message"]

    code, said = ciuic(knows_one, "jobs", "--address", dashboard)
    assert code == 2
    assert "takes jobs from anybody" in said["error"]["message"]

    assert ciuic(without, "jobs", "--address", dashboard, "--insecure") == (0, {"schema_version": 1, "jobs": []})
    code, said = ciuic(without, "devices", "--address", address, "--insecure", "--measure", "never")
    assert code == 0
    assert "node0/cpu" in [device["name"] for device in said["devices"]]

    code, said = ciuic(without, "replan", "--address", address, "--insecure")
    assert (code, said["error"]["type"]) == (2, "InvalidInput")
    assert "no model runs on this cluster" in said["error"]["message"], "it was joined"
    run = ["run", str(tiny_int4), "--prompt", "A", "--max-tokens", "3", "--threads", "1", "--executor", "ray"]
    code, said = ciuic(without, *run, "--address", address)
    assert code == 2
    code, said = ciuic(without, *run, "--address", address, "--insecure")
    assert code == 0, said
    assert len(said["token_ids"]) <= 3


@pytest.mark.slow
def test_a_model_is_served_from_a_cluster_without_a_token_where_that_is_said_to_be_fine(
    open_cluster: tuple[str, str], tiny_int4: Path, tmp_path: Path
) -> None:
    assert "ciuic serve: --join-insecure" in ALLOW  # its --insecure is about clients
    address, _ = open_cluster
    serve = [
        "serve", str(tiny_int4), "--port", "0", "--context", "64", "--threads", "1", "--executor", "ray",
        "--address", address,
    ]  # fmt: skip
    for env, says in [
        (environment(tmp_path), f"the cluster at {address} would be joined without a token"),
        (environment(tmp_path, RAY_AUTH_TOKEN="0" * 64), f"the cluster at {address} asks for no token"),
    ]:
        code, said = ciuic(env, *serve)
        assert code == 2
        assert said["error"]["message"].startswith(says)
        assert said["error"]["message"].endswith(ALLOW), said

    with subprocess.Popen(
        [*CIUIC, *serve, "--join-insecure", "--json"], env=environment(tmp_path),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as server:  # fmt: skip
        try:
            assert server.stdout is not None
            assert server.stderr is not None
            line = server.stdout.readline()
            assert line, server.stderr.read()
            asked = {"model": tiny_int4.name, "prompt": "A", "max_tokens": 3, "temperature": 0, "ignore_eos": True}
            answer = httpx.post(f"{json.loads(line)['url']}/v1/completions", json=asked, timeout=60)
            assert (answer.status_code, answer.json()["usage"]["completion_tokens"]) == (200, 3)
            server.send_signal(signal.SIGTERM)
            assert server.wait(30) == 0, server.stderr.read()
        finally:
            server.kill()


@pytest.mark.slow  # Ray tries again and again
def test_a_wrong_token_is_refused(cluster: Any, tmp_path: Path) -> None:
    code, said = ciuic(environment(tmp_path, RAY_AUTH_TOKEN="0" * 64), "devices", "--address", cluster.address)
    assert code == 1
    assert "could not be reached" in said["error"]["message"]
    assert "is the token its own?" in said["error"]["message"]
