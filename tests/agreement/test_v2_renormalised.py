"""deepseek_v2 with norm_topk_prob: transformers ignores the field, so the formula takes its router's place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from agreement import open_llm, relative_error
from hf_reference import GROUPED, NEW, V2, Case, make, reference_of
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter

from ciuic_runtime.devices.spec import Topology
from ciuic_runtime.engine.sampling import SamplingParams


@pytest.mark.parametrize("grouped", [{}, GROUPED], ids=["greedy", "groups"])
def test_renormalised_weights(
    grouped: dict[str, Any], here: Topology, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """w_i = s_i / sum of the chosen s, with softmax scores s; routed_scaling_factor is 1, as in every such model."""
    case = Case("v2-normalised", V2 | grouped | {"norm_topk_prob": True, "num_experts_per_tok": 3})
    plain = make(case, tmp_path)
    forward = DeepseekV2TopkRouter.forward

    def renormalised(self: DeepseekV2TopkRouter, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits, weights, ids = forward(self, x)
        return logits, weights / weights.sum(-1, keepdim=True), ids

    monkeypatch.setattr(DeepseekV2TopkRouter, "forward", renormalised)
    expected = reference_of(tmp_path, plain.prompt, case)
    assert relative_error(plain.logits, expected.logits).max() > 1e-2, "renormalising changes nothing here"
    with open_llm(tmp_path, here) as llm:
        assert relative_error(llm.logits(plain.prompt), expected.logits).max() <= 1e-4
        output = llm.generate(plain.prompt, SamplingParams(max_tokens=NEW, ignore_eos=True))[0]
    assert list(output.token_ids) == expected.tokens
