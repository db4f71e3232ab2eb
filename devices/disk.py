"""The disk under a folder: how much room it has, and how fast it reads past the page cache by size of access.
Knows nothing of what will be stored there; its scratch file loses its name when opened, so nothing stays."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.devices.limits import MEASURE_VERSION, Limits, spread
from ciuic_runtime.devices.spec import DeviceSpec

ACCESS_SIZES = (64 << 10, 1 << 20, 8 << 20)  # bytes per read
IN_FLIGHT = 4  # reads at once
SCRATCH_BYTES = 256 << 20  # at most; less where writing is slow
LEAST_SCRATCH_BYTES = 32 << 20
BLOCK = 8 << 20  # bytes per write; every access size divides it
LATENCY_BYTES = 4096
HUGE_PAGE = 2 << 20
WINDOWS = 3  # measured one after the other, for the median and the spread

Read = Callable[[memoryview, int], int]  # into a buffer, from an offset -> bytes read


@dataclass(frozen=True, slots=True)
class Mount:
    source: str  # "/dev/nvme0n1p2"
    filesystem: str  # "ext4"
    mount_point: str
    device: str  # "259:2"


def discover_disk(
    path: str | Path, mountinfo: Path = Path("/proc/self/mountinfo"), sys: Path = Path("/sys")
) -> DeviceSpec:
    """The disk that holds `path` (a folder, or a file in one); rates are left out."""
    folder = _folder(path)
    room = shutil.disk_usage(folder)
    mount = _mount(folder, mountinfo)
    facts: dict[str, str | int | float | bool] = {"path": str(folder), "total_bytes": room.total}
    model = ""
    if mount:
        facts |= {"filesystem": mount.filesystem, "source": mount.source, "mount_point": mount.mount_point}
        model = _model(mount, sys, facts)
    return DeviceSpec("disk", "DISK", model, memory_bytes=room.free, memory_free_bytes=room.free, facts=facts)


def disk_fingerprint(spec: DeviceSpec) -> str:
    """What a disk's figures depend on: not on how full it is."""
    parts = [str(spec.facts.get(key, "")) for key in ("source", "filesystem", "mount_point")]
    return " | ".join([f"version {MEASURE_VERSION}", spec.kind, spec.model, *parts])


def measure_disk(path: str | Path, seconds: float = 2.5) -> Limits:
    """Read rates past the page cache, or in the facts why they could not be measured."""
    folder = _folder(path)
    if reason := _why_not(folder):
        return Limits(facts={"not_measured": reason})
    try:
        return _measure(folder, seconds)
    except OSError as error:
        return Limits(facts={"not_measured": f"{error.strerror or error} in {folder}"})


def _measure(folder: Path, seconds: float) -> Limits:
    handle, name = tempfile.mkstemp(prefix=".ciuic-disk-", dir=folder)
    direct = -1
    try:
        try:
            direct = _open_direct(name)
        finally:
            os.unlink(name)
        nbytes = _write(handle, seconds * 0.4)
        read, how = _reader(handle, direct)
        return _read_rates(read, how, nbytes, seconds * 0.6)
    finally:
        os.close(handle)
        if direct >= 0:
            os.close(direct)


def _read_rates(read: Read, how: str, nbytes: int, seconds: float) -> Limits:
    each = seconds / (len(ACCESS_SIZES) + 0.5)
    rates, spreads = {}, []
    for size in ACCESS_SIZES:
        windows = [_window(read, size, nbytes, each / WINDOWS) for _ in range(WINDOWS)]
        rates[size] = statistics.median(windows)
        spreads.append(spread(windows))
    return Limits(
        memory_bandwidth=max(rates.values()),
        bandwidth_by_access=rates,
        facts={
            "past_page_cache_by": how,
            "reads_in_flight": IN_FLIGHT,
            "scratch_bytes": nbytes,
            "read_latency_s": _latency(read, nbytes, each / 2),
            "spread_read": max(spreads),
        },
    )


def _window(read: Read, size: int, nbytes: int, seconds: float) -> float:
    """Bytes/s of several threads that read the whole file in a shuffled order, each its own part, for some time."""
    offsets = list(range(0, nbytes - size + 1, size))
    random.Random(size).shuffle(offsets)
    buffers = [huge_buffer(size) for _ in range(IN_FLIGHT)]
    start = time.perf_counter()

    def work(worker: int) -> int:
        done, at = 0, worker
        while time.perf_counter() - start < seconds:
            done += read(buffers[worker], offsets[at % len(offsets)])
            at += IN_FLIGHT
        return done

    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        done = sum(pool.map(work, range(IN_FLIGHT)))
    return done / (time.perf_counter() - start)


