"""Curves of operators, kept between runs in a file beside the measured limits, under what they depend on.
Knows not how they are measured; a file that cannot be read or written costs time, never correctness."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ciuic_runtime import __version__
from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.devices.files import read_entries, write_whole
from ciuic_runtime.devices.limits import cache_file
from ciuic_runtime.devices.measure import fingerprint
from ciuic_runtime.devices.spec import DeviceSpec, Topology
from ciuic_runtime.model import Model
from ciuic_runtime.ops.native import REFERENCE, instruction_set
from ciuic_runtime.schedulers.calibration import Calibration, Curve, Point, operator_of, size_of

log = logging.getLogger("ciuic")

CALIBRATION_VERSION = 3  # raise it when a figure's meaning changes
SAME_SIZE = 0.25  # log of the ratio of two sizes that count as one
MEASURED_ERROR = 0.2  # relative, of forecasts from curves: nearly all were within it (benchmarks/results)


def kernels_of(model: Model, kernels: str = "auto") -> str:
    """What computes the model on a CPU: an instruction set, or torch's operators."""
    return REFERENCE if model.format == "float32" else instruction_set(kernels)


def can_be_calibrated(device: DeviceSpec) -> bool:
    """CPUs whose limits were measured, here or on a node of a cluster: what is known of one is known of its like."""
    return device.kind == "CPU" and device.usable and device.basis == "measured"


def load_calibration(model: Model, topology: Topology, kernels: str = "auto") -> Calibration:
    """What was measured of these devices before: curves of the model's format, of whatever model, with these kernels.
    The assumed shares where there are none."""
    entries, chosen = _entries(), kernels_of(model, kernels)
    curves: list[Curve] = []
    for device in filter(can_be_calibrated, topology.devices):
        alike = replace(device, name=device.name.rpartition("/")[2])
        known = map(_curve_of, entries.get(_key(alike, chosen), []))
        curves += (replace(c, device=device.name) for c in known if c is not None and c.format == model.format)
    return Calibration(curves=tuple(curves), model_error=MEASURED_ERROR) if curves else Calibration()


def is_calibrated(model: Model, device: DeviceSpec, calibration: Calibration) -> bool:
    """Whether every operator of the model was measured on the device at its size and number of threads."""
    for task in model.graph:
        size = size_of(task)
        found = calibration.curve(device.name, device.threads, model.format, operator_of(task, "decode"), size)
        if found is None or found.threads != device.threads or abs(math.log(found.size / size)) > SAME_SIZE:
            return False
    return True


def store_curves(device: DeviceSpec, kernels: str, curves: Sequence[Curve]) -> None:
    """Adds curves to the file, in place of those of the same operator, format, threads and size."""
    entries, key, new = _entries(), _key(device, kernels), {_identity(c) for c in curves}
    old = ((entry, _curve_of(entry)) for entry in entries.get(key, []))
    kept = [entry for entry, curve in old if curve is not None and _identity(curve) not in new]
    entries[key] = [*kept, *map(asdict, curves)]
    file = _file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps({"version": CALIBRATION_VERSION, "curves": entries}))
    except (OSError, InvalidInput) as error:
        log.warning("the calibration was not cached: %s; set CIUIC_CACHE_DIR to a writable folder", error)


def _file() -> Path:
    return cache_file().with_name("calibration.json")


def _key(device: DeviceSpec, kernels: str) -> str:
    """How much memory there is does not matter to how fast a kernel is."""
    return f"{fingerprint(replace(device, memory_bytes=0))} | kernels {kernels} {__version__}"


def _identity(curve: Curve) -> tuple[str, int, str, float]:
    return curve.operator, curve.threads, curve.format, curve.size


def _entries() -> dict[str, Any]:
    return read_entries(_file(), CALIBRATION_VERSION, "curves")


def _curve_of(entry: Any) -> Curve | None:
    """None for what `store_curves` would not have written."""
    try:
        points = tuple(Point(*(_number(p[key]) for key in _POINT)) for p in entry["points"])
        return Curve(
            str(entry["device"]), int(entry["threads"]), str(entry["format"]), str(entry["operator"]),
            _number(entry["size"]), _number(entry["overhead"]), points,
            *(None if entry.get(key) is None else _number(entry[key]) for key in ("peak", "bandwidth", "measured")),
        )  # fmt: skip
    except (TypeError, ValueError, KeyError):
        return None


_POINT = ("rows", "compute", "memory", "spread")


def _number(value: Any) -> float:
    if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{value!r} is not a share or a time")
    return float(value)
