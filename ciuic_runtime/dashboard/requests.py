"""Requests along the axis of steps, the newest where there are many."""

from __future__ import annotations

from typing import Any

from ciuic_runtime.dashboard.source import Source

COLUMNS = (
    "request", "arrived", "admitted", "first_token", "ended", "prompt_tokens", "cached_tokens", "new_tokens",
    "finish_reason", "preemptions",
)  # fmt: skip


def requests_answer(source: Source, most: int) -> dict[str, Any]:
    kept = source.request_notes(most)
    return {"total": source.num_requests, **{name: [getattr(note, name) for note in kept] for name in COLUMNS}}
