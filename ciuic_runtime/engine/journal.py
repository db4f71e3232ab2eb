"""What passes did for requests, and what befell the cluster: what a recording has beside its events.
Knows requests and passes as they were; when what is computed is not its business."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TypeVar

from ciuic_runtime.engine.batching import Pass
from ciuic_runtime.engine.request import FinishReason, Request
from ciuic_runtime.schedulers.recording import Mark, MarkKind, PassNote, RequestNote

MOST_ENDED = 1 << 14  # requests that have ended, and marks, that are kept: at least half as many


@dataclass(frozen=True, slots=True)
class Noted:
    """A pass, and the blocks of the KV cache that requests held when it had ended."""

    note: PassNote
    kv_blocks: int


class Journal:
    """One thread writes, any other may read. Times are kept as time.perf_counter() gives them."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._live: dict[int, Request] = {}
        self._ended: list[RequestNote] = []
        self._marks: list[Mark] = []
        self._passes: dict[int, Noted] = {}  # by number, all since the beginning counted
        self._num_passes = self._first_pass = 0

    # As it happens

    def arrived(self, request: Request) -> None:
        self._live[request.index] = request

    def begun(self, todo: Pass) -> None:
        for request in todo.requests:
            if request.admitted is None:
                request.admitted = time.perf_counter()

    def passed(self, done: Pass, running: int, waiting: int, kv_blocks: int) -> None:
        """A pass has ended, and what it did for its requests is known to them."""
        chunks = zip(done.requests, done.chunks, strict=True)
        note = PassNote(tuple((r.index, len(c.token_ids)) for r, c in chunks), running, waiting)
        self._passes[self._num_passes] = Noted(note, kv_blocks)
        self._num_passes += 1
        for request in done.requests:
            if request.finish_reason:
                self.ended(request)

    def ended(self, request: Request, reason: FinishReason | None = None) -> None:
        """`reason`: where the request itself has none yet."""
        if self._live.get(request.index) is request:
            note = replace(_note(request), ended=time.perf_counter())
            self._ended = _with(self._ended, replace(note, finish_reason=note.finish_reason or reason))
            del self._live[request.index]  # last, so that it is always in one of them

    def all_ended(self, reason: FinishReason) -> None:
        for request in list(self._live.values()):
            self.ended(request, reason)

    def mark(self, kind: MarkKind, text: str) -> None:
        self._marks = _with(self._marks, Mark(time.perf_counter(), kind, text))

    def forget_passes(self, before: int) -> None:
        while self._first_pass < min(before, self._num_passes):
            del self._passes[self._first_pass]
            self._first_pass += 1

    # As it is told

    @property
    def num_passes(self) -> int | None:
        """That have been noted; None where passes are nobody's."""
        return self._num_passes if self._num_passes or self._live else None

    def passes(self, first: int, num: int) -> list[Noted]:
        """As many from that number on."""
        nobody = Noted(PassNote((), 0, 0), 0)
        return [self._passes.get(number, nobody) for number in range(first, first + num)]

    def requests(self, begin: float) -> list[RequestNote]:
        """In the order in which they arrived, with times since `begin`."""
        live = list(self._live.values())  # first: one that ends meanwhile is among the others then
        notes = {note.request: note for note in (*map(_note, live), *self._ended)}
        return sorted((_since(note, begin) for note in notes.values()), key=lambda note: (note.arrived, note.request))

    def marks(self, begin: float) -> list[Mark]:
        return [replace(mark, time=mark.time - begin) for mark in list(self._marks)]


def _note(r: Request) -> RequestNote:
    return RequestNote(
        r.index, r.made, len(r.prompt), r.admitted, r.first_token, None, r.cached, len(r.token_ids), r.preemptions,
        r.finish_reason,
    )  # fmt: skip


def _since(note: RequestNote, begin: float) -> RequestNote:
    admitted, first, ended = (t if t is None else t - begin for t in (note.admitted, note.first_token, note.ended))
    return replace(note, arrived=note.arrived - begin, admitted=admitted, first_token=first, ended=ended)


T = TypeVar("T")


def _with(items: list[T], one: T) -> list[T]:
    """The items and one more, in the same list until there are too many: then without the older half."""
    items.append(one)
    return items if len(items) <= MOST_ENDED else items[-MOST_ENDED // 2 :]
