"""A node's losses count for an hour."""

from __future__ import annotations

from ciuic_runtime.cluster.losses import Losses


def test_losses_count_by_node_and_for_an_hour() -> None:
    losses = Losses(3600.0)
    for when in (0.0, 10.0, 3000.0):
        losses.add("node1", when)
    losses.add("node2", 20.0)
    assert (losses.of("node1", 3000.0), losses.of("node2", 3000.0), losses.of("node3", 3000.0)) == (3, 1, 0)
    assert losses.total(3000.0) == 4
    assert losses.of("node1", 3600.0) == 2  # the first one is an hour old
    assert losses.of("node1", 3610.0) == 1
    assert losses.total(3610.0) == 2
    assert losses.total(6600.0) == 0


def test_three_losses_in_a_week_are_never_more_than_one_at_once() -> None:
    losses, day = Losses(3600.0), 86400.0
    for number in range(3):
        losses.add("node1", number * 2 * day)
        assert losses.of("node1", number * 2 * day) == 1
