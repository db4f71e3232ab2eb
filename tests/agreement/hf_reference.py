"""Random models of every family, made and saved by transformers, with what transformers computes with them.
Which configurations there are is listed (and drawn) here; what must agree is the tests' business."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB, PROMPT, NEW = 500, 64, 64


@dataclass(frozen=True)
class Case:
    """A configuration and how its checkpoint is written."""

    name: str
    config: Mapping[str, Any]
    dtype: str = "float32"  # of the file
    shards: int = 1
    seed: int = 0


@dataclass
class Reference:
    """A checkpoint folder, and what transformers makes of it in float32."""

    case: Case
    folder: Path
    prompt: list[int]
    logits: torch.Tensor  # float32 [PROMPT, VOCAB]
    tokens: list[int]  # greedy continuation, NEW of them
    bf16_logits: torch.Tensor
    chosen: list[torch.Tensor] = field(default_factory=list)  # per MoE layer: expert ids [PROMPT, k]


LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
QWEN2 = LLAMA | {"model_type": "qwen2"}
V3: dict[str, Any] = {
    "model_type": "deepseek_v3", "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 112,
    "moe_intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4,
    "n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 1, "n_group": 4, "topk_group": 2,
    "kv_lora_rank": 32, "q_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 20,
    "first_k_dense_replace": 1, "max_position_embeddings": 256, "routed_scaling_factor": 2.5, "norm_topk_prob": True,
}  # fmt: skip
V2 = V3 | {
    "model_type": "deepseek_v2", "norm_topk_prob": False, "routed_scaling_factor": 1.0, "topk_method": "greedy",
    "n_group": 1, "topk_group": 1,
}  # fmt: skip


def rope(kind: str, theta: float = 10000.0, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **values}}


def yarn(mscale: float | None = None, all_dim: float | None = None, factor: float = 4.0, **more: Any) -> dict[str, Any]:
    scales = {k: v for k, v in (("mscale", mscale), ("mscale_all_dim", all_dim)) if v is not None}
    original = {"original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1}
    return rope("yarn", factor=factor, **original, **scales, **more)


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GROUPED = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}

CASES = [
    Case("v3", V3 | yarn(1.0, 1.0)),
    Case("v3-shards", V3 | yarn(1.0, 0.7, factor=40.0), "bfloat16", 3),
    Case("v3-direct-queries", V3 | {"q_lora_rank": None, "norm_topk_prob": False}, "float16", 2),
    Case("v3-biases", V3 | yarn(1.0, 1.0) | {"attention_bias": True}),
    Case("v3-one-group", V3 | yarn() | {"n_group": 1, "topk_group": 1, "n_shared_experts": 2, "rms_norm_eps": 1e-5}),
    Case("v3-tied", V3 | {"tie_word_embeddings": True, "first_k_dense_replace": 0, "routed_scaling_factor": 1.0}),
    Case("v3-dense", V3 | {"first_k_dense_replace": 3}),
    Case("v3-halves", V3 | {"rope_interleave": False, "num_experts_per_tok": 1, "n_group": 2, "topk_group": 1}),
    Case("v2", V2 | yarn(0.707, 0.707)),
    Case("v2-direct-queries", V2 | yarn(0.707, 0.707, factor=40.0) | {"q_lora_rank": None}, "bfloat16", 2),
    Case("v2-groups", V2 | GROUPED | {"routed_scaling_factor": 16.0, "attention_bias": True}, "float16", 3),
    Case("v2-tied", V2 | yarn(1.0, 0.5) | {"tie_word_embeddings": True, "mlp_bias": True, "n_shared_experts": 2}),
    Case("llama", LLAMA),
    Case("llama-linear", LLAMA | rope("linear", factor=4.0) | {"attention_bias": True}, "bfloat16", 2),
    Case("llama-dynamic", LLAMA | rope("dynamic", factor=2.0) | {"mlp_bias": True, "num_key_value_heads": 4}),
    Case("llama-llama3", LLAMA | rope("llama3", 500000.0, **LLAMA3) | {"tie_word_embeddings": True}, "float16"),
    Case("llama-yarn", LLAMA | yarn(attention_factor=1.2) | {"num_key_value_heads": 1, "head_dim": 24}),
    Case("llama-yarn-plain", LLAMA | yarn(truncate=False) | {"attention_bias": True, "mlp_bias": True}, shards=2),
    Case("qwen2", QWEN2),
    Case("qwen2-tied", QWEN2 | {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}, "bfloat16", 3),
    Case("qwen2-yarn", QWEN2 | yarn(factor=2.0) | {"num_key_value_heads": 4}, "float16"),
]  # fmt: skip


def drawn(family: str, seed: int) -> Case:
    """A configuration by chance."""
    r = random.Random(f"{family}/{seed}")
    base = {"llama": LLAMA, "qwen2": QWEN2, "deepseek_v3": V3, "deepseek_v2": V2}[family]
    config = base | {"num_hidden_layers": r.randint(1, 3), "hidden_size": r.choice([32, 64, 96])}
    config |= {"tie_word_embeddings": r.random() < 0.3, "rms_norm_eps": r.choice([1e-6, 1e-5])}
    config |= _drawn_deepseek(r, family, config) if family.startswith("deepseek") else _drawn_dense(r, family)
    return Case(f"{family}-{seed}", config, r.choice(["float32", "bfloat16", "float16"]), r.randint(1, 3), seed)


def _drawn_dense(r: random.Random, family: str) -> dict[str, Any]:
    heads = r.choice([1, 2, 4, 8])
    kinds = [
        {},
        rope("linear", factor=3.0),
        rope("dynamic", factor=2.0),
        rope("llama3", **LLAMA3),
        yarn(),
        yarn(1.0, 0.5),
    ]
    biases = {"attention_bias": r.random() < 0.5, "mlp_bias": r.random() < 0.5} if family == "llama" else {}
    kv_heads = r.choice([k for k in (1, 2, 4, 8) if heads % k == 0])
    head_dim = r.choice([8, 12, 32])
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    return r.choice(kinds) | biases | sizes


def _drawn_deepseek(r: random.Random, family: str, config: Mapping[str, Any]) -> dict[str, Any]:
    groups = r.choice([1, 2, 4])
    experts = groups * r.choice([2, 3, 5])
    open_groups = r.randint(1, groups)
    heads = r.choice([1, 2, 4])
    found = {
        "num_attention_heads": heads, "num_key_value_heads": heads, "q_lora_rank": r.choice([None, 16, 40]),
        "kv_lora_rank": r.choice([16, 40]), "qk_rope_head_dim": r.choice([4, 8, 16]), "v_head_dim": r.choice([8, 20]),
        "qk_nope_head_dim": r.choice([8, 12]), "n_routed_experts": experts, "n_shared_experts": r.randint(1, 2),
        "n_group": groups, "topk_group": open_groups, "routed_scaling_factor": r.choice([1.0, 2.5, 16.0]),
        "num_experts_per_tok": r.randint(1, min(4, experts // groups * open_groups)),
        "first_k_dense_replace": r.randint(0, config["num_hidden_layers"] - 1), "attention_bias": r.random() < 0.3,
        "norm_topk_prob": family == "deepseek_v3" and r.random() < 0.7,
    }  # fmt: skip
    if family == "deepseek_v2":
        found["topk_method"] = r.choice(["greedy", "group_limited_greedy"])
    kinds = [{}, yarn(), yarn(1.0, 1.0), yarn(0.707, 0.707, factor=40.0), yarn(1.0, 0.5), yarn(0.707)]
    return r.choice(kinds) | found


def randomise(model: PreTrainedModel, seed: int) -> None:
    """Weights that keep activations near 1, make tokens differ, and send them to different experts."""
    generator = torch.Generator().manual_seed(seed)
    tied = model.config.tie_word_embeddings
    for name, values in [*model.named_parameters(), *model.named_buffers()]:
        if "inv_freq" in name:
            continue
        noise = torch.randn(values.shape, generator=generator)
        if name.endswith(("norm.weight", "layernorm.weight")):
            # The last norm makes up for the small embeddings of a tied head.
            values.data = (1 + 0.2 * noise) * (3.0 if tied and name == "model.norm.weight" else 1.0)
        elif "correction_bias" in name:
            values.data = 0.1 * noise
        elif values.dim() == 1:
            values.data = 0.2 * noise
        elif name.endswith("gate.weight"):
            values.data = 2 * noise * values.shape[-1] ** -0.5
        elif "embed_tokens" in name:
            values.data = noise * (0.05 if tied else 1.0)
        else:
            values.data = noise * values.shape[-1] ** -0.5


def make(case: Case, folder: Path) -> Reference:
    """Writes the checkpoint and asks transformers, which reads it back from the file, in float32 and in bfloat16."""
    torch.manual_seed(case.seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**case.config))
    randomise(model, case.seed)
    model = model.to(getattr(torch, case.dtype))
    nbytes = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(folder, max_shard_size=int(nbytes / (case.shards - 0.5)) if case.shards > 1 else "1GB")
    files = len(list(folder.glob("*.safetensors")))
    assert (files > 1) == (case.shards > 1), f"{files} files, {case.shards} shards wanted"
    generator = torch.Generator().manual_seed(case.seed + 1)
    prompt = torch.randint(0, case.config["vocab_size"], (PROMPT,), generator=generator).tolist()
    return reference_of(folder, prompt, case)


def reference_of(folder: Path, prompt: list[int], case: Case) -> Reference:
    model = load(folder, torch.float32)
    logits, chosen = forward(model, prompt), routes(model, prompt)
    low = forward(load(folder, torch.bfloat16), prompt)
    return Reference(case, folder, prompt, logits, greedy(model, prompt, NEW), low, chosen)


def load(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
def forward(model: PreTrainedModel, prompt: list[int]) -> torch.Tensor:
    """Logits at every position, float32 [tokens, vocab]."""
    return model(torch.tensor([prompt])).logits[0].float()


@torch.no_grad()
def greedy(model: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    """The continuation by `generate`, which must neither stop nor mask ids that happen to be special ones."""
    ids = torch.tensor([prompt])
    model.generation_config.eos_token_id = None
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return out[0, len(prompt) :].tolist()


@torch.no_grad()
def routes(model: PreTrainedModel, prompt: list[int]) -> list[torch.Tensor]:
    """The expert ids that each MoE layer's router picks, [tokens, k]."""
    found: list[torch.Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output: found.append(output[2]))
        for name, module in model.named_modules()
        if name.endswith("mlp.gate")
    ]
    forward(model, prompt)
    for hook in hooks:
        hook.remove()
    return found
