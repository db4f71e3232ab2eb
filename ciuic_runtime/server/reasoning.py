"""Where a model's thinking ends and its answer begins, in text that comes in pieces: DeepSeek's `<think>...</think>`.
Knows these two marks only; whether a template has already opened the first one is told."""

from __future__ import annotations

BEGIN, END = "<think>", "</think>"


class ReasoningParser:
    """An answer is: line breaks and blanks, `<think>`, thinking, `</think>`, the answer itself. Where the first mark is
    not at the beginning, everything is the answer; where the second one does not come, everything after the first is
    thinking.

    The marks are not shown. Of the whitespace around them, that before `<think>` and the line breaks right after it,
    before `</think>` and after it are dropped, as DeepSeek's API does; all other text is handed on as it came, and as
    soon as it cannot be part of what is dropped."""

    def __init__(self, begins_inside: bool) -> None:
        self._inside = begins_inside
        self._before = not begins_inside  # whether <think> may still come
        self._at_mark = begins_inside  # whether line breaks are dropped, because a mark was just there
        self._held = ""  # what may turn out to be part of a mark, or of the line breaks around one

    def push(self, text: str) -> tuple[str, str]:
        """What can be shown, with the next piece: (of the thinking, of the answer)."""
        self._held += text
        if self._before:
            self._begin()
        if self._before:
            return "", ""
        thought = self._think() if self._inside else ""
        return thought, "" if self._inside else self._answer()

    def finish(self) -> tuple[str, str]:
        """What was held back, at the end of the text."""
        rest, self._held = self._held, ""
        return (rest, "") if self._inside else ("", rest)

    def _begin(self) -> None:
        text = self._held.lstrip()
        if text.startswith(BEGIN):
            self._before, self._inside, self._at_mark, self._held = False, True, True, text[len(BEGIN) :]
        elif not BEGIN.startswith(text):
            self._before = False

    def _think(self) -> str:
        self._drop_line_breaks()
        thought, mark, after = self._held.partition(END)
        if mark:
            self._inside, self._at_mark, self._held = False, True, after
            return thought.rstrip("\n")
        shown = thought[: len(thought) - _start_of(END, thought)].rstrip("\n")
        self._held = self._held[len(shown) :]
        return shown

    def _answer(self) -> str:
        self._drop_line_breaks()
        shown, self._held = self._held, ""
        return shown

    def _drop_line_breaks(self) -> None:
        if self._at_mark:
            self._held = self._held.lstrip("\n")
            self._at_mark = not self._held


def _start_of(mark: str, text: str) -> int:
    """How much of the text's end could be the beginning of the mark."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)
