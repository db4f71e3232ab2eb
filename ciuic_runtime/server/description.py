"""The OpenAPI description of what is served, so that it is true for this server: its model, its limits, its errors.
Knows shapes only; the routes are in `app.py`."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema
from starlette.responses import Response

from ciuic_runtime.server.answers import ChatAnswer, ChatChunk, CompletionAnswer
from ciuic_runtime.server.errors import ErrorAnswer
from ciuic_runtime.server.jobs import Served
from ciuic_runtime.server.protocol import ChatRequest, CompletionRequest, Fields

_REF = "#/components/schemas/{model}"


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorAnswer, "description": HTTPStatus(status).phrase} for status in statuses}


def _generation(request: type[Fields], answer: Any, streamed: str) -> dict[str, Any]:
    """What a route takes and gives, for FastAPI; bodies are read by ourselves."""
    body = {"application/json": {"schema": {"$ref": _REF.format(model=request.__name__)}}}
    data = {"type": "string", "description": f"a {streamed} as JSON; at the end [DONE]"}
    events = {"schema": {"type": "object", "properties": {"data": data}, "required": ["data"]}}
    return {
        "response_class": Response,
        "responses": {
            200: {"model": answer, "description": "the answer", "content": {"text/event-stream": events}},
            **errors(400, 401, 403, 404, 413, 415, 429, 500, 503),
        },
        "openapi_extra": {"requestBody": {"required": True, "content": body}},
    }


CHAT = _generation(ChatRequest, ChatAnswer, ChatChunk.__name__)
COMPLETION = _generation(CompletionRequest, CompletionAnswer, CompletionAnswer.__name__)


def describe(app: FastAPI, served: Served) -> None:
    described: dict[str, Any] = {}

    def openapi() -> dict[str, Any]:
        if not described:
            described.update(_described(app, served))
        return described

    app.openapi = openapi  # type: ignore[method-assign]


def _described(app: FastAPI, served: Served) -> dict[str, Any]:
    found = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
    schemas = found["components"]["schemas"]
    requests: list[tuple[type[Fields], Any]] = [(ChatRequest, "validation"), (CompletionRequest, "validation")]
    schemas |= models_json_schema(requests, ref_template=_REF)[1]["$defs"]
    for name in (ChatRequest.__name__, CompletionRequest.__name__):
        fields = schemas[name]["properties"]
        fields["model"]["enum"] = [served.name]
        fields["n"]["anyOf"][0]["maximum"] = served.config.max_choices
        for limit in fields.keys() & {"max_tokens", "max_completion_tokens"}:
            fields[limit]["anyOf"][0]["maximum"] = served.llm.context - 1
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    for operations in found["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
    if served.config.api_keys:
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, operations in found["paths"].items():
            for operation in operations.values():
                operation["security"] = [] if path == "/health" else [{"key": []}]
    return found
