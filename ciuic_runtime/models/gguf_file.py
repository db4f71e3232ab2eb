"""The container format GGUF: typed values and descriptions of tensors, parsed within the bounds of the mapped file.
Knows where a tensor's bytes lie, not what they mean; nothing here allocates more than a fraction of the file's size."""

from __future__ import annotations

import mmap
import struct
import sys
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import gguf
import numpy as np

from ciuic_runtime.devices.errors import InvalidInput

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_FIELDS = 65_536
MAX_TENSORS = 131_072
MAX_TEXT = 16 << 20  # bytes of all names and single strings together; lists of strings are bounded by the file only
MAX_DIMS = 4
_FLOAT32, _STRING, _ARRAY = 6, 8, 9
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}  # value type -> struct code
_LENGTH = struct.Struct("<Q")
_NORESERVE = 0x4000 if sys.platform == "linux" else 0  # a file larger than memory may be mapped


@dataclass(frozen=True, slots=True)
class GgufTensor:
    name: str
    type: int  # gguf.GGMLQuantizationType, or a number that this version of gguf does not know
    shape: tuple[int, ...]  # as numpy has it: the file's order reversed
    offset: int  # bytes from the start of the file
    nbytes: int

    @property
    def type_name(self) -> str:
        known = self.type in iter(gguf.GGMLQuantizationType)
        return gguf.GGMLQuantizationType(self.type).name if known else f"type {self.type}"


class StringArray(Sequence[str]):
    """Strings that stay in the mapped file until they are asked for."""

    def __init__(self, data: mmap.mmap, starts: array[int]) -> None:
        self._data, self._starts = data, starts

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._decode(self._starts[index])

    def __iter__(self) -> Iterator[str]:
        return map(self._decode, self._starts)

    def _decode(self, start: int) -> str:
        (length,) = _LENGTH.unpack_from(self._data, start - 8)
        return str(memoryview(self._data)[start : start + length], "utf-8")


class GgufFile:
    """One opened file: `fields` (int, float, bool, str, numpy array or StringArray) and `tensors` by name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = _map(path)
        cursor = _Cursor(path, self.data)
        num_tensors, num_fields = _read_counts(cursor)
        self.fields: dict[str, Any] = {}
        for _ in range(num_fields):
            key = cursor.string("a key")
            if key in self.fields:
                raise cursor.error(f"the key {key!r} occurs twice")
            self.fields[key] = cursor.value(key)
        described = [_read_tensor(cursor) for _ in range(num_tensors)]
        start = _aligned(cursor, self._alignment(cursor))
        self.tensors = _place(cursor, described, start)

    def _alignment(self, cursor: _Cursor) -> int:
        alignment = self.fields.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
            raise cursor.error(f"general.alignment is {alignment!r}, not a power of two")
        return alignment

    def raw(self, tensor: GgufTensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The tensor's bytes, as a view of the mapped file."""
        return np.frombuffer(self.data, np.uint8, tensor.nbytes, tensor.offset)


def open_gguf(path: str | Path) -> list[GgufFile]:
    """The file, followed by the other parts where it is the first of a split model (NAME-00001-of-00005.gguf)."""
    first = GgufFile(Path(path))
    count, number = first.fields.get("split.count", 0), first.fields.get("split.no", 0)
    if not isinstance(count, int) or not isinstance(number, int) or not 0 <= count <= 10_000:
        raise InvalidInput(f"{path}: split.count {count!r} and split.no {number!r} make no sense; download it again")
    if count <= 1:
        return [first]
    ending = f"-{number + 1:05d}-of-{count:05d}.gguf"
    if not first.path.name.endswith(ending):
        raise InvalidInput(f"{path} is part {number + 1} of {count}; its name should end in {ending}")
    if number:
        raise InvalidInput(f"{path} is part {number + 1} of {count}; open the first part, which has the model's fields")
    stem = first.path.name.removesuffix(ending)
    return [first] + [
        _open_part(first.path.with_name(f"{stem}-{i:05d}-of-{count:05d}.gguf")) for i in range(2, count + 1)
    ]


def _open_part(path: Path) -> GgufFile:
    if not path.is_file():
        raise InvalidInput(f"{path} is missing, a part of this split model; download every part into one folder")
    return GgufFile(path)


