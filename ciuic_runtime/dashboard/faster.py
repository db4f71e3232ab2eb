"""What would have made a step faster: by arithmetic on what was measured, and by the cost model with one resource
changed. Knows which change goes with what was waited for; each can be tried in the what-if view."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ciuic_runtime.dashboard import changed
from ciuic_runtime.dashboard.changed import bandwidth_of
from ciuic_runtime.dashboard.source import Source
from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.schedulers.blame import Cause
from ciuic_runtime.schedulers.late import Late, in_words

LEAST_GAIN, MOST = 0.02, 3


@dataclass(frozen=True, slots=True)
class Faster:
    text: str
    whatif: dict[str, Any] | None  # a body of POST whatif that shows it


def faster(source: Source, number: int, parts: Mapping[Cause, float], late: Late | None) -> list[Faster]:
    """The largest gain first."""
    info = source.recording.steps[number - source.recording.first_step]
    wall = info.end - info.start
    found: list[tuple[float, Faster]] = []

    def add(seconds: float, text: str, whatif: dict[str, Any] | None) -> None:
        if wall - seconds > LEAST_GAIN * wall:
            found.append((wall - seconds, Faster(text, whatif)))

    def without(cause: Cause, what: str, whatif: dict[str, Any] | None) -> None:
        left = wall - parts[cause]
        add(left, f"Without {what} this step would have taken {in_words(left)}{_times(wall, left)}.", whatif)

    without("disk", "waiting for pages", _all_in_memory(source))
    without("copy", "waiting for copies", None)
    without("network", "waiting for the network", None)
    if late is not None and late.planned_s is not None and late.actual_s - late.planned_s < wall:
        left = wall - (late.actual_s - late.planned_s)
        add(left, f"Had {late.task} taken what was planned, the step would have taken {in_words(left)}"
                  f"{_times(wall, left)}.", None)  # fmt: skip
    for seconds, base, what, patch in _recosted(source, number, parts):
        left = wall * seconds / base
        add(left, f"With {what} the cost model puts this step at {in_words(seconds)} instead of {in_words(base)}"
                  f"{_times(base, seconds)}; estimated.", patch)  # fmt: skip
    return [one for _, one in sorted(found, key=lambda pair: -pair[0])[:MOST]]


def _times(before: float, after: float) -> str:
    return f" ({before / after:.1f}x as fast)" if after > 0 else ""


def _all_in_memory(source: Source) -> dict[str, Any] | None:
    """As much memory as all pages need, beside what else is needed."""
    basis = source.basis
    if basis is None or basis.schedule.paging is None:
        return None
    paging, predicted = basis.schedule.paging, basis.schedule.predicted
    device = basis.schedule.topology.device(paging.device)
    other = max(0, (predicted.memory_bytes.get(device.name, 0) if predicted else 0) - paging.cache_bytes)
    taken = device.memory_bytes - min(device.memory_bytes, device.memory_free_bytes or device.memory_bytes)
    return {"ram": {device.name: int(1.02 * (basis.model.graph.nbytes + other + taken))}}


def _recosted(
    source: Source, number: int, parts: Mapping[Cause, float]
) -> list[tuple[float, float, str, dict[str, Any]]]:  # fmt: skip
    """(seconds, seconds as it was, what was changed, patch) of the step with twice of what it was bound by."""
    basis, step = source.basis, source.recording.steps[number - source.recording.first_step].step
    if basis is None or step is None or basis.pipelining is not None:
        return []
    topology = basis.schedule.topology
    disks = [d for d in topology.devices if d.kind == "DISK"]
    rate = bandwidth_of(disks[0], topology) if disks and parts["disk"] else None
    if not rate:
        return []
    bandwidth = {disks[0].name: 2 * rate}
    try:
        twice = replace(basis.schedule, topology=changed.faster(topology, bandwidth))
        before, after = (replace(basis.forecaster, schedule=s).recost([step]).steps[0] for s in (basis.schedule, twice))
    except InvalidInput:
        return []
    return [(after.end - after.start, before.end - before.start, "a disk twice as fast", {"bandwidth": bandwidth})]
