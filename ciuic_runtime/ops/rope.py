"""Rotary position embedding: frequencies of every scaling that the models use, and the rotation.
Sources: RoFormer (arXiv 2104.09864), YaRN (arXiv 2309.00071), Llama 3.1's published scaling."""

from __future__ import annotations

import math

import torch

from ciuic_runtime.models.spec import RopeSpec


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature: 0.1 m ln(s) + 1."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def rope_frequencies(rope: RopeSpec) -> tuple[torch.Tensor, float]:
    """Angle per position of each pair, float32 [dim / 2], and the factor on cosine and sine.

    `dynamic` scaling changes nothing up to the trained context, which is as far as it is run here."""
    exponents = torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim
    plain = 1.0 / rope.theta**exponents
    if rope.kind == "linear":
        return plain / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3(rope, plain), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, plain), _yarn_attention_factor(rope)
    return plain, 1.0


def softmax_scale(rope: RopeSpec, qk_dim: int) -> float:
    """1 / sqrt(d), times YaRN's mscale_all_dim squared, as DeepSeek trains it."""
    scale: float = qk_dim**-0.5
    if rope.kind == "yarn" and rope.mscale_all_dim:
        scale *= yarn_mscale(rope.factor, rope.mscale_all_dim) ** 2
    return scale


def rope_table(
    inv_freq: torch.Tensor, factor: float, positions: torch.Tensor, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """positions [tokens] -> cosine and sine [tokens, 1, dim / 2], computed in float32 and then rounded to `dtype`."""
    angles = positions.float()[:, None, None] * inv_freq
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """x [tokens, heads, dim] turned by position; pairs stay where they were in x. Computed in the table's type."""
    turning = x.to(cos.dtype)
    a, b = (turning[..., 0::2], turning[..., 1::2]) if interleaved else turning.chunk(2, dim=-1)
    turned = (a * cos - b * sin, b * cos + a * sin)
    out = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return out.to(x.dtype)


def _yarn_attention_factor(rope: RopeSpec) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return yarn_mscale(rope.factor, rope.mscale) / yarn_mscale(rope.factor, rope.mscale_all_dim)
    return yarn_mscale(rope.factor, 1.0)


def _yarn(rope: RopeSpec, plain: torch.Tensor) -> torch.Tensor:
    """NTK by parts: fast pairs keep their frequency, slow ones are interpolated, with a ramp between."""

    def dimension(rotations: float) -> float:
        turns = rope.original_max_positions / (rotations * 2 * math.pi)
        return rope.dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    width = high - low or 0.001
    ramp = ((torch.arange(rope.dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return plain / rope.factor * ramp + plain * (1 - ramp)


def _llama3(rope: RopeSpec, plain: torch.Tensor) -> torch.Tensor:
    """Long waves are interpolated, short ones kept, those between mixed smoothly."""
    waves = 2 * math.pi / plain
    turns = rope.original_max_positions / waves
    mix = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return (1 - mix) * plain / rope.factor + mix * plain
