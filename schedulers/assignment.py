"""What a schedule consists of besides its topology: rows, the forecast, and the candidates that were considered.
Knows nothing of how any of it came about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True)
class Assignment:
    """One row of a schedule: a task, or one routed expert of a task group."""

    task: str  # layers.3.attention, layers.3.experts.17
    device: str  # computes it
    home: str  # stores its weights
    nbytes: int  # at home; 0 where another row on that device holds the same page (tied embeddings)


@dataclass(frozen=True, slots=True)
class Paging:
    """How pages whose home is a disk come into the memory of the device that computes with them."""

    device: str  # cpu
    disk: str
    cache_bytes: int  # of that device's memory, for all pages
    policy: str = "auto"  # which routed experts stay
    lookahead: int = 2  # layers ahead that routed experts are guessed and read; 0: when they are needed


@dataclass(frozen=True, slots=True)
class ModelSummary:
    name: str
    format: str
    parameters: int
    active_parameters: int


@dataclass(frozen=True, slots=True)
class Prediction:
    first_token_s: float  # until every sequence of the batch has its first token
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    range: tuple[float, float]  # of decode_tokens_per_s
    bound_by: str  # "memory of cpu": what the decode step spends most of its time on
    memory_bytes: Mapping[str, int]  # by device: weights, cache and working memory
    basis: Literal["measured", "estimated", "mixed"]
    seconds_per_token: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # phase -> kind of task -> s


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plan that was considered, also when it lost or does not fit."""

    name: str
    feasible: bool
    decode_tokens_per_s: float | None = None
    prefill_tokens_per_s: float | None = None
    why_not: str = ""  # "" for the chosen one
