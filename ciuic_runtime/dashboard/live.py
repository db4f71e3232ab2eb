"""An engine at work as a source, and what happens there as a stream of events for everybody who looks.
Knows the service and asyncio; one poller serves all, only while there is somebody."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

from ciuic_runtime.basis import Basis
from ciuic_runtime.dashboard.plans import Plans
from ciuic_runtime.dashboard.source import EMPTY, Shown, Source, nodes_of
from ciuic_runtime.engine.service import EngineService
from ciuic_runtime.schedulers.recording import Recording, RequestNote

log = logging.getLogger("ciuic")

PERIOD = 0.25  # s between two looks
SETTLED = 2.0  # s after the last pass, when what the processes of a cluster recorded has come in
SILENCE = 10.0  # s without an event, after which a comment shows that the connection lives
MOST_BARS = 250  # of the steps that came between two looks
PATIENCE = 0.004  # s, for what is planned of them
MOST_EVENTS = 1 << 19  # that are kept; then the older half is forgotten
MOST_WAITING = 64  # events that somebody has not taken yet; who takes none is left
KEPT = 60.0  # s after the last look, during which what was worked out is kept

Event = dict[str, Any]
InThread = Callable[[Callable[[], list[Event]]], Awaitable[list[Event]]]


class LiveSource(Source):
    """What the service's engine has recorded; `refresh` takes in what came since."""

    def __init__(self, service: EngineService) -> None:
        self._service, self._llm = service, service.llm
        super().__init__("live", "live", basis=self._llm.basis)
        self._stats = service.stats()
        self._changed = self._looked = self._counted = -math.inf  # of time.monotonic()
        self.seen()

    def seen(self) -> None:
        """Somebody looks."""
        self._seen = time.monotonic()

    @property
    def unseen_s(self) -> float:
        """Since somebody looked for the last time."""
        return time.monotonic() - self._seen

    def forget(self) -> None:
        """What was worked out, unless somebody looks; who does later, has it worked out again."""
        with self.lock:
            if self.unseen_s >= KEPT:
                self.shown = Shown.of(EMPTY)
                self._looked = self._counted = -math.inf

    def refresh(self, counts: bool = False) -> None:
        """Unless that was done just now, or nothing has happened. `counts`: with those of pages and experts, which are
        those of now unless nothing has happened."""
        with self.lock:
            self.seen()
            now, stats = time.monotonic(), self._service.stats()
            if stats != self._stats:
                self._stats, self._changed = stats, now
            settled = now - self._changed > SETTLED
            if counts and not (settled and self._counted > self._changed + SETTLED):
                self._counted = now
            elif (settled and self._looked > self._changed + SETTLED) or now - self._looked < PERIOD / 2:
                return
            else:
                counts = False
            self._looked = now
            if self._llm.schedule is not self.schedule:  # planned again
                self._use(self._llm.basis)
            self._take_in(counts)

    def whole(self) -> Recording:
        return self._llm.recording()

    @property
    def num_requests(self) -> int:
        return self._llm.engine.journal.num_requests

    def request_notes(self, newest: int) -> list[RequestNote]:
        return self._llm.request_notes(newest)

    def request_notes_of(self, indices: Collection[int]) -> list[RequestNote]:
        return self._llm.request_notes_of(indices)

    @property
    def stages(self) -> tuple[int, ...]:
        """It changes when a request comes, has its first token, or ends."""
        return self._stats.waiting, self._stats.running, self._stats.prompt_tokens

    @property
    def ended(self) -> bool:
        """The server is being shut down, and nothing runs any more."""
        stats = self._service.stats()
        return self._service.draining and not stats.running and not stats.waiting

    @property
    def ray_dashboard(self) -> str | None:
        return self._llm.ray_dashboard

    def _use(self, basis: Basis) -> None:
        self.nodes_before |= dict.fromkeys(nodes_of(self.basis)) if self.basis else {}
        self.basis, self.schedule = basis, basis.schedule
        self.plans = Plans(basis.forecaster)

    def _take_in(self, counts: bool) -> None:
        """What does not follow on what is here begins anew: the recorder was cleared, or forgot what nobody took."""
        before, asked = self.recording, self.shown.growing.next_step
        snapshot = self._llm.recording(asked, counts=False)
        anew = snapshot.began != before.began or snapshot.first_step != asked
        if anew and asked:
            snapshot = self._llm.recording(counts=False)
        if counts:
            snapshot = self._llm.counted(snapshot)
        elif anew:
            self._counted = -math.inf
        else:
            snapshot = replace(snapshot, pages=before.pages, expert_uses=before.expert_uses)
        self.shown = Shown.of(snapshot, MOST_EVENTS) if anew else self.shown.add(snapshot)


