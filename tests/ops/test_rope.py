"""The rotation against the written-out one, and every kind of frequencies against transformers' own functions."""

from __future__ import annotations

import cmath
from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ciuic_runtime.models.config import read_config
from ciuic_runtime.models.spec import RopeSpec
from ciuic_runtime.ops.rope import apply_rope, rope_frequencies, rope_table, softmax_scale, yarn_mscale

HEADS, DIM = 3, 12


def rotated(x: torch.Tensor, positions: list[int], frequencies: list[float], interleaved: bool) -> torch.Tensor:
    """Pair i of the token at position p, taken as a complex number, times exp(i p f_i): in double precision."""
    out = x.double().clone()
    half = x.shape[-1] // 2
    for row, position in enumerate(positions):
        for head in range(x.shape[1]):
            for i, f in enumerate(frequencies):
                a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
                turned = complex(x[row, head, a], x[row, head, b]) * cmath.exp(1j * position * f)
                out[row, head, a], out[row, head, b] = turned.real, turned.imag
    return out


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotation_is_the_written_out_one(interleaved: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, HEADS, DIM, generator=generator)
    positions = [0, 1, 17, 300]
    inv_freq, factor = rope_frequencies(RopeSpec("default", 10000.0, DIM, interleaved))
    expected = rotated(x, positions, [10000.0 ** (-2 * i / DIM) for i in range(DIM // 2)], interleaved)
    cos, sin = rope_table(inv_freq, factor, torch.tensor(positions))
    got = apply_rope(x, cos, sin, interleaved)
    torch.testing.assert_close(got, expected.float(), rtol=1e-4, atol=5e-5)
    assert torch.equal(got[0], x[0])


@pytest.mark.parametrize("interleaved", [True, False])
def test_scores_depend_on_the_distance_only(interleaved: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 1, 1, DIM, generator=generator).unbind(0)
    inv_freq, factor = rope_frequencies(RopeSpec("default", 10000.0, DIM, interleaved))

    def score(at: int, to: int) -> float:
        (cq, sq), (ck, sk) = (rope_table(inv_freq, factor, torch.tensor([p])) for p in (at, to))
        return float((apply_rope(q, cq, sq, interleaved) * apply_rope(k, ck, sk, interleaved)).sum())

    assert score(10, 3) == pytest.approx(score(107, 100), abs=1e-4)
    assert abs(score(10, 3) - score(3, 10)) > 1e-3


def test_the_result_has_the_type_of_x_and_the_arithmetic_that_of_the_table() -> None:
    x = torch.randn(5, HEADS, DIM, generator=torch.Generator().manual_seed(2)).bfloat16()
    inv_freq, factor = rope_frequencies(RopeSpec("default", 10000.0, DIM, True))
    positions = torch.arange(5) * 40
    wide = apply_rope(x, *rope_table(inv_freq, factor, positions), True)
    narrow = apply_rope(x, *rope_table(inv_freq, factor, positions, torch.bfloat16), True)
    exact = apply_rope(x.float(), *rope_table(inv_freq, factor, positions), True)
    assert wide.dtype == narrow.dtype == torch.bfloat16
    assert torch.equal(wide, exact.bfloat16())
    assert not torch.equal(narrow, wide)
    torch.testing.assert_close(narrow.float(), exact, rtol=0.02, atol=0.03)


YARN: dict[str, Any] = {"factor": 8.0, "original_max_position_embeddings": 512}
KINDS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
    "yarn": {"rope_type": "yarn", **YARN},
    "yarn, betas": {"rope_type": "yarn", **YARN, "beta_fast": 16, "beta_slow": 2},
    "yarn, not truncated": {"rope_type": "yarn", **YARN, "truncate": False},
    "yarn, its own factor": {"rope_type": "yarn", **YARN, "attention_factor": 1.3},
    "yarn, mscale": {"rope_type": "yarn", **YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
    "yarn, equal mscale": {"rope_type": "yarn", **YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    "yarn, mscale alone": {"rope_type": "yarn", **YARN, "mscale": 0.707},
    "yarn, no factor": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 512},
}  # fmt: skip


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("head_dim", [8, 64, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_frequencies_are_those_of_transformers(kind: str, head_dim: int, theta: float) -> None:
    parameters = KINDS[kind] | {"rope_theta": theta}
    config = {"hidden_size": 4 * head_dim, "num_attention_heads": 4, "max_position_embeddings": 4096}
    theirs = LlamaConfig(**config, rope_parameters=parameters)
    if parameters.get("factor", 1) is None:
        theirs.rope_parameters["factor"] = 8.0
    expected, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](theirs, "cpu")
    sizes = {"model_type": "llama", "vocab_size": 10, "intermediate_size": 8, "num_hidden_layers": 1}
    ours = read_config(config | sizes | {"rope_parameters": parameters}).rope
    got, got_factor = rope_frequencies(ours)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    assert got_factor == pytest.approx(factor, rel=1e-6)
    plain = rope_frequencies(RopeSpec("default", theta, head_dim, False))[0]
    assert torch.equal(got, plain) == (kind == "dynamic")


def test_dynamic_scaling_changes_nothing_within_the_trained_context() -> None:
    config = LlamaConfig(rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4})
    for length in (1, 100, config.max_position_embeddings):
        expected, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, "cpu", seq_len=length)
        got, _ = rope_frequencies(RopeSpec("dynamic", 1e4, 128, False, factor=4.0))
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("all_dim", [None, 0.707, 1.0])
def test_softmax_scale_of_latent_attention(all_dim: float | None) -> None:
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 40.0, "original_max_position_embeddings": 64}
    yarn |= {"mscale": 1.0, "mscale_all_dim": all_dim} if all_dim else {}
    config = DeepseekV3Config(
        hidden_size=32, num_attention_heads=2, num_key_value_heads=2, qk_nope_head_dim=16, qk_rope_head_dim=8,
        kv_lora_rank=8, q_lora_rank=8, v_head_dim=8, rope_parameters=yarn,
    )  # fmt: skip
    ours = RopeSpec("yarn", 1e4, 8, True, factor=40.0, original_max_positions=64, mscale_all_dim=all_dim)
    assert softmax_scale(ours, 24) == pytest.approx(DeepseekV3Attention(config, 0).scaling, rel=1e-6)


def test_yarn_mscale() -> None:
    assert yarn_mscale(1.0, 1.0) == 1.0
    assert yarn_mscale(40.0, 0.707) == pytest.approx(0.1 * 0.707 * 3.6888794541139363 + 1)
