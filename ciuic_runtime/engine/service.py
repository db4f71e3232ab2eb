"""The engine in a thread of its own, for an event loop: requests go in at any time, what passes did for them comes out.
Knows threads and asyncio, and no HTTP; what runs when is the batching's decision."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from ciuic_runtime.devices.errors import CiuicError
from ciuic_runtime.engine.batching import Pass
from ciuic_runtime.engine.llm import LLM
from ciuic_runtime.engine.request import Request, Update
from ciuic_runtime.engine.sampling import SamplingParams
from ciuic_runtime.schedulers.policies.mixing import Size

if TYPE_CHECKING:
    from ciuic_runtime.engine.guide import Guide

log = logging.getLogger("ciuic")

MOST_EVENTS = 1 << 20  # that are kept of what was recorded
LOOKED_SECONDS = 5.0  # after somebody looked, another look is expected
GATHER_SECONDS = 0.5  # between two times that what other processes recorded is asked for, while somebody looks
CHECK_SECONDS = 5.0  # between two looks, while nothing is to do, whether the model is still there


class QueueFull(CiuicError):
    """So many requests are waiting that another one would wait too long."""


class ShuttingDown(CiuicError):
    """What was let in is still being finished; nothing new is."""


@dataclass(frozen=True, slots=True)
class PassInfo:
    seconds: float
    forecast_seconds: float | None  # None where a device's speed is not known
    prompt_tokens: int
    decode_tokens: int
    running: int
    waiting: int


@dataclass(frozen=True, slots=True)
class ServiceStats:
    """As things are, and counts since the start."""

    waiting: int
    running: int
    kv_blocks: int
    kv_blocks_used: int  # that running requests hold
    kv_blocks_cached: int  # whose content may be found again, and that give way when there is need
    prompt_tokens: int  # of requests that were let in
    cached_prompt_tokens: int  # of these, found in the cache
    generated_tokens: int
    preemptions: int
    passes: int
    page_hit_rate: float | None = None  # where weights are paged
    pages_bytes_resident: int | None = None
    pages_budget_bytes: int | None = None


class Submission:
    """A request on its way; iterating yields its updates until one that has a finish_reason. Left as a context, it is
    cancelled if it has not ended."""

    def __init__(self, request: Request, cancel: Callable[[Submission], None]) -> None:
        self.request, self._cancel = request, cancel
        self.loop = asyncio.get_running_loop()
        self._updates: deque[Update] = deque()
        self._came = asyncio.Event()
        self.ended = False  # its last update has come, or never will

    async def __aiter__(self) -> AsyncIterator[Update]:
        while True:
            while self._updates:
                update = self._updates.popleft()
                yield update
                if update.finish_reason:
                    return
            if self.ended:
                return
            self._came.clear()
            await self._came.wait()

    def cancel(self) -> None:
        """From the event loop. What it held is free when the pass that is running has ended."""
        if not self.ended:
            self._cancel(self)
            self.put(Update(self.request, finish_reason="interrupted"))

    def put(self, update: Update) -> None:
        if not self.ended:
            self._updates.append(update)
            self.ended = update.finish_reason is not None
            self._came.set()

    async def __aenter__(self) -> Submission:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()


class EngineService:
    """Submissions and cancellations go through a list to the thread, which takes them between passes; what a pass did
    comes back to the event loop in one call."""

    def __init__(self, llm: LLM, *, max_waiting: int = 256) -> None:
        self.llm, self.max_waiting = llm, max_waiting
        self.on_pass: Callable[[PassInfo], None] | None = None  # called in the thread
        self.on_failure: Callable[[], None] | None = None  # called in the thread at its end, where `failure` says why
        self.failure: Exception | None = None  # after which nothing more is answered
        self._engine = llm.engine
        self._thread = threading.Thread(target=self._run, name="ciuic-engine", daemon=True)
        self._inbox: deque[tuple[bool, Submission]] = deque()  # (it is new, else to be cancelled, submission)
        self._wake = threading.Event()
        self._live: dict[int, Submission] = {}  # the event loop's, until their last update has been handed over
        self._known: dict[int, Submission] = {}  # the thread's
        self._closing = self._draining = self._ended = False
        self._handing_in = threading.Lock()  # nothing goes into the inbox that the thread would never see
        self._prompt_tokens = self._cached_tokens = self._generated = self._passes = 0
        self._looked, self._gathered = -LOOKED_SECONDS, 0.0  # of time.monotonic(), s
        llm.keep_newest(MOST_EVENTS)
        llm.on_look = self._look

    def start(self) -> None:
        self.llm.use_in(self._thread)
        self._thread.start()

    def submit(
        self, prompt: Sequence[int], params: SamplingParams, *, client: str = "", guide: Guide | None = None
    ) -> Submission:
        """From the event loop. Raises InvalidInput for what cannot be run, QueueFull, and ShuttingDown."""
        if self._draining or self._closing:
            raise ShuttingDown("the server is shutting down and takes no new requests; try another one, or later")
        room = self.llm.max_num_seqs + self.max_waiting
        if len(self._live) >= room:
            raise QueueFull(
                f"{len(self._live)} requests are running or waiting, and {room} may be (--max-num-seqs and "
                "--max-waiting); try again later"
            )
        submission = Submission(self.llm.request(prompt, params, client, guide), self._cancelled)
        if not self._send(True, submission):
            raise ShuttingDown("the server was shut down")
        self._live[submission.request.index] = submission
        return submission

    async def drain(self) -> None:
        """Refuses what comes; returns when all that was let in has ended."""
        self._draining = True
        while self._live:
            await asyncio.sleep(0.02)

    @property
    def draining(self) -> bool:
        return self._draining or self._closing

    def close(self) -> None:
        """Ends the thread after the pass that is running; what has not ended is cancelled. Whoever looks at what was
        recorded is gone by then: from now on that is asked for in the caller's thread."""
        self._closing = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()
        self.llm.on_look = None

    def stats(self) -> ServiceStats:
        batching, memory = self._engine.batching, self.llm.paged_memory
        blocks, new = batching.blocks, sum(is_new for is_new, _ in tuple(self._inbox))
        return ServiceStats(
            len(batching.waiting) + new, len(batching.running), blocks.num_blocks, blocks.num_used, blocks.num_cached,
            self._prompt_tokens, self._cached_tokens, self._generated, batching.preemptions, self._passes,
            *((memory.report.hit_rate, memory.state.used, memory.budget) if memory else ()),
        )  # fmt: skip

    # In any thread

    def _look(self) -> None:
        """Somebody looks at what was recorded."""
        looked_at, self._looked = self._is_looked_at(), time.monotonic()
        if not looked_at:
            self._wake.set()

    def _is_looked_at(self) -> bool:
        return time.monotonic() - self._looked < LOOKED_SECONDS

    # In the event loop

    def _send(self, new: bool, submission: Submission) -> bool:
        """Whether the thread will see it."""
        with self._handing_in:
            if not self._ended:
                self._inbox.append((new, submission))
                self._wake.set()
            return not self._ended

    def _cancelled(self, submission: Submission) -> None:
        self._live.pop(submission.request.index, None)
        self._send(False, submission)

    def _hand_over(self, updates: Sequence[tuple[Submission, Update]]) -> None:
        for submission, update in updates:
            if update.finish_reason:
                self._live.pop(submission.request.index, None)
            submission.put(update)

    # In the thread

    def _run(self) -> None:
        try:
            self.llm.set_torch_threads()
            while not self._closing and self.failure is None:
                if not self._engine.busy and not self._inbox:
                    self._wake.wait(GATHER_SECONDS if self._is_looked_at() else CHECK_SECONDS)
                    self._check()
                self._wake.clear()
                self._take_in()
                if self._engine.busy:
                    self._deliver(self._pass())
                self._gather()
        except Exception as error:
            log.exception("the engine's thread ends by a mistake of ours; nothing more will be answered")
            self.failure = error
        finally:
            self._closing = True
            with self._handing_in:
                self._ended = True
                self._take_in()
            for submission in self._known.values():
                self._engine.cancel(submission.request)
            self._deliver([Update(s.request, finish_reason="interrupted") for s in self._known.values()])
            self.llm.use_anywhere()
            if self.failure is not None and self.on_failure is not None:
                self.on_failure()

    def _check(self) -> None:
        """While there is nothing to do: whether anything could be done."""
        try:
            self.llm.check()
        except CiuicError as error:
            self.failure = error

    def _gather(self) -> None:
        now = time.monotonic()
        if self._is_looked_at() and now - self._gathered >= GATHER_SECONDS:
            self._gathered = now
            self.llm.gather()

    def _take_in(self) -> None:
        while self._inbox:
            new, submission = self._inbox.popleft()
            if new:
                self._known[submission.request.index] = submission
                self._engine.add(submission.request)
            elif self._known.pop(submission.request.index, None):
                self._engine.cancel(submission.request)

    def _pass(self) -> list[Update]:
        """What one pass did. A pass that fails ends the requests that run, and the next ones are tried again, unless
        the model has ended with it."""
        batching, begin = self._engine.batching, time.perf_counter()
        try:
            done, updates = self.llm.step()
        except Exception as error:
            log.error("a pass failed, and with it %d requests: %s", len(batching.running), error, exc_info=True)
            self.failure = error if self.llm.ended else None
            return [self._failed(request, error) for request in list(batching.running)]
        if done is None:
            return []
        self._account(done, updates, time.perf_counter() - begin)
        return updates

    def _failed(self, request: Request, error: Exception) -> Update:
        self._engine.cancel(request, "error")
        request.finish_reason, request.error = "error", str(error)
        return Update(request, finish_reason="error", error=request.error)

    def _account(self, done: Pass, updates: Sequence[Update], seconds: float) -> None:
        self._passes += 1
        for update in updates:
            self._generated += len(update.token_ids)
            if len(update.request.token_ids) == len(update.token_ids):  # its first
                self._prompt_tokens += len(update.request.prompt)
                self._cached_tokens += update.request.cached
        if self.on_pass is not None:
            batching, size, times = self._engine.batching, size_of(done), self.llm.pass_times
            forecast = times.seconds(size) if times else None
            waiting, running = len(batching.waiting), len(batching.running)
            self.on_pass(PassInfo(seconds, forecast, size.tokens, size.decodes, running, waiting))

    def _deliver(self, updates: Sequence[Update]) -> None:
        """To the event loops that wait for them, usually one."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Submission, Update]]] = {}
        for update in updates:
            if (submission := self._known.get(update.request.index)) is None:
                continue
            if update.finish_reason:
                del self._known[update.request.index]
            by_loop.setdefault(submission.loop, []).append((submission, update))
        for loop, mine in by_loop.items():
            with suppress(RuntimeError):  # a loop that was closed has nobody left who waits
                loop.call_soon_threadsafe(self._hand_over, mine)


def size_of(done: Pass) -> Size:
    """Of a pass, for its forecast."""
    alone = [r.computed for r in done.decoding]
    rest = [c for c in done.chunks if c.prompt or len(c.token_ids) > 1]
    tokens = sum(len(c.token_ids) for c in rest)
    at = sum(c.position for c in rest) // len(rest) if rest else 0
    return Size(len(alone), sum(alone) // len(alone) if alone else 0, tokens, at)