def _latency(read: Read, nbytes: int, seconds: float) -> float:
    """Median seconds of one small read with nothing else in flight."""
    times: list[float] = []
    generator, end = random.Random(0), time.perf_counter() + seconds
    buffer = huge_buffer(LATENCY_BYTES)
    while time.perf_counter() < end or not times:
        offset = generator.randrange(nbytes // LATENCY_BYTES) * LATENCY_BYTES
        start = time.perf_counter()
        read(buffer, offset)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def huge_buffer(nbytes: int) -> memoryview:
    """Memory to read into, touched, in huge pages where the system has them: into small ones, a disk of a virtual
    machine gives little more than half its rate."""
    mapped = mmap.mmap(-1, nbytes + 2 * HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        mapped.madvise(mmap.MADV_HUGEPAGE)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(mapped)) % HUGE_PAGE
    buffer = memoryview(mapped)[start : start + nbytes]
    buffer[:] = bytes(nbytes)
    return buffer


def _write(handle: int, seconds: float) -> int:
    """Fills the scratch file until it is full or time is up, whole blocks, all of it on the disk; returns its size."""
    block, nbytes, start = os.urandom(BLOCK), 0, time.perf_counter()
    while nbytes < LEAST_SCRATCH_BYTES or (nbytes < SCRATCH_BYTES and time.perf_counter() - start < seconds):
        left = memoryview(block)
        while left:
            left = left[os.write(handle, left) :]
        nbytes += BLOCK
        if nbytes % LEAST_SCRATCH_BYTES == 0:
            os.fsync(handle)
    os.fsync(handle)
    return nbytes


def _open_direct(name: str) -> int:
    """A descriptor that bypasses the page cache, -1 where the file system refuses."""
    flag = getattr(os, "O_DIRECT", 0)
    try:
        return os.open(name, os.O_RDONLY | flag) if flag else -1
    except OSError:
        return -1


def _reader(handle: int, direct: int) -> tuple[Read, str]:
    """How to read past the page cache: directly, else by dropping the pages of each piece before it is read."""
    if direct >= 0:
        try:
            os.preadv(direct, [huge_buffer(LATENCY_BYTES)], 0)
            return lambda buffer, offset: os.preadv(direct, [buffer], offset), "O_DIRECT"
        except OSError:  # some file systems accept the flag and refuse the read
            direct = -1
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead into what is read next

    def read(buffer: memoryview, offset: int) -> int:
        os.posix_fadvise(handle, offset, len(buffer), os.POSIX_FADV_DONTNEED)
        return os.preadv(handle, [buffer], offset)

    return read, "posix_fadvise"


def _why_not(folder: Path) -> str:
    """Why the disk should not be measured, "" if it can be."""
    if not hasattr(os, "posix_fadvise"):
        return "this system has no way to read past its page cache"
    if not os.access(folder, os.W_OK) or os.statvfs(folder).f_flag & os.ST_RDONLY:
        return f"{folder} is read-only"
    free = shutil.disk_usage(folder).free
    if free < 2 * SCRATCH_BYTES:
        return f"only {free >> 20} MiB free in {folder}, {2 * SCRATCH_BYTES >> 20} MiB wanted"
    return ""


def _folder(path: str | Path) -> Path:
    path = Path(path).resolve()
    if not path.exists():
        raise InvalidInput(f"{path} does not exist; name a folder on the disk that is to hold the weights")
    return path if path.is_dir() else path.parent


def _mount(folder: Path, mountinfo: Path) -> Mount | None:
    """The mount that holds the folder: the longest mount point above it, of equal ones the last."""
    try:
        lines = mountinfo.read_text(errors="replace").splitlines()
    except OSError:  # not Linux: the facts are left out
        return None
    found = None
    for line in lines:
        left, right = ([w.replace("\\040", " ") for w in half.split()] for half in line.partition(" - ")[::2])
        if len(left) >= 5 and len(right) >= 2 and folder.is_relative_to(left[4]):
            mount = Mount(right[1], right[0], left[4], left[2])
            found = mount if found is None or len(mount.mount_point) >= len(found.mount_point) else found
    return found


def _model(mount: Mount, sys: Path, facts: dict[str, str | int | float | bool]) -> str:
    """The drive's own name, else that of its block device, "" where no block device is behind the mount."""
    block = (sys / "dev/block" / mount.device).resolve()
    if not block.is_dir():
        return ""
    whole = block.parent if (block / "partition").exists() else block
    facts["block_device"] = whole.name
    rotational = whole / "queue/rotational"
    if rotational.is_file():
        facts["rotational"] = rotational.read_text().strip() == "1"
    model = whole / "device/model"
    return model.read_text().strip() if model.is_file() else whole.name
