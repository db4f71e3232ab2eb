"""A packed folder, opened for reading: which file holds which page, and pages read past the page cache into buffers.
Every page is checked as it is read; what its bytes mean is the layout's business.

On disk a packed folder is a checkpoint folder: `config.json` (with a section "ciuic" that says how it is packed),
tokenizer, and safetensors files with one U8 tensor per page, each at a multiple of 4096 bytes and as long as its
layout says. The files' metadata holds a checksum per page, which is bound to the page's name; the config holds one of
all of them, so that files of two models are never taken for one. A table, of which single rows are read, has checksums
of its pieces as well."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash

from ciuic_runtime.devices.backend import host_buffer
from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.models.config import read_config
from ciuic_runtime.models.config_fields import read_json_object
from ciuic_runtime.models.layout import LAYOUT_VERSION, PAGE_ALIGN, page_layout
from ciuic_runtime.models.safetensors_header import MAX_HEADER_BYTES, StoredTensor, read_header_and_metadata
from ciuic_runtime.models.spec import ModelSpec
from ciuic_runtime.models.tensors import tensors_by_page

INDEX = "model.safetensors.index.json"
FORMAT_KEY, VERSION_KEY, CHECKSUM_KEY = "ciuic_format", "ciuic_layout_version", "xxh3_128 "  # in a file's metadata
CHECKED_NBYTES = 128 << 10  # of a table's piece, which has a checksum of its own; a multiple of PAGE_ALIGN
PIECES_KEY = f"xxh3_64 {CHECKED_NBYTES} "  # of the pieces' checksums, likewise
_MAX_READ = 1 << 30  # bytes at a time; a multiple of PAGE_ALIGN
_PIECE = 4 << 20  # bytes that are checked at a time of a page that is not kept; a multiple of PAGE_ALIGN


def checksum(page: str, data: torch.Tensor) -> str:
    """XXH3-128 of the bytes, seeded with the page's name: the bytes of another page do not have it."""
    return xxhash.xxh3_128_hexdigest(data.numpy().data, seed=_seed(page))


def piece_checksum(page: str, number: int, data: torch.Tensor) -> str:
    """XXH3-64 of a piece of a page, seeded with the page's name and the piece's number."""
    return xxhash.xxh3_64_hexdigest(data.numpy().data, seed=_seed(f"{page} {number}"))


def piece_checksums(page: str, data: torch.Tensor) -> list[str]:
    """Of all pieces of a page, one after another; the last may be shorter."""
    pieces = torch.split(data, CHECKED_NBYTES)
    return [piece_checksum(page, i, piece) for i, piece in enumerate(pieces)]


def _seed(page: str) -> int:
    return xxhash.xxh3_64_intdigest(page.encode())


def checksum_of_all(checksums: Iterable[str]) -> str:
    """Of the pages' checksums in the order of a forward pass."""
    return xxhash.xxh3_128_hexdigest(" ".join(checksums).encode())


