"""Recordings that are made up: steps one after the other, or overlapping as those of a pipeline, with random lanes."""

from __future__ import annotations

import random

import numpy as np
from hypothesis import strategies as st

from ciuic_runtime.schedulers.graph import Step
from ciuic_runtime.schedulers.recording import (
    COLUMNS,
    COMPUTE,
    COPY,
    EVICT,
    MEMORY,
    NONE,
    READ,
    SAMPLE,
    WAIT,
    Recording,
)
from ciuic_runtime.schedulers.trace import StepInfo

DEVICES = ("cpu", "node1/cpu")
LANES = {
    "cpu": (COMPUTE, WAIT), "node1/cpu": (COMPUTE,), "host": (SAMPLE,), "disk -> cpu": (READ,),
    "disk -> cpu (2)": (READ,), "cpu -> sim:0": (COPY,), "cpu -> node1/cpu": (COPY,),
}  # fmt: skip
TASKS = ("layers.0.attention", "layers.0.experts", "layers.1.mlp_norm", "head", "other")
PAGES = ("layers.0.experts.0", "layers.0.experts.1")


def made(seed: int, steps: int = 4, events: int = 12, overlapping: bool = False) -> Recording:
    """Whole ns, so that what is compared is equal; on each lane nothing overlaps."""
    draw = random.Random(seed)
    names = [*LANES, *TASKS, *PAGES, "KV cache"]
    number = {name: i for i, name in enumerate(names)}
    free = dict.fromkeys(LANES, 0)
    rows, infos, now = [], [], 0
    for step in range(steps):
        begin, mine = now, []
        for _ in range(draw.randint(0, events)):
            lane = draw.choice(list(LANES))
            start = max(free[lane], begin + draw.randint(0, 2000))
            end = start + draw.choice([1, 5, 50, 700, 3000])
            free[lane], kind = end, draw.choice(LANES[lane])
            task = draw.choice(PAGES if kind == READ else TASKS)
            cause = number[draw.choice(PAGES)] if kind == WAIT else NONE
            nbytes = draw.randint(1, 10**6) if kind in (READ, COPY) else 0
            mine.append((number[task], number[lane], step, kind, nbytes, start / 1e9, end / 1e9, cause))
        end = max([begin + draw.randint(1, 3000), *(round(row[6] * 1e9) for row in mine)])
        mine.append((number["KV cache"], number["cpu"], step, MEMORY, 64 * step, end / 1e9, end / 1e9, NONE))
        mine.append((number[PAGES[0]], number["cpu"], step, EVICT, 0, begin / 1e9, begin / 1e9, NONE))
        size = Step.decode(64 + step, 1) if step else Step.prefill(64)
        infos.append(StepInfo(size.phase, size.tokens, 1, begin / 1e9, end / 1e9, size))
        rows += mine
        now = (begin + end) // 2 if overlapping else end + draw.randint(0, 100)
    return Recording(np.array(rows, COLUMNS), names, infos, devices=DEVICES)


recordings = st.builds(
    made, st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(0, 60), overlapping=st.booleans()
)  # fmt: skip
