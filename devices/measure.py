"""The raw limits of a device that computes, measured in seconds: memory reads, matrix products, products with one row.
Knows how to time, not what for: our own kernels are calibrated elsewhere, these are the ceilings above them."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING

from ciuic_runtime.devices.backend import Backend
from ciuic_runtime.devices.backends import open_backend
from ciuic_runtime.devices.bandwidth import memory_rates, working_set
from ciuic_runtime.devices.errors import OutOfMemory
from ciuic_runtime.devices.limits import MEASURE_VERSION, Fact, Limits, spread
from ciuic_runtime.devices.spec import DeviceSpec

if TYPE_CHECKING:
    import torch

WEIGHT = (4096, 4096)  # shape of one weight matrix in the one-row products
MATRIX_DTYPES = ("float32", "bfloat16", "int8")
VECTOR_DTYPES = ("float32", "bfloat16")
Progress = Callable[[str], None]


def fingerprint(spec: DeviceSpec) -> str:
    """What a computing device's figures depend on: they are measured once for each."""
    what = (
        f"version {MEASURE_VERSION}", spec.kind, spec.name, spec.model, f"{spec.cores} cores",
        spec.facts.get("allowed_cpus") or spec.facts.get("uuid") or "", f"{spec.memory_bytes} B",
        f"torch {_torch_version()}", "probe" if find_spec("ciuic_runtime.devices._probe") else "no probe",
    )  # fmt: skip
    return " | ".join(map(str, what))


def measure_device(spec: DeviceSpec, seconds: float = 6.0, progress: Progress | None = None) -> Limits:
    """All rates of a CPU or a usable GPU, in about that time; torch's thread count is left as it was."""
    say, start = progress or (lambda message: None), time.perf_counter()
    limits = Limits(threads=spec.cores)
    if spec.kind == "CPU":
        say(f"measuring how fast {spec.name} reads memory")
        limits = memory_rates(spec, seconds / 4)
    if _torch_version() == "none":
        return replace(limits, facts={**limits.facts, "matrix_rates_not_measured": "torch is not installed"})
    say(f"measuring matrix products on {spec.name}")
    with torch_threads(spec.cores):
        backend = open_backend(spec)
        left = max(1.0, seconds - (time.perf_counter() - start))  # torch itself took up to two seconds to load
        matrix, matrix_spread = matrix_rates(backend, left * 0.4)
        vector, vector_spread = matrix_vector_rates(backend, left * 0.5)
        overhead, overhead_spread = launch_overhead(backend, left * 0.05)
        products = matrix_launch_overhead(backend, matrix, left * 0.05)
    facts: dict[str, Fact] = {**limits.facts, "spread_launch_overhead": overhead_spread}
    facts |= {f"spread_matrix_{k}": v for k, v in matrix_spread.items()}
    facts |= {f"spread_matrix_vector_{k}": v for k, v in vector_spread.items()}
    return replace(
        limits,
        matrix_rates=matrix,
        matrix_vector_rates=vector,
        launch_overhead=overhead,
        matrix_launch_overhead=products,
        threads=spec.cores,
        facts=facts,
    )


def matrix_rates(backend: Backend, seconds: float) -> tuple[dict[str, float], dict[str, float]]:
    """Operations per second of large square products by dtype, and their spreads; dtypes that fail are left out."""
    rates, spreads = {}, {}
    for dtype in MATRIX_DTYPES:
        try:
            size, product = _large_product(backend, dtype, seconds / len(MATRIX_DTYPES) / 2)
        except (RuntimeError, OutOfMemory):  # torch: not implemented for this dtype on this device
            continue
        times = _repeat(backend, product, seconds / len(MATRIX_DTYPES) / 2)
        rates[dtype], spreads[dtype] = 2 * size**3 / statistics.median(times), spread(times)
    return rates, spreads


def _large_product(backend: Backend, dtype: str, seconds: float) -> tuple[int, Callable[[], object]]:
    """The largest of some sizes whose product takes about that long at most; small ones only where all are slow."""
    size, product = 256, _product(backend, dtype, 256)
    for larger in (512, 1024, 2048, 4096):
        _timed(backend, product)  # the first call chooses and prepares a kernel
        quickest = min(_timed(backend, product) for _ in range(3 if size < 1024 else 1))
        # On a busy machine threads wait for each other, which says nothing about larger sizes: go on to 1024.
        if quickest * (larger / size) ** 3 > (max(seconds, 0.3) if larger <= 1024 else seconds):
            break
        size, product = larger, _product(backend, dtype, larger)
    return size, product


