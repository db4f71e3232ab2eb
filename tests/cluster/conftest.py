"""A Ray cluster of several raylets on this machine, each a node to Ray; nothing of it is left afterwards."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ["RAY_AUTH_MODE"] = "token"
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

# A killed raylet is noticed in seconds instead of a quarter of a minute.
HEALTH = {
    "health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}  # fmt: skip


@pytest.fixture(scope="session")
def ray() -> Any:
    return pytest.importorskip("ray")


@pytest.fixture
def cluster(ray: Any) -> Iterator[Any]:
    """Three nodes of two processors each; `cluster.add_node(...)` adds, `cluster.remove_node(...)` takes."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 2, "object_store_memory": 100 << 20, "include_dashboard": False, "_system_config": HEALTH}
    made = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(2):
            made.add_node(num_cpus=2, object_store_memory=100 << 20)
        made.wait_for_nodes()
        yield made
    finally:
        pids = [p.process.pid for node in made.list_all_nodes() for one in node.all_processes.values() for p in one]
        if ray.is_initialized():
            ray.shutdown()
        made.shutdown()
        remove_semaphores(pids)


def remove_semaphores(pids: list[int]) -> None:
    """Compiled graphs leave theirs, named after the raylet."""
    for file in Path("/dev/shm").glob("sem.*"):
        if any(str(pid) in file.name for pid in pids):
            file.unlink(missing_ok=True)