class Stream:
    """Events of one live source. Whoever iterates is served from then on."""

    def __init__(
        self, source: LiveSource, in_thread: Callable[[Callable[[], list[Event]]], Awaitable[list[Event]]]
    ) -> None:
        self.source, self._in_thread = source, in_thread
        self._queues: set[asyncio.Queue[Event | None]] = set()
        self._poller: asyncio.Task[None] | None = None
        self._next = 0  # the first step that was not sent
        self._requests: tuple[int, ...] = ()
        self._marks = 0

    async def events(self) -> AsyncIterator[Event | None]:
        """None: nothing has happened for a while. Ends when the server does, when there can be no more, and for whoever
        takes too few of them: who wants to go on loads anew."""
        queue: asyncio.Queue[Event | None] = asyncio.Queue(MOST_WAITING)
        if not self._queues:
            await self._in_thread(self._begin)
        self._queues.add(queue)
        if self._poller is None or self._poller.done():
            self._poller = asyncio.create_task(self._poll())
        try:
            while True:
                try:
                    event = await asyncio.wait_for(queue.get(), SILENCE)
                except TimeoutError:
                    yield None
                    continue
                if event is None:
                    return
                yield event
        finally:
            self._queues.discard(queue)

    async def close(self) -> None:
        if self._poller is not None:
            self._poller.cancel()
            with suppress(asyncio.CancelledError):
                await self._poller

    async def _poll(self) -> None:
        try:
            while self._queues:
                for event in await self._in_thread(self._news):
                    self._tell(event)
                if self.source.ended:
                    break
                await asyncio.sleep(PERIOD)
        except Exception:
            log.exception("the live view ends by a mistake of ours; a page that asks for it again gets another one")
        for queue in list(self._queues):
            self._leave(queue)

    def _tell(self, event: Event) -> None:
        for queue in list(self._queues):
            try:
                queue.put_nowait(event)
            except asyncio.QueueFull:
                self._leave(queue)

    def _leave(self, queue: asyncio.Queue[Event | None]) -> None:
        """What it has not taken is not for it any more, but that this is the end."""
        self._queues.discard(queue)
        while not queue.empty():
            queue.get_nowait()
        queue.put_nowait(None)

    # In the thread of answers

    def _begin(self) -> list[Event]:
        """What is there already, the page asks for."""
        with self.source.lock:
            self.source.refresh()
            growing = self.source.shown.growing
            self._next, self._marks = growing.next_step, len(growing.recording.marks)
            self._requests = self.source.stages
        return []

    def _news(self) -> list[Event]:
        with self.source.lock:
            self.source.refresh()
            shown, found = self.source.shown, list[Event]()
            recording, end = shown.recording, shown.growing.next_step
            if end < self._next:  # it began anew
                self._next = recording.first_step
            if end > self._next:
                bars = shown.strip.bars(recording, self._next, end, MOST_BARS, self._planned)
                rows = shown.growing.of_steps(self._next, end).rows
                numbers = {
                    "since": float(rows["start"].min(initial=recording.seconds)),
                    "recorded_s": recording.seconds, "num_events": len(recording.rows),
                    "num_steps": len(recording.steps), "first_step": recording.first_step,
                }  # fmt: skip
                found.append({"type": "steps", **bars, **numbers})
                self._next = end
            if (stages := self.source.stages) != self._requests:
                self._requests = stages
                found.append({"type": "requests"})
            if len(recording.marks) != self._marks:
                self._marks = len(recording.marks)
                found.append({"type": "marks", "marks": [asdict(mark) for mark in recording.marks]})
            return found

    def _planned(self, steps: Any) -> Any:
        return self.source.plans.seconds(steps, PATIENCE)
