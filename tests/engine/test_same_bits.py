"""Whole models on the native kernels: a token's logits are the same bits for any number of threads, any size of prefill
chunk, alone or in a batch; across instruction sets they are close."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from watched import Watched

from ciuic_runtime.devices.spec import Topology
from ciuic_runtime.engine.sampling import SamplingParams
from ciuic_runtime.models.random_checkpoint import write_random_checkpoint
from ciuic_runtime.ops.native import kernels

pytestmark = pytest.mark.skipif(kernels() is None, reason="the native kernels are not built here")

FORMATS = ["bfloat16", "int8", "int4"]
PROMPTS = [[5, 250, 17, 99, 3, 3, 42] * 12, [7], list(range(60, 100)), [77] * 65, [9, 8]]
PARAMS = [
    SamplingParams(max_tokens=12, ignore_eos=True),
    SamplingParams(max_tokens=70, ignore_eos=True, temperature=1.2, seed=3),
    SamplingParams(max_tokens=9, ignore_eos=True, temperature=1.0, top_p=0.9, seed=4),
    SamplingParams(max_tokens=5, ignore_eos=True),
    SamplingParams(max_tokens=12, ignore_eos=True, temperature=0.7, seed=5, repetition_penalty=1.3),
]
MODELS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {
        "model_type": "deepseek_v2", "vocab_size": 320, "hidden_size": 72, "intermediate_size": 150,
        "moe_intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 3, "num_key_value_heads": 3,
        "q_lora_rank": None, "kv_lora_rank": 40, "qk_nope_head_dim": 20, "qk_rope_head_dim": 8, "v_head_dim": 18,
        "n_routed_experts": 6, "n_shared_experts": 2, "num_experts_per_tok": 2, "n_group": 3, "topk_group": 2,
        "topk_method": "group_limited_greedy", "scoring_func": "softmax", "norm_topk_prob": False,
        "routed_scaling_factor": 1.0, "first_k_dense_replace": 1, "moe_layer_freq": 1,
        "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu",
        "attention_bias": True, "tie_word_embeddings": False,
    },
    "llama": {
        "model_type": "llama", "vocab_size": 300, "hidden_size": 144, "intermediate_size": 200, "num_hidden_layers": 3,
        "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 256, "mlp_bias": True,
        "tie_word_embeddings": True,
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=["deepseek_v3", *MODELS])
def checkpoint(request: pytest.FixtureRequest, tiny_v3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "deepseek_v3":
        return tiny_v3
    return write_random_checkpoint(MODELS[request.param], tmp_path_factory.mktemp("models") / request.param)


class Runner(Watched):
    def run(self, which: Sequence[int]) -> dict[int, tuple[list[int], torch.Tensor]]:
        """Tokens and logits of the prompts of these numbers."""
        self.seen = {}
        outputs = self.generate([PROMPTS[i] for i in which], [PARAMS[i] for i in which])
        return {i: (list(o.token_ids), torch.stack(self.seen[o.index])) for i, o in zip(which, outputs, strict=True)}


def opened(checkpoint: Path, format: str, here: Topology, **settings: Any) -> Runner:
    return Runner(
        checkpoint, devices=here, dtype=format, max_model_len=192, **({"threads": 1, "max_num_seqs": 3} | settings)
    )


def same(got: dict[int, tuple[list[int], torch.Tensor]], expected: dict[int, tuple[list[int], torch.Tensor]]) -> bool:
    return all(
        tokens == expected[i][0] and torch.equal(logits.view(torch.int32), expected[i][1].view(torch.int32))
        for i, (tokens, logits) in got.items()
    )


@pytest.mark.parametrize("format", FORMATS)
def test_threads_chunks_and_company_change_no_bit(checkpoint: Path, format: str, here: Topology) -> None:
    everybody = range(len(PROMPTS))
    with opened(checkpoint, format, here, max_num_seqs=1) as llm:
        alone = {i: llm.run([i])[i] for i in everybody}
        prompt = llm.logits(PROMPTS[0])
        assert torch.equal(llm.logits(PROMPTS[0], chunk=1), prompt)
    assert len({tuple(tokens) for tokens, _ in alone.values()}) == len(PROMPTS)
    for threads, chunk, batch in ((1, 512, 5), (2, 7, 3), (3, 64, 2), (2, 33, 5)):
        with opened(checkpoint, format, here, threads=threads, prefill_chunk=chunk, max_num_seqs=batch) as llm:
            assert same(llm.run(everybody), alone), f"{threads} threads, chunks of {chunk}, {batch} at once"
            assert torch.equal(llm.logits(PROMPTS[0], chunk=chunk), prompt)
            assert same(llm.run([3, 0]), alone), "the same again in other company"


@pytest.mark.parametrize("format", FORMATS)
def test_every_instruction_set_keeps_its_bits_and_is_close_to_the_others(
    checkpoint: Path, format: str, here: Topology
) -> None:
    module = kernels()
    assert module is not None
    logits = {}
    for isa in module.instruction_sets():
        with opened(checkpoint, format, here, kernels=isa, max_num_seqs=1) as llm:
            alone = {i: llm.run([i])[i] for i in (2, 4)}
            logits[isa] = llm.logits(PROMPTS[0])
        with opened(checkpoint, format, here, kernels=isa, threads=3, prefill_chunk=20) as llm:
            assert same(llm.run([4, 2]), alone), isa
            assert torch.equal(llm.logits(PROMPTS[0], chunk=20), logits[isa])
    first, *others = logits.values()
    for other in others:
        rows = (other - first).norm(dim=1) / first.norm(dim=1)
        # Activations round to other neighbours here and there, and a router's threshold may be crossed by one.
        assert rows.median() <= 0.03, rows
        assert (rows > 0.1).float().mean() <= 0.1, rows
