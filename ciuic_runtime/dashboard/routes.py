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

from ciuic_runtime.dashboard.answers import COUNTED, answer
from ciuic_runtime.dashboard.live import KEPT, LiveSource, Stream
from ciuic_runtime.dashboard.pages import ADDRESSES, HEADERS, TYPES, VIEWS
from ciuic_runtime.dashboard.save import save_page
from ciuic_runtime.dashboard.source import Source, whole_number
from ciuic_runtime.dashboard.whatif import WhatIf
from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.schedulers.chrome import recording_text
from ciuic_runtime.server.errors import ApiError, check_json, to_json

API = "/dashboard/api"
NOW = {"Cache-Control": "no-store"}
MOST_ADDRESS = 4096  # characters of the page's address that a saved page keeps

Found = TypeVar("Found")


class Dashboard:
    """Sources, and the threads in which they are asked."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = list(sources)
        self._streams: dict[Source, Stream] = {}
        self._unseen: dict[LiveSource, asyncio.TimerHandle] = {}
        self._answers = ThreadPoolExecutor(1, "ciuic-dashboard")
        self._plans = ThreadPoolExecutor(1, "ciuic-whatif")

    def source(self, id: str) -> Source:
        number = whole_number(id)
        if number is None or number >= len(self.sources):
            says = f"there is no source {id[:40]}; there are 0 to {len(self.sources) - 1}"
            raise ApiError(404, says, code="not_found")
        found = self.sources[number]
        if isinstance(found, LiveSource):
            found.seen()
            if found not in self._unseen:
                self._watch(found, KEPT)
        return found

    def _watch(self, source: LiveSource, seconds: float) -> None:
        self._unseen[source] = asyncio.get_running_loop().call_later(seconds, self._look_after, source)

    def _look_after(self, source: LiveSource) -> None:
        """Has it forget what nobody has looked at for a while."""
        if (left := KEPT - source.unseen_s) > 0:
            self._watch(source, left)
        else:
            del self._unseen[source]
            self._answers.submit(source.forget)

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
        """What is being worked out is waited for: nobody looks at an engine after this."""
        for timer in self._unseen.values():
            timer.cancel()
        for stream in self._streams.values():
            await stream.close()
        for threads in (self._answers, self._plans):
            await asyncio.to_thread(threads.shutdown, cancel_futures=True)


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
        if path == "trace":
            return _download(found, "trace.json", await dashboard.plan(lambda: _trace(found)), "application/json")
        body = await dashboard.answer(lambda: _asked(found, asked))
        return Response(body, 200, NOW, "application/json")

    @app.post(API + "/{source}/whatif", include_in_schema=False)
    async def whatif(source: str, request: Request) -> Response:
        check_json(request)
        found, change = dashboard.source(source), _read_json(await request.body())
        return _json(await dashboard.plan(lambda: _whatif(found).ask(change)))


async def _save(dashboard: Dashboard, source: Source, request: Request) -> Response:
    asked = dict(request.query_params)
    text, view = asked.get("step", ""), asked.pop("view", "")
    at = f"#/{view}?{urlencode(asked)}" if view in VIEWS else ""

    def page() -> bytes:
        source.refresh(counts=True)
        return save_page(source, source.step_number(text) if text else None, at[:MOST_ADDRESS])

    return _download(source, "dashboard.html", await dashboard.plan(page), "text/html; charset=utf-8")


def _trace(source: Source) -> bytes:
    """The whole recording, as `write_recording` writes it."""
    recording = source.whole()
    if not recording.steps:
        raise ApiError(
            409, f"{source.name} has no passes to trace; of a plan, `ciuic plan MODEL --trace FILE` writes what it is "
            "forecast to do", code="no_trace",
        )  # fmt: skip
    return recording_text(recording).encode()


def _download(source: Source, what: str, content: bytes, kind: str) -> Response:
    name = "".join(c if (c.isascii() and c.isalnum()) or c in "-_." else "-" for c in source.name)
    headers = {**NOW, "Content-Disposition": f'attachment; filename="{name}-{what}"'}
    return Response(content, 200, headers, kind)


def _asked(source: Source, path: str) -> bytes:
    source.refresh(counts=path.partition("?")[0] in COUNTED)
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


def _json(value: Any) -> Response:
    return Response(to_json(value), 200, NOW, "application/json")
