"""Memory for what tasks hand on, by name, out of a pool: it grows to what was needed once and is used again.
Knows no task; whoever writes under a name knows when its earlier content is no longer wanted."""

from __future__ import annotations

import torch

from ciuic_runtime.memory.pool import TensorPool


class Buffers:
    """Views are kept too, so that asking again for the same rows allocates nothing."""

    def __init__(self) -> None:
        self.pool = TensorPool()
        self._memory: dict[str, torch.Tensor] = {}  # name -> [most rows so far, width]
        self._views: dict[tuple[str, int], torch.Tensor] = {}

    def get(self, name: str, rows: int, width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """[rows, width], with whatever was there; a name always has the same width and type."""
        view = self._views.get((name, rows))
        if view is None:
            view = self._views[name, rows] = self._room(name, rows, width, dtype)[:rows]
        return view

    @property
    def nbytes(self) -> int:
        return sum(m.nbytes for m in self._memory.values())

    def _room(self, name: str, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        memory = self._memory.get(name)
        if memory is None or memory.shape[0] < rows:
            for key in [k for k in self._views if k[0] == name]:
                del self._views[key]
            if memory is not None:
                self.pool.free(memory)
                self.pool.clear()  # nobody asks for so few rows of this name again
            most = max(rows, 1)
            slot = self.pool.allocate(most * width * dtype.itemsize)
            memory = self._memory[name] = slot.view(dtype).view(most, width)
        assert memory.shape[1] == width, f"{name} is {memory.shape[1]} wide, {width} asked for"
        assert memory.dtype == dtype, f"{name} holds {memory.dtype}, {dtype} asked for"
        return memory
