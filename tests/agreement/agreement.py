"""How far two results are apart, and how a checkpoint is opened for a comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ciuic_runtime.devices.spec import Topology
from ciuic_runtime.engine.llm import LLM


def open_llm(path: Path, topology: Topology, dtype: str = "float32", **settings: Any) -> LLM:
    """Small enough to be quick, with room for a prompt and its continuation."""
    return LLM(path, devices=topology, dtype=dtype, threads=1, **{"max_model_len": 192, "max_num_seqs": 4} | settings)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Per position: the distance of the logits relative to their length."""
    assert got.shape == expected.shape, (got.shape, expected.shape)
    return (got - expected).norm(dim=-1) / expected.norm(dim=-1)


def kl_divergence(expected: torch.Tensor, got: torch.Tensor) -> torch.Tensor:
    """Per position: KL(expected || got) of the distributions that the logits stand for, in double precision."""
    p, q = expected.double().log_softmax(-1), got.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)
