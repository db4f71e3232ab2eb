"""Whether the head of a Ray cluster is there. Without it Ray's calls wait, and after a minute Ray ends the process with
no word to whoever called; so it is looked at here, and its loss is an error before that. Knows nothing of stages."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from contextlib import suppress
from typing import Any

from ciuic_runtime.devices.errors import CiuicError

log = logging.getLogger("ciuic")

PERIOD = 1.0  # s, between looks
ANSWER_SECONDS = 3.0
RAY_WAITS = "RAY_gcs_rpc_server_reconnect_timeout_s"  # Ray's setting: how long it waits before it ends the process
RAY_WAITS_SECONDS = 60.0  # unless that says otherwise
GOES_ON = "a job leaves out the prompts that its output has"
LEAVE_SECONDS = 20.0  # Ray leaves a cluster in 5 s where its head is gone, in 15 s where that machine is


class ClusterLost(CiuicError):
    """Its head is gone, or this process's own node; the process has left it."""


class Head:
    """Looks whether the head listens, in a thread."""

    def __init__(self, ray: Any) -> None:
        context = ray.get_runtime_context()
        self._ray, self.address, self._here = ray, str(context.gcs_address), context.get_node_id()
        waits = ray_waits()
        self.patience = max(PERIOD, min(waits / 2, waits - LEAVE_SECONDS))  # s
        self._why = ""  # it is lost
        self._seen = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="ciuic-head", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> bool:
        return bool(self._why)

    def check(self) -> None:
        """Costs nothing. Raises ClusterLost where it is gone for good; this process has left the cluster then."""
        if self.lost:
            self.leave_if_lost()
            raise ClusterLost(self._why)

    def nodes(self) -> list[dict[str, Any]]:
        """As Ray knows them. Raises ClusterLost, also where this process's own node is gone: with it Ray ends all that
        the process began, and begins nothing more for it."""
        self.wait()
        found: list[dict[str, Any]] = self._ray.nodes()
        if not any(n["Alive"] and n["NodeID"] == self._here for n in found):
            self._why = (
                f"the node of this process has left the Ray cluster at {self.address}, and all stages ended with it; "
                f"start Ray again on this machine (ray start), or run this on another one; {GOES_ON}"
            )
            self.check()
        return found

    def wait(self) -> None:
        """Until it answers: before calls of Ray's that would wait for it without end. Raises ClusterLost."""
        while not self.answers():
            self.check()
            time.sleep(PERIOD / 5)

    def answers(self) -> bool:
        """Whether it does now."""
        host, _, port = self.address.rpartition(":")
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS):
                return True
        except OSError:
            return False

    def close(self) -> None:
        self._ended.set()
        self._thread.join(ANSWER_SECONDS + PERIOD)

    def _look(self) -> None:
        said = False
        while not self._ended.wait(PERIOD):
            if self.answers():
                self._seen, said = time.monotonic(), False
            elif time.monotonic() - self._seen > self.patience:
                self._why = (
                    f"the head of the Ray cluster at {self.address} has not answered for {self.patience:.0f} s, so the "
                    "cluster is gone; start it again (ray start --head, then every node) and run this again; "
                    f"{GOES_ON}. With a larger {RAY_WAITS} (s, now {ray_waits():g}) it is waited for longer"
                )
                log.error("it has not answered since; unless a pass comes first, Ray ends this process")
                return
            elif not said:
                said = True
                log.warning(
                    "the head of the Ray cluster at %s does not answer; waiting for %.0f s", self.address, self.patience
                )

    def leave_if_lost(self) -> None:
        """Else Ray ends this process soon. Where it has joined another cluster meanwhile, that is left alone."""
        ray = self._ray
        if self.lost and ray.is_initialized() and ray.get_runtime_context().gcs_address == self.address:
            ray.shutdown()


def ray_waits() -> float:
    """Seconds that Ray waits for a head before it ends the process."""
    with suppress(ValueError):
        return float(os.environ.get(RAY_WAITS, RAY_WAITS_SECONDS))
    return RAY_WAITS_SECONDS
