"""A checkpoint into a packed folder: pages are packed on all cores and written one after another, in bounded memory.
An interrupted packing goes on where it was; the folder appears under its name when it is whole. How pages are packed,
`models/pages.py` knows, how they are kept `memory/page_writer.py`."""

from __future__ import annotations

import errno
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import disk_usage
from typing import Any

import torch
import xxhash

from ciuic_runtime.devices.backend import host_buffer
from ciuic_runtime.devices.cpu import discover_cpus
from ciuic_runtime.devices.errors import CiuicError, InvalidInput
from ciuic_runtime.devices.files import check_can_write
from ciuic_runtime.devices.units import format_bytes
from ciuic_runtime.memory import pack_journal
from ciuic_runtime.memory.pack_journal import PackJournal
from ciuic_runtime.memory.page_store import checksum_of_all
from ciuic_runtime.memory.page_writer import SHARD_BYTES, PageWriter
from ciuic_runtime.models.checkpoint import Checkpoint, open_checkpoint
from ciuic_runtime.models.graph import is_table
from ciuic_runtime.models.layout import LAYOUT_VERSION, PACKED_FORMATS, num_values, page_layout
from ciuic_runtime.models.packed_files import write_config, write_tokenizer
from ciuic_runtime.models.pages import fill_page
from ciuic_runtime.models.spec import ModelSpec
from ciuic_runtime.models.tensors import tensors_by_page
from ciuic_runtime.models.tokenizer import load_tokenizer

FORMATS = {**{f: f for f in PACKED_FORMATS}, "bf16": "bfloat16", "bfloat16": "bfloat16"}
IN_FLIGHT = 256 << 20  # bytes of pages being packed or waiting to be written, and of what they are packed from
Progress = Callable[[int, int], None]  # bytes of pages done, bytes in all


@dataclass(frozen=True, slots=True)
class PackReport:
    path: Path
    format: str
    pages: int
    pages_kept: int  # that an interrupted packing had left
    nbytes: int  # of all pages
    source_nbytes: int  # of the tensors they were packed from
    nbytes_written: int  # this time
    seconds: float
    bits_per_weight: Mapping[str, float]  # by kind of page, of the parts in the format itself ("int4"), and of "all"

    @property
    def write_rate(self) -> float:
        """bytes/s of pages written."""
        return self.nbytes_written / self.seconds

    @property
    def read_rate(self) -> float:
        """bytes/s of the source, as far as it was packed this time."""
        return self.source_nbytes * (self.nbytes_written / self.nbytes) / self.seconds

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema_version": 1,
            "path": str(self.path),
            "format": self.format,
            "pages": self.pages,
            "pages_kept": self.pages_kept,
            "bytes": self.nbytes,
            "source_bytes": self.source_nbytes,
            "seconds": self.seconds,
            "source_bytes_per_s": self.read_rate,
            "written_bytes_per_s": self.write_rate,
            "bits_per_weight": dict(self.bits_per_weight),
        }


