"""What the disk under a model gives a reader that does nothing else: random pages of the model's own files, past the
page cache (O_DIRECT), at several depths. The best of them is what paging is measured against.

    python benchmarks/disk.py MODEL [--seconds 1]"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ciuic_runtime.memory.page_store import PageStore

DEPTHS = (1, 2, 4, 8, 16)
HUGE_PAGE = 2 << 20


def disk_rates(model: Path, seconds: float = 1.0) -> dict[int, float]:
    """Bytes/s by the number of reads under way at once, each of one routed expert's page."""
    store = PageStore(model)
    pages = [page for page in store.pages if ".experts." in page]
    places = [(store.file_of(page).direct, store.offset(page), store.pages[page]) for page in pages]
    if any(handle < 0 for handle, _, _ in places):
        raise SystemExit(f"the file system of {model} refuses O_DIRECT")
    return {depth: _rate(places, depth, seconds) for depth in DEPTHS}


def best(rates: dict[int, float]) -> float:
    return max(rates.values())


def rates_line(rates: dict[int, float]) -> str:
    return "disk, pages at random, " + ", ".join(f"{d} at once {r / 1e9:.2f}" for d, r in rates.items()) + " GB/s"


def _rate(places: list[tuple[int, int, int]], depth: int, seconds: float) -> float:
    buffers = [_buffer(max(nbytes for _, _, nbytes in places)) for _ in range(depth)]
    start = time.perf_counter()

    def work(buffer: memoryview) -> int:
        done, draw = 0, random.Random()
        while time.perf_counter() - start < seconds:
            handle, offset, nbytes = draw.choice(places)
            done += os.preadv(handle, [buffer[:nbytes]], offset)
        return done

    with ThreadPoolExecutor(depth) as pool:
        done = sum(pool.map(work, buffers))
    return done / (time.perf_counter() - start)


def _buffer(nbytes: int) -> memoryview:
    """In huge pages, like our slots, and touched: into small ones this reader gets little more than half the rate."""
    mapped = mmap.mmap(-1, nbytes + 2 * HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapped.madvise(mmap.MADV_HUGEPAGE)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(mapped)) % HUGE_PAGE
    whole = -(-nbytes // HUGE_PAGE) * HUGE_PAGE
    buffer = memoryview(mapped)[start : start + whole]
    buffer[:] = bytes(whole)
    return buffer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a packed folder")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each depth")
    args = parser.parse_args()
    print(rates_line(disk_rates(args.model, args.seconds)))


if __name__ == "__main__":
    main()
