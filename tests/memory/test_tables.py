"""Rows of a table in a packed folder: any of them come as they were written, and nothing damaged is taken for a row."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from configs import TINY_V3
from hypothesis import HealthCheck, given, settings
from packed_folder import write_int4_folder

from ciuic_runtime.devices.backend import host_buffer
from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.memory import page_store
from ciuic_runtime.memory.page_store import (
    CHECKED_NBYTES,
    PIECES_KEY,
    PageStore,
    piece_checksum,
    piece_checksums,
)
from ciuic_runtime.memory.page_writer import PageWriter
from ciuic_runtime.memory.source import AT_ONCE, PackedSource
from ciuic_runtime.models.config import read_config
from ciuic_runtime.models.layout import page_layout
from ciuic_runtime.models.safetensors_header import read_header_and_metadata
from ciuic_runtime.models.tensors import tensors_by_page

pytest.importorskip("ciuic_runtime.memory._page_reader")

PIECES = AT_ONCE + 9  # of the table, the last one shorter
CONFIG = TINY_V3 | {"vocab_size": (PIECES * CHECKED_NBYTES - 45_000) // 128}
SPEC = read_config(CONFIG, "tiny")
PAGES = {page: page_layout(SPEC, page, "int4").nbytes for page in tensors_by_page(SPEC)}
TABLE = "embedding"
NBYTES = PAGES[TABLE]


def table() -> torch.Tensor:
    data = host_buffer(NBYTES)
    return data.random_(0, 256, generator=torch.Generator().manual_seed(1))


def content(page: str) -> torch.Tensor:
    return table() if page == TABLE else host_buffer(PAGES[page]).zero_()


def write_folder(folder: Path, *tables: str) -> Path:
    return write_int4_folder(folder, CONFIG, PAGES, content, tables=tables)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("tables") / "tiny", TABLE)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "tiny", TABLE)


@pytest.fixture
def source(folder: Path) -> Iterator[PackedSource]:
    opened = PackedSource(PageStore(folder))
    yield opened
    opened.close()


def rows(source: PackedSource, nbytes: int, *offsets: int) -> torch.Tensor:
    into = torch.zeros(len(offsets), nbytes, dtype=torch.uint8)
    source.rows(TABLE, offsets, nbytes, into)
    return into


def flip(folder: Path, at: int) -> None:
    """A bit of the table."""
    store = PageStore(folder)
    path, begin = store.file_of(TABLE).path, store.offset(TABLE)
    with path.open("r+b") as file:
        file.seek(begin + at)
        [before] = file.read(1)
        file.seek(begin + at)
        file.write(bytes([before ^ 16]))


@given(data=st.data(), nbytes=st.integers(1, 3 * CHECKED_NBYTES))
@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_come_as_they_were_written(written: Path, data: st.DataObject, nbytes: int) -> None:
    offsets = data.draw(st.lists(st.integers(0, NBYTES - nbytes), min_size=1, max_size=9))
    source, expected = PackedSource(PageStore(written)), table()
    try:
        for _ in range(2):  # pieces that have been verified, too
            found = rows(source, nbytes, *offsets)
            assert torch.equal(found, torch.stack([expected[at : at + nbytes] for at in offsets]))
    finally:
        source.close()


def test_the_whole_table_comes_in_several_turns(source: PackedSource) -> None:
    assert len(piece_checksums(TABLE, table())) == PIECES
    assert torch.equal(rows(source, NBYTES, 0)[0], table())
    assert not source.slower


@pytest.mark.parametrize("piece", [0, 1, PIECES - 1])
def test_damage_is_found_where_it_is(folder: Path, piece: int) -> None:
    at = piece * CHECKED_NBYTES + 300
    flip(folder, at)
    source = PackedSource(PageStore(folder))
    try:
        others = [n * CHECKED_NBYTES for n in (0, 1, 5, PIECES - 1) if n != piece]
        assert torch.equal(rows(source, 64, *others)[0], table()[others[0] : others[0] + 64])
        for offset in (at - 200, at, max(0, piece * CHECKED_NBYTES - 1)):  # none of its bytes but for the second
            with pytest.raises(InvalidInput, match=f"is damaged: page {TABLE} does not have the checksum"):
                rows(source, 64, others[0], offset)
    finally:
        source.close()


def test_what_was_verified_is_verified_again_when_its_file_has_changed(folder: Path, source: PackedSource) -> None:
    rows(source, 64, 0, 5 * CHECKED_NBYTES)
    flip(folder, 5 * CHECKED_NBYTES + 7)
    rows(source, 64, 0)
    with pytest.raises(InvalidInput, match="checksum"):
        rows(source, 64, 0, 5 * CHECKED_NBYTES)
    flip(folder, 5 * CHECKED_NBYTES + 7)
    assert torch.equal(rows(source, 64, 5 * CHECKED_NBYTES)[0], table()[5 * CHECKED_NBYTES :][:64])


def test_a_file_that_has_become_shorter_is_said(folder: Path, source: PackedSource) -> None:
    store = PageStore(folder)
    os.truncate(store.file_of(TABLE).path, store.offset(TABLE) + 4 * CHECKED_NBYTES)
    with pytest.raises(InvalidInput, match="has become shorter"):
        rows(source, 64, 9 * CHECKED_NBYTES)


def test_of_a_folder_without_checksums_of_pieces_the_whole_table_is_verified(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "old")
    assert not PageStore(folder).has_pieces(TABLE)
    source = PackedSource(PageStore(folder))
    assert torch.equal(rows(source, 64, 640)[0], table()[640 : 640 + 64])
    assert "was packed by an earlier version" in source.slower
    source.close()
    flip(folder, NBYTES - 1)
    source = PackedSource(PageStore(folder))
    with pytest.raises(InvalidInput, match="checksum"):
        rows(source, 64, 640)
    source.close()


def test_too_few_checksums_of_pieces_are_refused(folder: Path) -> None:
    path = PageStore(folder).file_of(TABLE).path
    text = path.read_bytes()
    sums = read_header_and_metadata(path)[1][PIECES_KEY + TABLE].encode()
    path.write_bytes(text.replace(sums, sums[:-17] + b" " * 17, 1))
    with pytest.raises(InvalidInput, match=f"has {PIECES - 1} checksums of pieces"):
        PageStore(folder)


def test_an_interrupted_packing_keeps_the_checksums_of_pieces(tmp_path: Path) -> None:
    """Pages that were written before are read again, and end as if nothing had happened."""
    expected = read_header_and_metadata(write_folder(tmp_path / "whole", TABLE) / "model-00001-of-00001.safetensors")
    (tmp_path / "again").mkdir()
    writer = PageWriter(tmp_path / "again", "int4", PAGES, tables=[TABLE])
    done = {TABLE: writer.write(TABLE, table())}
    writer.close()
    again = PageWriter(tmp_path / "again", "int4", PAGES, tables=[TABLE])
    assert again.holds(TABLE, done[TABLE])
    for page in PAGES:
        if page != TABLE:
            again.write(page, content(page))
    again.finish()
    assert read_header_and_metadata(tmp_path / "again/model-00001-of-00001.safetensors")[1] == expected[1]


def test_the_format_of_checksums_of_pieces_stays() -> None:
    """Folders packed yesterday are read tomorrow."""
    data = torch.arange(CHECKED_NBYTES + 4096, dtype=torch.int64).to(torch.uint8)
    first, second = piece_checksums(TABLE, data)
    assert (first, second) == (piece_checksum(TABLE, 0, data[:CHECKED_NBYTES]), piece_checksum(TABLE, 1, data[:4096]))
    assert (page_store.PIECES_KEY, first) == ("xxh3_64 131072 ", "eb270e2fdca4f8f8")
    others = {piece_checksum(page, n, data[:CHECKED_NBYTES]) for page, n in ((TABLE, 0), (TABLE, 1), ("x", 0))}
    assert len(others) == 3, "bound to the page and the place"
