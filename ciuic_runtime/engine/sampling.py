"""How the next token is chosen from logits: the parameters a user gives, and pure functions of them and the logits.
A draw depends on (seed, position) only, so neighbours, restarts and batch order cannot change it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ciuic_runtime.devices.errors import InvalidInput

MOST_LOGPROBS = 20
LIKELIEST = 1024  # tokens that are put in order first; mostly they are enough, and all are not needed
MOST_LOGIT = torch.finfo(torch.float32).max

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How likely the model found a token, before temperature and the like."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # token ids and their log probabilities, likeliest first


@dataclass(frozen=True)  # without slots: these would be pickled field by field, for every pass to another process
class SamplingParams:
    max_tokens: int = 128
    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0  # tokens less likely than this share of the likeliest are dropped
    repetition_penalty: float = 1.0
    seed: int | None = None  # None: drawn afresh for each request, and reported
    stop: tuple[str, ...] = ()  # generation ends before the first of these strings
    ignore_eos: bool = False
    logprobs: int | None = None  # of each new token, and of so many of the likeliest beside it; None: none
    prompt_logprobs: int | None = None  # the same of the prompt's tokens; max_tokens may be 0 then

    def __post_init__(self) -> None:
        stop: object = self.stop  # one text, or a list of them, is taken too
        if not isinstance(stop, (str, tuple, list)):
            raise InvalidInput(f"stop is {stop!r}; give a text, or a list of them")
        object.__setattr__(self, "stop", (stop,) if isinstance(stop, str) else tuple(stop))
        _whole("max_tokens", self.max_tokens, 1 if self.prompt_logprobs is None else 0, 2**31)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), 0, MOST_LOGPROBS)
        _whole("top_k", self.top_k, 0, 2**31)
        if self.seed is not None:
            _whole("seed", self.seed, 0, 2**63)
        _number("temperature", self.temperature, 0, 100)
        _number("top_p", self.top_p, 0, 1, open_low=True)
        _number("min_p", self.min_p, 0, 1)
        _number("repetition_penalty", self.repetition_penalty, 0, 100, open_low=True)
        if not all(isinstance(s, str) and s for s in self.stop):
            raise InvalidInput(f"stop {self.stop!r}: stop strings must be text that is not empty")


def sample(logits: torch.Tensor, params: SamplingParams, history: Sequence[int], seed: int, position: int) -> int:
    """One token from logits float32 [vocab]. `history` is prompt and output so far, for the repetition penalty."""
    values = logits.numpy()
    best = int(values.argmax())  # of a NaN, where there is one
    if not np.isfinite(values[best]):
        raise FloatingPointError("the model produced NaN or infinite logits; its weights or activations overflow")
    if params.repetition_penalty != 1.0 and history:
        logits = _penalised(logits, params.repetition_penalty, history)
        best = int(logits.argmax())
    if params.temperature == 0:
        return best
    # Differences to the largest, in double precision: a tiny temperature makes them -inf, never NaN.
    ranks = ((logits - logits.max()).double() / params.temperature).numpy()
    weights, number = np.exp(ranks), uniform(seed, position)
    drawn = _drawn(weights, _likeliest(ranks, LIKELIEST), params, number)
    if drawn is None:
        drawn = _drawn(weights, _likeliest(ranks, len(ranks)), params, number)
    assert drawn is not None, "nothing is left out of all tokens"
    return drawn


def token_logprob(logits: torch.Tensor, token_id: int, count: int) -> TokenLogprob:
    """Of a token, and of the `count` likeliest, from logits float32 [vocab]."""
    all = logits.log_softmax(dim=0)
    values, ids = all.topk(count) if count else (all[:0], all[:0].long())
    return TokenLogprob(token_id, float(all[token_id]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that is a function of its arguments (the counter-based generator Philox)."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=position)).random())


def _likeliest(ranks: Doubles, least: int) -> npt.NDArray[np.int64]:
    """The tokens of at least so many of the highest ranks [vocab], likeliest first, of equals the first first; of
    equals all or none."""
    ids = np.arange(len(ranks))
    if least < len(ranks):
        ids = np.flatnonzero(ranks >= np.partition(ranks, -least)[-least])
    return ids[np.argsort(-ranks[ids], kind="stable")]


def _drawn(weights: Doubles, ids: npt.NDArray[np.int64], params: SamplingParams, number: float) -> int | None:
    """The token at `number`, in [0, 1), of what top-k, top-p and min-p leave of the weights [vocab], the largest of
    which is 1; these leave the likeliest so many, and one at least. `ids` are some likeliest in their order; None where
    more of them are needed. Whatever is given, sums are of the same numbers in the same order."""
    whole, cumulative, total = len(ids) == len(weights), weights[ids].cumsum(), float(weights.sum())
    kept = len(weights)
    if params.top_k and params.top_k < kept:
        kept = params.top_k
        if kept > len(ids):
            return None
        total = float(cumulative[kept - 1])
    if params.top_p < 1:
        before = int(np.searchsorted(cumulative, params.top_p * total))  # of which the sum is less than top-p
        if before == len(ids) and not whole:
            return None
        kept = min(kept, before + 1)
    if params.min_p:
        kept = min(kept, int(np.count_nonzero(weights >= params.min_p)))
    if kept < len(weights):
        if kept > len(ids):
            return None
        total = float(cumulative[kept - 1])
    at = int(np.searchsorted(cumulative, number * total, side="right"))
    if at == len(ids) and not whole:
        return None
    if at >= kept:  # by rounding
        at = int(np.flatnonzero(weights[ids[:kept]])[-1])
    return int(ids[at])


def _penalised(logits: torch.Tensor, penalty: float, history: Sequence[int]) -> torch.Tensor:
    """Seen tokens' logits divided by the penalty where positive, multiplied where negative (CTRL, arXiv 1909.05858)."""
    seen = torch.tensor(sorted(set(history)))
    values = logits[seen]
    logits = logits.clone()
    # The smallest penalties would make the likeliest infinite, and its distance to itself no number.
    logits[seen] = torch.where(values > 0, values / penalty, values * penalty).clamp(max=MOST_LOGIT)
    return logits


def _whole(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        most = f" and at most {high}" if high < 2**31 else ""
        raise InvalidInput(f"{name} is {value!r}; it must be a whole number of at least {low}{most}")


def _number(name: str, value: object, low: float, high: float, open_low: bool = False) -> None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
    if not good or (open_low and value == low):
        least = f"above {low} and at most" if open_low else f"from {low} to"
        raise InvalidInput(f"{name} is {value!r}; it must be a number {least} {high}")
