"""Which resource a step spent most of its time on. Knows its rows and, where there is one, the cost model that tells
what a task on a device is bound by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ciuic_runtime.schedulers.blame import Cause
from ciuic_runtime.schedulers.forecaster import Forecaster
from ciuic_runtime.schedulers.graph import task_kind
from ciuic_runtime.schedulers.lanes import lane_kind
from ciuic_runtime.schedulers.recording import COMPUTE, COPY, SAMPLE, Recording


@dataclass(frozen=True, slots=True)
class Binding:
    resource: str  # memory of cpu
    share: float  # of the step's wall time
    text: str


def binding(recording: Recording, step: int, parts: Mapping[Cause, float], forecaster: Forecaster | None) -> Binding:
    """`parts`: of the step's wall time, as `step_parts` has them."""
    info, names = recording.steps[step - recording.first_step], recording.names
    wall, computing, kinds, moving = info.end - info.start, dict[str, float](), dict[str, float](), dict[str, float]()
    for task, lane, _, kind, _, start, end, _ in recording.of_step(step).tolist():
        if kind in (COMPUTE, SAMPLE):
            what = _bound_by(names[task], names[lane], info.step, forecaster) if kind == COMPUTE else "the host"
            computing[what] = computing.get(what, 0.0) + end - start
            kinds[task_kind(names[task])] = kinds.get(task_kind(names[task]), 0.0) + end - start
        elif kind == COPY:
            moving[names[lane]] = moving.get(names[lane], 0.0) + end - start
    resources = {f"reads from {_disk(recording)}": parts["disk"], "nothing that was recorded": parts["waiting"]}
    # Several devices may compute at once: of the time in which any did, each has a share by what it computed.
    busy = sum(computing.values())
    resources |= {what: parts["compute"] * s / busy for what, s in computing.items() if busy}
    moved = sum(moving.values())
    resources |= {f"link {lane}": (parts["copy"] + parts["network"]) * s / moved for lane, s in moving.items() if moved}
    most = max(resources, key=lambda one: resources[one])
    share = resources[most] / wall if wall > 0 else 0.0
    return Binding(most, share, _in_words(most, share, kinds))


def _bound_by(task: str, lane: str, step: object, forecaster: Forecaster | None) -> str:
    if forecaster is None or step is None or task not in forecaster.graph.by_name:
        return f"computing on {lane}"
    device = next((d for d in forecaster.cost.topology.devices if d.name == lane), None)
    if device is None:
        return f"computing on {lane}"
    return f"{forecaster.cost.task(forecaster.graph.by_name[task], device, step).bound_by} of {lane}"  # type: ignore[arg-type]


def _disk(recording: Recording) -> str:
    lanes = (lane for lane in recording.names if " -> " in lane and lane_kind(lane, recording.devices) == "disk")
    return next((lane.partition(" ")[0] for lane in lanes), "disk")


def _in_words(resource: str, share: float, kinds: Mapping[str, float]) -> str:
    if resource.startswith("reads from"):
        return f"{resource} bind: {share:.0%} of the step tasks waited for pages"
    if resource.startswith("nothing"):
        return f"for {share:.0%} of the step no task ran, nothing was copied and no page was waited for"
    if resource.startswith("link"):
        return f"{resource} binds: {share:.0%} of the step nothing was computed while it brought values"
    most = max(kinds, key=lambda kind: kinds[kind])
    part = kinds[most] / sum(kinds.values())
    how = " (as the cost model has it)" if " of " in resource else ""
    return f"{resource} binds{how}: {share:.0%} of the step; {part:.0%} of the computing was {most}"
