"""A page's weights as the native kernels take them: matrices described by layout and address.
Knows where its parts lie, in a packed block or a mapped file; what is computed with them is not its business."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ciuic_runtime.devices.backend import host_buffer
from ciuic_runtime.models.checkpoint import Checkpoint
from ciuic_runtime.models.layout import PageLayout, Part, page_layout
from ciuic_runtime.models.pages import fill_parts
from ciuic_runtime.models.tensors import tensors_by_page
from ciuic_runtime.ops.native import kernels


class NativePage:
    """Keeps the memory alive that its parts lie in."""

    def __init__(self, parts: Mapping[str, tuple[Part, torch.Tensor]]) -> None:
        self._parts = parts
        module = kernels()
        assert module is not None, "pages for kernels are made where there are kernels"
        self._kernels = module

    def matrix(self, role: str) -> Any:
        """The part as the kernels' `Matrix`; one without data where the page has no such part."""
        if role not in self._parts:
            return self._kernels.Matrix.none()
        part, memory = self._parts[role]
        return self._kernels.Matrix(part.layout, *part.matrix, memory.data_ptr())

    def address(self, role: str) -> int:
        """Of the part's first byte; 0 where the page has no such part."""
        return self._parts[role][1].data_ptr() if role in self._parts else 0

    def tensor(self, role: str) -> torch.Tensor | None:
        """A part that is held row after row, as torch takes it; None where the page has no such part."""
        if role not in self._parts:
            return None
        part, memory = self._parts[role]
        dtype = {"f32-rows": torch.float32, "bf16-rows": torch.bfloat16}[part.layout]
        return memory.view(dtype).view(part.shape)

    def shape(self, role: str) -> tuple[int, ...]:
        """Before padding."""
        return self._parts[role][0].shape

    def layout(self, role: str) -> str:
        return self._parts[role][0].layout


def page_of_block(layout: PageLayout, block: torch.Tensor) -> NativePage:
    """A page whose bytes, as `page_layout` has them, lie in `block` (uint8)."""
    return NativePage({p.role: (p, block[p.offset : p.offset + p.nbytes]) for p in layout.parts})


def can_map(checkpoint: Checkpoint, page: str, format: str) -> bool:
    """Whether the page's bulk can be used where it lies in the checkpoint's file."""
    matrices = [t for t in tensors_by_page(checkpoint.spec)[page] if t.is_matrix and t.role != "gate"]
    return format == "bfloat16" and all(checkpoint.is_mapped(t, torch.bfloat16) for t in matrices)


def mapped_page(checkpoint: Checkpoint, page: str, format: str) -> NativePage:
    """A page used in place: matrices of the file's own type stay there, the few other parts are made in memory."""
    spec = checkpoint.spec
    layout = page_layout(spec, page, format)
    tensors = {t.role: t for t in tensors_by_page(spec)[page]}
    parts: dict[str, tuple[Part, torch.Tensor]] = {}
    for part in layout.parts:
        tensor = tensors.get(part.role)
        if tensor is not None and part.layout == "bf16-rows":
            parts[part.role] = (part, checkpoint.load(tensor, torch.bfloat16))
        else:
            parts[part.role] = (part, host_buffer(part.nbytes))
    made = {role: memory for role, (_, memory) in parts.items() if memory.dtype == torch.uint8}
    if made:
        fill_parts(checkpoint, page, layout, made)
    return NativePage(parts)
