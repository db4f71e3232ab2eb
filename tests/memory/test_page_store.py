"""Packed files: what is written is read back, others can open them, nothing damaged, swapped or newer gets through."""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from configs import TINY_V3
from packed_folder import write_int4_folder
from safetensors import safe_open

from ciuic_runtime.devices.backend import host_buffer
from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.memory import page_store
from ciuic_runtime.memory.page_store import CHECKSUM_KEY, INDEX, PageStore, checksum
from ciuic_runtime.memory.page_writer import PageWriter
from ciuic_runtime.models.config import read_config
from ciuic_runtime.models.layout import LAYOUT_VERSION, PAGE_ALIGN, page_layout
from ciuic_runtime.models.safetensors_header import read_header_and_metadata
from ciuic_runtime.models.tensors import tensors_by_page

SPEC = read_config(TINY_V3, "tiny")
PAGES = {page: page_layout(SPEC, page, "int4").nbytes for page in tensors_by_page(SPEC)}
EXPERT = "layers.2.experts.5"


def content(page: str) -> torch.Tensor:
    """Some bytes, others for each page."""
    data = host_buffer(PAGES[page])
    data.random_(0, 256, generator=torch.Generator().manual_seed(list(PAGES).index(page)))
    return data


def write_folder(folder: Path, shard_bytes: int = 150_000, seed: int = 0) -> Path:
    def seeded(page: str) -> torch.Tensor:
        data = content(page)
        data[0] = seed
        return data

    return write_int4_folder(folder, TINY_V3, PAGES, seeded, shard_bytes=shard_bytes)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("packed") / "tiny")


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(written, tmp_path / "tiny"))


def read(store: PageStore, page: str) -> torch.Tensor:
    into = host_buffer(store.pages[page])
    store.read_page(page, into)
    return into


def place(folder: Path, page: str) -> tuple[Path, int]:
    """File and offset of a page."""
    index = json.loads((folder / INDEX).read_text())
    file = folder / index["weight_map"][page]
    return file, read_header_and_metadata(file)[0][page].begin


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_pages_come_back(written: Path) -> None:
    store = PageStore(written)
    assert (store.format, store.spec.packed) == ("int4", "int4")
    assert dict(store.pages) == PAGES
    assert list(store.pages) == list(PAGES), "in the order of a forward pass"
    for page in PAGES:
        expected = content(page)
        expected[0] = 0
        assert torch.equal(read(store, page), expected)


def test_buffers_that_are_not_aligned_are_filled_too(written: Path) -> None:
    store = PageStore(written)
    odd = torch.empty(PAGES[EXPERT] + 1, dtype=torch.uint8)[1:]
    store.read_page(EXPERT, odd)
    assert torch.equal(odd, read(store, EXPERT))


def test_without_direct_reads_the_page_cache_serves(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "O_DIRECT")
    store = PageStore(written)
    expected = content(EXPERT)
    expected[0] = 0
    assert torch.equal(read(store, EXPERT), expected)


def test_many_threads_read_at_once(written: Path) -> None:
    store = PageStore(written)
    expected = {page: read(store, page) for page in PAGES}
    with ThreadPoolExecutor(8) as pool:
        for page, got in pool.map(lambda p: (p, read(store, p)), list(PAGES) * 5):
            assert torch.equal(got, expected[page])


def test_the_safetensors_library_opens_every_file(written: Path) -> None:
    files = sorted(written.glob("*.safetensors"))
    assert [f.name for f in files] == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    assert len(files) > 2
    seen: dict[str, str] = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
            assert (metadata["ciuic_format"], metadata["ciuic_layout_version"]) == ("int4", str(LAYOUT_VERSION))
            for name in opened.keys():  # noqa: SIM118
                tensor = opened.get_tensor(name)
                assert (tensor.dtype, tensor.shape) == (torch.uint8, (PAGES[name],))
                assert checksum(name, tensor) == metadata[CHECKSUM_KEY + name]
                seen[name] = file.name
    index = json.loads((written / INDEX).read_text())
    assert index == {"metadata": {"total_size": sum(PAGES.values())}, "weight_map": seen}


