"""What was measured on a device, and the cache that keeps it between runs under a fingerprint of what was measured.
Knows nothing of how it was measured; a cache that cannot be read or written costs time, never correctness."""

from __future__ import annotations

import json
import logging
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.devices.files import read_entries, write_whole
from ciuic_runtime.devices.spec import DeviceSpec

log = logging.getLogger(__name__)
MEASURE_VERSION = 3  # part of every fingerprint: raise it when a figure's meaning changes

Fact = str | int | float | bool


@dataclass(frozen=True, slots=True)
class Limits:
    """Measured rates of one device, named as in DeviceSpec."""

    memory_bandwidth: float | None = None  # bytes/s
    memory_bandwidth_by_threads: Mapping[int, float] = field(default_factory=dict)  # threads -> bytes/s
    bandwidth_by_access: Mapping[int, float] = field(default_factory=dict)  # bytes per read -> bytes/s
    matrix_rates: Mapping[str, float] = field(default_factory=dict)  # dtype -> flop/s
    matrix_vector_rates: Mapping[str, float] = field(default_factory=dict)  # dtype -> weight bytes/s
    launch_overhead: float | None = None  # s
    matrix_launch_overhead: Mapping[str, float] = field(default_factory=dict)  # dtype -> s
    threads: int = 0
    facts: Mapping[str, Fact] = field(default_factory=dict)

    @property
    def measured(self) -> bool:
        return self.memory_bandwidth is not None or bool(self.matrix_rates)

    @property
    def spread(self) -> float:
        """The largest relative interquartile range among the figures."""
        return max((float(v) for k, v in self.facts.items() if k.startswith("spread_")), default=0.0)

    def on(self, spec: DeviceSpec) -> DeviceSpec:
        """The device with these rates; what was not measured stays as it was."""
        known = {k: getattr(self, k) for k in RATES if getattr(self, k)}
        basis = "measured" if self.measured else spec.basis
        return replace(spec, **known, facts={**spec.facts, **self.facts}, basis=basis)


RATES = (
    "memory_bandwidth", "memory_bandwidth_by_threads", "bandwidth_by_access", "matrix_rates", "matrix_vector_rates",
    "launch_overhead", "matrix_launch_overhead", "threads",
)  # fmt: skip


def spread(values: Sequence[float]) -> float:
    """Interquartile range over the median: 0.05 means that half the values lie within 5 %."""
    if len(values) < 2:
        return 0.0
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / median if median else 0.0


def cache_file() -> Path:
    folder = os.environ.get("CIUIC_CACHE_DIR")
    return (Path(folder) if folder else Path.home() / ".cache/ciuic") / "limits.json"


def load(fingerprint: str, file: Path | None = None) -> Limits | None:
    """What was measured under this fingerprint, None where nothing usable is there."""
    entry = _entries(file or cache_file()).get(fingerprint)
    try:
        return None if entry is None else _from_json(entry)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        log.warning("measured again, since the cached limits cannot be used: %s", error)
        return None


def store(fingerprint: str, limits: Limits, file: Path | None = None) -> None:
    file = file or cache_file()
    entries = {**_entries(file), fingerprint: asdict(limits)}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps({"version": MEASURE_VERSION, "limits": entries}, indent=1))
    except (OSError, InvalidInput) as error:
        log.warning("the measured limits were not cached: %s; set CIUIC_CACHE_DIR to a writable folder", error)


def _entries(file: Path) -> dict[str, Any]:
    """The cache's content; nothing where it is absent, damaged or of another version."""
    return read_entries(file, MEASURE_VERSION, "limits")


def _from_json(entry: Mapping[str, Any]) -> Limits:
    """Raises ValueError or TypeError for anything that was not written by `store`."""
    bandwidth, overhead = entry["memory_bandwidth"], entry["launch_overhead"]
    return Limits(
        memory_bandwidth=None if bandwidth is None else _positive(bandwidth),
        memory_bandwidth_by_threads={int(k): _positive(v) for k, v in entry["memory_bandwidth_by_threads"].items()},
        bandwidth_by_access={int(k): _positive(v) for k, v in entry["bandwidth_by_access"].items()},
        matrix_rates={str(k): _positive(v) for k, v in entry["matrix_rates"].items()},
        matrix_vector_rates={str(k): _positive(v) for k, v in entry["matrix_vector_rates"].items()},
        launch_overhead=None if overhead is None else _positive(overhead),
        matrix_launch_overhead={str(k): _positive(v) for k, v in entry["matrix_launch_overhead"].items()},
        threads=int(entry["threads"]),
        facts=dict(entry["facts"]),
    )


def _positive(value: float) -> float:
    if not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{value!r} is not a rate")
    return float(value)
