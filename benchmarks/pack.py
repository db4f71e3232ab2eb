"""Packing rate beside what bounds it, in the same run: the disk's own sequential rates past the page cache, and the
kernel alone, in memory, on as many threads. The source is dropped from the page cache before each packing.

    python benchmarks/pack.py MODEL [--formats int4,int8,bf16] [--repeats 3] [--threads N] [--scratch FOLDER]

MODEL is a checkpoint, such as `make_model.py bf16 OUT --layers 6` writes. Bound: source read and pages written at the
disk's rates, one after the other as on one disk, or packed at the kernel's, whichever takes longer."""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from machine import machine_line

from ciuic_runtime.devices.backend import host_buffer
from ciuic_runtime.devices.disk import huge_buffer
from ciuic_runtime.devices.units import format_bytes, format_rate
from ciuic_runtime.models.checkpoint import open_checkpoint
from ciuic_runtime.models.layout import matrix_nbytes
from ciuic_runtime.ops.native import kernels
from ciuic_runtime.packing import FORMATS, PackReport, pack

BLOCK = 8 << 20  # bytes per read or write
DISK_BYTES = 1 << 30
LAYOUTS = {"int4": "w4g128-t16", "int8": "w8g128-t16", "bfloat16": "bf16-rows"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--formats", default="int4,int8,bf16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--scratch", type=Path, default=None, help="folder on the disk to write to; beside MODEL if not given"
    )
    args = parser.parse_args()
    files = sorted(open_checkpoint(args.model).files)
    print(machine_line())
    print(f"{args.model.name}: {format_bytes(sum(f.stat().st_size for f in files))}, {args.threads} threads")
    scratch = args.scratch or args.model.absolute().parent
    read = statistics.median(read_rate(files) for _ in range(args.repeats))
    write = statistics.median(write_rate(scratch) for _ in range(args.repeats))
    print(f"disk  sequential, {format_bytes(BLOCK)} past the page cache, one in flight   "
          f"read {format_rate(read, 'B/s')}   write {format_rate(write, 'B/s')}")  # fmt: skip
    for format in (FORMATS[name] for name in args.formats.split(",")):
        kernel = statistics.median(kernel_rate(LAYOUTS[format], args.threads) for _ in range(args.repeats))
        print(f"kernel  {LAYOUTS[format]:<10}  bf16 in memory   {format_rate(kernel, 'B/s')} of source")
        reports = [packed(args.model, scratch, format, args.threads, files) for _ in range(args.repeats)]
        report = sorted(reports, key=lambda r: r.seconds)[len(reports) // 2]
        on_disk, in_kernel = report.source_nbytes / read + report.nbytes / write, report.source_nbytes / kernel
        print(
            f"pack  {format:<8}  {format_bytes(report.source_nbytes)} -> {format_bytes(report.nbytes)}   "
            f"{report.seconds:.2f} s   read {format_rate(report.read_rate, 'B/s')}   "
            f"write {format_rate(report.write_rate, 'B/s')}   "
            f"{max(on_disk, in_kernel) / report.seconds:.0%} of the bound (disk {on_disk:.2f} s, kernel "
            f"{in_kernel:.2f} s)   {report.bits_per_weight[format]:.4g} bits per weight"
        )


def packed(model: Path, scratch: Path, format: str, threads: int, files: list[Path]) -> PackReport:
    forget(files)
    with tempfile.TemporaryDirectory(prefix=".ciuic-pack-", dir=scratch) as folder:
        report = pack(model, Path(folder) / "out", format, threads)
        shutil.rmtree(report.path)
    return report


def kernel_rate(layout: str, threads: int, rows: int = 2048, columns: int = 2048, seconds: float = 1.0) -> float:
    """Bytes/s of bfloat16 packed by all threads at once, each its own matrix after matrix, larger than caches."""
    native, count = kernels(), 8
    assert native is not None, "the kernels are not built"

    def work(_: int) -> int:
        weights = torch.randn(count, rows, columns).bfloat16()
        into = [host_buffer(matrix_nbytes(layout, rows, columns)) for _ in range(count)]
        done, end = 0, time.perf_counter() + seconds
        while time.perf_counter() < end:
            i = done % count
            native.pack_matrix(layout, weights[i].data_ptr(), "bf16", rows, columns, into[i].data_ptr())
            done += 1
        return done * weights[0].nbytes

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(work, range(threads))) / seconds


def read_rate(files: list[Path]) -> float:
    """Bytes/s of the first GiB of the source."""
    done, buffer, start = 0, huge_buffer(BLOCK), time.perf_counter()
    for path in files:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECT)
        offset = 0
        while done < DISK_BYTES and (count := os.preadv(handle, [buffer], offset)):
            done, offset = done + count, offset + count
            if count % 4096:
                break
        os.close(handle)
    return done / (time.perf_counter() - start)


def write_rate(folder: Path) -> float:
    """Bytes/s of a GiB that does not compress, all of it on the disk."""
    buffer = huge_buffer(BLOCK)
    buffer[:] = os.urandom(BLOCK)
    handle, name = tempfile.mkstemp(prefix=".ciuic-pack-", dir=folder)
    os.close(handle)
    direct = os.open(name, os.O_WRONLY | os.O_DIRECT)
    try:
        os.unlink(name)
        start = time.perf_counter()
        for offset in range(0, DISK_BYTES, BLOCK):
            os.pwrite(direct, buffer, offset)
        os.fsync(direct)
        return DISK_BYTES / (time.perf_counter() - start)
    finally:
        os.close(direct)


def forget(files: list[Path]) -> None:
    """Drops files from the page cache."""
    for path in files:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


if __name__ == "__main__":
    main()
