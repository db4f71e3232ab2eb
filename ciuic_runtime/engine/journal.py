"""What passes did for requests, and what befell the cluster: what a recording has beside its events.
Knows requests and passes as they were; when what is computed is not its business."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

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
        self._requests: dict[int, Request | RequestNote] = {}  # as they arrived; a note when it has ended
        self._num_ended = 0  # of these
        self._marks: list[Mark] = []
        self._passes: dict[int, Noted] = {}  # by number, all since the beginning counted
        self._num_passes = self._first_pass = 0

    # As it happens

    def arrived(self, request: Request) -> None:
        self._requests[request.index] = request

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
        if self._requests.get(request.index) is request:
            note = replace(_note(request), ended=time.perf_counter())
            self._requests[request.index] = replace(note, finish_reason=note.finish_reason or reason)
            self._num_ended += 1
            if self._num_ended > MOST_ENDED:
                self._forget_requests()

    def all_ended(self, reason: FinishReason) -> None:
        for request in list(self._requests.values()):
            if isinstance(request, Request):
                self.ended(request, reason)

    def mark(self, kind: MarkKind, text: str) -> None:
        self._marks.append(Mark(time.perf_counter(), kind, text))
        if len(self._marks) > MOST_ENDED:
            self._marks = self._marks[-MOST_ENDED // 2 :]

    def forget_passes(self, before: int) -> None:
        while self._first_pass < min(before, self._num_passes):
            del self._passes[self._first_pass]
            self._first_pass += 1

    def _forget_requests(self) -> None:
        """Of those that have ended, the ones that arrived first."""
        ended = [index for index, one in self._requests.items() if isinstance(one, RequestNote)]
        old = set(ended[: -MOST_ENDED // 2])
        self._requests = {index: one for index, one in self._requests.items() if index not in old}
        self._num_ended -= len(old)

    # As it is told

    @property
    def num_passes(self) -> int | None:
        """That have been noted; None where passes are nobody's."""
        return self._num_passes if self._num_passes or len(self._requests) > self._num_ended else None

    def passes(self, first: int, num: int) -> list[Noted]:
        """As many from that number on."""
        nobody = Noted(PassNote((), 0, 0), 0)
        return [self._passes.get(number, nobody) for number in range(first, first + num)]

    @property
    def num_requests(self) -> int:
        """That are known still."""
        return len(self._requests)

    def requests(self, begin: float, newest: int | None = None) -> list[RequestNote]:
        """In the order in which they arrived, with times since `begin`; of many the `newest` so many."""
        every = list(self._requests.values())
        kept = every if newest is None else every[max(0, len(every) - newest) :]
        return sorted((_since(one, begin) for one in kept), key=lambda note: (note.arrived, note.request))

    def requests_of(self, indices: Iterable[int], begin: float) -> list[RequestNote]:
        """Those of them that are known still."""
        known = self._requests
        return [_since(known[index], begin) for index in indices if index in known]

    def marks(self, begin: float) -> list[Mark]:
        return [replace(mark, time=mark.time - begin) for mark in list(self._marks)]


def _note(r: Request) -> RequestNote:
    return RequestNote(
        r.index, r.made, len(r.prompt), r.admitted, r.first_token, None, r.cached, len(r.token_ids), r.preemptions,
        r.finish_reason,
    )  # fmt: skip


def _since(one: Request | RequestNote, begin: float) -> RequestNote:
    note = one if isinstance(one, RequestNote) else _note(one)
    admitted, first, ended = (t if t is None else t - begin for t in (note.admitted, note.first_token, note.ended))
    return replace(note, arrived=note.arrived - begin, admitted=admitted, first_token=first, ended=ended)