def pack(
    model: str | Path,
    out: str | Path,
    format: str = "int4",
    threads: int | None = None,
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> PackReport:
    """Writes the folder `out`, which `run`, `plan` and `LLM` take like any checkpoint.

    What is written before it is whole stands in `out` + ".partial"; calling this again after an interruption goes on
    from there. Raises InvalidInput, before anything is written, for what cannot be packed, there or like that."""
    start = time.perf_counter()
    checkpoint, out, format = _opened(model, out, format)
    spec, threads = checkpoint.spec, _threads(threads)
    pages = {page: page_layout(spec, page, format).nbytes for page in tensors_by_page(spec)}
    partial = out.with_name(out.name + ".partial")
    _check_room(out, sum(pages.values()) - _size(partial))
    with (
        closing(checkpoint),
        _disk_errors(partial),
        PackJournal(partial, _heading(checkpoint, format, shard_bytes)) as journal,
    ):
        write_tokenizer(checkpoint.path, partial)
        tables = [page for page in pages if is_table(spec, page)]
        with closing(PageWriter(partial, format, pages, shard_bytes, tables)) as writer:
            kept = _kept(writer, journal.written, progress)
            _pack(checkpoint, writer, journal, threads, progress)
            writer.finish()
        checksum = checksum_of_all(writer.checksums[page] for page in pages)
        write_config(checkpoint.path, spec, partial, format, checksum)
        _appear(partial, out)
        source_nbytes = checkpoint.nbytes
    written = sum(nbytes for page, nbytes in pages.items() if page not in kept)
    return PackReport(
        out, format, len(pages), len(kept), sum(pages.values()), source_nbytes, written, time.perf_counter() - start,
        bits_per_weight(spec, format),
    )  # fmt: skip


def bits_per_weight(spec: ModelSpec, format: str) -> dict[str, float]:
    """Bits that a parameter takes, padding and all: in each kind of page, in the parts held in the format itself, and
    in all pages together."""
    nbytes: dict[str, int] = {}
    weights: dict[str, int] = {}
    for page, tensors in tensors_by_page(spec).items():
        layout = page_layout(spec, page, format)
        kind = "experts" if ".experts." in page else page.rsplit(".", 1)[-1]
        for name in ("norms" if kind.endswith("_norm") else kind, "all"):
            nbytes[name] = nbytes.get(name, 0) + layout.nbytes
            weights[name] = weights.get(name, 0) + sum(t.num_parameters for t in tensors)
        for part in layout.parts:
            if part.layout == _BULK[format]:
                nbytes[format] = nbytes.get(format, 0) + part.nbytes
                weights[format] = weights.get(format, 0) + num_values(part)
    return {name: nbytes[name] * 8 / weights[name] for name in weights}


_BULK = {"int4": "w4g128-t16", "int8": "w8g128-t16", "bfloat16": "bf16-rows"}


# What can be refused before anything is written


def _opened(model: str | Path, out: str | Path, format: str) -> tuple[Checkpoint, Path, str]:
    if format not in FORMATS:
        raise InvalidInput(f"format {format!r} is not one of {', '.join(FORMATS)}")
    out = Path(os.path.abspath(out))  # a trailing slash or "." would hide its name
    if out.exists():
        raise InvalidInput(f"{out} exists already; give a folder that does not, or remove it")
    check_can_write(out)
    checkpoint = open_checkpoint(model)
    if checkpoint.spec.packed:
        raise InvalidInput(f"{model} is packed already, as {checkpoint.spec.packed}; give the checkpoint it came from")
    if not checkpoint.path.is_dir():
        load_tokenizer(checkpoint.path)  # will be written anew: one that cannot be is refused now
    return checkpoint, out, FORMATS[format]


def _check_room(out: Path, nbytes: int) -> None:
    free = disk_usage(out.parent).free
    if nbytes > free:
        raise InvalidInput(
            f"{out} needs {format_bytes(nbytes)} more and {format_bytes(free)} are free there; choose another disk, or "
            "a smaller format"
        )


def _threads(threads: int | None) -> int:
    if threads is not None and threads < 1:
        raise InvalidInput(f"threads is {threads}; it must be at least 1")
    return threads or max(1, sum(cpu.cores for cpu in discover_cpus()))


def _size(folder: Path) -> int:
    """Bytes that its files occupy."""
    return sum(file.stat().st_blocks * 512 for file in folder.glob("*")) if folder.is_dir() else 0


# The packing itself


def _pack(
    checkpoint: Checkpoint, writer: PageWriter, journal: PackJournal, threads: int, progress: Progress | None
) -> None:
    """Threads pack pages ahead, as many as fit into IN_FLIGHT; this one writes them in their order."""
    todo = deque(page for page in writer.pages if page not in writer.checksums)
    done, total = sum(writer.pages[page] for page in writer.checksums), sum(writer.pages.values())
    flying: deque[tuple[str, torch.Tensor, Future[None]]] = deque()
    spare: dict[int, list[torch.Tensor]] = {}  # buffers by size, to be used again
    loaded = {page: _loaded_nbytes(checkpoint, page) for page in todo}
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, "pack", torch.set_num_threads, (1,))
    try:
        weight = 0
        while todo or flying:
            while todo and (not flying or weight + writer.pages[todo[0]] + loaded[todo[0]] <= IN_FLIGHT):
                page = todo.popleft()
                weight += writer.pages[page] + loaded[page]
                free = spare.get(writer.pages[page])
                into = free.pop() if free else host_buffer(writer.pages[page])
                for tensor in tensors_by_page(checkpoint.spec)[page]:
                    checkpoint.prefetch(tensor)
                flying.append((page, into, pool.submit(fill_page, checkpoint, page, writer.format, into)))
            page, into, packed = flying.popleft()
            packed.result()
            journal.add(page, writer.write(page, into))
            spare.setdefault(into.numel(), []).append(into)
            weight -= writer.pages[page] + loaded[page]
            done += writer.pages[page]
            if progress:
                progress(done, total)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def _loaded_nbytes(checkpoint: Checkpoint, page: str) -> int:
    """What packing a page holds besides it, at most: its largest tensor, loaded."""
    return max(
        0 if checkpoint.is_mapped(t, torch.bfloat16) else 4 * t.num_parameters
        for t in tensors_by_page(checkpoint.spec)[page]
    )


# Going on after an interruption, and the end


def _kept(writer: PageWriter, written: Mapping[str, str], progress: Progress | None) -> set[str]:
    """The pages that are whole on the disk."""
    done, total = 0, sum(writer.pages.values())
    for page, nbytes in writer.pages.items():
        if page in written and writer.holds(page, written[page]) and progress:
            done += nbytes
            progress(done, total)
    return set(writer.checksums)


def _heading(checkpoint: Checkpoint, format: str, shard_bytes: int) -> dict[str, Any]:
    """What is packed: the source's files by name, size and time of change. Their folder may be moved meanwhile."""
    files = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(checkpoint.files)]
    source = xxhash.xxh3_128_hexdigest(json.dumps(files).encode())
    return {"source": source, "format": format, "layout_version": LAYOUT_VERSION, "shard_bytes": shard_bytes}


def _appear(partial: Path, out: Path) -> None:
    """In one step; the journal goes afterwards, so that a folder without one is always whole."""
    _sync(partial)
    os.rename(partial, out)
    (out / pack_journal.NAME).unlink()
    _sync(out)
    _sync(out.parent)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _disk_errors(partial: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "the disk is full; make room" if full else f"{error.strerror}; see to that"
        raise CiuicError(f"cannot write to {partial}: {what} and give the same command to go on") from error
