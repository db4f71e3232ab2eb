"""What is left of a real model's logits in 8 and 4 bits and in bfloat16, against its float32 logits.
The figures are those of benchmarks/quality.py, with room; the text is in English, as the model's training was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ciuic_runtime.devices.spec import Topology
from ciuic_runtime.engine.llm import LLM

TEXT = (
    "The river rises in the hills above the town and reaches the sea after two hundred miles. For most of that way it "
    "is slow and brown, and barges carried grain and timber along it until the railway came."
)


def logits(path: Path, here: Topology, format: str, kernels: str = "auto") -> torch.Tensor:
    with LLM(path, devices=here, dtype=format, kernels=kernels, max_model_len=256, max_num_seqs=1, threads=2) as llm:
        return llm.logits(llm.tokenizer.encode(TEXT))


@pytest.fixture(scope="module")
def exact(smollm2: Path, here: Topology) -> torch.Tensor:
    return logits(smollm2, here, "float32")


def divergence(exact: torch.Tensor, got: torch.Tensor) -> float:
    log = exact.log_softmax(-1)
    return float((log.exp() * (log - got.log_softmax(-1))).sum(-1).mean())


@pytest.mark.parametrize(
    ("format", "most", "same"),
    [("bfloat16", 0.003, 0.95), ("int8", 0.04, 0.85), ("int4", 1.0, 0.5)],  # 4 bits: rounded to nearest, 135 M weights
)
def test_packed_logits_are_near_the_exact_ones(
    format: str, most: float, same: float, exact: torch.Tensor, smollm2: Path, here: Topology
) -> None:
    got = logits(smollm2, here, format)
    assert divergence(exact, got) <= most
    assert (exact.argmax(-1) == got.argmax(-1)).float().mean() >= same


def test_native_bfloat16_is_no_further_off_than_torchs(exact: torch.Tensor, smollm2: Path, here: Topology) -> None:
    torchs = divergence(exact, logits(smollm2, here, "bfloat16", "reference"))
    assert divergence(exact, logits(smollm2, here, "bfloat16")) <= torchs
