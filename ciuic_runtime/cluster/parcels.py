"""What a stage is told of a pass, and what the last one answers, as bytes between processes of one run: Ray takes bytes
as they are, which costs a fifth less a pass than objects that it has to look into (benchmarks/pipeline.py)."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass

from ciuic_runtime.engine.draw import Draw, Drawn
from ciuic_runtime.models.batch import Chunk
from ciuic_runtime.schedulers.graph import Phase


@dataclass(frozen=True, slots=True)
class Call:
    """Of every stage."""

    chunks: tuple[Chunk, ...]
    phase: Phase
    number: int  # by which the pass was sent

    def to_bytes(self) -> bytes:
        return pickle.dumps(self, protocol=5)

    @staticmethod
    def from_bytes(data: bytes) -> Call:
        call: Call = pickle.loads(data)
        return call


def draws_to_bytes(draws: Sequence[Draw]) -> bytes:
    return pickle.dumps(tuple(draws), protocol=5)


def draws_from_bytes(data: bytes) -> tuple[Draw, ...]:
    draws: tuple[Draw, ...] = pickle.loads(data)
    return draws


def drawn_to_bytes(drawn: Sequence[Drawn]) -> bytes:
    return pickle.dumps(list(drawn), protocol=5)


def drawn_from_bytes(data: bytes) -> list[Drawn]:
    drawn: list[Drawn] = pickle.loads(data)
    return drawn
