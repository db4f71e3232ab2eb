"""What is wanted of the logits of one chunk, and what was made of them: the part of a pass that may be far away.
Knows parameters, seed and position; the request they belong to stays with the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from ciuic_runtime.engine.batching import Pass
from ciuic_runtime.engine.guide import GuideFailed
from ciuic_runtime.engine.request import Request
from ciuic_runtime.engine.sampling import SamplingParams, TokenLogprob, sample, token_logprob
from ciuic_runtime.models.batch import Chunk

if TYPE_CHECKING:
    from ciuic_runtime.engine.guide import Guide


class Draw(NamedTuple):
    """Of the `rows` rows that a chunk has among the logits: of each that is followed by a known token, how likely that
    one is; from the last, the next token, if it is wanted."""

    request: int  # its number
    rows: int
    params: SamplingParams
    seed: int
    position: int  # of the token that is drawn
    wanted: bool
    history: tuple[int, ...] = ()  # prompt and output so far, where a penalty needs them
    following: tuple[int, ...] = ()
    guide: Guide | None = None


class Drawn(NamedTuple):
    token: int | None = None
    logprob: TokenLogprob | None = None
    told: tuple[TokenLogprob, ...] = ()  # of the known tokens
    error: str | None = None  # why no token could be drawn
    asked_too_much: bool = False  # it is the guide that failed


def draws_of(todo: Pass) -> list[Draw]:
    """In the order of the rows."""
    return [_draw(r, c) for r, c in zip(todo.requests, todo.chunks, strict=True) if c.sample]


def _draw(request: Request, chunk: Chunk) -> Draw:
    params, end = request.params, chunk.position + len(chunk.token_ids)
    told = chunk.sample == "all"
    return Draw(
        request.index, len(chunk.token_ids) if told else 1, params, request.seed, end,
        wanted=end == request.num_tokens and params.max_tokens > 0,
        history=tuple(request.history) if params.repetition_penalty != 1.0 else (),
        following=request.prompt[chunk.position + 1 : end + 1] if told else (), guide=request.guide,
    )  # fmt: skip


def draw_all(draws: Sequence[Draw], logits: torch.Tensor) -> list[Drawn]:
    """From logits float32 [rows of all draws, vocab], which may be changed."""
    drawn, at = [], 0
    for one in draws:
        drawn.append(draw(one, logits[at : at + one.rows]))
        at += one.rows
    return drawn


def draw(one: Draw, logits: torch.Tensor) -> Drawn:
    """One chunk's. Its rows' bits are its own, so what is drawn depends on nobody else."""
    params, count = one.params, one.params.prompt_logprobs or 0
    told = tuple(token_logprob(row, token, count) for row, token in zip(logits, one.following, strict=False))
    if not one.wanted:
        return Drawn(told=told)
    last, guide = logits[-1], one.guide
    raw = last.clone() if guide is not None and params.logprobs is not None else last
    try:
        if guide is not None:
            guide.mask(last.numpy())
        token = sample(last, params, one.history, one.seed, one.position)
    except (FloatingPointError, GuideFailed) as error:
        says = f"prompt {one.request}, position {one.position}: {error}"
        return Drawn(told=told, error=says, asked_too_much=isinstance(error, GuideFailed))
    if guide is not None:
        guide.accept(token)
    return Drawn(token, None if params.logprobs is None else token_logprob(raw, token, params.logprobs), told)
