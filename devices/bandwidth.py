"""How fast a CPU's cores read its memory, by number of threads: by the compiled probe, else by numpy.
Knows nothing of operators; these rates are the ceiling of everything that streams weights."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from ciuic_runtime.devices.cpu import parse_cpu_list
from ciuic_runtime.devices.limits import Fact, Limits, spread
from ciuic_runtime.devices.spec import DeviceSpec

WORKING_SET = 1 << 30  # bytes at most; large, so that caches do not help
LEAST_WORKING_SET = 64 << 20  # bytes; with less free memory nothing is measured
LOOK_NBYTES, LOOK_SECONDS = 128 << 20, 0.03  # of a look between two measurements of something else
ALIKE = 0.1  # relative: looks at a memory whose speed has not changed
WINDOWS = 5  # measured one after the other, for the median and the spread

Reader = Callable[[int, int, float], Sequence[float]]  # (bytes, threads, seconds) -> bytes/s in each window


def memory_rates(spec: DeviceSpec, seconds: float) -> Limits:
    """Read rates of a CPU's memory with 1, 2, 4, ... threads and with all cores."""
    nbytes = working_set(spec)
    if not nbytes:
        return Limits(facts={"bandwidth_not_measured": "too little free memory"})
    counts = [1 << i for i in range(spec.cores.bit_length()) if 1 << i < spec.cores] + [spec.cores]
    read, by = _reader(spec)
    windows = {t: read(nbytes, t, seconds / len(counts) / 2) for t in counts}  # the other half goes into page faults
    rates = {t: statistics.median(w) for t, w in windows.items()}
    facts: dict[str, Fact] = {
        "bandwidth_by": by,
        "bandwidth_working_set": nbytes,
        "spread_memory_bandwidth": spread(windows[spec.cores]),
    }
    if nbytes < 2 * spec.cache_bytes.get("L3", 0):
        facts["bandwidth_note"] = "the working set is less than twice the L3 cache: caches may help"
    return Limits(
        memory_bandwidth=rates[spec.cores], memory_bandwidth_by_threads=rates, threads=spec.cores, facts=facts
    )


def memory_rate(spec: DeviceSpec, threads: int) -> float | None:
    """Bytes/s that so many threads read of a CPU's memory at this moment, by a short look; None where that cannot be
    said. A virtual machine's memory may be by turns half as fast, for seconds: what is timed between two looks that
    agree was timed at that rate."""
    nbytes = min(working_set(spec), LOOK_NBYTES)
    if not nbytes:
        return None
    read, _ = _reader(spec)
    return statistics.median(read(nbytes, threads, LOOK_SECONDS))


def usual_rate(rates: Sequence[float]) -> float:
    """That of several looks which most others are like; of two the higher one."""
    most = max(rates, key=lambda rate: (sum(alike(rate, other) for other in rates), rate))
    return statistics.median(rate for rate in rates if alike(rate, most))


def alike(one: float, other: float) -> bool:
    return abs(one - other) <= ALIKE * max(one, other)


def working_set(spec: DeviceSpec) -> int:
    """Bytes to measure with: at most a quarter of what is free, 0 if that is too little to say anything."""
    free = spec.memory_bytes if spec.memory_free_bytes is None else spec.memory_free_bytes
    nbytes = min(WORKING_SET, free // 4)
    return nbytes if nbytes >= LEAST_WORKING_SET else 0


def _reader(spec: DeviceSpec) -> tuple[Reader, str]:
    try:
        from ciuic_runtime.devices import _probe
    except ImportError:  # a pure-Python install
        return read_with_numpy, "numpy"
    bound = parse_cpu_list(str(spec.facts.get("allowed_cpus", ""))) if ":" in spec.name else []  # to their NUMA node
    cpus = sorted(bound)
    return lambda nbytes, threads, seconds: _probe.read_bandwidth(nbytes, threads, seconds, WINDOWS, cpus), "probe"


def read_with_numpy(nbytes: int, threads: int, seconds: float) -> list[float]:
    """The probe's stand-in: reductions, during which numpy lets go of the interpreter's lock."""
    import numpy as np

    chunk = 1 << 20  # numbers, 8 MiB between two looks at the clock
    per_thread = max(1, nbytes // threads // 8 // chunk)
    turns = [itertools.cycle(np.ones((per_thread, chunk), dtype=np.int64)) for _ in range(threads)]

    def window(pool: ThreadPoolExecutor) -> float:
        start = time.perf_counter()

        def read(turn: itertools.cycle[np.ndarray]) -> int:
            done = 0
            while time.perf_counter() - start < seconds / WINDOWS:
                np.bitwise_xor.reduce(next(turn))
                done += chunk * 8
            return done

        return sum(pool.map(read, turns)) / (time.perf_counter() - start)

    with ThreadPoolExecutor(threads) as pool:
        return [window(pool) for _ in range(WINDOWS)]
