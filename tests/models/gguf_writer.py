"""Writes small GGUF files of known content, as llama.cpp's converter would, for the reader to be compared with.
Tensors are given under their Hugging Face names; quantised matrices are quantised by the `gguf` package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from ciuic_runtime.models.gguf_names import gguf_name

Array = npt.NDArray[Any]
Quant = gguf.GGMLQuantizationType


def write_deepseek2_gguf(
    path: Path,
    spec_config: Mapping[str, Any],
    tensors: Mapping[str, Array],
    split_kv_b: bool,
    quant: Quant | None = None,
    with_tokenizer: bool = True,
) -> None:
    """A deepseek2 file of the model whose config.json is `spec_config`; `quant` is for matrices, None keeps float32."""
    writer = gguf.GGUFWriter(path, "deepseek2")
    add_common_fields(writer, spec_config)
    _add_attention_fields(writer, spec_config)
    _add_expert_fields(writer, spec_config)
    if with_tokenizer:
        add_byte_tokenizer(writer, spec_config["vocab_size"], "deepseek-llm")
    stored = stack_experts({name: np.asarray(value, np.float32) for name, value in tensors.items()})
    if split_kv_b:
        stored = split_kv(stored, spec_config)
    finish(writer, stored, quant)


def write_dense_gguf(
    path: Path, architecture: str, config: Mapping[str, Any], tensors: Mapping[str, Array], quant: Quant | None = None
) -> None:
    """A llama or qwen2 file; llama's query and key rows are reordered as its converter does."""
    writer = gguf.GGUFWriter(path, architecture)
    add_common_fields(writer, config)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    add_byte_tokenizer(writer, config["vocab_size"], "qwen2" if architecture == "qwen2" else "llama-bpe")
    stored = {}
    for name, value in tensors.items():
        if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            value = permute(value, heads if ".q_proj." in name else kv_heads)
        stored[gguf_name(name)] = np.asarray(value, np.float32)
    finish(writer, stored, quant)


def permute(weight: Array, heads: int) -> Array:
    """Per head, the rows (0, d/2, 1, d/2 + 1, ...): what llama.cpp's converter does to queries and keys."""
    rows = weight.shape[0] // heads
    order = [head * rows + half * rows // 2 + i for head in range(heads) for i in range(rows // 2) for half in (0, 1)]
    return weight[order]


def stack_experts(tensors: Mapping[str, Array]) -> dict[str, Array]:
    """By GGUF names, the experts of a layer in one array."""
    stacks: dict[str, list[Array]] = {}
    for name, value in tensors.items():
        stacks.setdefault(gguf_name(name), []).append(value)
    return {name: np.stack(v) if "_exps." in name else v[0] for name, v in stacks.items()}


def split_kv(tensors: Mapping[str, Array], config: Mapping[str, Any]) -> dict[str, Array]:
    heads, nope, value = config["num_attention_heads"], config["qk_nope_head_dim"], config["v_head_dim"]
    result: dict[str, Array] = {}
    for name, weight in tensors.items():
        if "attn_kv_b" not in name:
            result[name] = weight
            continue
        by_head = weight.reshape(heads, nope + value, -1)
        result[name.replace("attn_kv_b", "attn_k_b")] = by_head[:, :nope].transpose(0, 2, 1)
        result[name.replace("attn_kv_b", "attn_v_b")] = by_head[:, nope:]
    return result


def finish(writer: gguf.GGUFWriter, tensors: Mapping[str, Array], quant: Quant | None) -> None:
    for name, value in tensors.items():
        value = np.ascontiguousarray(value)
        is_quantised = quant is not None and value.ndim > 1 and "ffn_gate_inp" not in name
        if is_quantised and value.shape[-1] % gguf.GGML_QUANT_SIZES[quant][0] == 0:
            writer.add_tensor(name, gguf.quants.quantize(value, quant), raw_dtype=quant)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_common_fields(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    writer.add_name("known model")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config.get("rope_theta", 10000.0))
    scaling = config.get("rope_scaling")
    if scaling:
        kind = scaling.get("rope_type", scaling.get("type"))
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(scaling["factor"])
        if kind == "yarn":
            writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
        if scaling.get("mscale_all_dim"):
            writer.add_rope_scaling_yarn_log_mul(0.1 * scaling["mscale_all_dim"])


def _add_attention_fields(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    writer.add_head_count_kv(1)
    if config.get("q_lora_rank"):
        writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(config["kv_lora_rank"])
    writer.add_key_length(config["kv_lora_rank"] + config["qk_rope_head_dim"])
    writer.add_value_length(config["kv_lora_rank"])
    writer.add_key_length_mla(config["qk_nope_head_dim"] + config["qk_rope_head_dim"])
    writer.add_value_length_mla(config["v_head_dim"])
    writer.add_rope_dimension_count(config["qk_rope_head_dim"])


def _add_expert_fields(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    if config.get("norm_topk_prob"):
        writer.add_expert_weights_norm(True)
    is_sigmoid = config["model_type"] == "deepseek_v3"
    writer.add_expert_gating_func(
        gguf.ExpertGatingFuncType.SIGMOID if is_sigmoid else gguf.ExpertGatingFuncType.SOFTMAX
    )
    if config.get("n_group"):
        writer.add_expert_group_count(config["n_group"])
        writer.add_expert_group_used_count(config["topk_group"])


def byte_tokens() -> list[str]:
    """The 256 tokens of the byte-level alphabet, in byte order."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def add_byte_tokenizer(writer: gguf.GGUFWriter, vocab_size: int, pre: str) -> None:
    """A token for each byte as far as the vocabulary goes, fillers, one merge, and a beginning and an end of text."""
    tokens = byte_tokens()[: vocab_size - 3]
    first, second = tokens[0x21:0x23]
    tokens += [f"[PAD{i}]" for i in range(len(tokens), vocab_size - 3)] + [first + second, "<s>", "</s>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (vocab_size - 2) + [3, 3])
    writer.add_token_merges([f"{first} {second}"])
    writer.add_bos_token_id(vocab_size - 2)
    writer.add_eos_token_id(vocab_size - 1)
    writer.add_add_bos_token(True)
