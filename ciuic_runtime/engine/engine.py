"""One pass at a time for any number of requests: asks the batching what to compute, has it computed, samples.
Knows no threads and no clients; `LLM` and `EngineService` drive it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ciuic_runtime.engine.batching import Batching, Pass
from ciuic_runtime.engine.executor import LocalExecutor
from ciuic_runtime.engine.guide import GuideFailed
from ciuic_runtime.engine.request import Request, Update
from ciuic_runtime.engine.sampling import TokenLogprob, sample, token_logprob
from ciuic_runtime.models.batch import make_batch


class Engine:
    def __init__(self, executor: LocalExecutor, batching: Batching) -> None:
        self.executor, self.batching = executor, batching

    @property
    def busy(self) -> bool:
        return bool(self.batching.running or self.batching.waiting)

    def add(self, request: Request) -> None:
        self.batching.add(request)

    def cancel(self, request: Request) -> bool:
        """Not while a pass runs; whether it was still there. Its blocks are free afterwards."""
        there = self.batching.cancel(request)
        if there:
            request.finish("interrupted")
        return there

    def step(self) -> tuple[Pass | None, list[Update]]:
        """The next pass, if there is anything to do, and what came of it. If the pass itself fails, what it raises goes
        to the caller, and its requests are still there."""
        todo = self.batching.next_pass()
        if todo is None:
            return None, []
        updates: list[Update] = []

        def sampler(logits: torch.Tensor) -> None:
            self.batching.computed(todo)
            updates.extend(self._updates(todo, logits))

        self.executor.step(make_batch(todo.chunks), todo.phase, sampler)
        self.batching.release_finished()
        return todo, updates

    def _updates(self, done: Pass, logits: torch.Tensor) -> list[Update]:
        updates, at = [], 0
        for request, chunk in zip(done.requests, done.chunks, strict=True):
            if not chunk.sample:
                continue
            rows = len(chunk.token_ids) if chunk.sample == "all" else 1
            mine, at = logits[at : at + rows], at + rows
            if chunk.sample == "all":
                self._tell_prompt(request, chunk.position, mine)
            if request.computed == request.num_tokens:
                updates.append(self._next(request, mine[-1]))
        return updates

    def _tell_prompt(self, request: Request, position: int, logits: torch.Tensor) -> None:
        """Each row says how likely the token after its own was."""
        count, told = request.params.prompt_logprobs or 0, request.prompt_logprobs
        if position == 0:
            told[:] = [None]
        following = request.prompt[position + 1 : position + 1 + len(logits)]
        told += [token_logprob(row, token, count) for row, token in zip(logits, following, strict=False)]

    def _next(self, request: Request, logits: torch.Tensor) -> Update:
        """The next token, or that there is none: the request ends with its prompt, or the model made no numbers."""
        told = () if request.token_ids else tuple(request.prompt_logprobs)
        if not request.params.max_tokens:
            text = request.finish("length")
            return Update(request, text, prompt_logprobs=told, finish_reason=request.finish_reason)
        try:
            token, logprobs = self.sample(request, logits)
        except (FloatingPointError, GuideFailed) as error:
            request.error = f"prompt {request.index}, position {request.computed}: {error}"
            text, asked = request.finish("error"), isinstance(error, GuideFailed)
            return Update(request, text, finish_reason="error", error=request.error, asked_too_much=asked)
        request.logprobs += logprobs
        text = request.append(token)
        return Update(request, text, (token,), tuple(logprobs), told, request.finish_reason)

    def sample(self, request: Request, logits: torch.Tensor) -> tuple[int, Sequence[TokenLogprob]]:
        """The token that follows a request's last one, by logits float32 [vocab], which may be changed."""
        params, guide = request.params, request.guide
        raw = logits.clone() if guide is not None and params.logprobs is not None else logits
        if guide is not None:
            guide.mask(logits.numpy())
        history = request.history if params.repetition_penalty != 1.0 else ()
        token = sample(logits, params, history, request.seed, request.computed)
        if guide is not None:
            guide.accept(token)
        return token, () if params.logprobs is None else (token_logprob(raw, token, params.logprobs),)
