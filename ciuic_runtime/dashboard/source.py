"""What a dashboard shows: a recording from a file or of an engine at work, a schedule, or both.
Knows where it comes from and keeps it up to date; what is made of it is in the files beside this one."""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from ciuic_runtime.basis import Basis
from ciuic_runtime.dashboard.counts import Counts
from ciuic_runtime.dashboard.growing import Growing
from ciuic_runtime.dashboard.plans import Plans
from ciuic_runtime.dashboard.strip import Strip
from ciuic_runtime.dashboard.timeline import Timeline
from ciuic_runtime.dashboard.whatif import WhatIf
from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.model import Model
from ciuic_runtime.models.config import known_names
from ciuic_runtime.schedulers.chrome import read_recording
from ciuic_runtime.schedulers.memory import node_of
from ciuic_runtime.schedulers.recording import COLUMNS, Recording, RequestNote
from ciuic_runtime.schedulers.schedule import Schedule

SourceKind = Literal["live", "trace", "schedule"]
EMPTY = Recording(np.zeros(0, COLUMNS), ())


@dataclass(frozen=True)
class Shown:
    """A recording as it is now, and what was worked out of it so far."""

    growing: Growing
    strip: Strip
    timeline: Timeline

    @staticmethod
    def of(recording: Recording, most: int | None = None) -> Shown:
        growing, strip, timeline = Growing(recording, most), Strip(), Timeline()
        strip.add(growing.recording)
        timeline.add(growing.recording, growing.recording.rows)
        return Shown(growing, strip, timeline)

    @property
    def recording(self) -> Recording:
        return self.growing.recording

    def add(self, snapshot: Recording) -> Shown:
        """With what came since."""
        growing, before = self.growing, self.growing.next_step
        forgotten = growing.forgotten
        rows = growing.add(snapshot)
        if growing.forgotten > forgotten:
            return Shown.of(growing.recording, growing.most)
        self.strip.add(growing.of_steps(before, growing.next_step))
        self.timeline.add(growing.recording, rows)
        return self


class Source:
    """Everything that is asked of it is asked under its lock."""

    def __init__(
        self, name: str, kind: SourceKind, recording: Recording = EMPTY, schedule: Schedule | None = None,
        basis: Basis | None = None, why_no_basis: str = "",
    ) -> None:  # fmt: skip
        self.name, self.kind, self.lock = name, kind, threading.RLock()
        self.shown = Shown.of(recording)
        self.schedule = basis.schedule if basis else schedule
        self.basis, self.why_no_basis = basis, why_no_basis
        self.plans = Plans(basis.forecaster if basis else None, why_no_basis)
        self._whatif: WhatIf | None = None
        self.nodes_before: dict[str, None] = {}  # of a cluster, those of earlier plans

    @property
    def recording(self) -> Recording:
        return self.shown.recording

    def refresh(self, counts: bool = False) -> None:
        """Takes in what came since, with `counts` of pages and experts; of a file there is nothing."""

    def whole(self) -> Recording:
        """All that is known, with what its forecasts are made with."""
        return self.recording

    @property
    def num_requests(self) -> int:
        return len(self.recording.requests)

    def request_notes(self, newest: int) -> Sequence[RequestNote]:
        """In the order in which they arrived."""
        requests = self.recording.requests
        return requests[max(0, len(requests) - newest) :]

    def request_notes_of(self, indices: Collection[int]) -> Sequence[RequestNote]:
        return [note for note in self.recording.requests if note.request in indices]

    @property
    def ray_dashboard(self) -> str | None:
        """Where Ray shows its own, of a cluster that runs."""
        return None

    def counts(self) -> Counts:
        """Of pages, as far as they are known."""
        return Counts.of(self.recording)

    @property
    def whatif(self) -> WhatIf:
        """Raises InvalidInput where nothing is known to plan with."""
        if self.basis is None:
            raise InvalidInput(f"nothing can be planned again from {self.name}: {self.why_no_basis}")
        if self._whatif is None or self._whatif.basis is not self.basis:
            self._whatif = WhatIf(self.basis)
        return self._whatif

    def step_number(self, text: str) -> int:
        """Of a step that is here; InvalidInput for anything else."""
        first, count = self.recording.first_step, len(self.recording.steps)
        number = whole_number(text)
        if number is None or not first <= number < first + count:
            there = f"steps {first} to {first + count - 1} are known" if count else "no steps are known"
            raise InvalidInput(f"there is no step {text[:40]}; {there}")
        return number


def whole_number(text: str) -> int | None:
    """Of what stands in an address; None for anything else."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 18 else None


def nodes_of(basis: Basis) -> dict[str, list[str]]:
    """Of a cluster: the devices that compute, by node; on one machine, by stage."""
    found: dict[str, list[str]] = {}
    if basis.pipelining is not None:
        for device in basis.forecaster.carried_out.devices_used():
            found.setdefault(node_of(device).partition("/")[0], []).append(device)
    return found


def open_file(path: Path) -> Source:
    """A trace or a schedule that was saved. Raises InvalidInput for anything else."""
    try:
        with open(path, "rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror}") from error
    if b'"traceEvents"' in head:
        recording = read_recording(path)
        basis = Basis.from_dict(recording.basis, str(path)) if recording.basis is not None else None
        why = "" if basis else "the file does not say what its forecasts were made with"
        return Source(path.name, "trace", recording, basis=basis, why_no_basis=why)
    if b'"assignments"' not in path.read_bytes():
        raise InvalidInput(
            f"{path} is neither a trace nor a schedule; `ciuic run MODEL --trace FILE` writes a trace, and "
            "`ciuic plan MODEL --save FILE` a schedule"
        )
    schedule = Schedule.from_json(path)
    return schedule_source(path.name, schedule)


def schedule_source(name: str, schedule: Schedule) -> Source:
    """What can be planned again only if the model goes by a known name."""
    try:
        basis = Basis(known_model(schedule), schedule)
    except InvalidInput as error:
        why = f"a saved schedule does not hold its model, and it is not known by name: {error}"
        return Source(name, "schedule", schedule=schedule, why_no_basis=why)
    return Source(name, "schedule", schedule=schedule, basis=basis)


def known_model(schedule: Schedule) -> Model:
    """By the name in the schedule. Raises InvalidInput where there is none, or it is another one."""
    name = schedule.model.name
    if name not in known_names():
        raise InvalidInput(f"{name} is none of {', '.join(known_names())}; a trace holds what it was planned with")
    model = Model(name, schedule.model.format)
    schedule.validate(model.graph)
    return model
