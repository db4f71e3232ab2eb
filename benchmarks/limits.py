"""What the machine gives at this moment, so that every measurement can stand between two looks at it: cores, memory
reads, and the peaks of the instructions that multiply. A small C program (`limits.c`) measures all in under a second.

    python benchmarks/limits.py [--threads 2] [--times 5]"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).with_name("limits.c")
BUILT = Path(__file__).parent.parent / "build" / "benchmarks"
BUFFER_MIB = 1024  # read over and over: far more than the caches that one machine of many may use


@dataclass(frozen=True, slots=True)
class Limits:
    threads: int
    cores_given: float  # processors that as many spinning threads were given
    spins_per_s: float  # of all threads: falls with the clock rate and with a neighbour on the same physical core
    read_bandwidth: float  # bytes/s, all threads
    vnni_int8: float  # operations/s, all threads; 0 where the processor lacks the instruction
    avx512_bf16: float
    amx_int8: float
    amx_bf16: float

    @property
    def int8_peak(self) -> float:
        return max(self.vnni_int8, self.amx_int8)

    @property
    def bf16_peak(self) -> float:
        return max(self.avx512_bf16, self.amx_bf16)

    def __str__(self) -> str:
        return (
            f"{self.cores_given:.2f} of {self.threads} cores, reads {self.read_bandwidth / 1e9:.1f} GB/s, int8 "
            f"{self.int8_peak / 1e12:.2f} TOP/s (VNNI {self.vnni_int8 / 1e12:.2f}), bf16 {self.bf16_peak / 1e12:.2f}"
        )


def mean(every: list[Limits]) -> Limits:
    return Limits(every[0].threads, *(sum(getattr(x, f.name) for x in every) / len(every) for f in fields(Limits)[1:]))


def measure(threads: int, seconds: float = 0.1) -> Limits:
    """One look; `seconds` for each probe, twice that for memory."""
    command = [str(_program()), str(threads), str(BUFFER_MIB), str(seconds)]
    return Limits(**json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


@cache
def _program() -> Path:
    """The compiled probe, built anew when its source changes."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise SystemExit("no C compiler: the benchmarks measure the machine's limits with a small C program")
    program = BUILT / f"limits-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]}"
    if not program.exists():
        BUILT.mkdir(parents=True, exist_ok=True)
        unfinished = program.with_suffix(f".{os.getpid()}")
        subprocess.run([compiler, "-O2", "-o", str(unfinished), str(SOURCE), "-lpthread"], check=True)
        unfinished.replace(program)
    return program


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--times", type=int, default=5)
    args = parser.parse_args()
    for _ in range(args.times):
        print(measure(args.threads), flush=True)


if __name__ == "__main__":
    main()
