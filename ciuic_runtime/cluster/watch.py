"""A thread beside the passes: every few seconds it hears what people ask of the model, and looks for nodes that joined.
Knows when to look; what there is to see, and what comes of it, is for others."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import suppress

from ciuic_runtime.cluster.asking import Mailbox

log = logging.getLogger("ciuic")

PERIOD = 2.0  # s
LAST_SECONDS = 5.0  # for a look that is under way at the end

Look = Callable[[bool], tuple[bool, str]]  # whether somebody asked -> whether the plan changes, and what was seen


class Watch:
    def __init__(self, look: Look, mailbox: Mailbox, always: bool) -> None:
        """`always`: looks without being asked, too."""
        self._look, self._mailbox, self._always = look, mailbox, always
        self._ended, self._last = threading.Event(), ""
        self._thread = threading.Thread(target=self._run, name="ciuic-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._ended.set()
        self._thread.join(LAST_SECONDS)
        with suppress(Exception):  # the cluster may be gone
            self._mailbox.close()

    def _run(self) -> None:
        while not self._ended.wait(PERIOD):
            try:
                asked = self._mailbox.asked()
                if asked is not None or self._always:
                    moves, seen = self._seen(asked is not None)
                    if asked is not None:
                        self._mailbox.answer(asked, moves, seen)
            except Exception as error:  # the cluster's head may be gone: the passes notice, and say it to people
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
