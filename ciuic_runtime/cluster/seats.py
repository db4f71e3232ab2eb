"""The resources of stages, asked for before anything is loaded: all that begin together as one placement group of Ray,
whole or not at all, so that two jobs that want the same nodes never hold a half each.
Knows Ray's groups and bundles; what sits in them is `runner.py`'s business."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from ciuic_runtime.devices.errors import CiuicError

RESERVE_SECONDS = 20.0  # for others to go: what they held is free a second later
NODE_LABEL = "ray.io/node-id"


class Sitter(Protocol):
    """A stage: what it asks for."""

    @property
    def index(self) -> int: ...

    @property
    def node(self) -> str: ...

    @property
    def node_id(self) -> str | None: ...

    @property
    def cores(self) -> float: ...


class NoRoom(CiuicError):
    """The cluster does not have free what the stages need."""

    def __init__(self, message: str, node: str = "") -> None:
        """`node`: the one that lacks it, as the stages call it; "" where that is not one of several."""
        super().__init__(message)
        self.node = node


@dataclass(slots=True)
class _Seat:
    group: Any
    bundle: int
    node_id: str | None
    cores: float
    sitter: Sitter | None


class Seats:
    """Of a stage that ends, the seat is free for the next one on the same node; the others of its group stay."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._seats: list[_Seat] = []

    def reserve_elsewhere(self, sitters: Sequence[Sitter]) -> None:
        """Seats on nodes where there is none yet, before anybody has to leave another one for that. Raises NoRoom."""
        known, alive = {seat.node_id for seat in self._seats}, self._alive()
        if coming := [s for s in sitters if s.cores > 0 and s.node_id in alive and s.node_id not in known]:
            self._seats += self._group(coming)

    def reserve(self, sitters: Sequence[Sitter], sitting: Collection[Sitter]) -> None:
        """Seats for all of them, of whom some sit already; whoever else sat has left. Raises NoRoom, with what is
        lacking. One whose node is gone gets none."""
        for seat in self._seats:
            seat.sitter = seat.sitter if seat.sitter in sitting else None
        alive = self._alive()
        coming = [s for s in sitters if s not in sitting and s.cores > 0 and s.node_id in alive]
        left = [s for s in coming if not self._sits(s)]
        self._give_back(lambda seats: all(seat.sitter is None for seat in seats))
        if left:
            self._seats += self._group(left)

    def strategy(self, sitter: Sitter) -> Any | None:
        """What puts an actor into its seat; None where it has none."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        seat = next((seat for seat in self._seats if seat.sitter == sitter), None)
        return seat and PlacementGroupSchedulingStrategy(seat.group, placement_group_bundle_index=seat.bundle)

    def close(self) -> None:
        self._give_back(lambda seats: True)

    def _sits(self, sitter: Sitter) -> bool:
        """Whether a free seat does."""
        for seat in self._seats:
            if seat.sitter is None and (seat.node_id, seat.cores) == (sitter.node_id, sitter.cores):
                seat.sitter = sitter
                return True
        return False

    def _group(self, sitters: Sequence[Sitter]) -> list[_Seat]:
        from ray.util.placement_group import placement_group, remove_placement_group

        bundles = [{"CPU": s.cores} for s in sitters]
        where = [{NODE_LABEL: s.node_id} if s.node_id else {} for s in sitters]
        group = placement_group(bundles, strategy="PACK", bundle_label_selector=where)
        limit = time.monotonic() + RESERVE_SECONDS
        try:
            while not group.wait(1):
                if gone := {s.node_id for s in sitters} - self._alive():
                    break
                if time.monotonic() > limit:
                    raise self._lacking(sitters)
            else:
                return [_Seat(group, i, s.node_id, s.cores, s) for i, s in enumerate(sitters)]
        except BaseException:
            remove_placement_group(group)
            raise
        remove_placement_group(group)
        there = [s for s in sitters if s.node_id not in gone]
        return self._group(there) if there else []

    def _lacking(self, sitters: Sequence[Sitter]) -> NoRoom:
        """Which of them find no room, and what there is."""

        def said(some: Sequence[Sitter]) -> str:
            which = ", ".join(str(s.index) for s in some)
            what = f"stages {which} need" if len(some) > 1 else f"stage {which} needs"
            return f"{what} {sum(s.cores for s in some):g} cores"

        free = self._ray._private.state.available_resources_per_node()
        nodes = {n["NodeID"]: n for n in self._ray.nodes() if n["Alive"]}
        todo = "end what runs there (ciuic jobs), give the stages fewer threads, or place them elsewhere"
        for node_id in dict.fromkeys(s.node_id for s in sitters):
            mine = [s for s in sitters if s.node_id == node_id]
            room = free.get(node_id or "", {}).get("CPU", 0.0)
            if node_id is None:
                there = ", ".join(f"{free.get(i, {}).get('CPU', 0.0):g}" for i in nodes)
                return NoRoom(f"{said(mine)}, and the nodes have {there} free; nothing was loaded; {todo}")
            if node_id in nodes and sum(s.cores for s in mine) > room:
                whole, address = nodes[node_id]["Resources"].get("CPU", 0.0), nodes[node_id]["NodeManagerAddress"]
                return NoRoom(
                    f"{said(mine)} on {mine[0].node} ({address}), where {room:g} of {whole:g} are free; nothing was "
                    f"loaded; {todo}",
                    mine[0].node,
                )
        late = f"the cluster did not give the cores of {len(sitters)} stages in {RESERVE_SECONDS:.0f} s; {todo}"
        nodes_asked = {s.node for s in sitters}
        return NoRoom(late, nodes_asked.pop() if len(nodes_asked) == 1 else "")

    def _give_back(self, which: Callable[[Sequence[_Seat]], bool]) -> None:
        """Groups of which nobody needs a seat any more."""
        from ray.util.placement_group import remove_placement_group

        groups: dict[int, list[_Seat]] = {}
        for seat in self._seats:
            groups.setdefault(id(seat.group), []).append(seat)
        self._seats = []
        for seats in groups.values():
            if which(seats):
                with suppress(Exception):  # the cluster may be gone
                    remove_placement_group(seats[0].group)
            else:
                self._seats += seats

    def _alive(self) -> set[str | None]:
        """None: anywhere."""
        return {None, *(n["NodeID"] for n in self._ray.nodes() if n["Alive"])}
