"""What the disk under a model gives a reader that does nothing else: random pages of the model's own files, past the
page cache (O_DIRECT), at several depths. The best of them is what paging is measured against. And what it gives while
every core reads memory, as kernels do: what a disk brings has to be written to the same memory.

    python benchmarks/disk.py MODEL [--seconds 1] [--threads 2]"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ciuic_runtime.devices.disk import huge_buffer
from ciuic_runtime.memory.page_store import PageStore

DEPTHS = (1, 2, 4, 8, 16)
_READ = """
import numpy
much = numpy.ones(1 << 25)  # 256 MiB: far more than caches hold
print(flush=True)
while True:
    much.sum()
"""


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


@contextmanager
def memory_is_read(processes: int) -> Iterator[None]:
    """By so many processes, without end."""
    with ExitStack() as stack:
        for _ in range(processes):
            reader = stack.enter_context(subprocess.Popen([sys.executable, "-c", _READ], stdout=subprocess.PIPE))
            stack.callback(reader.kill)
            assert reader.stdout is not None
            if not reader.stdout.readline():
                raise SystemExit("a process that reads memory could not be started")
        yield


def _rate(places: list[tuple[int, int, int]], depth: int, seconds: float) -> float:
    buffers = [huge_buffer(max(nbytes for _, _, nbytes in places)) for _ in range(depth)]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a packed folder")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each depth")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="that read memory beside it")
    args = parser.parse_args()
    print(rates_line(disk_rates(args.model, args.seconds)))
    with memory_is_read(args.threads):
        print(f"while {args.threads} processes read memory: {rates_line(disk_rates(args.model, args.seconds))}")


if __name__ == "__main__":
    main()
