"""How much of a device's raw limits our operators reach: shares, measured by operator, size and rows, or assumed.
Data only; `ciuic_runtime/calibrate.py` measures it, `cost.py` makes times of it."""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from ciuic_runtime.schedulers.graph import Phase, Task

# What torch's operators reach of a CPU's raw limits on two small models, call overheads apart (benchmarks/results,
# against transformers): a third to four fifths of the matrix rate, about two thirds of the bandwidth. Assumed for
# every device that was not calibrated.
ASSUMED_COMPUTE_UTILISATION = 1 / 2
ASSUMED_MEMORY_UTILISATION = 2 / 3
# Where a device says nothing of its own launch overhead; estimated.
ASSUMED_LAUNCH_OVERHEAD = {"CPU": 5e-6, "GPU": 8e-6, "SIM": 0.0}  # s

ROUNDING = 1e-6
# What published engines reach on machines that are only declared, fitted to published speeds (benchmarks/
# published.py and its results): of a CPU's stream bandwidth and of a GPU's data sheet; with packed weights, of the int8
# rate.
ESTIMATED_MEMORY_UTILISATION = 0.70
ESTIMATED_PACKED_COMPUTE_UTILISATION = 0.094
ESTIMATED_LAUNCH_OVERHEAD = {"CPU": 5e-6, "GPU": 20e-6}  # s
ESTIMATED_ERROR = 1.4  # relative: nine of ten published rates lie within it

# Of a process's pass, besides the tasks: between two of them; before the first and after the last; and until it begins
# and when it has ended. Then choosing tokens.
BETWEEN, ENDS, AROUND, SAMPLE = "pass.between", "pass.ends", "pass.around", "sample"
# Where pages are missing: for each that is read (asking, making room, taking it in), for each layer that is guessed.
PAGE, GUESS = "page.read", "page.guess"


@dataclass(frozen=True, slots=True)
class Point:
    """One operator at one number of rows: the shares of both limits that its time amounts to."""

    rows: float  # tokens; of routed experts, tokens per expert; of attention's scores, positions per token
    compute: float  # of the matrix rate
    memory: float  # of the bandwidth
    spread: float = 0.0  # relative interquartile range of the repetitions


@dataclass(frozen=True)
class Curve:
    """An operator of one size on one device: time = overhead + max(flops / (peak x compute), bytes / (bandwidth x
    memory)). The limits that it was measured beside are kept with it: looked at again, they are other ones."""

    device: str
    threads: int
    format: str
    operator: str  # kind of task; "attention.decode", "scores.prefill"; BETWEEN and so on
    size: float  # bytes of its page (of one expert); of scores, flops per pair
    overhead: float  # s per call
    points: tuple[Point, ...] = ()  # by rows
    peak: float | None = None  # operations/s: what its shares are of, measured beside them; None: the device's own
    bandwidth: float | None = None  # bytes/s, likewise
    measured: float | None = None  # when, unix time, s

    def at(self, rows: float) -> tuple[float, float]:
        """The shares (compute, memory) at a number of rows: interpolated in log space, at the ends held."""
        return self._compute.at(rows), self._memory.at(rows)

    def covers(self, rows: float) -> bool:
        """Whether it was measured there, or on both sides of it."""
        low, high = (self.points[0].rows, self.points[-1].rows) if self.points else (math.inf, 0.0)
        return low * (1 - ROUNDING) <= rows <= high * (1 + ROUNDING)

    @property
    def spread(self) -> float:
        """Of the middle one of its points."""
        return statistics.median(p.spread for p in self.points) if self.points else 0.0

    @cached_property
    def _compute(self) -> _LogLine:
        return _LogLine([p.rows for p in self.points], [p.compute for p in self.points])

    @cached_property
    def _memory(self) -> _LogLine:
        return _LogLine([p.rows for p in self.points], [p.memory for p in self.points])


class _LogLine:
    """y(x), straight between known points in log-log space and level beyond them."""

    def __init__(self, x: Sequence[float], y: Sequence[float]) -> None:
        self.x, self.y = [math.log(v) for v in x], [math.log(v) if v > 0 else -math.inf for v in y]

    def at(self, x: float) -> float:
        at = math.log(x) if x > 0 else -math.inf
        i = bisect_left(self.x, at)
        if i == 0 or i == len(self.x):
            return math.exp(self.y[0 if i == 0 else -1])
        left, right = self.y[i - 1], self.y[i]
        if left == right:
            return math.exp(left)
        share = (at - self.x[i - 1]) / (self.x[i] - self.x[i - 1])
        return math.exp(left + share * (right - left))


@dataclass(frozen=True)
class Calibration:
    """What share of a device's raw limits our kernels reach, and how far a forecast may be off.

    Operators without a measured curve take the shares given for their device, else those assumed above: then the plan's
    basis says "estimated" or "mixed". A forecast's range is as wide as `model_error` says."""

    compute_utilisation: Mapping[str, float] = field(default_factory=dict)  # device -> share of its matrix rate
    memory_utilisation: Mapping[str, float] = field(default_factory=dict)  # device -> share of its bandwidth
    launch_overhead: Mapping[str, float] = field(default_factory=dict)  # device -> s per operator call
    model_error: float = ESTIMATED_ERROR  # relative: rates from forecast / 2.4 to forecast x 2.4 are to be expected
    basis: Literal["measured", "estimated"] = "estimated"  # of devices without curves
    curves: tuple[Curve, ...] = ()

    def curve(self, device: str, threads: int, format: str, operator: str, size: float) -> Curve | None:
        """The curve of the size nearest to this one, at the nearest number of threads; None where there is none."""
        found = self._by_operator.get((device, format, operator))
        if not found:
            return None

        def distance(curve: Curve) -> tuple[float, float]:
            return abs(math.log(max(1, curve.threads) / max(1, threads))), abs(
                math.log(max(1.0, curve.size) / max(1.0, size))
            )

        return min(found, key=distance)

    def under(self, names: Mapping[str, str]) -> Calibration:
        """The same, of devices that have other names: each with the one that is known here."""

        def those(known: Mapping[str, float]) -> dict[str, float]:
            return {name: known[old] for name, old in names.items() if old in known}

        return replace(
            self,
            compute_utilisation=those(self.compute_utilisation),
            memory_utilisation=those(self.memory_utilisation),
            launch_overhead=those(self.launch_overhead),
            curves=tuple(replace(c, device=n) for n, old in names.items() for c in self.curves if c.device == old),
        )

    def calibrated(self, device: str, format: str) -> bool:
        return any((device, format) == known[:2] for known in self._by_operator)

    @cached_property
    def _by_operator(self) -> dict[tuple[str, str, str], list[Curve]]:
        found: dict[tuple[str, str, str], list[Curve]] = {}
        for curve in self.curves:
            found.setdefault((curve.device, curve.format, curve.operator), []).append(curve)
        return found


def operator_of(task: Task, phase: Phase) -> str:
    """What a task's curve is found under: attention's projections differ by phase."""
    return f"attention.{phase}" if task.kind == "attention" else task.kind


def size_of(task: Task) -> float:
    """What tells an operator's curves apart."""
    return float(task.pages[0].nbytes)
