"""Two threads beside the passes: one hears what people ask of the model, every few seconds; the other one looks for
nodes that joined, which may take minutes. Know when to look; what there is to see, and what comes of it, is for others.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ciuic_runtime.cluster.asking import Mailbox

log = logging.getLogger("ciuic")

PERIOD = 2.0  # s
LAST_SECONDS = 5.0  # for a look that is under way at the end

Look = Callable[[bool], tuple[bool, str]]  # whether somebody asked -> whether the plan changes, and what was seen


class Watch:
    def __init__(self, look: Look, mailbox: Mailbox, always: bool) -> None:
        """`always`: looks without being asked, too."""
        self._look, self._mailbox, self._always = look, mailbox, always
        self._asked: deque[Any] = deque()  # heard, and not looked for yet
        self._ended, self._due, self._last = threading.Event(), threading.Event(), ""
        self._threads = [
            threading.Thread(target=work, name=f"ciuic-watch-{work.__name__.strip('_')}", daemon=True)
            for work in (self._hear, self._work)
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        self._ended.set()
        self._due.set()
        limit = time.monotonic() + LAST_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, limit - time.monotonic()))
        with suppress(Exception):  # the cluster may be gone
            self._mailbox.close()

    def _hear(self) -> None:
        while not self._ended.wait(PERIOD):
            with self._cluster_may_be_gone():
                if (asked := self._mailbox.asked()) is not None:
                    self._asked.append(asked)
                    self._due.set()

    def _work(self) -> None:
        while not self._ended.is_set():
            self._due.wait(PERIOD if self._always else None)
            self._due.clear()
            asked = [self._asked.popleft() for _ in range(len(self._asked))]
            if self._ended.is_set() or not (asked or self._always):
                continue
            moves, seen = self._seen(bool(asked))
            with self._cluster_may_be_gone():
                for one in asked:
                    self._mailbox.answer(one, moves, seen)

    @contextmanager
    def _cluster_may_be_gone(self) -> Iterator[None]:
        """The passes notice, and say it to people."""
        try:
            yield
        except Exception as error:
            self._say(f"cannot hear what is asked of this model: {error}")

    def _seen(self, asked: bool) -> tuple[bool, str]:
        try:
            return self._look(asked)
        except Exception as error:
            seen = f"looking for new nodes failed: {type(error).__name__}: {error}"
            self._say(seen)
            return False, seen

    def _say(self, what: str) -> None:
        """Once, however often it happens in a row."""
        if what != self._last and not self._ended.is_set():
            log.warning("%s", what)
        self._last = what
