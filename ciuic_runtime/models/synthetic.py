"""A checkpoint that exists in memory only, with random weights of the shapes of a model: for measuring its operators.
Knows no file; what it computes means nothing, how long that takes is what a real checkpoint takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from ciuic_runtime.models.random_checkpoint import standard_deviation
from ciuic_runtime.models.spec import ModelSpec
from ciuic_runtime.models.tensors import TensorSpec, count_parameters

POOL = (1 << 24) + 1009  # random numbers that tensors are cut from, each beginning where the last one ended


class SyntheticCheckpoint:
    """Implements `checkpoint.Checkpoint`."""

    def __init__(self, spec: ModelSpec, seed: int = 0) -> None:
        self.path = Path(f"random weights for {spec.name}")
        self.spec = replace(spec, packed="")  # they are not, whatever the model's own are
        self._pool = torch.empty(POOL).normal_(generator=torch.Generator().manual_seed(seed))
        self._at = 0

    @property
    def files(self) -> set[Path]:
        return set()

    @property
    def nbytes(self) -> int:
        return 2 * count_parameters(self.spec).total

    def load(self, tensor: TensorSpec, dtype: torch.dtype) -> torch.Tensor:
        values = torch.empty(tensor.num_parameters, dtype=dtype)
        done, deviation = 0, standard_deviation(tensor, self.spec)
        while done < len(values):
            piece = self._pool[self._at : self._at + len(values) - done]
            values[done : done + len(piece)] = piece * deviation
            done += len(piece)
            self._at = (self._at + len(piece)) % POOL
        if not tensor.is_matrix:
            values += 1.0
        return values.view(tensor.shape)

    def is_mapped(self, tensor: TensorSpec, dtype: torch.dtype) -> bool:
        """Never: nothing lies in a file."""
        return False

    def prefetch(self, tensor: TensorSpec) -> None:
        """Nothing: there is no file to read."""

    def release(self, tensor: TensorSpec) -> None:
        """Nothing: there is no file to let go of."""

    def close(self) -> None:
        """Nothing is open."""
