"""What every source of weights offers, and which reader opens a path: a Hugging Face or packed folder or a GGUF file.
Knows no file format itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.models.config_fields import read_json_object
from ciuic_runtime.models.spec import ModelSpec
from ciuic_runtime.models.tensors import TensorSpec

if TYPE_CHECKING:
    import torch


class Checkpoint(Protocol):
    """Weights on disk, opened: headers are read and checked against the spec, tensors are not loaded yet."""

    path: Path
    spec: ModelSpec

    @property
    def files(self) -> set[Path]:
        """The files that its tensors lie in."""

    @property
    def nbytes(self) -> int:
        """Of all tensors of the model, as they lie there."""

    def load(self, tensor: TensorSpec, dtype: torch.dtype) -> torch.Tensor:
        """The tensor in `dtype` and in the shape the spec asks for, on the host.

        Where the file already holds `dtype`, the result is a view of the mapped file: nothing is read until it is
        used, and it must not be written to. Otherwise it is converted (dequantised) into fresh memory.
        Raises InvalidInput naming file and tensor if it is missing or has another shape or type."""

    def is_mapped(self, tensor: TensorSpec, dtype: torch.dtype) -> bool:
        """Whether `load` would return a view of the file instead of fresh memory."""

    def prefetch(self, tensor: TensorSpec) -> None:
        """Says that the tensor will be loaded soon: the system begins to read the file ahead."""

    def release(self, tensor: TensorSpec) -> None:
        """Says that what was loaded is done with: bytes of the file stop counting as this process's memory."""

    def close(self) -> None: ...


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a Hugging Face folder, a packed one or a `.gguf` file; raises InvalidInput for anything else."""
    path = Path(path)
    if path.is_dir() and _is_packed(path):
        from ciuic_runtime.models.packed_checkpoint import PackedCheckpoint

        return PackedCheckpoint(path)
    if path.is_dir():
        from ciuic_runtime.models.safetensors_checkpoint import SafetensorsCheckpoint

        return SafetensorsCheckpoint(path)
    if path.suffix == ".gguf" and path.is_file():
        from ciuic_runtime.models.gguf_checkpoint import GgufCheckpoint

        return GgufCheckpoint(path)
    if not path.exists():
        raise InvalidInput(
            f"no checkpoint at {path}; give a folder with config.json and *.safetensors, or a .gguf file"
        )
    raise InvalidInput(f"{path} is neither a checkpoint folder nor a .gguf file")


def _is_packed(folder: Path) -> bool:
    config = folder / "config.json"
    return config.is_file() and "ciuic" in read_json_object(config)
