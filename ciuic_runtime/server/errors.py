"""What goes wrong, in the shape that clients of OpenAI's API read.
Knows which status an exception of ours means; texts of exceptions that are mistakes of ours stay in the log."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from typing_extensions import TypedDict

from ciuic_runtime.devices.errors import CiuicError, InvalidInput
from ciuic_runtime.engine.service import QueueFull, ShuttingDown

log = logging.getLogger("ciuic")

RETRY_SECONDS = 1  # what a client is told to wait when the queue is full

_TYPES = {403: "permission_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}


class ApiError(CiuicError):
    """`code` is for programs, `param` names the field of the request that is wrong."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.code, self.param, self.headers = status, code, param, dict(headers or {})

    @property
    def body(self) -> ErrorAnswer:
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> Response:
        return Response(to_json(self.body), self.status, self.headers, "application/json")


class ErrorDetail(TypedDict):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(TypedDict):
    error: ErrorDetail


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, code=code, param=param)


def as_api_error(error: Exception) -> ApiError:
    """What a client is told. A mistake of ours goes to the log, with its traceback."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return ApiError(429, str(error), code="queue_full", headers={"Retry-After": str(RETRY_SECONDS)})
    if isinstance(error, ShuttingDown):
        return ApiError(503, str(error), code="shutting_down")
    if isinstance(error, InvalidInput):
        return invalid(str(error))
    log.error("a mistake of ours while answering a request: %r", error, exc_info=error)
    return ApiError(500, "the server made a mistake; its log says which", code="internal_error")


def check_json(request: Request) -> None:
    """That the body is declared as JSON: a page of another site cannot declare that without asking first."""
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, f"the body is declared as {kind or 'nothing'!r}; send Content-Type: application/json")


def to_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def handle_errors(app: FastAPI) -> None:
    """Whatever leaves a route, and what has no route, in the one shape."""

    async def raised(request: Request, error: Exception) -> Response:
        return as_api_error(error).response

    async def no_route(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException), error
        status, path = error.status_code, request.url.path
        says = {
            404: f"there is nothing at {path}; /openapi.json lists what there is",
            405: f"{request.method} is not for {path}; it takes {(error.headers or {}).get('Allow', 'others')}",
        }.get(status, str(error.detail))
        code = "not_found" if status == 404 else None
        return ApiError(status, says, code=code, headers=error.headers).response

    app.add_exception_handler(HTTPException, no_route)
    app.add_exception_handler(CiuicError, raised)
    app.add_exception_handler(Exception, raised)
