"""Two nodes in network namespaces of their own, with a slow cable between them: the tokens of one process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import ciuic_runtime as ciuic
from ciuic_runtime.devices.spec import Topology
from ciuic_runtime.ops.native import kernels

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(kernels() is None, reason="the native kernels are not built here"),
]

RATE, BURST = "100mbit", "256kb"  # with a smaller burst, what comes in pieces waits for each of them
BYTES_PER_S = 100e6 / 8
PORT = 6399
PROMPTS = [[5, 250, 17, 99, 3, 3, 42] * 12, [7], list(range(60, 100)), [9, 8]]
PARAMS: dict[str, Any] = {"max_tokens": 8, "ignore_eos": True, "logprobs": 2, "temperature": 1.0, "seed": 3}
SETTINGS: dict[str, Any] = {"max_model_len": 192, "max_num_seqs": 4, "threads": 1}

DRIVER = """
import json, sys
import ciuic_runtime as ciuic
model, address, prompts, params, settings = json.loads(sys.argv[1])
hardware = ciuic.DeviceManager.from_ray(address)
placement = ciuic.Placement().put("*", on="node1/cpu")
for first in ("embedding", "layers.0.*"):
    placement = placement.put(first, on="node0/cpu")
with ciuic.LLM(
    model, devices=hardware, executor="ray", address=address, stages=2, placement=placement, **settings
) as llm:
    outputs = llm.generate(prompts, ciuic.SamplingParams(**params))
    print(json.dumps({
        "outcome": repr([(o.token_ids, o.logprobs, o.finish_reason) for o in outputs]),
        "lanes": sorted({e.lane for e in llm.trace.events}),
        "bandwidth": [link.bandwidth for link in hardware.topology.links if link.src[:5] != link.dst[:5]],
    }))
"""


@dataclass(frozen=True)
class Namespace:
    name: str
    address: str  # of its end of the cable

    def run(self, *command: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return run("ip", "netns", "exec", self.name, *command, **options)

    def end(self) -> None:
        """Its processes, then itself, and its end of the cable with it."""
        for _ in range(50):
            pids = run("ip", "netns", "pids", self.name).stdout.split()
            for pid in pids:
                _kill(int(pid))
            if not pids:
                break
            time.sleep(0.1)
        run("ip", "netns", "del", self.name)


def run(*command: str, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, **options)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(command[:6])} ... exited with {done.returncode}: {done.stderr[-2000:]}")
    return done


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


@pytest.fixture
def namespaces() -> Iterator[tuple[Namespace, Namespace]]:
    """Two, and the cable. Skips where this process may not make them."""
    if missing := [tool for tool in ("ip", "tc") if shutil.which(tool) is None]:
        pytest.skip(f"network namespaces need {' and '.join(missing)} (iproute2)")
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    mark, subnet = f"cr{os.getpid() % 10**6}", f"10.{200 + os.getpid() % 50}.77"
    both = tuple(Namespace(f"{mark}{end}", f"{subnet}.{i}") for i, end in enumerate("ab", 1))
    made: list[Namespace] = []
    try:
        try:
            for one in both:
                run("ip", "netns", "add", one.name)
                made.append(one)
            one, other = (n.name for n in both)
            run("ip", "link", "add", one, "netns", one, "type", "veth", "peer", "name", other, "netns", other)
            for n in both:
                n.run("ip", "address", "add", f"{n.address}/24", "dev", n.name)
                for device in ("lo", n.name):
                    n.run("ip", "link", "set", device, "up")
                n.run("ip", "route", "add", "default", "dev", n.name)  # by which Ray finds out the node's own address
                n.run("tc", "qdisc", "add", "dev", n.name, *f"root tbf rate {RATE} burst {BURST} latency 50ms".split())
        except RuntimeError as error:
            pytest.skip(f"network namespaces with limited bandwidth cannot be made here: {error}")
        yield both[0], both[1]
    finally:
        for one in made:
            one.end()


@pytest.fixture
def nodes(ray: Any, namespaces: tuple[Namespace, Namespace]) -> Iterator[str]:
    """The address of a cluster with a node in each."""
    head, other = namespaces
    folder = Path(tempfile.mkdtemp(prefix="crn", dir="/tmp"))  # sockets have short names
    start = [str(Path(sys.executable).with_name("ray")), "start", "--num-cpus=2", "--object-store-memory=100000000"]
    address, apart = f"{head.address}:{PORT}", os.environ | {"RAY_TMPDIR": str(folder)}  # from other clusters here
    try:
        head.run(
            *start, "--head", f"--node-ip-address={head.address}", f"--port={PORT}", f"--temp-dir={folder}",
            "--include-dashboard=false", "--disable-usage-stats", env=apart,
        )  # fmt: skip
        other.run(*start, f"--address={address}", f"--node-ip-address={other.address}", env=apart)
        yield address
    finally:
        for one in namespaces:
            for pid in run("ip", "netns", "pids", one.name).stdout.split():
                _kill(int(pid))
        shutil.rmtree(folder, ignore_errors=True)


def test_two_stages_over_a_slow_cable(
    nodes: str, namespaces: tuple[Namespace, Namespace], tiny_int4: Path, here: Topology
) -> None:
    with ciuic.LLM(tiny_int4, devices=here, **SETTINGS) as llm:
        local = llm.generate(PROMPTS, ciuic.SamplingParams(**PARAMS))
    asked = json.dumps([str(tiny_int4), nodes, PROMPTS, PARAMS, SETTINGS])
    found = json.loads(namespaces[0].run(sys.executable, "-c", DRIVER, asked).stdout.splitlines()[-1])
    assert found["outcome"] == repr([(o.token_ids, o.logprobs, o.finish_reason) for o in local])
    assert {"node0/cpu", "node1/cpu"} <= set(found["lanes"])
    assert len(found["bandwidth"]) == 2
    assert all(rate < 1.5 * BYTES_PER_S for rate in found["bandwidth"]), "the cable is not limited"
