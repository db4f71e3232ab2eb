"""What people ask of models that run on a cluster, and what these answer, through Ray's key-value store, which asks for
the cluster's token. Knows keys and texts; what is done about it is for others."""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from ciuic_runtime.devices.errors import CiuicError, InvalidInput

JOB_ID = "CIUIC_JOB_ID"  # environment variable of a job's driver
SPACE = b"ciuic"  # of keys
HEARD_SECONDS = 15.0  # for a model that runs to hear of it
STORE_SECONDS = 5.0  # for the store to answer; without a limit Ray waits for a head that is gone
ANSWER_SECONDS = 300.0  # and to look at the new nodes, of which each is measured


@dataclass(frozen=True, slots=True)
class Answer:
    id: str  # of the model that runs: its job's, or its process's
    moves: bool  # it goes on by another plan
    text: str
    heard: bool = True  # else it said nothing, and the text is ours


def name_of_this_run() -> str:
    return os.environ.get(JOB_ID) or f"{socket.gethostname()}-{os.getpid()}"


class Mailbox:
    """Of one model that runs. Where this process has others of that name open, a number is added to it."""

    _names: ClassVar[set[str]] = set()  # of this process
    _naming: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, ray: Any, id: str, about: dict[str, Any]) -> None:
        self._kv, self._about = _Store(ray), about
        with self._naming:
            names = (id, *(f"{id}-{i + 2}" for i in range(len(self._names))))
            self.id = next(name for name in names if name not in self._names)
            self._names.add(self.id)
        self._last = self._kv.get(f"ask/{self.id}")  # of one that had the same name
        self._kv.put(f"runs/{self.id}", about)

    def asked(self) -> Any | None:
        """What was asked since the last time; that it was heard is said at once. Whoever took it for ended hears that
        it is there."""
        if self._kv.get(f"runs/{self.id}") is None:
            self._kv.put(f"runs/{self.id}", self._about)
        found = self._kv.get(f"ask/{self.id}")
        if found is None or found == self._last:
            return None
        self._last = found
        self._kv.put(f"answer/{self.id}", {"to": found, "heard": True})
        return found

    def answer(self, to: Any, moves: bool, text: str) -> None:
        self._kv.put(f"answer/{self.id}", {"to": to, "moves": moves, "text": text})

    def close(self) -> None:
        with self._naming:
            self._names.discard(self.id)
        for key in ("runs", "ask", "answer"):
            self._kv.delete(f"{key}/{self.id}")


def ask(ray: Any, id: str | None, say: Callable[[str], None]) -> list[Answer]:
    """Has one model that runs on the cluster, or all of them, look for nodes that its plan lacks. Raises InvalidInput
    where there is none of that name, CiuicError where none answers."""
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
    begin = time.monotonic()
    answers = [_answer(kv, one, question, begin, say) for one in wanted]
    if not any(answer.heard for answer in answers):
        raise CiuicError("; ".join(f"{answer.id} {answer.text}" for answer in answers))
    return answers


def _answer(kv: _Store, id: str, question: str, begin: float, say: Callable[[str], None]) -> Answer:
    heard = False
    while True:
        found = kv.get(f"answer/{id}") or {}
        if found.get("to") == question and "text" in found:
            return Answer(id, found["moves"], found["text"])
        if found.get("to") == question and not heard:
            heard = True
            say(f"{id} looks for new nodes")
        if (waited := time.monotonic() - begin) > (ANSWER_SECONDS if heard else HEARD_SECONDS):
            if not heard:  # nobody is there to take its name away; one that is puts it back
                kv.delete(f"runs/{id}")
            what = "still looks" if heard else "did not hear, and is taken for ended"
            return Answer(id, False, f"{what} after {waited:.0f} s; look at its log, and ask again", heard=False)
        time.sleep(0.1)


class _Store:
    """JSON by key."""

    def __init__(self, ray: Any) -> None:
        from ray.experimental import internal_kv

        self._kv = internal_kv.internal_kv_get_gcs_client()

    def put(self, key: str, value: Any) -> None:
        data = json.dumps(value).encode()
        self._kv.internal_kv_put(key.encode(), data, overwrite=True, namespace=SPACE, timeout=STORE_SECONDS)

    def get(self, key: str) -> Any:
        found = self._kv.internal_kv_get(key.encode(), SPACE, timeout=STORE_SECONDS)
        return None if found is None else json.loads(found)

    def delete(self, key: str) -> None:
        self._kv.internal_kv_del(key.encode(), False, SPACE, timeout=STORE_SECONDS)

    def names(self, prefix: str) -> list[str]:
        found = self._kv.internal_kv_keys(prefix.encode(), SPACE, timeout=STORE_SECONDS)
        return sorted(key.decode().removeprefix(prefix) for key in found)
