"""Brings each page to the device that the schedule has it on, in the form that the device's operators read.
Knows checkpoints and backends; what the weights are used for is not its business."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch

from ciuic_runtime.devices.backend import Backend, host_buffer
from ciuic_runtime.models.checkpoint import Checkpoint
from ciuic_runtime.models.forward import Weights
from ciuic_runtime.models.graph import FLOAT32_ROLES
from ciuic_runtime.models.layout import PACKED_FORMATS, page_layout
from ciuic_runtime.models.native_pages import NativePage, can_map, mapped_page, page_of_block
from ciuic_runtime.models.pages import fill_page, unpack_tensor
from ciuic_runtime.models.tensors import tensors_by_page


def load_native(
    checkpoint: Checkpoint, pages: list[str], format: str, backend: Backend, threads: int
) -> dict[str, NativePage]:
    """Pages for native kernels. Where the device is the host and the file holds the format, they stay in the file;
    else they share one block of the device's memory, read or packed by that many threads."""
    mapped = {
        page: mapped_page(checkpoint, page, format)
        for page in pages
        if backend.host_memory and can_map(checkpoint, page, format)
    }
    rest = [page for page in pages if page not in mapped]
    if not rest:
        return mapped
    layouts = {page: page_layout(checkpoint.spec, page, format) for page in rest}
    block, at, slots = backend.allocate(sum(layout.nbytes for layout in layouts.values())), 0, {}
    for page, layout in layouts.items():
        slots[page] = block[at : at + layout.nbytes]
        at += layout.nbytes

    def fill(page: str) -> None:
        if backend.host_memory:
            fill_page(checkpoint, page, format, slots[page])
        else:
            staged = host_buffer(slots[page].nbytes)
            fill_page(checkpoint, page, format, staged)
            backend.copy(slots[page], staged)
            backend.synchronize()

    if len(rest) == 1 or not backend.host_memory:
        for page in rest:
            fill(page)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(fill, rest))
    return mapped | {page: page_of_block(layouts[page], slots[page]) for page in rest}


def load_tensors(checkpoint: Checkpoint, page: str, format: str, dtype: torch.dtype, backend: Backend) -> Weights:
    """A page's tensors for the torch operators, in `dtype`: mapped from the file where the device is the host and the
    type fits, else in one block of the device's memory. Packed formats give the values that the packed page has."""
    spec = checkpoint.spec
    wanted = {t: torch.float32 if t.role in FLOAT32_ROLES else dtype for t in tensors_by_page(spec)[page]}
    if format in PACKED_FORMATS:
        packed = host_buffer(page_layout(spec, page, format).nbytes)
        fill_page(checkpoint, page, format, packed)
        loaded = {t.role: unpack_tensor(spec, t, format, packed).to(kind) for t, kind in wanted.items()}
    else:
        loaded = {t.role: checkpoint.load(t, kind) for t, kind in wanted.items()}
    return loaded if backend.host_memory else _to_device(loaded, backend)


def _to_device(weights: Weights, backend: Backend) -> Mapping[str, torch.Tensor]:
    """One contiguous block of the device's memory, each tensor at a multiple of 64 bytes."""
    offsets, end = {}, 0
    for role, tensor in weights.items():
        offsets[role] = end
        end += -(-tensor.nbytes // 64) * 64
    block = backend.allocate(end)
    placed = {}
    for role, tensor in weights.items():
        view = block[offsets[role] : offsets[role] + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        backend.copy(view, tensor)
        placed[role] = view
    backend.synchronize()
    return placed
