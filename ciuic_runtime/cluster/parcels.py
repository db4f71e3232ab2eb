"""What a stage is told of a pass, and what the last one answers, as bytes between processes of one run: Ray takes bytes
as they are, which costs a fifth less a pass than objects that it has to look into (benchmarks/pipeline.py). They are
made of tuples and plain objects, which pickle takes apart and puts together without a line of Python."""

from __future__ import annotations

import pickle
from typing import Any, NamedTuple

from ciuic_runtime.models.batch import Chunk
from ciuic_runtime.schedulers.graph import Phase


class Call(NamedTuple):
    """What every stage is told."""

    chunks: tuple[Chunk, ...]
    phase: Phase
    number: int  # by which the pass was sent


def pack(what: object) -> bytes:
    return pickle.dumps(what, protocol=5)


def unpack(data: bytes) -> Any:
    """Of bytes that `pack` made in this run; others must not come here."""
    return pickle.loads(data)
