"""What a lane of a trace is, by its name, and what its events are shown as.
Knows how lanes are called; what is on them, others count."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Literal

from ciuic_runtime.schedulers.graph import task_kind
from ciuic_runtime.schedulers.memory import node_of
from ciuic_runtime.schedulers.recording import COMPUTE, COPY, KINDS
from ciuic_runtime.schedulers.trace_chart import KINDS as CHART_KINDS

LaneKind = Literal["compute", "copy", "disk", "network", "host"]
HOST = "host"  # chooses tokens
SHOWN: tuple[str, ...] = (*CHART_KINDS, "network", "other")  # kinds of events that have a colour of their own
_SEVERAL = re.compile(r" \(\d+\)$")  # disk -> cpu (2): another read at the same time


def lane_kind(lane: str, devices: Collection[str] = ()) -> LaneKind:
    """`devices`: those that compute."""
    if lane in devices:
        return "compute"
    src, arrow, dst = _SEVERAL.sub("", lane).partition(" -> ")
    if arrow:
        if _bare(src).startswith("disk"):
            return "disk"
        return "network" if node_of(src) != node_of(dst) else "copy"
    return "host" if _bare(lane) == HOST else "compute"


def lane_order(lanes: Collection[str], devices: Sequence[str]) -> list[str]:
    """Devices as they come in the plan, then the host, then transfers with the disk's last; each kind by name."""
    kinds: tuple[LaneKind, ...] = ("compute", "host", "copy", "network", "disk")
    places = {name: i for i, name in enumerate(devices)}
    every = dict.fromkeys((*devices, *lanes))

    def place(lane: str) -> tuple[int, int, str]:
        return kinds.index(lane_kind(lane, devices)), places.get(lane, len(places)), lane

    return sorted(every, key=place)


def shown_as(task: str, kind: int, lane: LaneKind) -> str:
    """One of SHOWN, of a row of a recording."""
    if kind == COMPUTE:
        what = task_kind(task)
    elif kind == COPY and lane == "network":
        what = "network"
    else:
        what = KINDS[kind]
    return what if what in SHOWN else "other"


def _bare(device: str) -> str:
    return device.rpartition("/")[2]
