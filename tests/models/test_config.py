"""What a config says becomes a ModelSpec with transformers' defaults; what it must not say gets one clear line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.models.config import KNOWN_FOLDER, known_names, load_spec, read_config
from ciuic_runtime.models.spec import MlaSpec, ModelSpec, RopeSpec

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
QWEN2 = LLAMA | {"model_type": "qwen2", "num_key_value_heads": 2}
V2: dict[str, Any] = LLAMA | {
    "model_type": "deepseek_v2",
    "q_lora_rank": None,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 24,
}
V3 = V2 | {"model_type": "deepseek_v3", "q_lora_rank": 24, "first_k_dense_replace": 1}
V32 = V3 | {"model_type": "deepseek_v32", "index_n_heads": 2, "index_head_dim": 16, "index_topk": 8}
V4: dict[str, Any] = LLAMA | {
    "model_type": "deepseek_v4",
    "head_dim": 16,
    "q_lora_rank": 24,
    "o_groups": 2,
    "o_lora_rank": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "compress_ratios": [0, 4, 128, 0],
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 8,
}
YARN = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 512}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
FAMILIES = {"llama": LLAMA, "qwen2": QWEN2, "v2": V2, "v3": V3, "v32": V32, "v4": V4}


def without(config: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in names}


def test_known_names_resolve_in_any_case() -> None:
    assert known_names() == ["deepseek-v2", "deepseek-v2-lite", "deepseek-v3", "deepseek-v3.2", "deepseek-v4-flash"]
    assert load_spec("DeepSeek-V3") == load_spec("deepseek-v3")
    assert load_spec("deepseek-v3").name == "deepseek-v3"


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(InvalidInput, match=r"'gpt-7'.*deepseek-v2-lite.*deepseek-v3"):
        load_spec("gpt-7")


@pytest.mark.parametrize("name", ["", "a" * 5000, "deepseek-v3/", "x\0y", "../deepseek-v3"])
def test_odd_names_get_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidInput) as failure:
        load_spec(name)
    assert "\n" not in str(failure.value)
    assert len(str(failure.value)) < 600


def test_real_v3() -> None:
    spec = load_spec("deepseek-v3")
    assert spec.mla == MlaSpec(q_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128)
    moe = spec.moe
    assert moe is not None
    assert (moe.num_experts, moe.experts_per_token, moe.num_shared, moe.first_dense) == (256, 8, 1, 3)
    assert (moe.scoring, moe.method, moe.num_groups, moe.groups_per_token) == ("sigmoid", "noaux_tc", 8, 4)
    assert (moe.normalise, moe.scaling) == (True, 2.5)
    assert spec.rope == RopeSpec("yarn", 10000.0, 64, True, 40.0, 4096, 32.0, 1.0, 1.0, 1.0)
    assert (spec.fp8_block, spec.num_mtp_layers, spec.eos_token_ids, spec.bos_token_id) == ((128, 128), 1, (1,), 0)
    assert spec.why_not_runnable == ""


def test_real_v2_and_lite() -> None:
    spec, lite = load_spec("deepseek-v2"), load_spec("deepseek-v2-lite")
    assert spec.moe is not None
    assert lite.moe is not None
    assert lite.mla is not None
    assert (spec.moe.method, spec.moe.num_groups, spec.moe.groups_per_token) == ("group_limited_greedy", 8, 3)
    assert (spec.moe.normalise, spec.moe.scaling, spec.moe.scoring) == (False, 16.0, "softmax")
    assert (lite.moe.method, lite.mla.q_rank, lite.rope.mscale_all_dim) == ("greedy", None, 0.707)
    assert [lite.is_moe(layer) for layer in range(3)] == [False, True, True]


@pytest.mark.parametrize("name", ["deepseek-v3.2", "deepseek-v4-flash"])
def test_counted_families_say_why_they_cannot_be_run(name: str) -> None:
    why = load_spec(name).why_not_runnable
    assert "cannot" in why or "not run yet" in why
    assert "\n" not in why


def test_a_folder_a_file_and_a_dict_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(V3))
    assert load_spec(tmp_path) == load_spec(tmp_path / "config.json") == read_config(V3, tmp_path.name)
    assert load_spec(tmp_path).name == tmp_path.name


def test_gguf_is_left_to_its_reader(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises((InvalidInput, ImportError), match="gguf"):
        load_spec(file)


def test_eos_ids_are_merged_with_those_of_generation_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"eos_token_id": 7}))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 7, 8]}')
    assert load_spec(tmp_path).eos_token_ids == (7, 9, 8)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(InvalidInput, match=r"generation_config.json: eos_token_id is 'x'"):
        load_spec(tmp_path)


@pytest.mark.parametrize(
    ("given_ids", "expected"),
    [(5, (5,)), ([5, 6, 5], (5, 6)), (None, ()), ([], ())],
    ids=["one", "list", "null", "none"],
)
def test_eos_ids(given_ids: object, expected: tuple[int, ...]) -> None:
    assert read_config(LLAMA | {"eos_token_id": given_ids}).eos_token_ids == expected


def test_a_missing_eos_has_the_default_of_transformers() -> None:
    assert read_config(LLAMA).eos_token_ids == (2,)
    assert read_config(QWEN2).eos_token_ids == ()
    assert read_config(QWEN2).bos_token_id is None


@pytest.mark.parametrize("family", ["llama", "qwen2", "v2", "v3"])
def test_defaults_are_those_of_transformers(family: str) -> None:
    from transformers import AutoConfig

    config = FAMILIES[family]
    fields = without(config, "model_type")
    theirs = AutoConfig.for_model(config["model_type"], **fields)
    spec = read_config(config)
    assert spec.max_positions == theirs.max_position_embeddings
    assert spec.rms_norm_eps == theirs.rms_norm_eps
    assert spec.tied_embeddings == theirs.tie_word_embeddings
    assert spec.rope.theta == theirs.rope_parameters["rope_theta"]
    assert spec.rope.kind == theirs.rope_parameters["rope_type"]
    assert spec.rope.dim == getattr(theirs, "head_dim", 64 // 4)
    if spec.mla is None:
        assert spec.num_kv_heads == theirs.num_key_value_heads
    assert spec.bos_token_id == theirs.bos_token_id
    if spec.moe is not None:
        assert spec.moe.num_shared == theirs.n_shared_experts
        assert spec.moe.normalise == theirs.norm_topk_prob
        assert spec.moe.scaling == theirs.routed_scaling_factor
        assert spec.moe.num_groups == (theirs.n_group or 1)
        assert spec.moe.groups_per_token == (theirs.topk_group or 1)
    as_saved = theirs.to_dict() | {"num_key_value_heads": config.get("num_key_value_heads", 4)}
    assert replace(read_config(as_saved), num_mtp_layers=0) == spec  # transformers saves "one" where nothing was said


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("type_key", ["type", "rope_type"])
def test_rope_from_old_and_new_fields(key: str, type_key: str) -> None:
    rope = {type_key: "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "mscale": 0, "beta_fast": None}
    spec = read_config(LLAMA | {key: rope, "rope_theta": 5000})
    assert spec.rope == RopeSpec("yarn", 5000.0, 16, False, 4.0, 512, 32.0, 1.0)
    assert read_config(LLAMA | {key: rope | {"rope_theta": 77}, "rope_theta": 5000}).rope.theta == 77.0


def test_rope_kinds() -> None:
    assert read_config(LLAMA | {"rope_scaling": None}).rope == RopeSpec("default", 10000.0, 16, False)
    linear = read_config(LLAMA | {"rope_scaling": {"type": "linear", "factor": 4}}).rope
    assert (linear.kind, linear.factor) == ("linear", 4.0)
    dynamic = read_config(LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}).rope
    assert (dynamic.kind, dynamic.factor, dynamic.original_max_positions) == ("dynamic", 2.0, 2048)
    scaling = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
    llama3 = read_config(LLAMA | {"rope_scaling": scaling | {"original_max_position_embeddings": 128}}).rope
    assert (llama3.low_freq_factor, llama3.high_freq_factor, llama3.original_max_positions) == (1.0, 4.0, 128)
    assert read_config(LLAMA | {"rope_scaling": scaling}).rope.original_max_positions == 2048
    by_ratio = read_config(LLAMA | {"rope_scaling": YARN | {"factor": None}}).rope
    assert by_ratio.factor == 4.0


def test_rope_interleaving() -> None:
    assert read_config(V3).rope.interleaved
    assert not read_config(V3 | {"rope_interleave": False}).rope.interleaved
    assert read_config(V2 | {"rope_interleave": False}).rope.interleaved  # transformers' deepseek_v2 always interleaves
    assert not read_config(LLAMA).rope.interleaved


def test_optional_parts() -> None:
    assert read_config(V2 | {"n_routed_experts": None}).moe is None
    moe = read_config(V2 | {"n_shared_experts": None}).moe
    assert moe is not None
    assert moe.num_shared == 0
    assert read_config(LLAMA | {"torch_dtype": "float16"}).dtype == "float16"
    assert read_config(LLAMA | {"dtype": "torch.float32", "torch_dtype": "float16"}).dtype == "float32"
    assert read_config(LLAMA | {"quantization_config": FP8 | {"weight_block_size": [64, 32]}}).fp8_block == (64, 32)
    assert read_config(LLAMA | {"head_dim": 24}).head_dim == 24
    assert read_config(QWEN2).qkv_bias
    assert not read_config(QWEN2).o_bias
    assert read_config(V3 | {"num_nextn_predict_layers": 2}).num_mtp_layers == 2
    v4 = read_config(V4).v4
    assert v4 is not None
    assert v4.compress_ratios == (0, 4, 128)


def test_a_sliding_window_that_no_layer_uses_is_no_sliding_window() -> None:
    assert read_config(QWEN2 | {"use_sliding_window": True, "max_window_layers": 3}).family == "qwen2"
    assert read_config(QWEN2 | {"use_sliding_window": False, "sliding_window": 4}).family == "qwen2"


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("no model_type", without(LLAMA, "model_type"), r"model_type is missing; this runtime knows: .*deepseek_v3.*qwen2"),
    ("other model_type", LLAMA | {"model_type": "mamba"}, r"model_type is 'mamba'; .*llama"),
    ("list as model_type", LLAMA | {"model_type": ["llama"]}, "model_type is"),
    ("field missing", without(LLAMA, "hidden_size"), "hidden_size is missing; it must be a whole number"),
    ("field null", LLAMA | {"vocab_size": None}, "vocab_size is null"),
    ("bool for int", LLAMA | {"num_hidden_layers": True}, "num_hidden_layers is true"),
    ("string for int", LLAMA | {"num_hidden_layers": "3"}, "num_hidden_layers is '3'"),
    ("float for int", LLAMA | {"num_hidden_layers": 3.0}, "num_hidden_layers is 3.0"),
    ("zero", LLAMA | {"num_attention_heads": 0}, "num_attention_heads is 0; it must be a whole number from 1"),
    ("negative", LLAMA | {"intermediate_size": -1}, "intermediate_size is -1"),
    ("absurd", LLAMA | {"hidden_size": 10**12}, "hidden_size is 1000000000000"),
    ("absurd layers", LLAMA | {"num_hidden_layers": 10**6}, "num_hidden_layers"),
    ("number for flag", LLAMA | {"tie_word_embeddings": 1}, "tie_word_embeddings is 1; it must be true or false"),
    ("string for number", LLAMA | {"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6'"),
    ("nan", LLAMA | {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    ("infinity", LLAMA | {"rope_theta": float("inf")}, "rope_theta is inf"),
    ("heads and kv heads", LLAMA | {"num_key_value_heads": 3}, r"num_key_value_heads is 3; num_attention_heads \(4\)"),
    ("more kv heads", LLAMA | {"num_key_value_heads": 8}, "num_key_value_heads is 8"),
    ("hidden and heads", LLAMA | {"hidden_size": 66}, r"hidden_size is 66; it must be a multiple .* or give head_dim"),
    ("odd head", LLAMA | {"head_dim": 15}, "head_dim is 15; .*even"),
    ("activation", LLAMA | {"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported: silu"),
    ("dtype", LLAMA | {"torch_dtype": "int4"}, "torch_dtype is 'int4'; supported: float32"),
    ("eos out of the vocabulary", LLAMA | {"eos_token_id": 320}, r"eos_token_id is 320; .*vocab_size \(320\)"),
    ("eos negative", LLAMA | {"eos_token_id": [-1]}, "eos_token_id is"),
    ("eos text", LLAMA | {"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
    ("bos", LLAMA | {"bos_token_id": 1.5}, "bos_token_id is 1.5"),
    (
        "rope kind",
        LLAMA | {"rope_scaling": {"type": "longrope"}},
        "rope_scaling: type is 'longrope'; supported",
    ),
    ("rope not an object", LLAMA | {"rope_scaling": 4}, "rope_scaling is 4; it must be an object or null"),
    ("rope factor missing", LLAMA | {"rope_scaling": {"type": "linear"}}, "rope_scaling: factor is missing"),
    ("rope factor text", LLAMA | {"rope_scaling": YARN | {"factor": "4"}}, "rope_scaling: factor is '4'"),
    ("rope factor small", LLAMA | {"rope_scaling": YARN | {"factor": 0.5}}, "rope_scaling: factor is 0.5"),
    ("rope betas", LLAMA | {"rope_scaling": YARN | {"beta_fast": 1, "beta_slow": 2}}, "beta_fast is 1; .*beta_slow"),
    ("rope by layer", LLAMA | {"rope_parameters": {"full_attention": {}}}, "rope_parameters: it differs by layer type"),
    ("partial rope", LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    (
        "llama3 factors",
        LLAMA | {"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}},
        "high_freq_factor is 4; it must be greater than low_freq_factor",
    ),
    ("sliding window", QWEN2 | {"use_sliding_window": True, "max_window_layers": 1}, "use_sliding_window is true"),
    ("sliding layers", QWEN2 | {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is"),
    ("gptq", LLAMA | {"quantization_config": {"quant_method": "gptq"}}, "quant_method is 'gptq'; .*supported: fp8"),
    ("awq", LLAMA | {"quantization_config": {"quant_method": "awq"}}, "quantization_config: quant_method is 'awq'"),
    (
        "fp8 without blocks",
        V3 | {"quantization_config": FP8 | {"weight_block_size": None}},
        "weight_block_size is null",
    ),
    ("fp8 block of 3", V3 | {"quantization_config": FP8 | {"weight_block_size": [1, 2, 3]}}, "weight_block_size is"),
    ("fp8 block of 0", V3 | {"quantization_config": FP8 | {"weight_block_size": [128, 0]}}, "weight_block_size is"),
    ("e5m2", V3 | {"quantization_config": FP8 | {"fmt": "e5m2"}}, "fmt is 'e5m2'; .*e4m3"),
    ("quantisation is text", V3 | {"quantization_config": "fp8"}, "quantization_config is 'fp8'"),
    ("mla heads", V3 | {"num_key_value_heads": 2}, "num_key_value_heads is 2; latent attention"),
    ("no q rank", without(V3, "q_lora_rank"), "q_lora_rank is missing; .*null"),
    ("no kv rank", without(V3, "kv_lora_rank"), "kv_lora_rank is missing"),
    ("odd rope dim", V3 | {"qk_rope_head_dim": 7}, "qk_rope_head_dim is 7; .*even"),
    ("groups", V3 | {"n_group": 3}, r"n_group is 3; n_routed_experts \(16\) must be a multiple"),
    ("default groups", V3 | {"n_routed_experts": 12}, r"n_group is missing; .*\(12\) must be a multiple of it, 8"),
    ("groups of one expert", V3 | {"n_group": 16}, "n_group is 16; noaux_tc needs two"),
    ("too many groups per token", V3 | {"n_group": 2, "topk_group": 3}, "topk_group is 3; .*only 2 groups"),
    ("too many experts", V3 | {"num_experts_per_tok": 17}, "num_experts_per_tok is 17"),
    (
        "too many experts for the groups",
        V3 | {"n_group": 8, "topk_group": 1, "num_experts_per_tok": 3},
        "num_experts_per_tok is 3; .*1 of 8 groups .*only 2 experts",
    ),
    ("no groups", V2 | {"topk_method": "group_limited_greedy"}, "n_group is missing; topk_method group_limited_greedy"),
    (
        "too many dense layers",
        V3 | {"first_k_dense_replace": 4},
        r"first_k_dense_replace is 4; .*layers \(3\)",
    ),
    ("v3 softmax", V3 | {"scoring_func": "softmax"}, "scoring_func is 'softmax'; supported: sigmoid"),
    ("v2 sigmoid", V2 | {"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'; supported: softmax"),
    ("v3 greedy", V3 | {"topk_method": "greedy"}, "topk_method is 'greedy'; supported: noaux_tc"),
    ("v2 noaux", V2 | {"topk_method": "noaux_tc"}, "topk_method is 'noaux_tc'; supported: greedy"),
    (
        "expert explosion",
        V3 | {"n_routed_experts": 65536, "num_hidden_layers": 4096},
        "n_routed_experts is 65536; times",
    ),
    ("v4 ratios short", V4 | {"compress_ratios": [0]}, "compress_ratios is .*each of the 3 layers"),
    ("v4 ratio", V4 | {"compress_ratios": [0, 4, 5]}, "compress_ratios is .*0, 4 or 128"),
    ("v4 groups", V4 | {"o_groups": 3}, "o_groups is 3"),
    ("v32 without indexer", without(V32, "index_topk"), "index_topk is missing"),
]


@pytest.mark.parametrize(("config", "message"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_configs_get_one_line_naming_field_and_value(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    with pytest.raises(InvalidInput, match=message) as failure:
        load_spec(path)
    assert str(failure.value).startswith(str(path))
    assert "\n" not in str(failure.value)
    assert failure.value.exit_code == 2


BAD_FILES = [
    ("empty", b"", "not valid JSON"),
    ("not JSON", b"{model_type: llama}", "not valid JSON"),
    ("not UTF-8", b'{"model_type": "\xff\xfe"}', "not valid JSON"),
    ("a list", b"[1, 2]", r"holds \[1, 2\], not a JSON object"),
    ("deep", b"[" * 200_000, "too deeply nested"),
    ("deep object", b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "too deeply nested"),
    ("long number", b'{"vocab_size": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ("huge", b" " * 10_000_001, "larger than 10 MB"),
]


@pytest.mark.parametrize(("content", "message"), [case[1:] for case in BAD_FILES], ids=[case[0] for case in BAD_FILES])
def test_bad_files_get_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(InvalidInput, match=message) as failure:
        load_spec(tmp_path)
    assert "\n" not in str(failure.value)


def test_absent_files(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"config.json does not exist"):
        load_spec(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(InvalidInput, match=r"config.json is not a file"):
        load_spec(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
OPTIONAL = ["rope_scaling", "rope_parameters", "n_group", "topk_group", "quantization_config", "eos_token_id", "dtype"]
ROPE_FIELDS = ["type", "factor", "beta_fast", "mscale", "truncate", "original_max_position_embeddings", "rope_theta"]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_value_in_any_field_is_read_or_refused(data: st.DataObject) -> None:
    config = dict(data.draw(st.sampled_from(list(FAMILIES.values()))))
    for name in data.draw(st.lists(st.sampled_from(sorted(config) + OPTIONAL), min_size=1, max_size=3)):
        config[name] = data.draw(JSON)
    if data.draw(st.booleans()):
        config["rope_scaling"] = YARN | {data.draw(st.sampled_from(ROPE_FIELDS)): data.draw(JSON)}
    outcome = _outcome(config)
    assert isinstance(outcome, ModelSpec) or "\n" not in outcome


def _outcome(config: dict[str, Any]) -> ModelSpec | str:
    try:
        return read_config(config)
    except InvalidInput as error:
        return str(error)


def test_a_model_is_named_after_its_folder_or_its_file(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    text = (KNOWN_FOLDER / "deepseek-v3.json").read_text()
    (folder / "config.json").write_text(text)
    (folder / "other.json").write_text(text)
    assert load_spec(folder).name == load_spec(folder / "config.json").name == "my-model"
    assert load_spec(folder / "other.json").name == "other"
