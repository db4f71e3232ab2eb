"""What the fields of a GGUF file say about the model: the same as the config.json that they were made from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import gguf_writer as writer
import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.models.config import KNOWN_FOLDER, read_config
from ciuic_runtime.models.gguf_checkpoint import read_gguf_spec
from ciuic_runtime.models.gguf_rope import _llama3_factors
from ciuic_runtime.models.spec import ModelSpec

DENSE = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 512,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}


def write_fields(path: Path, architecture: str, config: dict[str, Any], **more: Any) -> gguf.GGUFWriter:
    """A file without weights, as far as a spec needs it; `more` are fields by the last part of their names."""
    file = gguf.GGUFWriter(path, architecture)
    writer.add_common_fields(file, config)
    if architecture == "deepseek2":
        writer._add_attention_fields(file, config)
        writer._add_expert_fields(file, config)
    for key, value in more.items():
        name = f"{architecture}.{key.replace('__', '.')}"
        add = {int: file.add_uint32, float: file.add_float32, bool: file.add_bool, str: file.add_string}[type(value)]
        file.kv_data[0].pop(name, None)
        add(name, value)
    return file


def spec_of(file: gguf.GGUFWriter, path: Path, **tensors: Any) -> ModelSpec:
    stored = {"token_embd.weight": np.zeros((320, 4), np.float32), "output.weight": np.zeros((1, 1), np.float32)}
    writer.finish(file, stored | {name.replace("__", "."): value for name, value in tensors.items()}, None)
    return read_gguf_spec(path)


@pytest.mark.parametrize("name", ["deepseek-v2-lite", "deepseek-v2", "deepseek-v3"])
def test_published_models_come_out_as_their_config_says(tmp_path: Path, name: str) -> None:
    config = json.loads((KNOWN_FOLDER / f"{name}.json").read_text())
    path = tmp_path / "fields.gguf"
    file = write_fields(path, "deepseek2", config, vocab_size=config["vocab_size"])
    spec = spec_of(file, path)
    expected = read_config(config)
    same = {"name": "", "dtype": "", "bos_token_id": None, "eos_token_ids": (), "fp8_block": None, "num_mtp_layers": 0}
    assert replace(spec, **same) == replace(expected, **same)  # type: ignore[arg-type]
    assert spec.rope.mscale_all_dim == expected.rope.mscale_all_dim, "llama.cpp stores a tenth of it, in float32"


@pytest.mark.parametrize("name", ["deepseek-v2", "deepseek-v3"])
def test_files_from_before_expert_groups_were_written_get_the_published_ones(tmp_path: Path, name: str) -> None:
    config = json.loads((KNOWN_FOLDER / f"{name}.json").read_text())
    path = tmp_path / "fields.gguf"
    old = {k: v for k, v in config.items() if k not in ("n_group", "topk_group")}
    moe, expected = spec_of(write_fields(path, "deepseek2", old), path).moe, read_config(config).moe
    assert moe is not None
    assert expected is not None
    assert (moe.method, moe.num_groups, moe.groups_per_token) == (
        expected.method,
        expected.num_groups,
        expected.groups_per_token,
    )


def test_files_from_before_the_latent_head_sizes_have_the_plain_ones(tmp_path: Path) -> None:
    config = json.loads((KNOWN_FOLDER / "deepseek-v2-lite.json").read_text())
    path = tmp_path / "fields.gguf"
    file = write_fields(path, "deepseek2", config, attention__key_length=192, attention__value_length=128)
    for key in ("key_length_mla", "value_length_mla"):
        del file.kv_data[0][f"deepseek2.attention.{key}"]
    assert spec_of(file, path).mla == read_config(config).mla


def test_linear_scaling_as_in_deepseek_coder(tmp_path: Path) -> None:
    path = tmp_path / "fields.gguf"
    config = DENSE | {"rope_scaling": {"type": "linear", "factor": 4.0}}
    assert spec_of(write_fields(path, "llama", config), path).rope == read_config(config).rope


def test_yarn_of_dense_models_has_no_mscale(tmp_path: Path) -> None:
    path = tmp_path / "fields.gguf"
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = DENSE | {"model_type": "qwen2", "rope_scaling": scaling}
    assert spec_of(write_fields(path, "qwen2", config), path).rope == read_config(config).rope


def published_factors(base: float, dim: int, factor: float, low: float, high: float, length: int) -> Any:
    """The loop of llama.cpp's converter, in torch float32 as there."""
    factors = []
    for frequency in 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)):
        wavelength = 2 * torch.pi / frequency
        if wavelength < length / high:
            factors.append(1.0)
        elif wavelength > length / low:
            factors.append(factor)
        else:
            smooth = (length / wavelength - low) / (high - low)
            factors.append(float(1 / ((1 - smooth) / factor + smooth)))
    return np.array(factors, np.float32)


