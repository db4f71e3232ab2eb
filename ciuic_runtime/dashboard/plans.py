"""What the plan gives steps as they came: of one step exactly, of thousands by a few that are simulated.
Knows a forecaster; a step of which nothing is known, or a device without a speed, has no plan."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.schedulers.forecaster import Forecaster
from ciuic_runtime.schedulers.graph import Step
from ciuic_runtime.schedulers.recording import Recording

APART = 256  # positions between contexts that are simulated; in between a pass's time is close to straight
MOST_KEPT = 256  # steps with all their tasks; of others the seconds only
PATIENCE = 0.5  # s, for simulating on behalf of one answer


class Plans:
    def __init__(self, forecaster: Forecaster | None, why_none: str = "") -> None:
        self.forecaster, self.why_none = forecaster, why_none
        self._traces: OrderedDict[Step, Recording] = OrderedDict()
        self._seconds: dict[Step, float] = {}

    def of(self, step: Step | None) -> Recording | None:
        """The planned rows of one step; None where there is no plan, and `why_none` says why."""
        if self.forecaster is None or step is None:
            return None
        size = replace(step, touched=None, read_bytes=None)
        if size not in self._traces:
            try:
                self._traces[size] = Recording.of(self.forecaster.planned(size))
            except InvalidInput as error:
                self.forecaster, self.why_none = None, f"no plan to compare with: {error}"
                return None
            if len(self._traces) > MOST_KEPT:
                self._traces.popitem(last=False)
        self._traces.move_to_end(size)
        return self._traces[size]

    def seconds(self, steps: Sequence[Step | None], patience: float = PATIENCE) -> list[float | None]:
        """Of each step, between the two nearest contexts that are simulated. What would take too long now is None, and
        is there when it is asked for again."""
        until = time.monotonic() + patience
        return [None if step is None else self._between(step, until) for step in steps]

    def _between(self, step: Step, until: float) -> float | None:
        at = max(0.0, (step.positions - step.tokens) / step.sequences)
        low = int(at) // APART * APART
        before, after = (self._at(step, context, until) for context in (low, low + APART))
        if before is None or after is None:
            return None
        return before + (after - before) * (at - low) / APART

    def _at(self, step: Step, context: int, until: float) -> float | None:
        """Seconds of such a step whose sequences all have so many positions behind them."""
        each = step.tokens / step.sequences
        pairs = step.tokens * context + step.tokens * (each + 1) / 2
        positions = float(step.sequences * context + step.tokens)
        size = Step(step.phase, step.tokens, step.sequences, pairs, positions, step.sampled)
        if size not in self._seconds:
            if time.monotonic() > until or self.forecaster is None:
                return None
            try:
                [info] = self.forecaster.planned(size).steps
            except InvalidInput as error:
                self.forecaster, self.why_none = None, f"no plan to compare with: {error}"
                return None
            if len(self._seconds) > 64 * MOST_KEPT:
                self._seconds.clear()
            self._seconds[size] = info.end - info.start
        return self._seconds[size]
