"""Pages of a small packed model, opened for one test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ciuic_runtime.memory.hierarchy import MemoryHierarchy


@pytest.fixture
def memory(tiny_int4: Path) -> Iterator[MemoryHierarchy]:
    found = MemoryHierarchy(tiny_int4)
    yield found
    found.close()