class PageStore:
    """`read_page` may be called from many threads at once, which then read at the same time."""

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder)
        self.spec: ModelSpec = read_config(self.path / "config.json")
        if not self.spec.packed:
            raise InvalidInput(f"{self.path} is not packed; pack it with: ciuic pack {self.path} OUT --format int4")
        self.format: str = self.spec.packed
        self._stored = _stored_pages(self.path, self.spec)
        self.pages: Mapping[str, int] = {name: page.tensor.nbytes for name, page in self._stored.items()}  # bytes
        self._files: dict[Path, StoreFile] = {}
        self._opening = threading.Lock()

    @property
    def files(self) -> set[Path]:
        return {page.tensor.file for page in self._stored.values()}

    def read_page(self, name: str, into: torch.Tensor) -> None:
        """Fills `into` (uint8 [nbytes] on the host, page aligned for best speed) with the page, checked.

        Raises InvalidInput, naming page and file, where the file is cut short or the bytes are not this page's."""
        if name not in self._stored:
            raise InvalidInput(f"{self.path} has no page {name!r}; pages are like {next(iter(self._stored))}")
        page = self._stored[name]
        assert into.numel() == page.tensor.nbytes, f"{name} has {page.tensor.nbytes} bytes, not {into.numel()}"
        self.file_of(name).read(page.tensor.begin, into, name)
        self.verify(name, into)

    def verify_stored(self, name: str) -> None:
        """As `verify`, of what is in the file; the page is read piece by piece and not kept."""
        file, begin, left = self.file_of(name), self.offset(name), self.pages[name]
        hashed, piece = xxhash.xxh3_128(seed=_seed(name)), host_buffer(min(left, _PIECE))
        while left:
            part = piece[: min(left, len(piece))]
            file.read(begin, part, name)
            hashed.update(part.numpy().data)
            begin, left = begin + len(part), left - len(part)
        self._compare(name, hashed.hexdigest(), self._stored[name].checksum)

    def verify(self, name: str, data: torch.Tensor) -> None:
        """Raises InvalidInput, naming page and file, unless `data` is what was packed as this page."""
        self._compare(name, checksum(name, data), self._stored[name].checksum)

    def has_pieces(self, name: str) -> bool:
        """Whether pieces of the page have checksums of their own; not in folders of earlier versions."""
        return bool(self._stored[name].pieces)

    def verify_piece(self, name: str, number: int, data: torch.Tensor) -> None:
        """As `verify`, of CHECKED_NBYTES of the page, or what is left at its end."""
        self._compare(name, piece_checksum(name, number, data), self._stored[name].pieces[number])

    def _compare(self, name: str, found: str, expected: str) -> None:
        if found != expected:
            raise InvalidInput(
                f"{self._stored[name].tensor.file} is damaged: page {name} does not have the checksum it was packed "
                "with; copy the file again from where it came, or pack the model again"
            )

    def offset(self, name: str) -> int:
        """Bytes from the start of its file to the page."""
        return self._stored[name].tensor.begin

    def file_of(self, name: str) -> StoreFile:
        """The page's file, opened; it stays the same one though another takes its name meanwhile."""
        path = self._stored[name].tensor.file
        with self._opening:
            if path not in self._files:
                self._files[path] = StoreFile(path)
            return self._files[path]

    def close(self) -> None:
        with self._opening:
            self._files.clear()


@dataclass(frozen=True, slots=True)
class _StoredPage:
    tensor: StoredTensor
    checksum: str
    pieces: tuple[str, ...]  # their checksums; () where they have none