def test_pages_lie_at_multiples_of_4096_in_the_order_of_a_pass(written: Path) -> None:
    order = []
    for file in sorted(written.glob("*.safetensors")):
        tensors, _ = read_header_and_metadata(file)
        assert file.stat().st_size % PAGE_ALIGN == 0
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1].begin):
            assert tensor.begin % PAGE_ALIGN == tensor.nbytes % PAGE_ALIGN == 0
            order.append(name)
    assert order == list(PAGES)


@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_a_flipped_bit_is_found(folder: Path, where: str) -> None:
    file, begin = place(folder, EXPERT)
    at = {"first": 0, "middle": PAGES[EXPERT] // 2, "last": PAGES[EXPERT] - 1}[where]
    byte = file.read_bytes()[begin + at]
    overwrite(file, begin + at, bytes([byte ^ 0x10]))
    store = PageStore(folder)
    with pytest.raises(InvalidInput, match=rf"{file.name} is damaged: page {EXPERT} does not have the checksum"):
        read(store, EXPERT)
    read(store, "layers.2.experts.4")


def test_another_pages_bytes_are_refused(folder: Path) -> None:
    """Whole and intact, but in the wrong place."""
    file, begin = place(folder, EXPERT)
    overwrite(file, begin, bytes(read(PageStore(folder), "layers.2.experts.4").numpy()))
    with pytest.raises(InvalidInput, match=f"page {EXPERT} does not have the checksum"):
        read(PageStore(folder), EXPERT)
    assert checksum("a", content("head")) != checksum("b", content("head"))


def test_another_pages_bytes_with_their_checksum_are_refused(folder: Path) -> None:
    """Two entries of a header exchanged, checksums and all."""
    file, _ = place(folder, EXPERT)
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[: 8 + length].replace(b"experts.5", b"experts.X").replace(b"experts.4", b"experts.5")
    header = header.replace(b"experts.X", b"experts.4")
    overwrite(file, 0, header)
    with pytest.raises(InvalidInput, match=r"checksum|different packings"):
        read(PageStore(folder), EXPERT)


def test_a_file_of_another_packing_is_refused(folder: Path, tmp_path: Path) -> None:
    other = write_folder(tmp_path / "other", seed=1)
    name = place(folder, EXPERT)[0].name
    shutil.copy(other / name, folder / name)
    with pytest.raises(InvalidInput, match="its files come from different packings"):
        PageStore(folder)


def test_a_file_cut_short_is_refused(folder: Path) -> None:
    file, _ = place(folder, EXPERT)
    os.truncate(file, file.stat().st_size - PAGE_ALIGN)
    with pytest.raises(InvalidInput, match=rf"{file.name} is damaged or no safetensors file"):
        PageStore(folder)


def read_header_pages(folder: Path, file: Path) -> list[str]:
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    return [page for page in PAGES if weight_map[page] == file.name]


def test_a_file_that_became_shorter_is_refused(folder: Path) -> None:
    file, _ = place(folder, EXPERT)
    store = PageStore(folder)
    last = read_header_pages(folder, file)[-1]
    for lost in (PAGE_ALIGN, 100):
        os.truncate(file, file.stat().st_size - lost)
        with pytest.raises(InvalidInput, match=f"{file.name} has become shorter .* page {last}"):
            read(store, last)


def test_a_missing_file_and_a_missing_page_are_named(folder: Path) -> None:
    file, _ = place(folder, EXPERT)
    file.rename(folder / "away")
    with pytest.raises(InvalidInput, match=f"lacks 1 of .* files, {file.name} first"):
        PageStore(folder)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {page: name for page, name in index["weight_map"].items() if name != file.name}
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(InvalidInput, match=r"lacks \d+ pages of tiny"):
        PageStore(folder)


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        (b'version":"1"', b'version":"2"', "has pages of layout version 2, this runtime reads version 1"),
        (b'format":"int4"', b'format":"int8"', "holds pages in int8, config.json says int4"),
        (b'"xxh3_128 layers.2', b'"xxh3_129 layers.2', r"page layers\.2\..* has no checksum"),
    ],
)
def test_headers_that_say_something_else_are_refused(folder: Path, old: bytes, new: bytes, match: str) -> None:
    file, begin = place(folder, EXPERT)
    header = file.read_bytes()[:begin]
    assert old in header
    overwrite(file, 0, header.replace(old, new))
    with pytest.raises(InvalidInput, match=match):
        PageStore(folder)


