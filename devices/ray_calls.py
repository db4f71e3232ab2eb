"""What a call from process to process takes in a Ray cluster, where the one that is called computes between calls as a
stage of a model does: such a call takes several times as long as one to a process that waits for it.
Knows Ray's calls; what is computed in pipelines of them is for schedulers."""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

BUSY = 8e-3  # s that a process computes for each call, as a stage of a model does: the longer, the longer calls take
SMALL = 8 << 10  # bytes: a token's residual stream
WARM, CALLS, AT_ONCE, ROUNDS = 25, 6, 6, 8  # the first calls take longer; of the others the middle ones count
HOPS = 7  # for each of many pairs
FULL_SECONDS, FULL_WINDOWS = 0.2, 3  # that all cores are kept at work; the best counts: others may just have begun
Answer = Callable[[Any], Any]  # of a call, or what is wrong


@dataclass(frozen=True, slots=True)
class Calls:
    """To a process of one node. As facts of a device, under these names."""

    call_s: float  # of one by itself, there or back
    call_handling_s: float  # of these, what keeps the process that is called from computing
    call_cpu_s: float  # of a core, by both processes, for one and its answer; what is computed is not counted


class Spinner:
    """On one node: computes nothing for some time."""

    def spin(self, data: bytes, seconds: float) -> bytes:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass
        return data

    def cpu_seconds(self) -> float:
        """Of this process so far."""
        return time.process_time()

    def given(self, cores: int) -> float:
        """The share of so many cores that one gets who wants them all: the rest is for Ray's services and the host."""
        return max(self._given(cores) for _ in range(FULL_WINDOWS))

    def _given(self, cores: int) -> float:
        begin = time.perf_counter()

        def work(_: int) -> float:
            own = time.thread_time()
            while time.perf_counter() - begin < FULL_SECONDS:
                hashlib.pbkdf2_hmac("sha256", b"", b"", 10_000)  # some milliseconds, without the interpreter's lock
            return (time.thread_time() - own) / (time.perf_counter() - begin)

        with ThreadPoolExecutor(cores) as pool:
            return min(1.0, sum(pool.map(work, range(cores))) / cores)


def measure_calls(answer: Answer, spinner: Any) -> Calls:
    """From this process to a Spinner and back."""
    data = bytes(SMALL)
    for _ in range(WARM):
        _beyond(answer, spinner)
    alone, at_once, cpu = [], [], 0.0
    for _ in range(ROUNDS):
        cpu -= time.process_time() + answer(spinner.cpu_seconds.remote())
        alone += [_beyond(answer, spinner) for _ in range(CALLS)]
        cpu += time.process_time() + answer(spinner.cpu_seconds.remote()) - CALLS * BUSY
        begin = time.perf_counter()
        for call in [spinner.spin.remote(data, BUSY) for _ in range(AT_ONCE)]:
            answer(call)
        at_once.append(time.perf_counter() - begin - BUSY)
    there_and_back = max(0.0, statistics.median(alone))
    each = statistics.median((seconds - there_and_back) / (AT_ONCE - 1) for seconds in at_once) - BUSY
    handling = min(max(0.0, each), there_and_back / 2)
    return Calls(there_and_back / 2, handling, max(handling, cpu / (ROUNDS * CALLS)))


def measure_hop(answer: Answer, one: Any, other: Any) -> float:
    """Seconds from a Spinner to another one, by way of this process, which makes both calls: what two calls in a row
    take beyond the way to the first one and back from the second, measured by turns. Not less than a way from here."""
    hops, around = [], []
    for _ in range(HOPS):
        around.append((_beyond(answer, one) + _beyond(answer, other)) / 2)
        hops.append(_beyond(answer, one, other) - around[-1])
    return max(statistics.median(hops), statistics.median(around) / 2)


def _beyond(answer: Answer, *spinners: Any) -> float:
    """Seconds of calls of these in a row, beyond what they compute."""
    value: Any = bytes(SMALL)
    begin = time.perf_counter()
    for spinner in spinners:
        value = spinner.spin.remote(value, BUSY)
    answer(value)
    return time.perf_counter() - begin - len(spinners) * BUSY