class _Cursor:
    """Reads forward and refuses to go past the end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.pos, self.end = path, data, 0, len(data)
        self.text_left = MAX_TEXT

    def error(self, what: str) -> InvalidInput:
        return InvalidInput(f"{self.path} is not a sound GGUF file: {what}; download it again or convert it anew")

    def take(self, nbytes: int, what: str) -> int:
        start = self.pos
        if nbytes > self.end - start:
            raise self.error(f"{what} needs {nbytes} bytes at offset {start}, the file ends at {self.end}")
        self.pos = start + nbytes
        return start

    def number(self, code: str, what: str) -> Any:
        return struct.unpack_from("<" + code, self.data, self.take(struct.calcsize("<" + code), what))[0]

    def string(self, what: str) -> str:
        length = self.number("Q", what)
        if length > self.text_left:
            raise self.error(f"{what} has a length of {length}")
        self.text_left -= length
        start = self.take(length, what)
        try:
            return str(memoryview(self.data)[start : start + length], "utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is not UTF-8") from error

    def value(self, key: str) -> Any:
        kind = self.number("I", key)
        if kind == _STRING:
            return self.string(key)
        if kind == _ARRAY:
            return self._array(key)
        if kind not in _SCALARS:
            raise self.error(f"{key} has the unknown type {kind}")
        number = self.number(_SCALARS[kind], key)
        return float(str(np.float32(number))) if kind == _FLOAT32 else number  # 1e-05, not 9.999999747378752e-06

    def _array(self, key: str) -> Any:
        kind, count = self.number("I", key), self.number("Q", key)
        if kind == _STRING:
            return self._strings(key, count)
        if kind not in _SCALARS:
            raise self.error(f"{key} is an array of the unsupported type {kind}")
        dtype = np.dtype("<" + _SCALARS[kind] if _SCALARS[kind] != "?" else "u1")
        return np.frombuffer(self.data, dtype, count, self.take(count * dtype.itemsize, key))

    def _strings(self, key: str, count: int) -> StringArray:
        if count > (self.end - self.pos) // 8:
            raise self.error(f"{key} claims {count} strings, more than the file has room for")
        starts: array[int] = array("Q")
        position, unpack = self.pos, _LENGTH.unpack_from
        for _ in range(count):
            if position + 8 > self.end:
                raise self.error(f"{key} is cut short")
            (length,) = unpack(self.data, position)
            starts.append(position + 8)
            position += 8 + length
            if position > self.end:
                raise self.error(f"{key} has a string of length {length} past the end")
        self.pos = position
        return StringArray(self.data, starts)


def _map(path: Path) -> mmap.mmap:
    """Private and writable, so that torch takes views without a warning; what is written never reaches the file."""
    try:
        with path.open("rb") as file:
            if sys.platform == "win32":
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            flags, protection = mmap.MAP_PRIVATE | _NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
            return mmap.mmap(file.fileno(), 0, flags=flags, prot=protection)
    except (OSError, ValueError) as error:  # ValueError: an empty file
        raise InvalidInput(f"{path} cannot be read: {error}") from error


def _read_counts(cursor: _Cursor) -> tuple[int, int]:
    if cursor.data[:4] != MAGIC:
        raise cursor.error(f"it begins with {bytes(cursor.data[:4])!r} instead of {MAGIC!r}")
    cursor.take(4, "the magic")
    version = cursor.number("I", "the version")
    if version not in VERSIONS:
        kind = "big-endian" if version & 0xFFFF == 0 else f"of version {version}"
        raise cursor.error(f"it is {kind}, this runtime reads little-endian versions {VERSIONS[0]} and {VERSIONS[1]}")
    num_tensors, num_fields = cursor.number("Q", "the tensor count"), cursor.number("Q", "the field count")
    for what, count, most, least in (("tensors", num_tensors, MAX_TENSORS, 32), ("fields", num_fields, MAX_FIELDS, 13)):
        if count > min(most, cursor.end // least):
            raise cursor.error(f"it claims {count} {what}")
    return num_tensors, num_fields


def _read_tensor(cursor: _Cursor) -> GgufTensor:
    name = cursor.string("a tensor's name")
    num_dims = cursor.number("I", name)
    if not 1 <= num_dims <= MAX_DIMS:
        raise cursor.error(f"tensor {name} has {num_dims} dimensions")
    shape = tuple(cursor.number("Q", name) for _ in range(num_dims))[::-1]
    kind, offset = cursor.number("I", name), cursor.number("Q", name)
    num_values = 1
    for dim in shape:
        num_values *= dim
    # A type that gguf does not know occupies an unknown size; it is refused when the tensor is needed.
    block, nbytes = gguf.GGML_QUANT_SIZES.get(kind, (1, 0))
    if num_values == 0 or shape[-1] % block:
        raise cursor.error(f"tensor {name} of shape {shape} does not consist of blocks of {block}")
    return GgufTensor(name, kind, shape, offset, num_values // block * nbytes)


def _aligned(cursor: _Cursor, alignment: int) -> int:
    return -(-cursor.pos // alignment) * alignment


def _place(cursor: _Cursor, described: list[GgufTensor], start: int) -> dict[str, GgufTensor]:
    """By name, at absolute offsets, inside the file and without overlap."""
    tensors: dict[str, GgufTensor] = {}
    end, previous = start, ""
    for tensor in sorted(described, key=lambda t: t.offset):
        begin = start + tensor.offset
        if begin < end:
            raise cursor.error(f"tensors {previous} and {tensor.name} overlap")
        end, previous = begin + tensor.nbytes, tensor.name
        if end > cursor.end:
            raise cursor.error(f"tensor {tensor.name} ends at {end}, the file at {cursor.end} (cut short?)")
        if tensor.name in tensors:
            raise cursor.error(f"tensor {tensor.name} occurs twice")
        tensors[tensor.name] = GgufTensor(tensor.name, tensor.type, tensor.shape, begin, tensor.nbytes)
    return tensors