def test_pages_of_another_size_are_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"moe_intermediate_size": 320}))
    with pytest.raises(InvalidInput, match=r"page layers\.1\.experts\.0 is U8 of \d+ bytes; the model asks for U8 of"):
        PageStore(folder)


def test_what_is_not_packed_and_what_is_not_there(tiny_v3: Path, written: Path) -> None:
    with pytest.raises(InvalidInput, match="is not packed; pack it with: ciuic pack"):
        PageStore(tiny_v3)
    with pytest.raises(InvalidInput, match=r"has no page 'layers\.99\.mlp'"):
        PageStore(written).read_page("layers.99.mlp", host_buffer(PAGE_ALIGN))


@pytest.mark.parametrize("weight_map", [None, {}, {"a": 5}, {"a": "../x.safetensors"}, ["a"]], ids=str)
def test_an_index_that_makes_no_sense_is_refused(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InvalidInput, match="weight_map does not say which files beside it hold the pages"):
        PageStore(folder)


# Writing


def test_pages_may_be_written_in_any_order(written: Path, tmp_path: Path) -> None:
    writer = PageWriter(tmp_path, "int4", PAGES, 150_000)
    for page in reversed(PAGES):
        data = content(page)
        data[0] = 0
        writer.write(page, data)
    writer.finish()
    for file in written.glob("*.safetensors"):
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("how", ["no flag", "refused", "not aligned"])
def test_without_direct_writes_the_bytes_are_the_same(
    how: str, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ciuic_runtime.memory import page_writer

    monkeypatch.setattr(page_writer, "_FLUSH_BYTES", 20_000)
    if how == "no flag":
        monkeypatch.delattr(os, "O_DIRECT")
    if how == "refused":
        opened, real = set(), os.open

        def spy(path: Path, flags: int, mode: int = 0o777) -> int:
            handle = real(path, flags, mode)
            (opened.add if flags & os.O_DIRECT else opened.discard)(handle)
            return handle

        def refuse(handle: int, view: memoryview, offset: int, write=os.pwrite) -> int:
            if handle in opened:
                opened.discard(handle)
                raise OSError(22, "Invalid argument")
            return write(handle, view, offset)

        monkeypatch.setattr(os, "open", spy)
        monkeypatch.setattr(os, "pwrite", refuse)
    writer = PageWriter(tmp_path, "int4", PAGES, 150_000)
    for page in PAGES:
        data = content(page)
        data[0] = 0
        if how == "not aligned":
            data = torch.cat([torch.zeros(1, dtype=torch.uint8), data])[1:]
        writer.write(page, data)
    writer.finish()
    for file in written.glob("*.safetensors"):
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()


def test_what_was_written_can_be_looked_up(tmp_path: Path) -> None:
    writer = PageWriter(tmp_path, "int4", PAGES)
    sums = {page: writer.write(page, content(page)) for page in list(PAGES)[:5]}
    writer.close()
    again = PageWriter(tmp_path, "int4", PAGES)
    first, second, third = list(sums)[:3]
    assert again.holds(first, sums[first])
    assert not again.holds(second, sums[third])
    assert not again.holds(EXPERT, "0" * 32), "not written at all"
    assert again.checksums == {first: sums[first]}
    again.close()


def test_nothing_takes_an_unfinished_file_for_whole(tmp_path: Path) -> None:
    writer = PageWriter(tmp_path, "int4", PAGES)
    for page in list(PAGES)[:-1]:
        writer.write(page, content(page))
    writer.close()
    with pytest.raises(InvalidInput, match="damaged or no safetensors file"):
        read_header_and_metadata(tmp_path / writer.shards[0].name)


def test_a_page_larger_than_a_file_has_one_of_its_own(tmp_path: Path) -> None:
    writer = PageWriter(tmp_path, "int4", {"a": 8192, "b": 65536, "c": 4096, "d": 4096}, 16384)
    assert [list(shard.pages) for shard in writer.shards] == [["a"], ["b"], ["c", "d"]]


def test_the_format_of_checksums_stays(written: Path) -> None:
    """Folders packed yesterday are read tomorrow: this changes only together with the layout version."""
    data = torch.arange(4096, dtype=torch.int64).to(torch.uint8)
    assert checksum("layers.0.attention", data) == "73f69d4964462a47e34a43e5c7b117dd"
    assert (page_store.FORMAT_KEY, page_store.VERSION_KEY) == ("ciuic_format", "ciuic_layout_version")
