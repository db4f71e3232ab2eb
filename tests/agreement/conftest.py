"""Reference models, made once per session and by name only when a test asks for one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hf_reference import CASES, Case, Reference, make
from transformers import AutoModelForCausalLM, PreTrainedModel

Reader = Callable[[Case], Reference]


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    """The reference of a case; the cases that tests share are computed once."""
    torch.set_num_threads(1)  # more only wait for each other in models this small
    known: dict[str, Reference] = {}

    def of(case: Case) -> Reference:
        if case.name not in known:
            made = make(case, tmp_path_factory.mktemp(case.name))
            if case not in CASES:
                return made
            known[case.name] = made
        return known[case.name]

    return of


@pytest.fixture(scope="session")
def smollm2_reference(smollm2: Path) -> PreTrainedModel:
    """The pretrained sample model as transformers reads the same GGUF file, float32; loading it takes 15 s."""
    load = AutoModelForCausalLM.from_pretrained
    return load(smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32, local_files_only=True).eval()
