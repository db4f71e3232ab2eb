"""What tests of the dashboard say of the run that `run_file` makes, and how they open it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from fastapi.testclient import TestClient

LATE, DELAY = "layers.2.attention", 0.2  # a page that every pass needs, s
EVIL = '<img src=x onerror="window.hit = 1">'

Client = Callable[..., AbstractContextManager[TestClient]]
