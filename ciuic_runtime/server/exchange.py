"""One request of a client from its body to the last byte of its answer, whole or as a stream of events.
Knows HTTP and when the client goes away; what the answer says is the job's business."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing, suppress
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ciuic_runtime.engine.request import Update
from ciuic_runtime.engine.service import EngineService
from ciuic_runtime.server.errors import ApiError, as_api_error, to_json
from ciuic_runtime.server.group import Group
from ciuic_runtime.server.jobs import Job
from ciuic_runtime.server.metrics import Metrics

CLIENT_GONE = 499  # what nginx notes where nobody is left to be answered
STALL_SECONDS = 60.0  # a client that takes nothing of its stream for so long is left
SSE_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}


class ClientGone(Exception):
    """There is nobody to answer."""


class Exchange(Response):
    """A response that is made while it is sent: it reads the body, has it prepared, and follows the engine's updates.

    `prepare` turns the body into a job, in a thread of its own, since templates and tokenizers may take their time."""

    def __init__(
        self, service: EngineService, metrics: Metrics, endpoint: str, request: Request,
        prepare: Callable[[bytes], Job], seconds: float | None,
    ) -> None:  # fmt: skip
        super().__init__()
        self._service, self._metrics, self._endpoint, self._prepare = service, metrics, endpoint, prepare
        self._client, self._seconds = client_of(request), seconds
        self._begun = time.perf_counter()
        self._status, self._reason, self._started = CLIENT_GONE, None, False  # type: int, str | None, bool

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._metrics.request_began(self._endpoint)
        try:
            body = await read_body(receive)
            await unless_gone(receive, self._answer(body, send))
        except ClientGone:
            self._status = CLIENT_GONE
        except Exception as error:
            await self._fail(as_api_error(error), scope, receive, send)
        finally:
            self._metrics.request_ended(self._endpoint, self._status, self._reason)

    async def _fail(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        """A stream that has begun tells it as an event, and ends without the mark of one that is whole."""
        if not self._started:
            self._status = error.status
            await error.response(scope, receive, send)
        else:
            self._reason = "error"
            with suppress(ClientGone):
                await self._write(send, event(error.body), more=False)

    async def _answer(self, body: bytes, send: Send) -> None:
        job = await asyncio.to_thread(self._prepare, body)
        client = f"user {job.asked.user}" if job.asked.user else self._client
        answer = self._stream if job.asked.stream else self._whole
        with Group(self._service, job.wanted, client, self._seconds) as group:
            async with aclosing(self._observed(group)) as updates:
                await answer(job, group, updates, send)

    async def _whole(self, job: Job, group: Group, updates: AsyncGenerator[tuple[int, Update]], send: Send) -> None:
        async for index, update in updates:
            job.choices[index].take(update)
        await self._start(send, {"content-type": "application/json"})
        await self._write(send, to_json(job.whole(group.requests)), more=False)

    async def _stream(self, job: Job, group: Group, updates: AsyncGenerator[tuple[int, Update]], send: Send) -> None:
        """Begins with the first update, so that what goes wrong before has its own status."""
        async for index, update in updates:
            chunk = job.choices[index].take(update)
            if not self._started:
                await self._start(send, SSE_HEADERS)
            if chunk is not None:
                await self._write(send, event(job.chunk(chunk)))
        if job.asked.include_usage:
            await self._write(send, event(job.usage_chunk(group.requests)))
        await self._write(send, b"data: [DONE]\n\n", more=False)

    async def _observed(self, group: Group) -> AsyncGenerator[tuple[int, Update]]:
        last: dict[int, float] = {}
        async with aclosing(group.updates()) as updates:
            async for index, update in updates:
                if update.token_ids:
                    now = time.perf_counter()
                    if not last:
                        self._metrics.first_token(now - self._begun)
                    elif index in last:
                        self._metrics.token(now - last[index])
                    last[index] = now
                self._reason = update.finish_reason or self._reason
                yield index, update

    async def _start(self, send: Send, headers: dict[str, str]) -> None:
        self._started, self._status = True, 200
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": raw})

    async def _write(self, send: Send, data: bytes, more: bool = True) -> None:
        """Waits while the client does not read, so that what it has not read does not pile up here."""
        try:
            async with asyncio.timeout(STALL_SECONDS):
                await send({"type": "http.response.body", "body": data, "more_body": more})
        except TimeoutError:
            raise ClientGone from None


def event(value: Any) -> bytes:
    return b"data: " + to_json(value) + b"\n\n"


def client_of(request: Request) -> str:
    """Among whom turns are fair: the key's owner, else whoever has this address."""
    return str(request.scope.get("ciuic.key") or f"at {request.client.host if request.client else '?'}")


async def read_body(receive: Receive) -> bytes:
    parts = []
    while (message := await receive())["type"] == "http.request":
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)
    raise ClientGone


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Does the work; it is cancelled when the client goes away, which raises ClientGone."""
    working, gone = asyncio.create_task(work), asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        working.result()
    finally:
        working.cancel()
        gone.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
