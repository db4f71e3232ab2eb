"""A Ray cluster of several raylets on this machine, each a node to Ray: one for all tests of a process, and what a test
took away is put back for the next one. Nothing of it is left afterwards."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from typing import Any

import pytest
from raylets import HEALTH, NODE, family, free_ports, put_back, remove_semaphores, running, wait_until

os.environ["RAY_AUTH_MODE"] = "token"
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


@pytest.fixture(scope="session")
def ray() -> Any:
    return pytest.importorskip("ray")


@pytest.fixture(scope="session")
def whole_cluster(ray: Any) -> Iterator[Any]:
    """It takes jobs. At its end nothing may be left of it."""
    from ray.cluster_utils import Cluster

    left = set[int]()
    made = Cluster()
    try:
        ports = free_ports("dashboard_port", "dashboard_agent_listen_port")
        made.add_node(**NODE, include_dashboard=True, _system_config=HEALTH, **ports)
        put_back(made)
        yield made
    finally:
        pids = [p.process.pid for node in made.list_all_nodes() for one in node.all_processes.values() for p in one]
        left = family(pids)
        made.shutdown()
        remove_semaphores(pids)
    wait_until(lambda: not left & running(), "processes are left")


@pytest.fixture
def cluster(ray: Any, whole_cluster: Any) -> Iterator[Any]:
    """Three nodes of two processors each; `cluster.add_node(...)` adds, `cluster.remove_node(...)` takes."""
    put_back(whole_cluster)
    try:
        yield whole_cluster
    finally:
        if ray.is_initialized():
            ray.shutdown()
