"""Root-mean-square normalisation (arXiv 1910.07467): the torch reference and the entry point that prefers the kernel.
The kernel's source is csrc/rms_norm.cpp."""

from __future__ import annotations

import torch

from ciuic_runtime.ops.native import kernels

_NATIVE = {torch.float32: "rms_norm_f32", torch.bfloat16: "rms_norm_bf16"}


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [tokens, hidden], weight [hidden] -> [tokens, hidden]; computed in float32, scaled in x's type."""
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The same by the native kernel where there is one for this type and device.

    Each row's result depends on that row alone, in a fixed order of summation."""
    native = kernels()
    name = _NATIVE.get(x.dtype)
    if native is None or name is None or x.device.type != "cpu" or weight.dtype != x.dtype:
        return rms_norm_reference(x, weight, eps)
    x, weight = x.contiguous(), weight.contiguous()
    out = torch.empty_like(x)
    rows = x.numel() // x.shape[-1]
    getattr(native, name)(x.data_ptr(), weight.data_ptr(), out.data_ptr(), rows, x.shape[-1], eps)
    return out
