"""The errors a person meets: one line each, saying what was asked, what there is, and what to try.
They live in the lowest layer so that every layer can raise them; how they are shown is the command line's business."""

from __future__ import annotations


class CiuicError(Exception):
    """Anything that went wrong in a way we can explain; exit code 1 (failed while running)."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        """What a file or a user put into the message cannot break the line or steer the terminal."""
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


class InvalidInput(CiuicError, ValueError):
    """What was asked cannot be done as asked: a bad file, option, rule or prompt; exit code 2."""

    exit_code = 2


class OutOfMemory(InvalidInput, MemoryError):
    """Something does not fit where it was told to go; raised before anything is loaded where possible."""

    def __init__(self, message: str, *, need: int = 0, free: int = 0, capacity: int = 0) -> None:
        super().__init__(message)
        self.need, self.free, self.capacity = need, free, capacity  # bytes; 0 where they do not apply
