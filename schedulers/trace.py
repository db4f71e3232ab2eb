"""What happened, or is forecast to happen, when and where: events on lanes, the same type for a simulated and a real
run. Knows nothing of how events were recorded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ciuic_runtime.schedulers.comparison import Comparison, compare
from ciuic_runtime.schedulers.graph import Phase, Step, task_kind

if TYPE_CHECKING:
    from ciuic_runtime.schedulers.schedule import Schedule

EventKind = Literal["compute", "copy", "sample", "wait", "read"]  # wait: for a page; read: of one stored elsewhere


@dataclass(frozen=True, slots=True)
class Event:
    """One task (or copy) in one step. Events on a lane do not overlap."""

    task: str  # layers.3.attention; of a read, the page
    lane: str  # the device that computed it or waited, or "cpu -> sim:0" for a copy
    start: float  # s since the trace began
    end: float
    step: int
    phase: Phase
    kind: EventKind = "compute"
    nbytes: int = 0  # moved, for copies
    cause: str = ""  # of a wait: the page that came last

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class StepInfo:
    """What a step processed."""

    phase: Phase
    tokens: int
    sequences: int
    start: float
    end: float
    step: Step | None = None  # its size to the cost model, with the experts and reads that came; None: not known


@dataclass(frozen=True)
class Trace:
    events: tuple[Event, ...]
    steps: tuple[StepInfo, ...]
    source: Literal["simulated", "measured"]
    devices: tuple[str, ...] = ()  # lanes of compute, in order
    notes: tuple[str, ...] = ()  # "sim:0 is simulated"
    outcome: str = ""  # what did not come to its end, and for lack of what
    memory_bytes: Mapping[str, int] = field(default_factory=dict)  # by device: held at most, where that was simulated

    @property
    def lanes(self) -> tuple[str, ...]:
        seen = dict.fromkeys((*self.devices, *(e.lane for e in self.events)))
        return tuple(seen)

    def seconds(self, phase: Phase) -> float:
        """Time the steps of a phase took, pauses between steps not counted."""
        return sum(s.end - s.start for s in self.steps if s.phase == phase)

    def tokens(self, phase: Phase) -> int:
        return sum(s.tokens for s in self.steps if s.phase == phase)

    def tokens_per_s(self, phase: Phase) -> float | None:
        seconds = self.seconds(phase)
        return self.tokens(phase) / seconds if seconds > 0 else None

    def seconds_by_kind(self, phase: Phase) -> dict[str, float]:
        """Seconds by kind of task, over all steps of a phase; copies under "copy", sampling under "sample", waiting for
        pages under "wait". Reads from disk go on beside all that and are left out."""
        total: dict[str, float] = defaultdict(float)
        for event in self.events:
            if event.phase == phase and event.kind != "read":
                total[task_kind(event.task) if event.kind == "compute" else event.kind] += event.seconds
        return dict(total)

    def against(self, schedule: Schedule, recosted: Trace | None = None) -> Comparison:
        """This trace beside what the schedule forecast: rates, and time per token by kind of task. `recosted`: what the
        cost model makes of the passes as they really came (`simulate` with `passes()`)."""
        return compare(self, schedule, recosted)

    def passes(self, phase: Phase, most: int = 64) -> list[Step]:
        """The passes of a phase as they came, where that is known; of many, so many evenly spaced ones."""
        known = [info.step for info in self.steps if info.phase == phase and info.step is not None]
        count = min(len(known), most)
        return [known[(2 * i + 1) * len(known) // (2 * count)] for i in range(count)]

    def to_chrome_trace(self, path: str | Path) -> None:
        """Chrome trace JSON, which Perfetto opens and `read_recording` reads."""
        # Here, because a recording is made of a trace's events, and can be made into a trace.
        from ciuic_runtime.schedulers.chrome import write_recording
        from ciuic_runtime.schedulers.recording import Recording

        write_recording(Recording.of(self), path)
