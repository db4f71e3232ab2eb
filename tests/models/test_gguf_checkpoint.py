"""Tensors out of GGUF files: equal to what was written, to what gguf dequantises and to what transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import gguf_writer as writer
import numpy as np
import pytest
import torch

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.models.checkpoint import open_checkpoint
from ciuic_runtime.models.config import read_config
from ciuic_runtime.models.gguf_checkpoint import GgufCheckpoint, read_gguf_spec
from ciuic_runtime.models.gguf_file import GgufFile
from ciuic_runtime.models.spec import ModelSpec
from ciuic_runtime.models.tensors import TensorSpec, tensors

Quant = gguf.GGMLQuantizationType
V3 = {
    "model_type": "deepseek_v3",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 64,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "torch_dtype": "float32",
    "bos_token_id": 318,
    "eos_token_id": [319],
}
V2 = V3 | {
    "model_type": "deepseek_v2",
    "scoring_func": "softmax",
    "topk_method": "group_limited_greedy",
    "norm_topk_prob": False,
    "q_lora_rank": None,
    "rope_scaling": V3["rope_scaling"] | {"mscale": 0.707, "mscale_all_dim": 0.707},  # type: ignore[operator]
}
LITE = V2 | {"topk_method": "greedy", "n_group": 1, "topk_group": 1, "tie_word_embeddings": True}
DENSE = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "torch_dtype": "float32",
    "bos_token_id": 318,
    "eos_token_id": [319],
}


def random_tensors(spec: ModelSpec) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {t.name: rng.standard_normal(t.shape, dtype=np.float32) for t in tensors(spec)}


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
@pytest.mark.parametrize("config", [V3, V2, LITE], ids=["v3", "v2", "lite"])
def test_deepseek2_in_float32_comes_back_exactly(tmp_path: Path, config: dict[str, Any], split: bool) -> None:
    path = tmp_path / "known.gguf"
    spec = read_config(config, name="known model")
    known = random_tensors(spec)
    writer.write_deepseek2_gguf(path, config, known, split_kv_b=split)
    checkpoint = open_checkpoint(path)
    assert checkpoint.spec == spec
    for tensor in tensors(spec):
        loaded = checkpoint.load(tensor, torch.float32)
        np.testing.assert_array_equal(loaded.numpy(), known[tensor.name], err_msg=tensor.name)
        is_joined = split and "kv_b_proj" in tensor.name
        assert checkpoint.is_mapped(tensor, torch.float32) == (not is_joined), tensor.name
        assert not checkpoint.is_mapped(tensor, torch.bfloat16)


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
@pytest.mark.parametrize("quant", [Quant.Q8_0, Quant.Q4_0, Quant.F16, Quant.BF16], ids=lambda q: q.name)
def test_deepseek2_quantised_comes_back_dequantised(tmp_path: Path, quant: Quant, split: bool) -> None:
    path = tmp_path / "known.gguf"
    spec = read_config(V3, name="known model")
    known = random_tensors(spec)
    writer.write_deepseek2_gguf(path, V3, known, split_kv_b=split, quant=quant)
    checkpoint = GgufCheckpoint(path)

    def through(value: Any) -> Any:
        return gguf.quants.dequantize(gguf.quants.quantize(np.ascontiguousarray(value), quant), quant)

    for tensor in tensors(spec):
        value = known[tensor.name]
        if split and "kv_b_proj" in tensor.name:
            by_head = value.reshape(4, 32 + 64, 32)
            keys = through(by_head[:, :32].transpose(0, 2, 1)).transpose(0, 2, 1)
            value = np.concatenate([keys, through(by_head[:, 32:])], axis=1).reshape(tensor.shape)
        elif tensor.is_matrix and not tensor.name.endswith("mlp.gate.weight"):
            value = through(value)
        np.testing.assert_array_equal(checkpoint.load(tensor, torch.float32).numpy(), value, err_msg=tensor.name)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_dense_models_come_back_exactly(tmp_path: Path, architecture: str) -> None:
    config = DENSE | {"model_type": architecture}
    spec = read_config(config, name="known model")
    assert spec.qkv_bias == (architecture == "qwen2")
    known = random_tensors(spec)
    writer.write_dense_gguf(tmp_path / "known.gguf", architecture, config, known)
    checkpoint = GgufCheckpoint(tmp_path / "known.gguf")
    assert checkpoint.spec == spec
    for tensor in tensors(spec):
        loaded = checkpoint.load(tensor, torch.float32)
        np.testing.assert_array_equal(loaded.numpy(), known[tensor.name], err_msg=tensor.name)
        permuted = architecture == "llama" and any(p in tensor.name for p in ("q_proj", "k_proj"))
        assert checkpoint.is_mapped(tensor, torch.float32) == (not permuted), tensor.name


def test_llama_biases_are_found_and_restored(tmp_path: Path) -> None:
    config = DENSE | {"attention_bias": True, "mlp_bias": True}
    spec = read_config(config, name="known model")
    known = random_tensors(spec)
    writer.write_dense_gguf(tmp_path / "known.gguf", "llama", config, known)
    checkpoint = GgufCheckpoint(tmp_path / "known.gguf")
    assert checkpoint.spec == spec
    for tensor in tensors(spec):
        np.testing.assert_array_equal(checkpoint.load(tensor, torch.float32).numpy(), known[tensor.name])


def test_views_outlive_the_checkpoint_and_writing_to_one_leaves_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "known.gguf"
    spec = read_config(DENSE, name="known model")
    writer.write_dense_gguf(path, "llama", DENSE, random_tensors(spec))
    before = path.read_bytes()
    checkpoint = GgufCheckpoint(path)
    tensor = next(tensors(spec))
    loaded = checkpoint.load(tensor, torch.float32)
    expected = loaded.clone()
    checkpoint.close()
    del checkpoint
    assert torch.equal(loaded, expected)
    loaded.fill_(7.0)
    assert path.read_bytes() == before


def test_opening_and_loading_give_no_warnings(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    spec = read_config(DENSE, name="known model")
    writer.write_dense_gguf(tmp_path / "known.gguf", "llama", DENSE, random_tensors(spec), quant=Quant.Q8_0)
    checkpoint = GgufCheckpoint(tmp_path / "known.gguf")
    for tensor in tensors(spec):
        checkpoint.load(tensor, torch.bfloat16)
    assert [str(w.message) for w in recwarn] == []


def test_half_precision_is_rounded_from_the_dequantised_values(tmp_path: Path) -> None:
    spec = read_config(DENSE, name="known model")
    writer.write_dense_gguf(tmp_path / "known.gguf", "llama", DENSE, random_tensors(spec), quant=Quant.Q8_0)
    checkpoint = GgufCheckpoint(tmp_path / "known.gguf")
    for tensor in tensors(spec):
        full = checkpoint.load(tensor, torch.float32)
        for dtype in (torch.bfloat16, torch.float16):
            assert torch.equal(checkpoint.load(tensor, dtype), full.to(dtype)), tensor.name


def dequantisable() -> list[Quant]:
    """Every type that the gguf package dequantises, found by asking it."""
    found = []
    for quant, (_, nbytes) in gguf.GGML_QUANT_SIZES.items():
        try:
            gguf.quants.dequantize(np.zeros((1, nbytes), np.uint8), quant)
            found.append(quant)
        except NotImplementedError:
            pass
    return found


def write_typed(path: Path, quant: Quant) -> bytes:
    """A llama file whose embedding holds random blocks of the type; returns those bytes."""
    config = DENSE | {"hidden_size": 256, "tie_word_embeddings": True}
    known = random_tensors(read_config(config))
    known.pop("model.embed_tokens.weight")
    block, nbytes = gguf.GGML_QUANT_SIZES[quant]
    raw = np.random.default_rng(1).integers(0, 60, (320, 256 // block * nbytes), dtype=np.uint8)
    file = gguf.GGUFWriter(path, "llama")
    writer.add_common_fields(file, config)
    file.add_head_count_kv(2)
    writer.add_byte_tokenizer(file, 320, "llama-bpe")
    file.add_tensor("token_embd.weight", raw, raw_dtype=quant)
    writer.finish(file, {writer.gguf_name(name): value for name, value in known.items()}, None)
    return raw.tobytes()


@pytest.mark.parametrize("quant", dequantisable(), ids=lambda q: q.name)
def test_every_type_that_gguf_dequantises_is_read(tmp_path: Path, quant: Quant) -> None:
    raw = np.frombuffer(write_typed(tmp_path / "typed.gguf", quant), np.uint8).reshape(320, -1)
    checkpoint = GgufCheckpoint(tmp_path / "typed.gguf")
    loaded = checkpoint.load(next(tensors(checkpoint.spec)), torch.float32).numpy()
    np.testing.assert_array_equal(loaded, gguf.quants.dequantize(raw, quant))


@pytest.mark.parametrize("quant", [Quant.Q8_1, Quant.Q8_K, Quant.I8, Quant.I32], ids=lambda q: q.name)
def test_a_type_that_cannot_be_dequantised_is_named_on_opening(tmp_path: Path, quant: Quant) -> None:
    write_typed(tmp_path / "typed.gguf", quant)
    with pytest.raises(InvalidInput, match=rf"token_embd\.weight is stored as {quant.name}.*Q8_0"):
        GgufCheckpoint(tmp_path / "typed.gguf")


def test_a_missing_tensor_is_named_on_opening(tmp_path: Path) -> None:
    known = random_tensors(read_config(DENSE))
    del known["model.layers.1.mlp.up_proj.weight"]
    writer.write_dense_gguf(tmp_path / "known.gguf", "llama", DENSE, known)
    with pytest.raises(InvalidInput, match=r"no tensor blk\.1\.ffn_up\.weight"):
        GgufCheckpoint(tmp_path / "known.gguf")


def test_a_wrong_shape_is_named_on_opening(tmp_path: Path) -> None:
    known = random_tensors(read_config(V3))
    name = "model.layers.1.mlp.experts.7.up_proj.weight"
    del known[name]  # a stack of seven experts where eight are needed
    writer.write_deepseek2_gguf(tmp_path / "known.gguf", V3, known, split_kv_b=True)
    with pytest.raises(InvalidInput, match=r"ffn_up_exps\.weight has shape \(7, 32, 64\).*\(8, 32, 64\)"):
        GgufCheckpoint(tmp_path / "known.gguf")


def test_half_of_a_split_kv_b_is_not_enough(tmp_path: Path) -> None:
    known = random_tensors(read_config(V3))
    file = gguf.GGUFWriter(tmp_path / "known.gguf", "deepseek2")
    stored = writer.split_kv(writer.stack_experts(known), V3)
    del stored["blk.2.attn_v_b.weight"]
    writer.add_common_fields(file, V3)
    writer._add_attention_fields(file, V3)
    writer._add_expert_fields(file, V3)
    writer.add_byte_tokenizer(file, 320, "deepseek-v3")
    writer.finish(file, stored, None)
    with pytest.raises(InvalidInput, match=r"no tensor blk\.2\.attn_v_b\.weight"):
        GgufCheckpoint(tmp_path / "known.gguf")


def write_split(folder: Path, known: dict[str, Any]) -> list[Path]:
    """The model over three files; the last two have no fields but their number."""
    names = list(known)
    paths = []
    for i in range(3):
        path = folder / f"known-{i + 1:05d}-of-00003.gguf"
        file = gguf.GGUFWriter(path, "llama")
        if i == 0:
            writer.add_common_fields(file, DENSE)
            file.add_head_count_kv(2)
            writer.add_byte_tokenizer(file, 320, "llama-bpe")
        file.add_uint16("split.no", i)
        file.add_uint16("split.count", 3)
        file.add_int32("split.tensors.count", len(names))
        part = {writer.gguf_name(name): _stored(name, known[name]) for name in names[i::3]}
        writer.finish(file, part, None)
        paths.append(path)
    return paths


def _stored(name: str, value: Any) -> Any:
    heads = 4 if ".q_proj." in name else 2 if ".k_proj." in name else 0
    return writer.permute(value, heads) if heads else value


def test_a_model_split_over_files_is_read_as_one(tmp_path: Path) -> None:
    spec = read_config(DENSE, name="known model")
    known = random_tensors(spec)
    paths = write_split(tmp_path, known)
    checkpoint = GgufCheckpoint(paths[0])
    assert checkpoint.spec == spec == read_gguf_spec(paths[0])
    for tensor in tensors(spec):
        np.testing.assert_array_equal(checkpoint.load(tensor, torch.float32).numpy(), known[tensor.name])
    with pytest.raises(InvalidInput, match="part 2 of 3; open the first part"):
        GgufCheckpoint(paths[1])
    paths[2].unlink()
    with pytest.raises(InvalidInput, match=r"00003-of-00003\.gguf is missing"):
        GgufCheckpoint(paths[0])


def test_smollm2_opens_with_all_its_tensors(smollm2: Path) -> None:
    checkpoint = open_checkpoint(smollm2)
    spec = checkpoint.spec
    assert (spec.family, spec.num_layers, spec.hidden_size, spec.vocab_size) == ("llama", 30, 576, 49152)
    assert (spec.num_heads, spec.num_kv_heads, spec.rope.theta, spec.tied_embeddings) == (9, 3, 100000.0, True)
    assert (spec.dtype, spec.rms_norm_eps, spec.bos_token_id, spec.eos_token_ids) == ("bfloat16", 1e-5, 1, (2,))
    mapped = [t.name for t in tensors(spec) if checkpoint.is_mapped(t, torch.float32)]
    assert len(mapped) == 61, "the file has 61 float32 tensors, the norms"
    assert all("norm" in name for name in mapped)


def test_smollm2_values_are_what_gguf_dequantises(smollm2: Path) -> None:
    checkpoint, file = GgufCheckpoint(smollm2), GgufFile(smollm2)
    wanted = [t for t in tensors(checkpoint.spec) if "layers.7." in t.name or "embed" in t.name]
    names = {t.name: writer.gguf_name(t.name) for t in wanted}
    for tensor in wanted:
        stored = file.tensors[names[tensor.name]]
        raw = file.raw(stored).reshape(stored.shape[0], -1) if len(stored.shape) > 1 else file.raw(stored)
        expected = gguf.quants.dequantize(raw, Quant(stored.type))
        loaded = checkpoint.load(tensor, torch.float32).numpy()
        if heads := {"attn_q": 9, "attn_k": 3}.get(stored.name.split(".")[-2]):
            loaded = writer.permute(loaded, heads)
        np.testing.assert_array_equal(loaded, expected, err_msg=tensor.name)


@pytest.mark.slow  # in test_smollm2_agrees_with_transformers their logits agree
def test_smollm2_weights_are_those_that_transformers_loads(smollm2: Path, smollm2_transformers: Any) -> None:
    checkpoint = GgufCheckpoint(smollm2)
    reference = smollm2_transformers.state_dict()
    for tensor in tensors(checkpoint.spec):
        loaded = checkpoint.load(tensor, torch.float32)
        assert torch.equal(loaded, reference[tensor.name]), tensor.name


def test_what_is_mapped_is_decided_by_the_tensor(tmp_path: Path) -> None:
    spec = read_config(DENSE)
    writer.write_dense_gguf(tmp_path / "known.gguf", "llama", DENSE, random_tensors(spec), quant=Quant.F16)
    checkpoint = GgufCheckpoint(tmp_path / "known.gguf")
    value = TensorSpec("model.layers.0.self_attn.v_proj.weight", (32, 64), "layers.0.attention", "v_proj")
    norm = TensorSpec("model.norm.weight", (64,), "final_norm", "weight")
    assert checkpoint.is_mapped(value, torch.float16)
    assert not checkpoint.is_mapped(value, torch.float32)
    assert checkpoint.is_mapped(norm, torch.float32)
    assert checkpoint.spec.dtype == "float16"
