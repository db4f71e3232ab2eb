"""Reads rotary embedding out of a config, from `rope_scaling` (older files) or `rope_parameters` (transformers 5).
Knows fields and limits; what the kinds compute is the forward pass's business."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.models.config_fields import REQUIRED, Fields
from ciuic_runtime.models.spec import RopeKind, RopeSpec

_ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


def read_rope(fields: Fields, dim: int, interleaved: bool, max_positions: int, dim_name: str) -> RopeSpec:
    """Rotary embedding from `rope_scaling` (older files) or `rope_parameters` (since transformers 5)."""
    if dim % 2:
        raise fields.wrong(dim_name, f"rotary embedding turns pairs, so it must be even (it is {dim})")
    rope = fields.section("rope_scaling")
    if rope is None or not rope.values:
        rope = fields.section("rope_parameters") or Fields({}, fields.where)
    _refuse_partial_rope(fields, rope)
    name = "rope_type" if rope.values.get("rope_type") is not None else "type"
    kind: Any = rope.choice(name, _ROPE_KINDS, "default")
    has_theta = rope if rope.values.get("rope_theta") is not None else fields
    theta = has_theta.number("rope_theta", 10000.0, 1.001)
    return _SCALED_ROPES[kind](fields, rope, RopeSpec(kind, theta, dim, interleaved), max_positions)


def _refuse_partial_rope(fields: Fields, rope: Fields) -> None:
    if any(isinstance(value, dict) for value in rope.values.values()):
        raise InvalidInput(f"{rope.where}: it differs by layer type; one set of rope parameters for all is supported")
    for where in (fields, rope):
        if where.number("partial_rotary_factor", 1.0) != 1.0:
            raise where.wrong("partial_rotary_factor", "only rotary embedding of whole heads (1.0) is supported")


def _default_rope(fields: Fields, rope: Fields, base: RopeSpec, max_positions: int) -> RopeSpec:
    return base


def _factor_rope(fields: Fields, rope: Fields, base: RopeSpec, max_positions: int) -> RopeSpec:
    """linear and dynamic (NTK): the latter counts from `max_position_embeddings`, as transformers does."""
    if base.kind == "dynamic" and base.dim <= 2:
        raise InvalidInput(f"{rope.where}: dynamic rope needs heads of more than 2 values; there are {base.dim}")
    return replace(base, factor=rope.number("factor", minimum=1.0, maximum=1e6), original_max_positions=max_positions)


def _original_max_positions(fields: Fields, rope: Fields, max_positions: int) -> int:
    name = "original_max_position_embeddings"
    return (fields if fields.values.get(name) is not None else rope).size(name, max_positions, 2**40)


def _llama3_rope(fields: Fields, rope: Fields, base: RopeSpec, max_positions: int) -> RopeSpec:
    low, high = rope.number("low_freq_factor", minimum=1e-6), rope.number("high_freq_factor", minimum=1e-6)
    if high <= low:
        raise rope.wrong("high_freq_factor", f"it must be greater than low_freq_factor ({low:g})")
    return replace(
        base,
        factor=rope.number("factor", minimum=1.0, maximum=1e6),
        original_max_positions=_original_max_positions(fields, rope, max_positions),
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _yarn_rope(fields: Fields, rope: Fields, base: RopeSpec, max_positions: int) -> RopeSpec:
    """YaRN (arXiv 2309.00071); a null factor is the ratio of the context lengths, and zeros mean "not given"."""
    original = _original_max_positions(fields, rope, max_positions)
    ratio = max(1.0, max_positions / original) if rope.is_null("factor") else REQUIRED
    fast = rope.number("beta_fast", 32.0) or 32.0
    slow = rope.number("beta_slow", 1.0) or 1.0
    if fast < slow:
        raise rope.wrong("beta_fast", f"it must not be less than beta_slow ({slow:g})")
    has_attention_factor = rope.values.get("attention_factor") is not None
    return replace(
        base,
        factor=rope.number("factor", ratio, 1.0, 1e6),
        original_max_positions=original,
        beta_fast=fast,
        beta_slow=slow,
        mscale=rope.number("mscale", 0.0) or None,
        mscale_all_dim=rope.number("mscale_all_dim", 0.0) or None,
        attention_factor=rope.number("attention_factor") if has_attention_factor else None,
        truncate=rope.flag("truncate", True),
    )


_SCALED_ROPES: dict[RopeKind, Callable[[Fields, Fields, RopeSpec, int], RopeSpec]] = {
    "default": _default_rope,
    "linear": _factor_rope,
    "dynamic": _factor_rope,
    "llama3": _llama3_rope,
    "yarn": _yarn_rope,
}