class StoreFile:
    """One opened file, read with O_DIRECT where file system, offset and buffer allow it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.direct = self.plain = -1  # descriptors; direct is -1 where the file system refuses
        try:
            self.plain = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise InvalidInput(f"{path} cannot be opened: {error.strerror}") from error
        try:
            self.direct = os.open(path, os.O_RDONLY | os.O_DIRECT)
        except (OSError, AttributeError):  # the file system, or the system, does not have it
            self.direct = -1
        self._stamp = self._look()

    def __del__(self) -> None:
        for handle in (self.plain, self.direct):
            if handle >= 0:
                os.close(handle)

    def unchanged(self) -> bool:
        """Whether nobody has written to it since it was opened."""
        return self._look() == self._stamp

    def why_short(self, page: str, missing: int) -> InvalidInput:
        return InvalidInput(
            f"{self.path} has become shorter since it was opened: page {page} ends {missing} bytes early; copy the "
            "file again"
        )

    def why_failed(self, page: str, reason: str) -> InvalidInput:
        return InvalidInput(f"{self.path} cannot be read at page {page}: {reason}")

    def _look(self) -> tuple[int, int]:
        found = os.fstat(self.plain)
        return found.st_size, found.st_mtime_ns

    def read(self, offset: int, into: torch.Tensor, page: str) -> None:
        view = into.numpy().data
        aligned = offset % PAGE_ALIGN == 0 and into.data_ptr() % PAGE_ALIGN == 0 and len(view) % PAGE_ALIGN == 0
        try:
            if aligned and self.direct >= 0:
                try:
                    done = _read(self.direct, offset, view)
                except OSError:  # some file systems accept the flag and refuse the read
                    done = _read(self.plain, offset, view)
            else:
                done = _read(self.plain, offset, view)
        except OSError as error:
            raise self.why_failed(page, str(error.strerror)) from error
        if done != len(view):
            raise self.why_short(page, len(view) - done)


def _read(handle: int, offset: int, view: memoryview) -> int:
    """Bytes read; fewer than asked for only at the end of the file."""
    done = 0
    while done < len(view):
        count = os.preadv(handle, [view[done : done + _MAX_READ]], offset + done)
        if not count:
            break
        done += count
    return done


# What is in the folder


def _stored_pages(folder: Path, spec: ModelSpec) -> dict[str, _StoredPage]:
    """Every page of the model in the order of a forward pass, from headers alone."""
    found: dict[str, _StoredPage] = {}
    for file in _files(folder):
        tensors, metadata = read_header_and_metadata(file)
        _check_file(file, metadata, spec.packed)
        for name, tensor in tensors.items():
            if name in found:
                raise InvalidInput(
                    f"{file} and {found[name].tensor.file.name} both hold page {name}; remove one of them"
                )
            pieces = metadata.get(PIECES_KEY + name, "").split()
            found[name] = _StoredPage(tensor, metadata.get(CHECKSUM_KEY + name, ""), tuple(pieces))
    expected = tensors_by_page(spec)
    if missing := [name for name in expected if name not in found]:
        raise InvalidInput(
            f"{folder} lacks {len(missing)} pages of {spec.name}, {missing[0]} first; copy all its files"
        )
    for name in expected:
        _check_page(name, found[name], page_layout(spec, name, spec.packed).nbytes)
    pages = {name: found[name] for name in expected}
    _check_whole(folder, pages)
    return pages


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX
    weight_map = read_json_object(index, MAX_HEADER_BYTES).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or any(not isinstance(n, str) or n != Path(n).name for n in names):
        raise InvalidInput(f"{index}: weight_map does not say which files beside it hold the pages; copy it again")
    files = [folder / name for name in sorted(set(names))]
    if missing := [file.name for file in files if not file.is_file()]:
        raise InvalidInput(f"{folder} lacks {len(missing)} of {len(files)} files, {missing[0]} first; copy them too")
    return files


def _check_file(file: Path, metadata: Mapping[str, str], format: str) -> None:
    version, held = metadata.get(VERSION_KEY, "none"), metadata.get(FORMAT_KEY, "none")
    if version != str(LAYOUT_VERSION):
        raise InvalidInput(
            f"{file} has pages of layout version {version}, this runtime reads version {LAYOUT_VERSION}; "
            "pack the model again, or use the version of this package that packed it"
        )
    if held != format:
        raise InvalidInput(f"{file} holds pages in {held}, config.json says {format}; the files belong to two packings")


def _check_page(name: str, page: _StoredPage, nbytes: int) -> None:
    tensor = page.tensor
    if tensor.dtype != "U8" or tensor.nbytes != nbytes:
        raise InvalidInput(
            f"{tensor.file}: page {name} is {tensor.dtype} of {tensor.nbytes} bytes; the model asks for U8 of {nbytes}"
        )
    if not page.checksum:
        raise InvalidInput(f"{tensor.file}: page {name} has no checksum; pack the model again")
    if page.pieces and len(page.pieces) != -(-nbytes // CHECKED_NBYTES):
        raise InvalidInput(f"{tensor.file}: page {name} has {len(page.pieces)} checksums of pieces; pack it again")


def _check_whole(folder: Path, pages: Mapping[str, _StoredPage]) -> None:
    """That config.json and all files come from one packing."""
    section = read_json_object(folder / "config.json").get("ciuic", {})
    if section.get("checksum") != checksum_of_all(page.checksum for page in pages.values()):
        raise InvalidInput(f"{folder}: its files come from different packings; copy all of them from one")
