"""A small model opened once, for tests that only use it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ciuic_runtime.devices.spec import Topology
from ciuic_runtime.engine.llm import LLM


@pytest.fixture(scope="module")
def llm(tiny_v3: Path, here: Topology) -> Iterator[LLM]:
    """The tiny DeepSeek-V3 in float32: 512 positions, at most 3 sequences at once, 40 prompt tokens per pass."""
    with LLM(
        tiny_v3, devices=here, dtype="float32", max_model_len=512, max_num_seqs=3, prefill_chunk=40, threads=1
    ) as x:
        yield x
