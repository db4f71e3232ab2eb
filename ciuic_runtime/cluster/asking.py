"""What people ask of models that run on a cluster, and what these answer, through Ray's key-value store, which asks for
the cluster's token. Knows keys and texts; what is done about it is for others."""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ciuic_runtime.devices.errors import CiuicError, InvalidInput

JOB_ID = "CIUIC_JOB_ID"  # environment variable of a job's driver
SPACE = b"ciuic"  # of keys
HEARD_SECONDS = 15.0  # for a model that runs to hear of it
ANSWER_SECONDS = 300.0  # and to look at the new nodes, of which each is measured


@dataclass(frozen=True, slots=True)
class Answer:
    id: str  # of the model that runs: its job's, or its process's
    moves: bool  # it goes on by another plan
    text: str


def name_of_this_run() -> str:
    return os.environ.get(JOB_ID) or f"{socket.gethostname()}-{os.getpid()}"


class Mailbox:
    """Of one model that runs."""

    def __init__(self, ray: Any, id: str, about: dict[str, Any]) -> None:
        self._kv, self.id = _Store(ray), id
        self._last = self._kv.get(f"ask/{id}")  # of one that had the same name
        self._kv.put(f"runs/{id}", about)

    def asked(self) -> Any | None:
        """What was asked since the last time; that it was heard is said at once."""
        found = self._kv.get(f"ask/{self.id}")
        if found is None or found == self._last:
            return None
        self._last = found
        self._kv.put(f"answer/{self.id}", {"to": found, "heard": True})
        return found

    def answer(self, to: Any, moves: bool, text: str) -> None:
        self._kv.put(f"answer/{self.id}", {"to": to, "moves": moves, "text": text})

    def close(self) -> None:
        for key in ("runs", "ask", "answer"):
            self._kv.delete(f"{key}/{self.id}")


def ask(ray: Any, id: str | None, say: Callable[[str], None]) -> list[Answer]:
    """Has one model that runs on the cluster, or all of them, look for nodes that its plan lacks. Raises InvalidInput
    where there is none of that name, CiuicError where one does not answer."""
    kv = _Store(ray)
    running = kv.names("runs/")
    if id is not None and id not in running:
        there = f"there are {', '.join(running)}" if running else "none does"
        raise InvalidInput(f"no model {id!r} runs on this cluster; {there} (ciuic jobs lists jobs)")
    if not running:
        raise InvalidInput("no model runs on this cluster; ciuic launch, run or serve with --address begins one")
    wanted, question = [id] if id is not None else running, secrets.token_hex(8)
    for one in wanted:
        kv.put(f"ask/{one}", question)
    return [_answer(kv, one, question, say) for one in wanted]


def _answer(kv: _Store, id: str, question: str, say: Callable[[str], None]) -> Answer:
    begin, heard = time.monotonic(), False
    while True:
        found = kv.get(f"answer/{id}") or {}
        if found.get("to") == question and "text" in found:
            return Answer(id, found["moves"], found["text"])
        if found.get("to") == question and not heard:
            heard = True
            say(f"{id} looks for new nodes")
        if time.monotonic() - begin > (ANSWER_SECONDS if heard else HEARD_SECONDS):
            if not heard:  # nobody is there to take its name away
                kv.delete(f"runs/{id}")
            what = "still looks" if heard else "did not hear, and is taken for ended"
            raise CiuicError(f"{id} {what} after {time.monotonic() - begin:.0f} s; look at its log, and ask again")
        time.sleep(0.1)


class _Store:
    """JSON by key."""

    def __init__(self, ray: Any) -> None:
        from ray.experimental import internal_kv

        self._kv = internal_kv

    def put(self, key: str, value: Any) -> None:
        self._kv._internal_kv_put(key.encode(), json.dumps(value).encode(), overwrite=True, namespace=SPACE)

    def get(self, key: str) -> Any:
        found = self._kv._internal_kv_get(key.encode(), namespace=SPACE)
        return None if found is None else json.loads(found)

    def delete(self, key: str) -> None:
        self._kv._internal_kv_del(key.encode(), namespace=SPACE)

    def names(self, prefix: str) -> list[str]:
        found = self._kv._internal_kv_list(prefix.encode(), namespace=SPACE)
        return sorted(key.decode().removeprefix(prefix) for key in found)
