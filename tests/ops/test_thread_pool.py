"""The pool of threads under the kernels: every piece of work is done once and by the time a call returns, whoever
shares the pool, however many threads it has, and whether they sleep, are new, or were left behind by a fork."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import SETS, Weight, activations, address, examples, native, native_only, operators, same_bits, weight

pytestmark = native_only
HERE = Path(__file__).parent


def run(ops: Any, w: Weight, x: torch.Tensor) -> torch.Tensor:
    out = torch.full((x.shape[0], w.values.shape[1]), float("nan"))
    ops.linear(w.matrix, 0, address(x), x.shape[0], 0, address(out))
    return out


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_callers_from_several_python_threads_share_a_pool(threads: int) -> None:
    """Each with its own Operators. Temporaries of a pool's thread must not be used by two callers at once."""
    pool = native.ThreadPool(threads, [])
    times = examples(20)
    # The third is one piece of work only, which its caller does alone.
    cases = [("w4g128-t16", 40, 1500, 512), ("w4g128-t16", 130, 1000, 640), ("w4g128-t16", 130, 100, 5000)]
    weights = [weight(layout, outputs, columns, i) for i, (layout, _, outputs, columns) in enumerate(cases)]
    inputs = [activations(rows, columns, i) for i, (_, rows, _, columns) in enumerate(cases)]
    expected = [run(operators(SETS[0]), w, x) for w, x in zip(weights, inputs, strict=True)]
    wrong: list[str] = []
    together = threading.Barrier(len(cases))

    def caller(i: int) -> None:
        ops = native.Operators(SETS[0], pool)
        together.wait()
        for _ in range(times):
            if not same_bits(run(ops, weights[i], inputs[i]), expected[i]):
                wrong.append(f"caller {i}")

    callers = [threading.Thread(target=caller, args=(i,)) for i in range(len(cases))]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join(timeout=120)
        assert not thread.is_alive(), "a caller waits for work that nobody does"
    assert not wrong


def test_more_threads_than_processors() -> None:
    count = 4 * (os.cpu_count() or 1) + 1
    many = native.Operators(SETS[0], native.ThreadPool(count, []))
    for layout, rows in (("w4g128-t16", 1), ("w8g128-t16", 9), ("bf16-rows", 3)):
        w, x = weight(layout, 2000, 130, 1), activations(rows, 130, 2)
        expected = run(operators(SETS[0]), w, x)
        for _ in range(examples(40)):
            assert same_bits(run(many, w, x), expected)


@pytest.mark.parametrize("threads", [2, 3])
def test_many_small_calls_in_a_row(threads: int) -> None:
    """A worker that is late for one call meets the next: it must not take its work for the old one's, nor both do it.
    Every call has other weights, another input and another number of pieces than the one before."""
    ops = operators(SETS[0], threads)
    cases = []
    for i, outputs in enumerate((40, 3000, 130, 700, 1600, 17)):
        w, x = weight("w4g128-t16" if i % 2 else "f32-rows", outputs, 60, i), activations(1 + i % 2 * 4, 60, i)
        cases.append((w, x, run(operators(SETS[0]), w, x)))
    out = [torch.empty_like(expected) for _, _, expected in cases]
    for _ in range(examples(500)):
        for (w, x, _), into in zip(cases, out, strict=True):
            ops.linear(w.matrix, 0, address(x), x.shape[0], 0, address(into))
        for (_, _, expected), got in zip(cases, out, strict=True):
            assert same_bits(got, expected)
            got.fill_(float("nan"))


def test_sleeping_threads_are_woken() -> None:
    ops, w, x = operators(SETS[0], 3), weight("w4g128-t16", 2000, 128, 1), activations(1, 128, 2)
    expected = run(operators(SETS[0]), w, x)
    for pause in (0, 1e-5, 1e-4, 1e-3, 0.01, 0.1) * 5:
        time.sleep(pause)
        assert same_bits(run(ops, w, x), expected)


def test_pools_come_and_go() -> None:
    w, x = weight("w8g128-t16", 600, 128, 1), activations(5, 128, 2)
    expected = run(operators(SETS[0]), w, x)
    before = threads_here()
    for i in range(examples(60)):
        pool = native.ThreadPool(1 + i % 4, [0, 1] if i % 3 else [])
        assert pool.threads == 1 + i % 4
        if i % 5:
            assert same_bits(run(native.Operators(SETS[0], pool), w, x), expected)
        if i % 7 == 0:
            time.sleep(0.002)
        del pool
    assert threads_here() == before, "threads were left behind"


def threads_here() -> int:
    return len(os.listdir("/proc/self/task")) if Path("/proc/self/task").is_dir() else 0


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system binds no thread to a processor")
def test_a_worker_makes_way_for_its_caller() -> None:
    """Else both are on one processor, and the other has nothing to do."""
    allowed = os.sched_getaffinity(0)
    if len(allowed) < 2:
        pytest.skip("there is one processor")
    first, second = sorted(allowed)[:2]
    before = set(os.listdir("/proc/self/task"))
    ops = native.Operators(SETS[0], native.ThreadPool(2, [first, second]))
    [worker] = (int(thread) for thread in set(os.listdir("/proc/self/task")) - before)
    w, x = weight("w4g128-t16", 2000, 128, 1), activations(1, 128, 2)
    expected = run(operators(SETS[0]), w, x)
    try:
        for mine, its in ((first, second), (second, first), (first, second)):
            os.sched_setaffinity(0, {mine})
            assert same_bits(run(ops, w, x), expected)
            assert os.sched_getaffinity(worker) == {its}
    finally:
        os.sched_setaffinity(0, allowed)


def test_operators_keep_their_pool() -> None:
    w, x = weight("w4g128-t16", 600, 128, 1), activations(2, 128, 2)
    ops = native.Operators(SETS[0], native.ThreadPool(3, []))
    assert same_bits(run(ops, w, x), run(operators(SETS[0]), w, x))


def test_a_repeated_call_takes_no_more_memory() -> None:
    ops = native.Operators(SETS[0], native.ThreadPool(2, []))
    w = weight("w4g128-t16", 600, 3000, 1)
    sizes = []
    for rows in (1, 500, 3, 500, 500):
        run(ops, w, activations(rows, 3000, 1))
        sizes.append(ops.workspace_nbytes)
    assert sizes[0] < sizes[1]
    assert sizes[-1] == sizes[-2] <= sizes[1] + sizes[0]


FORKED = """
import os, sys, time, torch
sys.path.insert(0, sys.argv[1])
import conftest
from kernel_cases import SETS, activations, native, weight
from test_thread_pool import run
pool = native.ThreadPool(3, [])
ops = native.Operators(SETS[0], pool)
w, x = weight("w4g128-t16", 2000, 128, 1), activations(5, 128, 2)
expected = run(ops, w, x)
for pause in (0, 1e-3, 0.3):  # workers at work, on their way to sleep, asleep
    run(ops, w, x)
    time.sleep(pause)
    child = os.fork()
    if child == 0:
        ok = all(torch.equal(run(ops, w, x), expected) for _ in range(20))
        del ops, pool
        sys.exit(0 if ok else 3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, "the child failed"
    assert torch.equal(run(ops, w, x), expected)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_after_a_fork_the_caller_does_the_work_and_the_process_ends() -> None:
    done = subprocess.run([sys.executable, "-c", FORKED, str(HERE)], timeout=60, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
