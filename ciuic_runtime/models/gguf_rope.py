"""How a GGUF file says that rotary embedding is stretched, as the `rope_scaling` of a `config.json`.
Knows llama.cpp's fields for linear and YaRN scaling, and recognises llama3's in the factors it stores instead."""

from __future__ import annotations

import math
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.models.gguf_fields import GgufFields
from ciuic_runtime.models.gguf_file import GgufFile

Array = npt.NDArray[np.float64]
_LLAMA3_LENGTH = 8192  # original_max_position_embeddings of the published models


def rope_scaling(fields: GgufFields, config: dict[str, Any], files: list[GgufFile]) -> dict[str, Any] | None:
    kind = fields.get("rope.scaling.type", str, "none")
    factor = fields.get("rope.scaling.factor", float, 0.0) or fields.get("rope.scale_linear", float, 0.0)
    is_scaled = kind != "none" and factor not in (0.0, 1.0)
    if (factors := _frequency_factors(files)) is not None:
        if is_scaled:
            raise fields.error(
                f"it has rope_freqs.weight and rope.scaling.type {kind!r}; only one of them is supported"
            )
        return llama3_scaling(fields, config, factors)
    if not is_scaled:
        return None
    for key in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor"):
        if fields.get(f"rope.scaling.{key}", float, 1.0) != 1.0:
            raise fields.error(f"rope.scaling.{key} is not supported")
    if kind == "linear":
        return {"rope_type": "linear", "type": "linear", "factor": factor}
    if kind == "yarn":
        return _yarn(fields, config, factor)
    raise fields.error(f"rope.scaling.type {kind!r} is unknown; there are none, linear and yarn")


def _yarn(fields: GgufFields, config: dict[str, Any], factor: float) -> dict[str, Any]:
    """deepseek2 files hold 0.1 x mscale_all_dim and no mscale. The published models have the two equal, so that cos
    and sin keep their size and the softmax scale is multiplied by (0.1 mscale_all_dim ln(factor) + 1) squared."""
    scaling = {
        "rope_type": "yarn",
        "type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": fields.need("rope.scaling.original_context_length", int),
        "beta_fast": fields.get("rope.scaling.yarn_beta_fast", float, 32.0),
        "beta_slow": fields.get("rope.scaling.yarn_beta_slow", float, 1.0),
    }
    log_multiplier = fields.get("rope.scaling.yarn_log_multiplier", float)
    if log_multiplier is not None and "kv_lora_rank" in config:
        mscale = round(10 * log_multiplier, 6)
        scaling |= {"mscale": mscale, "mscale_all_dim": mscale}
    return scaling


def _frequency_factors(files: list[GgufFile]) -> npt.NDArray[np.float32] | None:
    for file in files:
        if (tensor := file.tensors.get("rope_freqs.weight")) is not None:
            if tensor.type != gguf.GGMLQuantizationType.F32 or len(tensor.shape) != 1:
                raise InvalidInput(f"{file.path}: rope_freqs.weight is {tensor.type_name} {tensor.shape}, not F32 [n]")
            return file.raw(tensor).view(np.float32)
    return None


def llama3_scaling(
    fields: GgufFields, config: dict[str, Any], stored: npt.NDArray[np.float32]
) -> dict[str, Any] | None:
    """The llama3 parameters that give these divisors of the frequencies; they determine them up to a common scale of
    (original length, low, high), which is fixed by the original length 8192 of the published models."""
    pairs = config.get("head_dim", config.get("qk_rope_head_dim", 0)) // 2
    if len(stored) != pairs or not np.isfinite(stored).all() or stored.min() < 0.999 or stored.max() > 1e6:
        raise fields.error(f"rope_freqs.weight does not hold {pairs} factors from 1 to 1e6, one per rotated pair")
    if np.allclose(stored, 1.0) or not 1 < config["rope_theta"] < 1e15:  # an absurd base is refused with the config
        return None
    factors = stored.astype(np.float64)
    frequencies = config["rope_theta"] ** (-np.arange(len(factors)) / len(factors))
    factor = float(round(factors.max(), 6))
    for low, high in [(1.0, 4.0), *_fitted_bounds(frequencies, factors, factor)]:
        if high > low > 0 and np.allclose(_llama3_factors(frequencies, factor, low, high), factors, rtol=1e-4, atol=0):
            return {
                "rope_type": "llama3",
                "type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": _LLAMA3_LENGTH,
            }
    raise fields.error("rope_freqs.weight is not what the llama3 scaling gives, and no other scaling is known for it")


def _llama3_factors(frequencies: Array, factor: float, low: float, high: float) -> Array:
    turns = _LLAMA3_LENGTH * frequencies / (2 * math.pi)  # full turns within the original length
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return np.asarray(1.0 / ((1 - smooth) / factor + smooth))


def _fitted_bounds(frequencies: Array, factors: Array, factor: float) -> list[tuple[float, float]]:
    """Low and high from the straight line on which the factors between the two bounds lie; also with the first of the
    largest ones on it, which it is where no frequency is low enough to be divided by the whole factor."""
    smooth = (1 / factors - 1 / factor) / (1 - 1 / factor)
    turns = _LLAMA3_LENGTH * frequencies / (2 * math.pi)
    between = (factors > 1.0001) & (factors < factor * 0.9999)
    with_first = between.copy()
    with_first[np.argmax(factors >= factor * 0.9999)] = True
    bounds: list[tuple[float, float]] = []
    for on_line in (between, with_first):
        if on_line.sum() < 2:
            continue
        slope, intercept = np.polyfit(turns[on_line], smooth[on_line], 1)
        if slope > 0:
            low, high = float(-intercept / slope), float((1 - intercept) / slope)
            bounds += [(round(low, 3), round(high, 3)), (low, high)]
    return bounds
