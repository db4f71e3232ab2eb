"""Where slots lie: one range of addresses, larger than memory if need be."""

from __future__ import annotations

from ciuic_runtime.memory.arena import HostArena


def test_more_address_space_than_there_is_memory_is_reserved() -> None:
    """A model larger than memory gets one range: what is not used does not count."""
    arena = HostArena(1 << 40)
    first, second = arena.take(1 << 20), arena.take(1 << 20)
    first.fill_(1)
    assert second.data_ptr() - first.data_ptr() == 1 << 20
    assert arena.discard(first)
    assert not first.any()
