"""Every question that the page may ask of a source, by its path: the same answers go over HTTP and into a saved page.
Knows which question is answered where."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import parse_qs

from ciuic_runtime.dashboard.explain import explain_answer, placement_answer
from ciuic_runtime.dashboard.memory import memory_answer
from ciuic_runtime.dashboard.requests import requests_answer
from ciuic_runtime.dashboard.source import Source, whole_number
from ciuic_runtime.dashboard.step import step_answer
from ciuic_runtime.dashboard.summary import summary
from ciuic_runtime.dashboard.why import why_answer
from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.server.errors import ApiError

MOST_BARS, MOST_REQUESTS, MOST_SAMPLES = 2000, 500, 2000
LARGEST = 100_000  # of what may be asked for at once
COUNTED = ("memory", "placement", "explain")  # what needs counts of pages
Query = Mapping[str, str]


def answer(source: Source, path: str) -> dict[str, Any]:
    """Of a path such as steps/12 or steps?most=2000. Raises ApiError and InvalidInput for what cannot be answered."""
    path, _, asked = path.partition("?")
    query = {key: values[-1] for key, values in parse_qs(asked, keep_blank_values=True).items()}
    name, *rest = path.split("/")
    with source.lock:
        if not rest and name in _BY_NAME:
            return _BY_NAME[name](source, query)
        if name == "steps" and len(rest) == 1:
            return step_answer(source, _known(lambda: source.step_number(rest[0])))
        if name == "tiles" and len(rest) == 2:
            level, index = (_whole("tile", text) for text in rest)
            tile: dict[str, Any] = _known(lambda: source.shown.timeline.tile(level, index))
            return tile
    raise ApiError(404, f"there is nothing at {path}", code="not_found")


def _steps(source: Source, query: Query) -> dict[str, Any]:
    recording = source.recording
    first, last = recording.first_step, recording.first_step + len(recording.steps)
    first = _number(query, "from", first)
    last = _number(query, "to", last - 1) + 1 if "to" in query else last
    most = _number(query, "most", MOST_BARS, least=1)
    return source.shown.strip.bars(recording, first, last, most, source.plans.seconds)


def _memory(source: Source, query: Query) -> dict[str, Any]:
    return memory_answer(source, _number(query, "most", MOST_SAMPLES, least=1))


def _requests(source: Source, query: Query) -> dict[str, Any]:
    return requests_answer(source, _number(query, "most", MOST_REQUESTS, least=1))


def _explain(source: Source, query: Query) -> dict[str, Any]:
    if not query.get("name"):
        raise InvalidInput("explain needs a name: explain?name=layers.3.attention")
    return explain_answer(source, query["name"])


_BY_NAME: dict[str, Callable[[Source, Query], dict[str, Any]]] = {
    "summary": lambda source, _: summary(source),
    "steps": _steps,
    "requests": _requests,
    "memory": _memory,
    "placement": lambda source, _: placement_answer(source),
    "explain": _explain,
    "why": lambda source, _: why_answer(source),
}


def _known(find: Callable[[], Any]) -> Any:
    """What is not there is not found, rather than badly asked for."""
    try:
        return find()
    except InvalidInput as error:
        raise ApiError(404, str(error), code="not_found") from error


def _number(query: Query, key: str, default: int, least: int = 0) -> int:
    if key not in query:
        return default
    value = _whole(key, query[key])
    if value < least or (key == "most" and value > LARGEST):
        raise InvalidInput(f"{key} is {value}; it must be a whole number from {least}" + (
            f" to {LARGEST}" if key == "most" else ""
        ))  # fmt: skip
    return value


def _whole(what: str, text: str) -> int:
    if (number := whole_number(text)) is None:
        raise InvalidInput(f"{what} is {text[:40]!r}; it must be a whole number")
    return number
