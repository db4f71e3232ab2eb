"""All steps of a recording as bars, each in its five parts; of many, the longest of each few that share a bar.
Knows columns; what is behind one step is in `step.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ciuic_runtime.schedulers.blame import CAUSES, step_parts
from ciuic_runtime.schedulers.graph import Step
from ciuic_runtime.schedulers.recording import Recording

Planned = Callable[[Sequence[Step | None]], Sequence[float | None]]  # of several steps, what the plan gives each


class Strip:
    """Added to as a recording grows."""

    def __init__(self) -> None:
        self.parts = np.zeros((0, len(CAUSES)))  # s, by step
        self._starts = self._ends = np.zeros(0)

    def __len__(self) -> int:
        return len(self.parts)

    def add(self, new: Recording) -> None:
        """Of the steps that came since."""
        self.parts = np.concatenate([self.parts, step_parts(new)])
        self._starts = np.concatenate([self._starts, [info.start for info in new.steps]])
        self._ends = np.concatenate([self._ends, [info.end for info in new.steps]])

    @property
    def walls(self) -> Any:
        return self._ends - self._starts

    def slowest(self, most: int) -> list[int]:
        """Places of the longest steps, the longest first."""
        return [int(i) for i in np.argsort(-self.walls, kind="stable")[:most]]

    def bars(self, recording: Recording, first: int, last: int, most: int, planned: Planned) -> dict[str, Any]:
        """Of the steps from number `first` to before `last`."""
        low, high = (min(max(0, n - recording.first_step), len(self)) for n in (first, last))
        each = max(1, -(-(high - low) // most))
        begins = np.arange(low, high, each)
        ends = np.minimum(begins + each, high)
        walls = self.walls
        worst = [int(begin + walls[begin:end].argmax()) for begin, end in zip(begins, ends, strict=True)]
        infos, number = [recording.steps[i] for i in worst], recording.first_step
        return {
            "causes": list(CAUSES), "total": high - low,
            "first": (begins + number).tolist(), "last": (ends - 1 + number).tolist(),
            "start": self._starts[begins].tolist(), "end": self._ends[ends - 1].tolist(),
            "phase": [info.phase for info in infos], "tokens": [info.tokens for info in infos],
            "worst": [i + number for i in worst], "seconds": self.parts[worst].tolist(),
            "planned": list(planned([info.step for info in infos])),
        }  # fmt: skip
