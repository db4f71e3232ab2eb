"""The pretrained sample model, quantised in a GGUF file, against transformers reading the same file in float32."""

from __future__ import annotations

from pathlib import Path

import torch
from agreement import relative_error
from hf_reference import forward
from transformers import PreTrainedModel

from ciuic_runtime.devices.spec import Topology
from ciuic_runtime.engine.llm import LLM
from ciuic_runtime.engine.sampling import SamplingParams

PROMPT = "The capital of France is"
# What transformers 5.23 gives, up to the end of sequence (2): " Paris.\n\nThe answer is: 2018-01-22 12:12:53."
TOKENS = [
    7042, 30, 198, 198, 504, 2988, 314, 42, 216, 34, 32, 33, 40, 29, 32,
    33, 29, 34, 34, 216, 33, 34, 42, 33, 34, 42, 37, 35, 30, 2,
]  # fmt: skip


def test_smollm2_agrees_with_transformers(smollm2: Path, smollm2_transformers: PreTrainedModel, here: Topology) -> None:
    with LLM(smollm2, devices=here, dtype="float32", max_model_len=256, max_num_seqs=1, threads=2) as llm:
        ids = llm.tokenizer.encode(PROMPT)
        output = llm.generate(PROMPT, SamplingParams(max_tokens=64))[0]
        logits = llm.logits(ids + TOKENS)
        chunked = llm.logits(ids + TOKENS, chunk=7)
    expected = forward(smollm2_transformers, ids + TOKENS)
    assert ids == [504, 3575, 282, 4649, 314]
    assert relative_error(logits, expected).max() <= 1e-4
    assert relative_error(chunked, expected).max() <= 1e-4
    assert expected[len(ids) - 1 : -1].argmax(-1).tolist() == TOKENS, "transformers says something else now"
    assert list(output.token_ids) == TOKENS
    assert output.finish_reason == "stop"
    assert output.text.startswith(" Paris.")
    assert not torch.isnan(logits).any()
