"""Closed forms are computed with the whole of a device's limits; what is assumed by default has its own test."""

from __future__ import annotations

import pytest

from ciuic_runtime.schedulers import cost


@pytest.fixture(autouse=True)
def whole_limits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "assumed" not in request.node.name:
        monkeypatch.setattr(cost, "ASSUMED_COMPUTE_UTILISATION", 1.0)
        monkeypatch.setattr(cost, "ASSUMED_MEMORY_UTILISATION", 1.0)
