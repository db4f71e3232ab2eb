"""A random checkpoint is a real one: transformers loads it; it is reproducible, and written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.models.random_checkpoint import write_random_checkpoint
from ciuic_runtime.models.safetensors_checkpoint import SafetensorsCheckpoint
from ciuic_runtime.models.tensors import count_parameters, tensors

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
QWEN2 = LLAMA | {"model_type": "qwen2", "tie_word_embeddings": True}
V2: dict[str, Any] = LLAMA | {
    "model_type": "deepseek_v2",
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}
V3 = V2 | {"model_type": "deepseek_v3", "q_lora_rank": 24, "n_group": 4, "topk_group": 2}
FAMILIES = {"llama": LLAMA, "qwen2": QWEN2, "v2": V2, "v3": V3}


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_it(tmp_path: Path, family: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = write_random_checkpoint(FAMILIES[family], tmp_path / family, num_shards=2)
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    checkpoint = SafetensorsCheckpoint(folder)
    buffers = sum(b.numel() for n, b in model.named_buffers() if n.endswith("e_score_correction_bias"))
    assert sum(p.numel() for p in model.parameters()) + buffers == count_parameters(checkpoint.spec).total
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("Grüße, 世界!\n", return_tensors="pt").input_ids
    assert ids[0].tolist() == list("Grüße, 世界!\n".encode())
    assert tokenizer.decode(ids[0]) == "Grüße, 世界!\n"
    assert model.config.eos_token_id == tokenizer.eos_token_id == 257
    with torch.no_grad():
        logits = model(ids).logits
    assert bool(logits.isfinite().all())
    assert 0.1 < float(logits.std()) < 10
    assert logits[0].argmax(-1).unique().numel() > 2  # positions differ


def test_experts_are_spread_over_tokens(tmp_path: Path) -> None:
    """Routing by the first MoE layer's own scores of normalised embeddings differs from token to token."""
    checkpoint = SafetensorsCheckpoint(write_random_checkpoint(V3, tmp_path / "m"))
    weights = {t.name: checkpoint.load(t, torch.float32) for t in tensors(checkpoint.spec)}
    x = weights["model.embed_tokens.weight"][:256]
    x = x / x.pow(2).mean(-1, keepdim=True).sqrt()
    chosen = (x @ weights["model.layers.1.mlp.gate.weight"].T).topk(4).indices
    load = torch.bincount(chosen.flatten(), minlength=16)
    assert int(load.min()) > 10
    assert len({tuple(sorted(row)) for row in chosen.tolist()}) > 100


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_it_holds_what_was_asked(tmp_path: Path, dtype: str) -> None:
    folder = write_random_checkpoint(V3 | {"torch_dtype": "float64"}, tmp_path / "m", dtype=dtype)
    stored = load_file(folder / "model.safetensors")
    assert {str(t.dtype) for n, t in stored.items() if not n.endswith("bias")} == {f"torch.{dtype}"}
    assert SafetensorsCheckpoint(folder).spec.dtype == dtype
    for name, tensor in stored.items():
        values = tensor.float()
        if name.endswith("norm.weight"):
            assert abs(float(values.mean()) - 1) < 0.1
        elif values.numel() > 500:
            assert abs(float(values.mean())) < 5 * float(values.std()) / values.numel() ** 0.5


def test_fp8_is_that_of_deepseek(tmp_path: Path) -> None:
    """Matrices of attention and MLPs are quantised; embedding, head, router and norms are not."""
    plain = load_file(write_random_checkpoint(V3, tmp_path / "plain", dtype="float32") / "model.safetensors")
    folder = write_random_checkpoint(V3, tmp_path / "fp8", fp8=True)
    stored = load_file(folder / "model.safetensors")
    quantised = {name for name, tensor in stored.items() if tensor.dtype == torch.float8_e4m3fn}
    others = {name.removesuffix(".weight").split(".")[-1] for name in plain.keys() - quantised}
    assert {n.split(".")[-2] for n in quantised} >= {"q_b_proj", "kv_a_proj_with_mqa", "o_proj", "up_proj", "down_proj"}
    assert others <= {"embed_tokens", "lm_head", "gate", "e_score_correction_bias"} | {
        name for name in others if name.endswith("norm")
    }
    checkpoint = SafetensorsCheckpoint(folder)
    for tensor in tensors(checkpoint.spec):
        error = (checkpoint.load(tensor, torch.float32) - plain[tensor.name]).norm() / plain[tensor.name].norm()
        assert float(error) < 0.04


def test_same_seed_same_bytes_whatever_the_shards(tmp_path: Path) -> None:
    one, again, other = (
        write_random_checkpoint(V3, tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert (one / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    assert (one / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()
    whole = load_file(one / "model.safetensors")
    sharded = write_random_checkpoint(V3, tmp_path / "d", seed=1, num_shards=3)
    files = sorted(sharded.glob("*.safetensors"))
    parts = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    sizes = [file.stat().st_size for file in files]
    assert len(sizes) == 3
    assert max(sizes) < 2 * min(sizes)


def test_as_many_shards_as_tensors(tmp_path: Path) -> None:
    config = LLAMA | {"num_hidden_layers": 1}
    folder = write_random_checkpoint(config, tmp_path / "m", num_shards=12)
    assert len(list(folder.glob("*.safetensors"))) == 12
    assert SafetensorsCheckpoint(folder).ignored == ()
    with pytest.raises(InvalidInput, match=r"num_shards is 13; .*from 1 to .* \(12\)"):
        write_random_checkpoint(config, tmp_path / "n", num_shards=13)
    assert not (tmp_path / "n").exists()


def test_a_failed_write_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(src: Path, dst: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_random_checkpoint(LLAMA, tmp_path / "m")
    assert list((tmp_path / "m").iterdir()) == []


@pytest.mark.parametrize(
    ("changed", "options", "message"),
    [
        ({"vocab_size": 259}, {}, "vocab_size is 259; .*260 or more"),
        ({"vocab_size": None}, {}, "vocab_size is None"),
        ({"model_type": "gpt2"}, {}, "model_type is 'gpt2'"),
        ({"hidden_size": 0}, {}, "hidden_size is 0"),
        ({}, {"dtype": "int8"}, "dtype 'int8' is not one of bfloat16, float16, float32"),
        ({}, {"num_shards": 0}, "num_shards is 0"),
    ],
)
def test_bad_requests(tmp_path: Path, changed: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        write_random_checkpoint(LLAMA | changed, tmp_path / "m", **options)
    assert not (tmp_path / "m").exists()


def test_an_existing_checkpoint_is_not_overwritten(tmp_path: Path) -> None:
    folder = write_random_checkpoint(LLAMA, tmp_path / "m")
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(InvalidInput, match="already holds a checkpoint"):
        write_random_checkpoint(LLAMA, folder, seed=1)
    assert (folder / "model.safetensors").read_bytes() == before
    with pytest.raises(InvalidInput, match="is a file"):
        write_random_checkpoint(LLAMA, folder / "config.json")


def test_mtp_is_announced_but_not_written(tmp_path: Path) -> None:
    folder = write_random_checkpoint(V3 | {"num_nextn_predict_layers": 1}, tmp_path / "m")
    assert SafetensorsCheckpoint(folder).spec.num_mtp_layers == 1
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["DeepseekV3ForCausalLM"]
