"""Token ids to text as they come: no character is split, and nothing that may become a stop string is shown early.
Knows nothing of requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A sequence of bytes that is no character yet is at most this many tokens long; after that it is shown as it is.
LONGEST_CHARACTER = 8


class TextStream:
    """The text of one growing sequence. `push` returns what can be shown for certain; `finish` the rest."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode, self._stop = decode, tuple(stop)
        self._ids: list[int] = []
        self._context = self._shown = 0  # ids from `context` on are decoded; those before `shown` are in the text
        self._held = ""  # decoded, but it may be the beginning of a stop string
        self.text = ""  # shown so far
        self.stopped = False  # a stop string has come

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        return self._show(self._decoded(final=False), final=False)

    def finish(self) -> str:
        return self._show(self._decoded(final=True), final=True)

    def _decoded(self, final: bool) -> str:
        """Text of the ids since the last call, "" while they end inside a character.

        Decoding starts at the ids of the previous piece, since some tokenizers treat the first token differently."""
        before = self._decode(self._ids[self._context : self._shown])
        now = self._decode(self._ids[self._context :])
        unfinished = now.endswith(REPLACEMENT) and len(self._ids) - self._shown < LONGEST_CHARACTER
        if (unfinished and not final) or len(now) <= len(before):
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return now[len(before) :]

    def _show(self, piece: str, final: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + piece
        at = min((i for s in self._stop if (i := text.find(s)) >= 0), default=-1)
        if at >= 0:
            self.stopped, shown, self._held = True, text[:at], ""
        else:
            keep = 0 if final else max((_overlap(text, s) for s in self._stop), default=0)
            shown, self._held = text[: len(text) - keep], text[len(text) - keep :]
        self.text += shown
        return shown


def _overlap(text: str, stop: str) -> int:
    """The longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
