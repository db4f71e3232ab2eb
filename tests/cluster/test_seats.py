"""What stages need is reserved before anything is loaded: whole or not at all."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import ciuic_runtime as ciuic
from ciuic_runtime.cluster import seats as reserving
from ciuic_runtime.cluster.seats import NoRoom, Seats
from ciuic_runtime.devices.ray_nodes import nodes_of
from ciuic_runtime.devices.ray_session import join


@dataclass(frozen=True)
class Stage:
    index: int
    node: str
    node_id: str | None
    cores: float


def sits(ray: Any, seats: Seats, stage: Stage) -> Any:
    """An actor in the stage's seat, and where it is."""

    class Somebody:
        def where(self) -> str:
            return str(ray.get_runtime_context().get_node_id())

    actor = ray.remote(Somebody).options(num_cpus=stage.cores, scheduling_strategy=seats.strategy(stage)).remote()
    return actor, ray.get(actor.where.remote(), timeout=20)


@contextmanager
def at_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nobody waits for what others may give back."""
    with monkeypatch.context() as patch:
        patch.setattr(reserving, "RESERVE_SECONDS", 0.0)
        yield


def test_seats_are_on_their_nodes_and_outlive_who_sat_there(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = join(cluster.address)
    nodes = [n["NodeID"] for n in nodes_of(ray)]
    stages = [Stage(i, f"node{i}", node, 2.0) for i, node in enumerate(nodes)]
    seats = Seats(ray)
    seats.reserve(stages[:2], ())
    actors = [sits(ray, seats, stage) for stage in stages[:2]]
    assert [where for _, where in actors] == nodes[:2]

    # Another one wants the third node too, and the second, and gets neither.
    other = Seats(ray)
    says = r"^stage 1 needs 2 cores on node1 \(.*\), where 0 of 2 are free; nothing was loaded; end what runs there "
    with at_once(monkeypatch), pytest.raises(NoRoom, match=says):
        other.reserve(stages[1:], ())
    seats.reserve(stages, stages[:2])  # so the third is free

    # One ends, and another one with the same needs takes its place beside those that sit.
    ray.kill(actors[1][0])
    again = Stage(7, "node1", nodes[1], 2.0)
    seats.reserve([stages[0], again, stages[2]], [stages[0]])
    assert seats.strategy(stages[1]) is None
    assert sits(ray, seats, again)[1] == nodes[1]
    assert ray.get(actors[0][0].where.remote(), timeout=20) == nodes[0]

    with (
        at_once(monkeypatch),
        pytest.raises(NoRoom, match=r"^stages 0, 1 need 3 cores on node0 \(.*\), where 0 of 2 are free"),
    ):
        other.reserve([Stage(i, "node0", nodes[0], 1.5) for i in range(2)], ())
    with at_once(monkeypatch), pytest.raises(NoRoom, match=r"^stage 0 needs 1 cores, and the nodes have 0, 0, 0 free"):
        other.reserve([Stage(0, "", None, 1.0)], ())
    seats.close()
    other.reserve(stages, ())
    other.close()


def test_who_asks_for_no_core_or_a_node_that_is_gone_has_no_seat(cluster: Any) -> None:
    seats, none, gone = Seats(join(cluster.address)), Stage(0, "", None, 0.0), Stage(1, "node9", "f" * 56, 2.0)
    seats.reserve([none, gone], ())
    assert seats.strategy(none) is None
    assert seats.strategy(gone) is None


def test_who_is_interrupted_as_he_waits_leaves_nothing_reserved(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = join(cluster.address)
    [first, *_] = [n["NodeID"] for n in nodes_of(ray)]
    taken, waiting, after = Seats(ray), Seats(ray), Seats(ray)
    taken.reserve([Stage(0, "node0", first, 1.0)], ())

    def interrupted(sitters: Any) -> NoRoom:
        raise KeyboardInterrupt

    with at_once(monkeypatch), monkeypatch.context() as patch:
        patch.setattr(waiting, "_lacking", interrupted)
        with pytest.raises(KeyboardInterrupt):
            waiting.reserve([Stage(0, "node0", first, 2.0)], ())
    taken.close()
    after.reserve([Stage(0, "node0", first, 2.0)], ())  # which the one that waited would have by now
    after.close()


def test_a_model_that_finds_no_room_loads_nothing(
    cluster: Any, tiny_int4: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = join(cluster.address)
    hw = ciuic.DeviceManager.from_ray(cluster.address)
    taken = Seats(ray)
    taken.reserve([Stage(0, "node1", nodes_of(ray)[1]["NodeID"], 2.0)], ())
    begun = time.perf_counter()
    with (
        at_once(monkeypatch),
        pytest.raises(NoRoom, match=r"^stage 1 needs 1 cores on node1 \(.*\), where 0 of 2 are free; nothing was loa"),
    ):
        ciuic.LLM(
            tiny_int4, devices=hw, executor="ray", address=cluster.address, threads=1, max_model_len=64,
            placement=ciuic.Placement().put("*", on="node0/cpu").put("head", on="node1/cpu").put(
                "final_norm", on="node1/cpu").put("layers.3.*", on="node1/cpu"),
        )  # fmt: skip
    assert time.perf_counter() - begun < 15
    taken.close()
