"""What of a growing text may be shown: nothing that may still become a stop string, and nothing after one.
Turning ids into pieces of text without splitting characters is the tokenizer's `TokenStream`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Pieces(Protocol):
    """Ids to certain text, piece by piece (`Tokenizer.stream`)."""

    def push(self, token_id: int) -> str: ...

    def finish(self) -> str: ...


class NoText:
    """Where there is no tokenizer: token ids in, token ids out."""

    def push(self, token_id: int) -> str:
        return ""

    def finish(self) -> str:
        return ""


class TextStream:
    """The text of one growing sequence. `push` returns what can be shown for certain; `finish` the rest."""

    def __init__(self, pieces: Pieces, stop: Sequence[str] = ()) -> None:
        self._pieces, self._stop = pieces, tuple(stop)
        self._held = ""  # it may be the beginning of a stop string
        self.text = ""  # shown so far
        self.stopped = False  # a stop string has come

    def push(self, token_id: int) -> str:
        return self._show(self._pieces.push(token_id), final=False)

    def finish(self) -> str:
        return self._show(self._pieces.finish(), final=True)

    def _show(self, piece: str, final: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + piece
        # The stop string that is complete first counts, however the text was cut into pieces.
        ends = min(((i + len(s), i) for s in self._stop if (i := text.find(s)) >= 0), default=None)
        if ends:
            self.stopped, shown, self._held = True, text[: ends[1]], ""
        else:
            keep = 0 if final else max((_overlap(text, s) for s in self._stop), default=0)
            shown, self._held = text[: len(text) - keep], text[len(text) - keep :]
        self.text += shown
        return shown


def _overlap(text: str, stop: str) -> int:
    """The longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
