"""A GGUF file's fields as the `config.json` of the same model, so that one reader validates both.
Knows the field names of llama, qwen2 and deepseek2 as llama.cpp's converter writes them, and what it leaves out."""

from __future__ import annotations

from typing import Any

import gguf

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.models.config_fields import show
from ciuic_runtime.models.gguf_fields import GgufFields
from ciuic_runtime.models.gguf_file import GgufFile, GgufTensor, StringArray
from ciuic_runtime.models.gguf_rope import rope_scaling

ARCHITECTURES = ("llama", "qwen2", "deepseek2")
# Files made before the converter wrote expert groups: (layers, hidden, experts) -> (groups, groups used), as published.
_PUBLISHED_GROUPS = {(60, 5120, 160): (8, 3), (61, 7168, 256): (8, 4)}
_SOFTMAX, _SIGMOID = 1, 2  # expert_gating_func


def gguf_config(files: list[GgufFile]) -> dict[str, Any]:
    """What config.json would say about the model in these files (the parts of one model, the first with its fields)."""
    first = files[0]
    tensors = {name: tensor for file in files for name, tensor in file.tensors.items()}
    architecture = first.fields.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise InvalidInput(
            f"{first.path} holds a model of architecture {show(architecture)}; "
            f"this runtime reads GGUF files of {', '.join(ARCHITECTURES)}"
        )
    fields = GgufFields(first, architecture)
    config = _common(fields, first, tensors)
    if architecture == "deepseek2":
        config |= _deepseek2(fields, config)
    else:
        config |= _dense(fields, config, tensors) | {"model_type": architecture}
    scaling = rope_scaling(fields, config, files)
    return config | ({"rope_scaling": scaling} if scaling else {})


def _common(fields: GgufFields, file: GgufFile, tensors: dict[str, GgufTensor]) -> dict[str, Any]:
    heads = fields.need("attention.head_count", int)
    mtp = fields.get("nextn_predict_layers", int, 0)
    return {
        "vocab_size": _vocab_size(fields, file, tensors),
        "hidden_size": fields.need("embedding_length", int),
        "intermediate_size": fields.need("feed_forward_length", int),
        "num_hidden_layers": fields.need("block_count", int) - mtp,
        "num_nextn_predict_layers": mtp,
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("attention.head_count_kv", int, heads),
        "max_position_embeddings": fields.need("context_length", int),
        "rms_norm_eps": fields.need("attention.layer_norm_rms_epsilon", float),
        "rope_theta": fields.get("rope.freq_base", float, 10000.0),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in tensors,
        "torch_dtype": _dtype(tensors),
        "bos_token_id": token_id(file, "bos"),
        "eos_token_id": list(eos_token_ids(file)) or None,
    }


def _vocab_size(fields: GgufFields, file: GgufFile, tensors: dict[str, GgufTensor]) -> int:
    tokens = file.fields.get("tokenizer.ggml.tokens")
    if isinstance(tokens, StringArray) and len(tokens):
        return len(tokens)
    embedding = tensors.get("token_embd.weight")
    return int(fields.get("vocab_size", int, embedding.shape[0] if embedding else 0))


def eos_token_ids(file: GgufFile) -> tuple[int, ...]:
    """The tokens that end a generation: end of sequence, of turn, of message."""
    found = [token_id(file, name) for name in ("eos", "eot", "eom")]
    return tuple(dict.fromkeys(token for token in found if token is not None))


def token_id(file: GgufFile, name: str) -> int | None:
    value = file.fields.get(f"tokenizer.ggml.{name}_token_id")
    return value if type(value) is int else None


def _dtype(tensors: dict[str, GgufTensor]) -> str:
    """What the matrices are stored as, the router apart, which is always float32; quantised ones count as bfloat16."""
    kinds = {t.type for t in tensors.values() if len(t.shape) > 1 and "ffn_gate_inp" not in t.name}
    if kinds == {gguf.GGMLQuantizationType.F32}:
        return "float32"
    if kinds == {gguf.GGMLQuantizationType.F16}:
        return "float16"
    return "bfloat16"


def _dense(fields: GgufFields, config: dict[str, Any], tensors: dict[str, GgufTensor]) -> dict[str, Any]:
    if fields.get("expert_count", int, 0):
        raise fields.error("mixture-of-experts models of this architecture are not supported")
    heads = max(1, config["num_attention_heads"])
    head_dim = fields.get("attention.key_length", int, config["hidden_size"] // heads)
    if fields.get("attention.value_length", int, head_dim) != head_dim:
        raise fields.error(f"keys of {head_dim} and values of another length are not supported")
    if (rotated := fields.get("rope.dimension_count", int, head_dim)) != head_dim:
        raise fields.error(f"rotating {rotated} of {head_dim} values per head is not supported")
    has_q, has_o = "blk.0.attn_q.bias" in tensors, "blk.0.attn_output.bias" in tensors
    if config["num_hidden_layers"] and has_o and not has_q:
        raise fields.error("a bias on attn_output but not on attn_q is not supported")
    return {"head_dim": head_dim, "attention_bias": has_q and has_o, "mlp_bias": "blk.0.ffn_gate.bias" in tensors}


def _deepseek2(fields: GgufFields, config: dict[str, Any]) -> dict[str, Any]:
    key = fields.get("attention.key_length_mla", int) or fields.need("attention.key_length", int)
    value = fields.get("attention.value_length_mla", int) or fields.need("attention.value_length", int)
    rope = fields.need("rope.dimension_count", int)
    return {
        "q_lora_rank": fields.get("attention.q_lora_rank", int),
        "kv_lora_rank": fields.need("attention.kv_lora_rank", int),
        "qk_rope_head_dim": rope,
        "qk_nope_head_dim": key - rope,
        "v_head_dim": value,
        "num_key_value_heads": config["num_attention_heads"],  # the file says 1: latent attention seen as multi-query
        "attention_bias": False,
        **_experts(fields, config),
    }


def _experts(fields: GgufFields, config: dict[str, Any]) -> dict[str, Any]:
    experts = fields.get("expert_count", int, 0)
    if not experts:
        return {"model_type": "deepseek_v2", "n_routed_experts": None}
    gating = fields.get("expert_gating_func", int, _SOFTMAX) or _SOFTMAX
    if gating not in (_SOFTMAX, _SIGMOID):
        raise fields.error(f"expert_gating_func {gating} is unknown; softmax is {_SOFTMAX}, sigmoid {_SIGMOID}")
    published = _PUBLISHED_GROUPS.get((config["num_hidden_layers"], config["hidden_size"], experts), (1, 1))
    groups = fields.get("expert_group_count", int, published[0]) or 1
    sigmoid = gating == _SIGMOID
    return {
        "model_type": "deepseek_v3" if sigmoid else "deepseek_v2",
        "n_routed_experts": experts,
        "num_experts_per_tok": fields.need("expert_used_count", int),
        "n_shared_experts": fields.get("expert_shared_count", int, 0),
        "moe_intermediate_size": fields.need("expert_feed_forward_length", int),
        "first_k_dense_replace": fields.get("leading_dense_block_count", int, 0),
        "moe_layer_freq": 1,
        "scoring_func": "sigmoid" if sigmoid else "softmax",
        "topk_method": "noaux_tc" if sigmoid else "group_limited_greedy" if groups > 1 else "greedy",
        "n_group": groups,
        "topk_group": fields.get("expert_group_used_count", int, published[1]) or 1,
        "norm_topk_prob": fields.get("expert_weights_norm", bool, False),
        "routed_scaling_factor": fields.get("expert_weights_scale", float, 1.0) or 1.0,
    }
