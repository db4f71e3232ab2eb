"""The disk under a folder: what is known of it, how it is read where O_DIRECT is refused, and that nothing is left."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from ciuic_runtime.devices import disk
from ciuic_runtime.devices.disk import discover_disk, disk_fingerprint, measure_disk
from ciuic_runtime.devices.errors import InvalidInput

MIB = 1 << 20


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scratch file that is written in no time."""
    monkeypatch.setattr(disk, "SCRATCH_BYTES", 16 * MIB)
    monkeypatch.setattr(disk, "LEAST_SCRATCH_BYTES", 16 * MIB)


def test_facts_of_this_disk(tmp_path: Path) -> None:
    spec = discover_disk(tmp_path)
    assert (spec.name, spec.kind, spec.can_compute) == ("disk", "DISK", False)
    assert 0 < spec.memory_bytes <= spec.facts["total_bytes"]  # type: ignore[operator]
    assert spec.basis == "unknown"
    inside = tmp_path / "weights.safetensors"
    inside.write_bytes(b"x")
    assert discover_disk(inside).facts["path"] == str(tmp_path)


def test_the_innermost_mount_and_its_drive(tmp_path: Path) -> None:
    folder = tmp_path / "my data/models"
    folder.mkdir(parents=True)
    mount = str(tmp_path / "my data").replace(" ", "\\040")
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        f"21 1 8:1 / / rw - ext4 /dev/sda1 rw\n40 21 259:3 / {mount} rw shared:1 - xfs /dev/nvme0n1p3 rw\n"
        f"41 21 0:5 / {tmp_path}/my rw - tmpfs tmpfs rw\n"
    )
    whole = tmp_path / "sys/devices/nvme0n1"
    (whole / "nvme0n1p3").mkdir(parents=True)
    (whole / "nvme0n1p3/partition").write_text("3\n")
    (whole / "queue").mkdir()
    (whole / "queue/rotational").write_text("0\n")
    (whole / "device").mkdir()
    (whole / "device/model").write_text("Fast SSD 2TB   \n")
    (tmp_path / "sys/dev/block").mkdir(parents=True)
    (tmp_path / "sys/dev/block/259:3").symlink_to(whole / "nvme0n1p3")
    spec = discover_disk(folder, mounts, tmp_path / "sys")
    assert spec.model == "Fast SSD 2TB"
    chosen = ("filesystem", "source", "block_device", "rotational")
    assert [spec.facts[k] for k in chosen] == ["xfs", "/dev/nvme0n1p3", "nvme0n1", False]


def test_how_full_it_is_does_not_change_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = discover_disk(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: usage._replace(free=usage.free // 2))
    after = discover_disk(tmp_path)
    assert before.memory_bytes != after.memory_bytes
    assert disk_fingerprint(before) == disk_fingerprint(after)


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"nowhere does not exist; name a folder"):
        discover_disk(tmp_path / "nowhere")


def plausible(limits: disk.Limits) -> bool:
    rates = list(limits.bandwidth_by_access.values())
    assert sorted(limits.bandwidth_by_access) == [65536, MIB, 8 * MIB]
    return all(1e5 < r < 1e12 for r in rates) and limits.memory_bandwidth == max(rates)


@pytest.mark.usefixtures("small")
def test_reading_is_measured_and_leaves_nothing(tmp_path: Path) -> None:
    handles = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    limits = measure_disk(tmp_path, seconds=0.2)
    assert plausible(limits)
    assert limits.facts["past_page_cache_by"] in ("O_DIRECT", "posix_fadvise")
    assert 0 < limits.facts["read_latency_s"] < 1  # type: ignore[operator]
    assert limits.facts["scratch_bytes"] == 16 * MIB
    assert list(tmp_path.iterdir()) == []
    if handles is not None:
        assert len(os.listdir("/proc/self/fd")) == handles


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("refused", ["open", "read"])
def test_where_direct_reading_is_refused_pages_are_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    direct: set[int] = set()
    dropped: list[int] = []
    real_open, real_preadv, real_advise = os.open, os.preadv, os.posix_fadvise

    def open_(path: Any, flags: int, *more: Any, **named: Any) -> int:
        if flags & os.O_DIRECT and refused == "open":
            raise OSError(errno.EINVAL, "Invalid argument")
        handle = real_open(path, flags & ~os.O_DIRECT, *more, **named)
        if flags & os.O_DIRECT:
            direct.add(handle)
        return handle

    def preadv(handle: int, *more: Any) -> int:
        if handle in direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_preadv(handle, *more)

    def advise(handle: int, offset: int, nbytes: int, advice: int) -> None:
        if advice == os.POSIX_FADV_DONTNEED:
            dropped.append(nbytes)
        real_advise(handle, offset, nbytes, advice)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(os, "posix_fadvise", advise)
    limits = measure_disk(tmp_path, seconds=0.2)
    assert plausible(limits)
    assert limits.facts["past_page_cache_by"] == "posix_fadvise"
    assert {65536, MIB, 8 * MIB} <= set(dropped)
    assert bool(direct) == (refused == "read")


@pytest.mark.usefixtures("small")
def test_the_scratch_file_goes_even_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(handle: int, data: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", write)
    limits = measure_disk(tmp_path, seconds=0.2)
    assert limits.facts == {"not_measured": f"No space left on device in {tmp_path}"}
    assert not limits.measured
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not tell what its memory is")
def test_what_is_read_into_is_memory_of_this_process_alone() -> None:
    """Shared memory is in small pages on most systems, whatever was asked for."""
    buffer = disk.huge_buffer(1 << 20)
    address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    [line] = [
        line
        for line in Path("/proc/self/maps").read_text().splitlines()
        if int(line.split("-")[0], 16) <= address < int(line.split()[0].split("-")[1], 16)
    ]
    assert line.split()[1] == "rw-p", line


def test_a_full_disk_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: usage._replace(free=100 * MIB))
    assert "only 100 MiB free" in str(measure_disk(tmp_path).facts["not_measured"])


def test_a_read_only_folder_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert measure_disk(tmp_path).facts == {"not_measured": f"{tmp_path} is read-only"}
