"""The head of a cluster is lost while a model runs: what runs ends with one error before Ray would end the process, and
that goes on."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from raylets import HEALTH, NODE, ON_TWO_NODES, family, free_ports, remove_semaphores, running, wait_until

from ciuic_runtime.cluster.head import RAY_WAITS
from ciuic_runtime.cluster.submit import JOB, RESULT
from ciuic_runtime.ops.native import kernels

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(kernels() is None, reason="the native kernels are not built here"),
]

WAITS = 40  # s, that Ray waits for a head
AFTER = 50  # s, that a process goes on without one
DRIVER = f"""
import sys, time
import ray
import ciuic_runtime as ciuic
from ciuic_runtime.devices.errors import CiuicError
from ciuic_runtime.devices.manager import DeviceManager

address, model = sys.argv[1:]
hw = DeviceManager.from_ray(address)
rules = ciuic.Placement().put("*", on="node1/cpu").put("embedding", on="node0/cpu").put("layers.0", on="node0/cpu")
try:
    with ciuic.LLM(model, devices=hw, executor="ray", address=address, placement=rules, threads=1) as llm:
        print(*llm._host.runner.processes(), flush=True)
        while True:
            llm.generate([[5, 6, 7]], ciuic.SamplingParams(max_tokens=40, ignore_eos=True))
except CiuicError as error:
    print(f"{{type(error).__name__}}: {{error}}", flush=True)
    llm.trace  # what is looked at afterwards joins nothing
    llm.peak_memory_bytes()
    print(f"ended: {{llm.ended}}, joined: {{ray.is_initialized()}}", flush=True)
time.sleep({AFTER})
print("goes on")
"""
HEAD_SAYS = f"the head of the Ray cluster at {{}} has not answered for {WAITS / 2:.0f} s, so the cluster is gone; start"
NODE_SAYS = "the node of this process has left the Ray cluster at {}, and all stages ended with it; start Ray again"
GENERATE = """
model = "model"
context = 64
threads = 1
max_num_seqs = 2

[generate]
prompts = "prompts.txt"
output = "out.jsonl"
max_tokens = 30
ignore_eos = true
"""


@pytest.fixture
def mortal(ray: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A cluster of two nodes for one test."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv(RAY_WAITS, str(WAITS))
    made, pids, left = Cluster(), list[int](), set[int]()
    try:
        made.add_node(**NODE, _system_config=HEALTH, **free_ports("dashboard_agent_listen_port"))
        made.add_node(**NODE, **free_ports("dashboard_agent_listen_port"))
        made.wait_for_nodes()
        pids = [p.process.pid for node in made.list_all_nodes() for one in node.all_processes.values() for p in one]
        left = family(pids)
        yield made
    finally:
        left |= family(pids)
        made.shutdown()
        for pid in left & running():  # Ray's agents wait for the head, too
            with contextlib.suppress(psutil.NoSuchProcess):
                psutil.Process(pid).kill()
        remove_semaphores(pids)
    wait_until(lambda: not left & running(), "processes are left")


def kill(cluster: Any, *what: str) -> None:
    """Of the head's processes."""
    for name in what:
        process = cluster.head_node.all_processes[name][0].process
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("what", "says"),
    [(("gcs_server",), HEAD_SAYS), (("gcs_server", "raylet"), HEAD_SAYS), (("raylet",), NODE_SAYS)],
    ids=["gcs", "machine", "raylet"],
)
def test_a_generation_ends_with_what_happened_and_its_process_goes_on(
    mortal: Any, tiny_int4: Path, what: tuple[str, ...], says: str
) -> None:
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, mortal.address, str(tiny_int4)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert driver.stdout is not None
        stages = [int(pid) for pid in driver.stdout.readline().split()]
        assert len(stages) == 2
        kill(mortal, *what)
        out, err = driver.communicate(timeout=WAITS + AFTER + 60)
    finally:
        driver.kill()
    error, state, last = out.splitlines()
    assert error.startswith(f"ClusterLost: {says.format(mortal.address)}")
    assert (RAY_WAITS in error) == ("gcs_server" in what)
    assert (state, last) == ("ended: True, joined: False", "goes on"), err
    assert ("does not answer; waiting for" in err) == ("gcs_server" in what)
    assert driver.returncode == 0, err
    assert not [pid for pid in stages if psutil.pid_exists(pid)], "stages are left"


def test_a_job_fails_with_what_happened_and_keeps_its_results(mortal: Any, tiny_int4: Path, tmp_path: Path) -> None:
    prompts = 5000
    (tmp_path / "model").symlink_to(tiny_int4)
    (tmp_path / "prompts.txt").write_text("A\n" * prompts)
    job = {"file": str(tmp_path / "job.toml"), "text": GENERATE + ON_TWO_NODES}
    log = tmp_path / "log"
    with open(log, "wb") as file:
        driver = subprocess.Popen(
            [sys.executable, "-m", "ciuic_runtime.cluster.run_job", "--address", mortal.address],
            stdout=file, stderr=subprocess.STDOUT, env=os.environ | {JOB: json.dumps(job)},
        )  # fmt: skip
    try:
        wait_until(lambda: lines(tmp_path) or driver.poll() is not None, "no prompt is done", seconds=90)
        before = len(lines(tmp_path))
        kill(mortal, "gcs_server")
        assert driver.wait(WAITS + 60) == 1
    finally:
        driver.kill()
    said = log.read_text().splitlines()
    result = json.loads(said[-1].removeprefix(RESULT))
    assert (result["error"]["type"], result["exit_code"], result["restarts"]) == ("ClusterLost", 1, 0), said
    assert HEAD_SAYS.format(mortal.address) in result["error"]["message"]
    done = lines(tmp_path)
    assert 0 < before <= len(done) < prompts
    assert all(len(json.loads(line)["token_ids"]) == 30 for line in done)


def test_a_server_that_nobody_asks_ends_with_what_happened(mortal: Any, tiny_int4: Path) -> None:
    server = subprocess.Popen(
        [
            *(sys.executable, "-m", "ciuic_runtime.cli", "serve", str(tiny_int4), "--port", "0", "--context", "64"),
            *("--threads", "1", "--executor", "ray", "--address", mortal.address),
        ],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert server.stderr is not None
        said = list[str]()
        while not (said and "ready at" in said[-1]) and server.poll() is None:
            said.append(server.stderr.readline())
        kill(mortal, "gcs_server")
        said += server.communicate(timeout=WAITS + 60)[1].splitlines()
    finally:
        server.kill()
    assert server.returncode == 1, said
    assert any("does not answer; waiting for" in line for line in said), said
    [ended] = [line for line in said if line.startswith("ciuic: the model has ended")]
    assert HEAD_SAYS.format(mortal.address) in ended


def lines(folder: Path) -> list[str]:
    """Of the output so far, whole ones."""
    out = folder / "out.jsonl"
    return [line for line in out.read_text().splitlines(keepends=True) if line.endswith("\n")] if out.exists() else []
