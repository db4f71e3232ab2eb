"""The dashboard over HTTP: its page, and what the page asks for. All work is done in two threads of its own, one for
answers and one for plans, so that whoever serves beside it goes on.
Knows paths and statuses; what is answered is in `answers.py`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from urllib.parse import urlencode

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from ciuic_runtime.dashboard.answers import answer
from ciuic_runtime.dashboard.live import LiveSource, Stream
from ciuic_runtime.dashboard.pages import ADDRESSES, HEADERS, TYPES, VIEWS
from ciuic_runtime.dashboard.save import save_page
from ciuic_runtime.dashboard.source import Source
from ciuic_runtime.dashboard.whatif import WhatIf
from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.server.errors import ApiError, to_json

API = "/dashboard/api"
PAST = {"Cache-Control": "private, max-age=3600"}  # what never changes
NOW = {"Cache-Control": "no-store"}
MOST_ADDRESS = 4096  # characters of the page's address that a saved page keeps

Found = TypeVar("Found")


class Dashboard:
    """Sources, and the threads in which they are asked."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = list(sources)
        self._streams: dict[Source, Stream] = {}
        self._answers = ThreadPoolExecutor(1, "ciuic-dashboard")
        self._plans = ThreadPoolExecutor(1, "ciuic-whatif")

    def source(self, id: str) -> Source:
        if not id.isdecimal() or int(id[:9]) >= len(self.sources):
            raise ApiError(404, f"there is no source {id}; there are 0 to {len(self.sources) - 1}", code="not_found")
        return self.sources[int(id)]

    def live(self, source: Source) -> Response:
        """Events as they come."""
        if not isinstance(source, LiveSource):
            raise ApiError(409, f"{source.name} is not live: it was saved", code="not_live")
        if source not in self._streams:
            self._streams[source] = Stream(source, self.answer)
        stream = self._streams[source]

        async def lines() -> AsyncIterator[bytes]:
            async for event in stream.events():
                yield b": nothing new\n\n" if event is None else b"data: " + to_json(event) + b"\n\n"

        return StreamingResponse(lines(), 200, NOW, "text/event-stream")

    async def answer(self, work: Callable[[], Found]) -> Found:
        return await asyncio.get_running_loop().run_in_executor(self._answers, work)

    async def plan(self, work: Callable[[], Found]) -> Found:
        return await asyncio.get_running_loop().run_in_executor(self._plans, work)

    async def close(self) -> None:
        for stream in self._streams.values():
            await stream.close()
        for threads in (self._answers, self._plans):
            threads.shutdown(wait=False, cancel_futures=True)


def add_dashboard(app: FastAPI, dashboard: Dashboard) -> None:
    for path in ADDRESSES:
        _add_page(app, path)

    @app.get(f"{API}/sources", include_in_schema=False)
    async def sources() -> Response:
        every = [{"id": i, "name": s.name, "kind": s.kind} for i, s in enumerate(dashboard.sources)]
        return _json({"sources": every})

    @app.get(API + "/{source}/{path:path}", include_in_schema=False)
    async def get(source: str, path: str, request: Request) -> Response:
        found = dashboard.source(source)
        asked = f"{path}?{request.url.query}" if request.url.query else path
        if path == "live":
            return dashboard.live(found)
        if path == "whatif":
            return _json(await dashboard.plan(lambda: _whatif(found).choices()))
        if path == "save":
            return await _save(dashboard, found, request)
        body = await dashboard.answer(lambda: _asked(found, asked))
        headers = PAST if path.startswith("tiles/") and _is_past(found, path) else NOW
        return Response(body, 200, headers, "application/json")

    @app.post(API + "/{source}/whatif", include_in_schema=False)
    async def whatif(source: str, request: Request) -> Response:
        found, change = dashboard.source(source), _read_json(await request.body())
        return _json(await dashboard.plan(lambda: _whatif(found).ask(change)))


async def _save(dashboard: Dashboard, source: Source, request: Request) -> Response:
    asked = dict(request.query_params)
    text, view = asked.get("step", ""), asked.pop("view", "")
    at = f"#/{view}?{urlencode(asked)}" if view in VIEWS else ""

    def page() -> bytes:
        source.refresh(counts=True)
        return save_page(source, source.step_number(text) if text else None, at[:MOST_ADDRESS])

    name = f"{''.join(c if c.isalnum() or c in '-_.' else '-' for c in source.name)}-dashboard.html"
    headers = {**NOW, "Content-Disposition": f'attachment; filename="{name}"'}
    return Response(await dashboard.plan(page), 200, headers, "text/html; charset=utf-8")


def _asked(source: Source, path: str) -> bytes:
    source.refresh(counts=not path.startswith("tiles/"))
    return to_json(answer(source, path))


def _whatif(source: Source) -> WhatIf:
    try:
        return source.whatif
    except InvalidInput as error:
        raise ApiError(409, str(error), code="no_plan") from error


def _read_json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"the body is not JSON: {error}") from error


def _add_page(app: FastAPI, path: str) -> None:
    @app.get(path, include_in_schema=False)
    async def page() -> Response:
        file = ADDRESSES[path]
        return Response(file.read_bytes(), 200, HEADERS, TYPES[file.suffix])


def _is_past(source: Source, path: str) -> bool:
    _, level, index = path.split("/")
    return source.kind != "live" or (int(index) + 1) << int(level) <= source.shown.timeline.end


def _json(value: Any) -> Response:
    return Response(to_json(value), 200, NOW, "application/json")
