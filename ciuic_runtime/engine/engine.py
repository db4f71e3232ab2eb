"""One pass after the other for any number of requests: asks the batching what to compute, has it computed, and tells
the requests what came of it. Knows no threads and no clients; `LLM` and `EngineService` drive it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from ciuic_runtime.devices.errors import CiuicError
from ciuic_runtime.engine.batching import Batching, Pass
from ciuic_runtime.engine.draw import Draw, Drawn, draw_all, draws_of
from ciuic_runtime.engine.executor import LocalExecutor
from ciuic_runtime.engine.journal import Journal
from ciuic_runtime.engine.request import FinishReason, Request, Update
from ciuic_runtime.models.batch import make_batch


class StageLost(CiuicError):
    """A stage's process or node is gone, or does not answer."""

    def __init__(self, index: int, node: str, why: str) -> None:
        super().__init__(f"stage {index}{f' on {node}' if node else ''} was lost: {why}")
        self.index, self.node, self.why = index, node, why


class Runner(Protocol):
    """Computes passes, in the order in which they begin."""

    depth: int  # so many passes may be on their way at once

    def begin(self, todo: Pass, draws: Sequence[Draw]) -> None: ...

    def end(self) -> tuple[Pass, list[Drawn]]:
        """Of the pass that began first."""

    def abandon(self) -> None:
        """Passes on their way are not waited for."""


class LocalRunner:
    """In this process, when it begins."""

    depth = 1

    def __init__(self, executor: LocalExecutor) -> None:
        self.executor = executor
        self._done: tuple[Pass, list[Drawn]] | None = None

    def begin(self, todo: Pass, draws: Sequence[Draw]) -> None:
        drawn: list[Drawn] = []

        def sampler(logits: torch.Tensor) -> None:
            drawn.extend(self.draw(draws, logits))

        self.executor.step(make_batch(todo.chunks), todo.phase, sampler)
        self._done = todo, drawn

    def draw(self, draws: Sequence[Draw], logits: torch.Tensor) -> list[Drawn]:
        return draw_all(draws, logits)

    def end(self) -> tuple[Pass, list[Drawn]]:
        assert self._done is not None, "no pass has begun"
        done, self._done = self._done, None
        return done

    def abandon(self) -> None:
        self._done = None


class Engine:
    def __init__(self, runner: Runner, batching: Batching) -> None:
        self.runner, self.batching, self.journal = runner, batching, Journal()
        batching.depth = runner.depth
        self._begun = 0  # passes on their way

    @property
    def busy(self) -> bool:
        return bool(self.batching.running or self.batching.waiting)

    def add(self, request: Request) -> None:
        self.batching.add(request)
        self.journal.arrived(request)

    def cancel(self, request: Request, reason: FinishReason = "interrupted") -> bool:
        """Not while `step` runs; whether it was still there. Its blocks are free now, or when its pass has ended."""
        there = self.batching.cancel(request)
        if there:
            request.finish(reason)
            self.journal.ended(request)
        return there

    def step(self) -> tuple[Pass | None, list[Update]]:
        """The next pass that ends, if there is anything to do, and what came of it. If it fails, what it raises goes to
        the caller, and its requests are still there."""
        try:
            while self._begun < self.runner.depth and (todo := self.batching.next_pass()) is not None:
                self.journal.begun(todo)
                self.runner.begin(todo, draws_of(todo))
                self._begun += 1
            if not self._begun:
                return None, []
            done, drawn = self.runner.end()
        except BaseException:
            self._abandon()
            self.batching.abandon()
            raise
        self._begun -= 1
        self.batching.computed(done)
        updates = self._updates(done, drawn)
        batching = self.batching
        self.journal.passed(done, len(batching.running), len(batching.waiting), batching.blocks.num_used)
        batching.release_finished()
        return done, updates

    def restart(self) -> None:
        """What was on its way and what was cached is lost; all that ran catches up from its tokens."""
        self._abandon()
        self.batching.depth = self.runner.depth
        self.batching.restart()

    def reset(self) -> None:
        """Everything is forgotten, wherever an exception may have struck."""
        self._abandon()
        self.batching.reset()
        self.journal.all_ended("interrupted")

    def _abandon(self) -> None:
        self._begun = 0
        self.runner.abandon()

    def _updates(self, done: Pass, drawn: Sequence[Drawn]) -> list[Update]:
        sampled = [(r, c) for r, c in zip(done.requests, done.chunks, strict=True) if c.sample]
        updates = []
        for (request, chunk), one in zip(sampled, drawn, strict=True):
            if request.finish_reason:
                continue  # cancelled while it was computed
            if chunk.sample == "all":
                before = request.prompt_logprobs[: chunk.position + 1] or [None]
                request.prompt_logprobs[:] = [*before, *one.told]
            if request.computed == request.num_tokens:
                updates.append(_next(request, one))
        return updates


def _next(request: Request, one: Drawn) -> Update:
    """The next token, or that there is none: the request ends with its prompt, or the model made no numbers."""
    told = () if request.token_ids else tuple(request.prompt_logprobs)
    if one.error is not None:
        request.error, text = one.error, request.finish("error")
        return Update(request, text, finish_reason="error", error=one.error, asked_too_much=one.asked_too_much)
    if one.token is None:
        text = request.finish("length")
        return Update(request, text, prompt_logprobs=told, finish_reason=request.finish_reason)
    logprobs = () if one.logprob is None else (one.logprob,)
    request.logprobs += logprobs
    text = request.append(one.token)
    return Update(request, text, (one.token,), logprobs, told, request.finish_reason)
