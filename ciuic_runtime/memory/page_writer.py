"""Writes a packed folder's files: pages one after another past the page cache, headers when all pages are there.
Knows where each page goes before the first is written; what is in a page, and what to resume, it does not know."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ciuic_runtime.devices.backend import host_buffer
from ciuic_runtime.devices.files import write_whole
from ciuic_runtime.memory.page_store import (
    CHECKED_NBYTES,
    CHECKSUM_KEY,
    FORMAT_KEY,
    INDEX,
    PIECES_KEY,
    VERSION_KEY,
    checksum,
    piece_checksums,
)
from ciuic_runtime.models.layout import LAYOUT_VERSION, PAGE_ALIGN

SHARD_BYTES = 3 << 30  # of pages in one file; a larger page has a file of its own
_FLUSH_BYTES = 256 << 20  # written through the page cache before it is flushed and emptied, where it cannot be avoided


@dataclass(frozen=True, slots=True)
class Shard:
    name: str
    pages: Mapping[str, int]  # page -> bytes from the start of the file
    header_nbytes: int
    nbytes: int


class PageWriter:
    """`write` takes pages in any order, though the disk likes the order of `pages` best; `finish` makes files of them.

    Until then the files have no headers, so nothing takes them for whole. One thread at a time."""

    def __init__(
        self, folder: Path, format: str, pages: Mapping[str, int], shard_bytes: int = SHARD_BYTES,
        tables: Collection[str] = (),
    ) -> None:  # fmt: skip
        """`pages`: bytes of each; `tables`: those of which single rows will be read."""
        self.folder, self.format, self.pages = folder, format, pages
        draft = {page: " ".join(["0" * 16] * -(-pages[page] // CHECKED_NBYTES)) for page in tables}
        self.shards = tuple(_shards(format, pages, draft, shard_bytes))
        self.checksums: dict[str, str] = {}
        self._pieces: dict[str, str] = {}
        self._tables = frozenset(tables)
        self._shard_of = {page: shard for shard in self.shards for page in shard.pages}
        self._open: _Output | None = None

    def write(self, page: str, data: torch.Tensor) -> str:
        """Puts the page (uint8 [nbytes], page aligned for best speed) into its place; returns its checksum."""
        assert data.numel() == self.pages[page], f"{page} has {self.pages[page]} bytes, not {data.numel()}"
        shard = self._shard_of[page]
        self._keep_checksums(page, checksum(page, data), data)
        self._output(shard).write(shard.pages[page], data)
        return self.checksums[page]

    def holds(self, page: str, expected: str) -> bool:
        """Whether the page was written before and is whole: it is read back and has the expected checksum."""
        shard, into = self._shard_of[page], host_buffer(self.pages[page])
        path = self.folder / shard.name
        if not path.exists() or self._output(shard).read(shard.pages[page], into) != into.numel():
            return False
        if checksum(page, into) != expected:
            return False
        self._keep_checksums(page, expected, into)
        return True

    def _keep_checksums(self, page: str, whole: str, data: torch.Tensor) -> None:
        self.checksums[page] = whole
        if page in self._tables:
            self._pieces[page] = " ".join(piece_checksums(page, data))

    def finish(self) -> None:
        """Writes headers and index and returns when everything is on the disk."""
        missing = [page for page in self.pages if page not in self.checksums]
        assert not missing, f"{len(missing)} pages are not written, {missing[0]} first"
        for shard in self.shards:
            output = self._output(shard)
            output.write_plain(0, _header(self.format, self.pages, shard, self.checksums, self._pieces))
            output.flush()
        self.close()
        total = sum(self.pages.values())
        weight_map = {page: shard.name for page, shard in self._shard_of.items()}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_whole(self.folder / INDEX, json.dumps(index, indent=2) + "\n")

    def close(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None

    def _output(self, shard: Shard) -> _Output:
        path = self.folder / shard.name
        if self._open is None or self._open.path != path:
            self.close()
            self._open = _Output(path)
        return self._open


class _Output:
    """One file, written with O_DIRECT where the file system has it, else flushed and dropped from the cache in turn."""

    def __init__(self, path: Path) -> None:
        self.path, self._unflushed = path, 0
        self._plain = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._direct = os.open(path, os.O_RDWR | os.O_DIRECT)
        except (OSError, AttributeError):  # the file system, or the system, does not have it
            self._direct = -1

    def write(self, offset: int, data: torch.Tensor) -> None:
        view = data.numpy().data
        if self._direct >= 0 and data.data_ptr() % PAGE_ALIGN == 0:
            try:
                return _write(self._direct, offset, view)
            except OSError as error:
                if error.errno != errno.EINVAL:  # accepted the flag and refuses the write
                    raise
                os.close(self._direct)
                self._direct = -1
        _write(self._plain, offset, view)
        self._unflushed += len(view)
        if self._unflushed >= _FLUSH_BYTES:
            self.flush()
        return None

    def write_plain(self, offset: int, data: bytes) -> None:
        _write(self._plain, offset, memoryview(data))

    def read(self, offset: int, into: torch.Tensor) -> int:
        """Bytes read, fewer where the file ends; from the disk, not from what the page cache still has of it."""
        self.flush()
        view, done = into.numpy().data, 0
        while done < len(view) and (count := os.preadv(self._plain, [view[done:]], offset + done)):
            done += count
        return done

    def flush(self) -> None:
        os.fsync(self._plain)
        self._unflushed = 0
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._plain, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        for handle in (self._plain, self._direct):
            if handle >= 0:
                os.close(handle)


def _write(handle: int, offset: int, view: memoryview) -> None:
    while view:
        count = os.pwrite(handle, view, offset)
        view, offset = view[count:], offset + count


def _shards(format: str, pages: Mapping[str, int], pieces: Mapping[str, str], limit: int) -> Iterator[Shard]:
    """Runs of pages in their order, as many as fit into a file, with the place of each."""
    runs: list[list[str]] = []
    size = limit
    for page, nbytes in pages.items():
        if size + nbytes > limit:
            runs.append([])
            size = 0
        runs[-1].append(page)
        size += nbytes
    for i, run in enumerate(runs):
        name = f"model-{i + 1:05}-of-{len(runs):05}.safetensors"
        draft = Shard(name, dict.fromkeys(run, 0), 0, 0)
        header = len(_header(format, pages, draft, dict.fromkeys(run, "0" * 32), pieces))
        places, end = {}, header
        for page in run:
            places[page] = end
            end += pages[page]
        yield Shard(name, places, header, end)


def _header(
    format: str, pages: Mapping[str, int], shard: Shard, checksums: Mapping[str, str], pieces: Mapping[str, str]
) -> bytes:
    """Length and text of a safetensors header, padded with spaces to a multiple of PAGE_ALIGN. `pieces`: checksums of
    a table's pieces, in one text."""
    metadata = {FORMAT_KEY: format, VERSION_KEY: str(LAYOUT_VERSION)}
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for page in shard.pages:
        metadata[CHECKSUM_KEY + page] = checksums[page]
        if page in pieces:
            metadata[PIECES_KEY + page] = pieces[page]
        header[page] = {"dtype": "U8", "shape": [pages[page]], "data_offsets": [end, end + pages[page]]}
        end += pages[page]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % PAGE_ALIGN)
    return len(text).to_bytes(8, "little") + text
