"""A packed folder as a checkpoint: pages as they are for whoever computes with them, tensors for the torch reference.
How a page is stored is `memory/page_store.py`'s business, how it is laid out `layout.py`'s."""

from __future__ import annotations

import threading
from pathlib import Path

import torch

from ciuic_runtime.devices.backend import host_buffer
from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.memory.page_store import PageStore
from ciuic_runtime.models.pages import unpack_tensor
from ciuic_runtime.models.tensors import TensorSpec


class PackedCheckpoint:
    """Implements `checkpoint.Checkpoint`; beside it, `format` and `read_page`."""

    def __init__(self, folder: str | Path) -> None:
        self.store = PageStore(folder)
        self.path, self.spec, self.format = self.store.path, self.store.spec, self.store.format
        if self.spec.why_not_runnable:
            raise InvalidInput(f"{self.path}: {self.spec.why_not_runnable}")
        self._latest: tuple[str, torch.Tensor] | None = None  # a page's tensors are asked for one after another
        self._reading = threading.Lock()

    @property
    def files(self) -> set[Path]:
        return self.store.files

    @property
    def nbytes(self) -> int:
        return sum(self.store.pages.values())

    def read_page(self, page: str, into: torch.Tensor) -> None:
        """Fills `into` (uint8 [page_layout(spec, page, format).nbytes], on the host) with the page, checked."""
        self.store.read_page(page, into)

    def load(self, tensor: TensorSpec, dtype: torch.dtype) -> torch.Tensor:
        """The values that the packed tensor stands for, in fresh memory."""
        return unpack_tensor(self.spec, tensor, self.format, self._page(tensor.page)).to(dtype)

    def is_mapped(self, tensor: TensorSpec, dtype: torch.dtype) -> bool:
        """Never: tensors are unpacked."""
        return False

    def prefetch(self, tensor: TensorSpec) -> None:
        """Nothing: pages are read past the page cache."""

    def release(self, tensor: TensorSpec) -> None:
        """Nothing: what `load` gives is no view of a file."""

    def close(self) -> None:
        self.store.close()
        self._latest = None

    def _page(self, name: str) -> torch.Tensor:
        with self._reading:
            if self._latest is None or self._latest[0] != name:
                self._latest = None
                data = host_buffer(self.store.pages[name])
                self.store.read_page(name, data)
                self._latest = (name, data)
            return self._latest[1]
