"""A request while it lives, and what is handed back of it.
Knows its own tokens and blocks; when it runs is the batching's decision."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from ciuic_runtime.engine.sampling import SamplingParams, TokenLogprob
from ciuic_runtime.engine.text import TextStream

if TYPE_CHECKING:
    from ciuic_runtime.engine.guide import Guide

FinishReason = Literal["stop", "length", "interrupted", "error"]


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What one prompt became. Times are in seconds since the request was made."""

    index: int
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]  # new tokens; an end-of-sequence token is the last one
    text: str
    finish_reason: FinishReason | None  # None: still running
    seed: int
    first_token_s: float | None
    total_s: float
    logprobs: tuple[TokenLogprob, ...] = ()  # of the new tokens, where they were asked for
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()  # of the prompt's; its first token has none


def not_begun(index: int, prompt: Sequence[int]) -> RequestOutput:
    """Of a prompt that was interrupted before its first token."""
    return RequestOutput(index, tuple(prompt), (), "", "interrupted", 0, None, 0.0)


@dataclass(eq=False, slots=True)
class Request:
    index: int
    prompt: tuple[int, ...]
    params: SamplingParams
    text: TextStream
    eos_token_ids: frozenset[int]
    client: str = ""  # whose turn it is goes by clients
    guide: Guide | None = None  # what may come next; None: anything
    token_ids: list[int] = field(default_factory=list)
    computed: int = 0  # tokens whose cache entries exist
    sent: int = 0  # these, and those in passes that are on their way
    cached: int = 0  # of the prompt's tokens, those whose entries were found in the cache when it was first let in
    blocks: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str | None = None
    made: float = field(default_factory=time.perf_counter)
    admitted: float | None = None  # into its first pass
    first_token: float | None = None
    last_token: float | None = None
    preemptions: int = 0  # times that it gave its blocks back before it had ended
    seed: int = 0

    def __post_init__(self) -> None:
        self.seed = secrets.randbits(63) if self.params.seed is None else self.params.seed

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.token_ids)

    @property
    def most_tokens(self) -> int:
        return len(self.prompt) + self.params.max_tokens

    @property
    def catching_up(self) -> bool:
        """Tokens have to be computed whose successors are known: a prompt, or what was given up for others' sake."""
        return self.computed < self._known

    @property
    def unsent(self) -> bool:
        """Some of these are in no pass yet."""
        return self.sent < self._known

    @property
    def _known(self) -> int:
        """Tokens that are computed in chunks: all but the last one that was generated."""
        return max(len(self.prompt), self.num_tokens - 1)

    @property
    def history(self) -> list[int]:
        return [*self.prompt, *self.token_ids]

    def tokens(self, start: int, end: int) -> tuple[int, ...]:
        """Of prompt and output, those at positions [start, end)."""
        n = len(self.prompt)
        return (*self.prompt[start:end], *self.token_ids[max(0, start - n) : max(0, end - n)])

    def append(self, token_id: int) -> str:
        """Takes the next token; returns the text that can be shown for it."""
        self.last_token = time.perf_counter()
        self.first_token = self.first_token or self.last_token
        self.token_ids.append(token_id)
        if token_id in self.eos_token_ids and not self.params.ignore_eos:
            return self.finish("stop")
        shown = self.text.push(token_id)
        if len(self.token_ids) >= self.params.max_tokens:
            shown += self.finish("length")
        if self.text.stopped:
            self.finish_reason = "stop"
        return shown

    def finish(self, reason: FinishReason) -> str:
        self.finish_reason = reason
        return self.text.finish()

    def output(self) -> RequestOutput:
        end = self.last_token or time.perf_counter()
        return RequestOutput(
            self.index, self.prompt, tuple(self.token_ids), self.text.text, self.finish_reason, self.seed,
            self.first_token and self.first_token - self.made, end - self.made, tuple(self.logprobs),
            tuple(self.prompt_logprobs),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Update:
    """What a pass did for a request."""

    request: Request
    text: str = ""  # that can be shown now
    token_ids: tuple[int, ...] = ()  # new ones
    logprobs: tuple[TokenLogprob, ...] = ()  # of these, where they were asked for
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()  # when the prompt ends, where they were asked for
    finish_reason: FinishReason | None = None
    error: str | None = None  # why it could not go on
    asked_too_much: bool = False  # it is what was asked for that could not go on, and not the model
