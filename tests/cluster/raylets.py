"""The nodes of a cluster for tests: how they are begun and put back, and what may be left of them."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil

# A killed raylet is noticed in seconds instead of a quarter of a minute.
HEALTH = {
    "health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}  # fmt: skip
NODE = {"num_cpus": 2, "object_store_memory": 100 << 20}
NODES = 3
ON_TWO_NODES = """
[[put]]
pattern = "*"
on = "node1/cpu"

[[put]]
pattern = "embedding"
on = "node0/cpu"

[[put]]
pattern = "layers.0"
on = "node0/cpu"
"""


def put_back(cluster: Any, nodes: int = NODES) -> None:
    """As many nodes as that, all of them alive."""
    for node in list(cluster.worker_nodes):
        alive = node.all_processes["raylet"][0].process.poll() is None
        if not alive or len(cluster.worker_nodes) >= nodes:
            cluster.remove_node(node, allow_graceful=alive)
    while len(cluster.worker_nodes) < nodes - 1:
        cluster.add_node(**NODE, **free_ports("dashboard_agent_listen_port"))
    cluster.wait_for_nodes()


def free_ports(*names: str) -> dict[str, Any]:
    with contextlib.ExitStack() as stack:
        taken = [stack.enter_context(socket.socket()) for _ in names]
        for one in taken:
            one.bind(("127.0.0.1", 0))
        return {name: one.getsockname()[1] for name, one in zip(names, taken, strict=True)}


def family(pids: Iterable[int]) -> set[int]:
    """These processes and all that they started, as far as they are there."""
    found = set[int]()
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            one = psutil.Process(pid)
            found |= {one.pid, *(child.pid for child in one.children(recursive=True))}
    return found


def running() -> set[int]:
    return {p.pid for p in psutil.process_iter(["status"]) if p.info["status"] != psutil.STATUS_ZOMBIE}


def wait_until(true: Callable[[], bool], otherwise: str, seconds: float = 20) -> None:
    limit = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < limit, otherwise
        time.sleep(0.1)


def remove_semaphores(pids: list[int]) -> None:
    """Compiled graphs leave theirs, named after the raylet."""
    for file in Path("/dev/shm").glob("sem.*"):
        if any(str(pid) in file.name for pid in pids):
            file.unlink(missing_ok=True)
