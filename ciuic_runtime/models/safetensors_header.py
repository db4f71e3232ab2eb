"""The header of a safetensors file, read and checked before anything maps the file: what lies where, in which type.
Stricter than or equal to the safetensors library, and bounded by the file: a claimed length allocates nothing."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

from ciuic_runtime.devices.errors import InvalidInput

MAX_HEADER_BYTES = 100_000_000  # the library's own limit
_MAX_DIMENSIONS = 64
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class StoredTensor:
    file: Path
    dtype: str  # as safetensors names it: BF16, F32, F8_E4M3
    shape: tuple[int, ...]
    begin: int  # bytes from the start of the file
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name; InvalidInput naming file and fault if it is damaged."""
    return read_header_and_metadata(path)[0]


def read_header_and_metadata(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors by name, and what the file says about itself."""
    text, size = _header_text(path)
    entries = _parse(path, text)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, "__metadata__ is not an object of strings")
    start = 8 + len(text)
    stored = {name: _stored(path, name, entry, start) for name, entry in entries.items()}
    _check_layout(path, stored, start, size)
    return stored, metadata


def _damaged(path: Path, problem: str) -> InvalidInput:
    return InvalidInput(f"{path} is damaged or no safetensors file: {problem}; download it again")


def _header_text(path: Path) -> tuple[bytes, int]:
    """The header's bytes and the size of the file; nothing is read before the length is known to be in the file."""
    if not path.is_file():
        raise InvalidInput(f"{path} {'is not a file' if path.exists() else 'does not exist'}")
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise _damaged(path, f"it has {size} bytes and claims a header of {length if size >= 8 else 'unknown'}")
            if length > MAX_HEADER_BYTES:
                raise _damaged(path, f"its header of {length} bytes exceeds the format's {MAX_HEADER_BYTES}")
            text = file.read(length)
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read: {error.strerror}") from error
    if len(text) != length:
        raise _damaged(path, "it became shorter while it was read")
    return text, size


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    # An entry is one object of 49 characters or more with two lists: reject denser text before it grows in memory.
    if text.count(b"{") > len(text) // 40 + 3 or text.count(b"[") > len(text) // 20 + 3:
        raise _damaged(path, "its header is not a list of tensors")
    if not text.startswith(b"{"):
        raise _damaged(path, "its header does not begin with {")
    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=_object_without_duplicates)
    except (ValueError, RecursionError) as error:
        reason = "too deeply nested" if isinstance(error, RecursionError) else str(error).split("\n")[0][:100]
        raise _damaged(path, f"its header is not valid JSON ({reason})") from None
    if not isinstance(entries, dict):
        raise _damaged(path, "its header is not a JSON object")
    return entries


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) == len(pairs):
        return result
    seen: set[str] = set()
    twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
    raise ValueError(f"{_shown(twice)} occurs twice")


def _shown(name: str) -> str:
    return repr(name if len(name) <= 120 else name[:117] + "...")


def _stored(path: Path, name: str, entry: Any, start: int) -> StoredTensor:
    """One entry with its offsets made absolute, checked as far as it can be by itself."""
    shown = _shown(name)
    if not isinstance(entry, dict):
        raise _damaged(path, f"the entry of {shown} is not an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise _damaged(path, f"{shown} has dtype {_shown(str(dtype))}, which safetensors does not know")
    if not _are_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        raise _damaged(path, f"the shape of {shown} is not a list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _damaged(path, f"data_offsets of {shown} are not [begin, end]")
    if prod(shape) * _BITS[dtype] != 8 * (offsets[1] - offsets[0]):
        raise _damaged(path, f"{shown} is {dtype} {list(shape)[:8]} but holds {offsets[1] - offsets[0]} bytes")
    return StoredTensor(path, dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)


def _check_layout(path: Path, stored: dict[str, StoredTensor], start: int, size: int) -> None:
    """The tensors lie one after another and end where the file ends."""
    position = start
    for name, tensor in sorted(stored.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.end > size:
            raise _damaged(path, f"{_shown(name)} ends at byte {tensor.end}, but the file has only {size}")
        if tensor.begin != position:
            fault = "overlaps another tensor" if tensor.begin < position else "leaves a gap before it"
            raise _damaged(path, f"{_shown(name)} {fault}")
        position = tensor.end
    if position != size:
        raise _damaged(path, f"its tensors end at byte {position}, but the file has {size}")
