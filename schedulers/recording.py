"""What was recorded of an engine at work, as columns: events, and beside them passes, requests, memory and marks.
Knows neither who recorded it nor who shows it; a `Trace` has the same events as objects, for those who count few."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from ciuic_runtime.schedulers.graph import PHASES, Phase, task_kind
from ciuic_runtime.schedulers.trace import Event, EventKind, StepInfo, Trace

MarkKind = Literal["lost", "replanned", "recovered", "joined"]
# `kind` of a row is a place in this list. Of "memory", nbytes are what is in use on the lane's device from `start` on,
# and the task says for what (WEIGHTS, CACHE); of "evict", the task is the page that left.
KINDS = ("compute", "copy", "sample", "wait", "read", "memory", "evict")
COMPUTE, COPY, SAMPLE, WAIT, READ, MEMORY, EVICT = range(len(KINDS))
WEIGHTS, CACHE = "weight pages", "KV cache"  # what memory is used for
NONE = -1
COLUMNS = np.dtype(
    [
        ("task", "i4"),  # a place in `names`, as is `lane`
        ("lane", "i4"),
        ("step", "i4"),  # counted from the first pass of all, also where those are forgotten
        ("kind", "i1"),
        ("nbytes", "i8"),
        ("start", "f8"),  # s since the recording began
        ("end", "f8"),
        ("cause", "i4"),  # of a wait: the page that came last, a place in `names`; else NONE
    ]
)
Rows = npt.NDArray[np.void]


@dataclass(frozen=True, slots=True)
class PassNote:
    """Whose tokens a pass computed, and who had to wait meanwhile."""

    requests: tuple[tuple[int, int], ...]  # (request, tokens)
    running: int
    waiting: int


@dataclass(frozen=True, slots=True)
class RequestNote:
    """A request as it went. Times are in s since the recording began; None: not yet."""

    request: int
    arrived: float
    prompt_tokens: int
    admitted: float | None = None  # into its first pass
    first_token: float | None = None
    ended: float | None = None
    cached_tokens: int = 0  # of the prompt, found in the cache
    new_tokens: int = 0
    preemptions: int = 0
    finish_reason: str | None = None


@dataclass(frozen=True, slots=True)
class Mark:
    """Something that befell the cluster."""

    time: float  # s since the recording began
    kind: MarkKind
    text: str


@dataclass(frozen=True, slots=True)
class PageCounts:
    """Of one page that is moved between tiers, since the recording began."""

    uses: int
    hits: int  # uses that found it in memory; for the others it was read, ahead of time or not
    reads: int
    waited_s: float  # by passes, where it was the page that came last
    resident: bool  # now
    bytes_read: int
    evictions: int


@dataclass(frozen=True)
class _Summed(Trace):
    """A trace whose events are only known summed up."""

    seconds_of: Mapping[Phase, Mapping[str, float]] = field(default_factory=dict)

    def seconds_by_kind(self, phase: Phase) -> dict[str, float]:
        return dict(self.seconds_of[phase])


@dataclass(frozen=True)
class Recording:
    """A snapshot: what comes later is in the next one."""

    rows: Rows  # of passes that came to their end, dtype COLUMNS, in the order in which they were recorded
    names: Sequence[str]
    steps: Sequence[StepInfo] = ()
    first_step: int = 0  # number of the first of `steps`; earlier ones are forgotten
    passes: Sequence[PassNote] = ()  # as many as steps, or none where nobody noted them
    requests: Sequence[RequestNote] = ()
    marks: Sequence[Mark] = ()
    capacity: Mapping[tuple[str, str], int] = field(default_factory=dict)  # (device, what for) -> bytes
    source: Literal["simulated", "measured"] = "measured"
    devices: Sequence[str] = ()  # lanes of compute, in order
    notes: Sequence[str] = ()
    began: float | None = None  # unix time, s
    basis: Mapping[str, Any] | None = None  # JSON: what its forecasts are made with (ciuic_runtime/basis.py)
    pages: Mapping[str, PageCounts] = field(default_factory=dict)  # by name, where they are moved between tiers
    expert_uses: Mapping[str, Sequence[int]] = field(default_factory=dict)  # task -> tokens that used each expert

    @staticmethod
    def of(trace: Trace) -> Recording:
        """A trace's events, in order of steps."""
        numbers: dict[str, int] = {}

        def number(name: str) -> int:
            return numbers.setdefault(name, len(numbers))

        rows = [
            (
                number(e.task), number(e.lane), e.step, KINDS.index(e.kind), e.nbytes, e.start, e.end,
                number(e.cause) if e.cause else NONE,
            )
            for e in sorted(trace.events, key=lambda e: e.step)
        ]  # fmt: skip
        return Recording(
            np.array(rows, COLUMNS), list(numbers), trace.steps, source=trace.source, devices=trace.devices,
            notes=trace.notes,
        )  # fmt: skip

    def trace(self) -> Trace:
        """Its events as objects; what is no event of a trace (memory, evictions) is left out."""
        names = self.names
        kept = self.rows[self.rows["kind"] <= READ]
        events = tuple(
            Event(
                names[task], names[lane], start, end, step - self.first_step, self._phase(step),
                cast(EventKind, KINDS[kind]), nbytes, names[cause] if cause != NONE else "",
            )
            for task, lane, step, kind, nbytes, start, end, cause in kept.tolist()
        )  # fmt: skip
        return Trace(events, tuple(self.steps), self.source, tuple(self.devices), tuple(self.notes))

    def summed(self) -> Trace:
        """As `trace()`, for its figures alone: what took how long is summed up here, and there are no event objects."""
        seconds = {phase: self.seconds_by_kind(phase) for phase in PHASES}
        return _Summed((), tuple(self.steps), self.source, tuple(self.devices), tuple(self.notes), seconds_of=seconds)

    def seconds_by_kind(self, phase: Phase) -> dict[str, float]:
        """As that of its trace."""
        kinds: dict[str, int] = {}

        def number(kind: str) -> int:
            return kinds.setdefault(kind, len(kinds))

        of_row = np.array([number(kind) for kind in KINDS], np.intp)
        of_task = np.array([number(task_kind(name)) for name in self.names], np.intp)
        mine = np.array([info.phase == phase for info in self.steps] or [phase == "decode"])
        rows = self.rows[self.rows["kind"] < READ]
        rows = rows[mine[rows["step"] - self.first_step if self.steps else np.zeros(len(rows), np.intp)]]
        found = np.where(rows["kind"] == COMPUTE, of_task[rows["task"]], of_row[rows["kind"]])
        total = np.bincount(found, rows["end"] - rows["start"], len(kinds))
        there, first = np.unique(found, return_index=True)
        names = list(kinds)
        return {names[n]: float(total[n]) for n in there[np.argsort(first)].tolist()}

    def _phase(self, step: int) -> Any:
        return self.steps[step - self.first_step].phase if self.steps else "decode"

    @property
    def seconds(self) -> float:
        """Until the last step or event ends."""
        ends = [float(self.rows["end"].max())] if len(self.rows) else []
        return max([*ends, *(step.end for step in self.steps[-1:])], default=0.0)

    def of_step(self, step: int) -> Rows:
        """The rows of one pass: they lie together, in order of steps."""
        first, last = np.searchsorted(self.rows["step"], [step, step + 1])
        return self.rows[first:last]