@pytest.mark.parametrize(("factor", "length"), [(8.0, 8192), (32.0, 8192)], ids=["3.1", "3.2"])
def test_llama3_scaling_is_recognised_from_its_factors(tmp_path: Path, factor: float, length: int) -> None:
    path = tmp_path / "fields.gguf"
    factors = published_factors(500000.0, 128, factor, 1.0, 4.0, length)
    rope = spec_of(write_fields(path, "llama", DENSE), path, rope_freqs__weight=factors).rope
    assert (rope.kind, rope.factor, rope.low_freq_factor, rope.high_freq_factor) == ("llama3", factor, 1.0, 4.0)
    assert rope.original_max_positions == length


@settings(max_examples=60, deadline=None)
@example(base=10000.0, factor=1.5, low=0.5, ratio=1.5, length=30599)  # no frequency gets the whole factor
@given(
    base=st.sampled_from([10000.0, 500000.0, 1e6]),
    factor=st.floats(1.5, 64),
    low=st.floats(0.5, 2),
    ratio=st.floats(1.5, 8),
    length=st.integers(1024, 65536),
)
def test_other_llama3_parameters_give_the_same_frequencies(
    tmp_path_factory: pytest.TempPathFactory, base: float, factor: float, low: float, ratio: float, length: int
) -> None:
    """(length, low, high) are known up to a common scale only: what counts is the factor of each frequency."""
    factors = published_factors(base, 128, factor, low, low * ratio, length)
    between = (factors > 1.001) & (factors < factor * 0.999)
    assume(between.sum() >= 2)
    path = tmp_path_factory.mktemp("rope") / "fields.gguf"
    file = write_fields(path, "llama", DENSE | {"rope_theta": base})
    rope = spec_of(file, path, rope_freqs__weight=factors).rope
    frequencies = base ** (-np.arange(64) / 64)
    scale = rope.original_max_positions / 8192
    again = _llama3_factors(frequencies * scale, rope.factor, rope.low_freq_factor, rope.high_freq_factor)
    np.testing.assert_allclose(again, factors, rtol=1e-4)


def test_factors_of_one_are_no_scaling(tmp_path: Path) -> None:
    path = tmp_path / "fields.gguf"
    rope = spec_of(write_fields(path, "llama", DENSE), path, rope_freqs__weight=np.ones(64, np.float32)).rope
    assert rope.kind == "default"


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        (np.linspace(1, 9, 64), "not what the llama3 scaling gives"),
        (np.ones(63), "64 factors"),
        (np.full(64, np.nan), "64 factors"),
        (np.zeros(64), "64 factors"),
    ],
    ids=["other curve", "too few", "nan", "zero"],
)
def test_unknown_factors_are_refused(tmp_path: Path, factors: Any, message: str) -> None:
    path = tmp_path / "fields.gguf"
    with pytest.raises(InvalidInput, match=message):
        spec_of(write_fields(path, "llama", DENSE), path, rope_freqs__weight=factors.astype(np.float32))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "experts": ({"expert_count": 8}, "mixture-of-experts"),
    "partial rope": ({"rope__dimension_count": 64}, "rotating 64 of 128"),
    "value length": ({"attention__value_length": 64}, "values of another length"),
    "scaling": ({"rope__scaling__type": "longrope", "rope__scaling__factor": 4.0}, "longrope"),
    "attention factor": (
        {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0, "rope__scaling__attn_factor": 0.5},
        "attn_factor is not supported",
    ),
    "type": ({"block_count": "two"}, r"llama\.block_count is 'two'"),
    "no layers": ({"block_count": 0}, "num_hidden_layers"),
    "heads": ({"attention__head_count": 0}, "num_attention_heads"),
    "kv heads": ({"attention__head_count_kv": 3}, "num_key_value_heads"),
    "nan": ({"attention__layer_norm_rms_epsilon": float("nan")}, "layer_norm_rms_epsilon is nan"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_run_is_named(tmp_path: Path, name: str) -> None:
    more, message = REFUSED[name]
    path = tmp_path / "fields.gguf"
    with pytest.raises(InvalidInput, match=message):
        spec_of(write_fields(path, "llama", DENSE, **more), path)


def test_other_architectures_are_named_with_what_there_is(tmp_path: Path) -> None:
    path = tmp_path / "fields.gguf"
    with pytest.raises(InvalidInput, match=r"'mamba'.*llama, qwen2, deepseek2"):
        spec_of(write_fields(path, "mamba", DENSE), path)


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    path = tmp_path / "fields.gguf"
    file = write_fields(path, "llama", DENSE)
    del file.kv_data[0]["llama.context_length"]
    with pytest.raises(InvalidInput, match=r"no field llama\.context_length"):
        spec_of(file, path)


def test_the_vocabulary_is_as_long_as_the_token_list(tmp_path: Path) -> None:
    path = tmp_path / "fields.gguf"
    file = write_fields(path, "llama", DENSE, vocab_size=999)
    writer.add_byte_tokenizer(file, 321, "llama-bpe")
    assert spec_of(file, path).vocab_size == 321
