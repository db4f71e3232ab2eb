"""Where a tensor of the model lies in a GGUF file: its name there, and what was done to it when it was converted.
The table holds for llama, qwen2 and deepseek2 alike; only llama's files have their query and key rows reordered."""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import dataclass

from ciuic_runtime.models.spec import ModelSpec

_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}
_PERMUTED = ("self_attn.q_proj", "self_attn.k_proj")


@dataclass(frozen=True, slots=True)
class Source:
    """One tensor of the file, an expert's slice of one, or the two halves of kv_b_proj."""

    parts: tuple[tuple[str, tuple[int, ...]], ...]  # name and shape that the file must have
    expert: int | None = None  # index into the first dimension of a stack of experts
    permuted_heads: int = 0  # rows of each of so many heads are in the file's order for rotary embedding


def gguf_name(name: str) -> str:
    """model.layers.3.self_attn.q_proj.weight -> blk.3.attn_q.weight; experts get the name of their stack."""
    module, _, kind = name.rpartition(".")
    if module in _TOP:
        return f"{_TOP[module]}.{kind}"
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    if match is None:
        raise KeyError(name)
    layer, module = match[1], match[2]
    if (module, kind) == ("mlp.gate", "e_score_correction_bias"):
        return f"blk.{layer}.exp_probs_b.bias"
    if expert := re.fullmatch(r"mlp\.experts\.\d+\.(gate|up|down)_proj", module):
        return f"blk.{layer}.ffn_{expert[1]}_exps.{kind}"
    return f"blk.{layer}.{_LAYER[module]}.{kind}"


def find_source(spec: ModelSpec, name: str, shape: tuple[int, ...], available: Container[str]) -> Source:
    """Where the tensor that Hugging Face calls `name` is, in a file that has tensors of the `available` names."""
    target = gguf_name(name)
    if target.endswith("attn_kv_b.weight") and target not in available:
        return _split_kv_b(spec, target)
    if expert := re.search(r"\.mlp\.experts\.(\d+)\.", name):
        assert spec.moe is not None
        return Source(((target, (spec.moe.num_experts, *shape)),), expert=int(expert[1]))
    heads = 0
    if spec.family == "llama" and any(module in name for module in _PERMUTED):
        heads = spec.num_heads if "q_proj" in name else spec.num_kv_heads
    return Source(((target, shape),), permuted_heads=heads)


def _split_kv_b(spec: ModelSpec, target: str) -> Source:
    mla = spec.mla
    assert mla is not None
    keys = (target.replace("attn_kv_b", "attn_k_b"), (spec.num_heads, mla.kv_rank, mla.nope_dim))
    values = (target.replace("attn_kv_b", "attn_v_b"), (spec.num_heads, mla.value_dim, mla.kv_rank))
    return Source((keys, values))