def _product(backend: Backend, dtype: str, size: int) -> Callable[[], object]:
    import torch

    on = backend.torch_device
    if dtype == "int8":
        a = torch.randint(-127, 127, (size, size), dtype=torch.int8, device=on)
        return lambda: torch._int_mm(a, a)
    b = torch.rand(size, size, device=on).to(getattr(torch, dtype))
    return lambda: b @ b


def matrix_vector_rates(backend: Backend, seconds: float) -> tuple[dict[str, float], dict[str, float]]:
    """Weight bytes per second of `linear` with one row, over many weight matrices in turn, and the spreads."""
    rates: dict[str, float] = {}
    spreads: dict[str, float] = {}
    buffers = _weight_buffers(backend, seconds / 3)
    try:
        for dtype in VECTOR_DTYPES if buffers else ():
            products = _one_row_products(buffers, dtype)
            nbytes = buffers[0].nbytes // (len(products) // len(buffers))
            in_turn = itertools.cycle(products)
            times = _repeat(backend, lambda turn=in_turn: next(turn)(), seconds / 3)  # type: ignore[misc]
            rates[dtype], spreads[dtype] = nbytes / statistics.median(times), spread(times)
    finally:
        for buffer in buffers:
            backend.free(buffer)
    return rates, spreads


def _weight_buffers(backend: Backend, seconds: float) -> list[torch.Tensor]:
    """Touched memory for float32 weights, a buffer per matrix, as much as time and free memory allow."""
    import torch

    rows, columns = WEIGHT
    end, buffers = time.perf_counter() + seconds, []
    for _ in range(working_set(backend.spec) // (rows * columns * 4)):
        buffers.append(backend.allocate(rows * columns * 4))
        buffers[-1].view(torch.float32).fill_(2**-7)  # as two bfloat16: 0 and 2**-7
        if time.perf_counter() > end:
            break
    backend.synchronize()
    return buffers


def _one_row_products(buffers: Sequence[torch.Tensor], dtype: str) -> list[Callable[[], object]]:
    import torch
    from torch.nn.functional import linear

    kind: torch.dtype = getattr(torch, dtype)
    weights = [w for b in buffers for w in b.view(kind).view(-1, *WEIGHT)]
    row = torch.ones(1, WEIGHT[1], dtype=kind, device=buffers[0].device)
    return [lambda w=w: linear(row, w) for w in weights]  # type: ignore[misc]


def matrix_launch_overhead(
    backend: Backend, dtypes: Iterable[str], seconds: float, calls: int = 20
) -> dict[str, float]:
    """Median seconds of a product of one row with a matrix too small to count, by dtype: what each call costs."""
    import torch

    found = {}
    chosen = [d for d in dtypes if d != "int8"]
    for dtype in chosen:
        row = torch.ones(1, 256, device=backend.torch_device, dtype=getattr(torch, dtype))
        weight = torch.ones(256, 256, device=backend.torch_device, dtype=getattr(torch, dtype))

        def many(row: torch.Tensor = row, weight: torch.Tensor = weight) -> None:
            for _ in range(calls):
                torch.nn.functional.linear(row, weight)

        found[dtype] = statistics.median(_repeat(backend, many, seconds / len(chosen))) / calls
    return found


def launch_overhead(backend: Backend, seconds: float, calls: int = 100) -> tuple[float, float]:
    """Median seconds of one small operator on one row, of many issued in a row, and its spread."""
    import torch

    row = torch.ones(1, 2048, device=backend.torch_device)

    def many() -> None:
        for _ in range(calls):
            torch.mul(row, row)

    times = _repeat(backend, many, seconds)
    return statistics.median(times) / calls, spread(times)


def _timed(backend: Backend, fn: Callable[[], object]) -> float:
    backend.synchronize()
    start = time.perf_counter()
    fn()
    backend.synchronize()
    return time.perf_counter() - start


def _repeat(
    backend: Backend, fn: Callable[[], object], seconds: float, least: int = 3, most: int = 1000
) -> list[float]:
    """Seconds of each call, after one that does not count."""
    _timed(backend, fn)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < least or (time.perf_counter() < end and len(times) < most):
        times.append(_timed(backend, fn))
    return times


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(max(1, threads))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _torch_version() -> str:
    try:
        return version("torch")
    except PackageNotFoundError:
        return "none"
