"""The application: which path does what.
Knows routes; what they do is in the files beside it."""

from __future__ import annotations

import asyncio
import importlib.resources
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from ciuic_runtime.dashboard.live import LiveSource
from ciuic_runtime.dashboard.routes import Dashboard, add_dashboard
from ciuic_runtime.engine.service import EngineService, ShuttingDown
from ciuic_runtime.server.answers import Health, ModelAnswer, ModelsAnswer
from ciuic_runtime.server.chat import chat_job
from ciuic_runtime.server.completions import completion_job
from ciuic_runtime.server.config import ServerConfig, default_name
from ciuic_runtime.server.description import CHAT, COMPLETION, describe, errors
from ciuic_runtime.server.errors import check_json, handle_errors
from ciuic_runtime.server.exchange import Exchange
from ciuic_runtime.server.guards import Guards
from ciuic_runtime.server.jobs import Job, Served
from ciuic_runtime.server.metrics import Metrics
from ciuic_runtime.server.tokens import TokenTexts

PAGE = {
    "/": ("index.html", "text/html"),
    "/chat.js": ("chat.js", "text/javascript"),
    "/chat.css": ("chat.css", "text/css"),
    "/chat.svg": ("chat.svg", "image/svg+xml"),
}
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def create_app(service: EngineService, config: ServerConfig) -> FastAPI:
    """Starts the service when it starts, and closes it when it ends."""
    name = config.model_name or default_name(service.llm.model.source)
    served = Served(service.llm, config, name, TokenTexts(service.llm.tokenizer))
    metrics = Metrics(service)

    dashboard = Dashboard([LiveSource(service)])

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
            await dashboard.close()
        finally:
            await asyncio.to_thread(service.close)

    app = FastAPI(
        title="ciuic_runtime", docs_url=None, redoc_url=None, redirect_slashes=False, lifespan=lifespan,
        summary="One engine for many users, as OpenAI's API has it",
    )  # fmt: skip
    app.add_middleware(Guards, config=config)
    handle_errors(app)
    _add_generation(app, service, served, metrics)
    _add_models(app, served)
    _add_watching(app, service, metrics)
    _add_page(app)
    add_dashboard(app, dashboard)
    describe(app, served)
    return app


def _add_generation(app: FastAPI, service: EngineService, served: Served, metrics: Metrics) -> None:
    def exchange(endpoint: str, request: Request, job: Callable[[Served, bytes], Job]) -> Exchange:
        check_json(request)
        seconds = served.config.max_seconds
        return Exchange(service, metrics, endpoint, request, lambda body: job(served, body), seconds)

    @app.post("/v1/chat/completions", **CHAT)
    async def chat_completions(request: Request) -> Response:
        """Answers a conversation, through the model's chat template."""
        return exchange("chat.completions", request, chat_job)

    @app.post("/v1/completions", **COMPLETION)
    async def completions(request: Request) -> Response:
        """Continues texts or token ids as they are."""
        return exchange("completions", request, completion_job)


def _add_models(app: FastAPI, served: Served) -> None:
    model: ModelAnswer = {
        "id": served.name, "object": "model", "created": served.created, "owned_by": "ciuic_runtime",
        "max_model_len": served.llm.context,
    }  # fmt: skip

    @app.get("/v1/models", responses=errors(401))
    async def models() -> ModelsAnswer:
        """The models that are served: one."""
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{id:path}", responses=errors(401, 404))
    async def model_of(id: str) -> ModelAnswer:
        served.check_name(id)
        return model


def _add_watching(app: FastAPI, service: EngineService, metrics: Metrics) -> None:
    @app.get("/health", responses=errors(503))
    async def health() -> Health:
        """Whether new requests are taken."""
        if service.failure is not None:
            raise ShuttingDown(f"the model has ended: {service.failure}; the server is shutting down")
        if service.draining:
            raise ShuttingDown("the server is shutting down; what it was asked before is still being finished")
        return {"status": "ok"}

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}, **errors(401)})
    async def prometheus() -> Response:
        """Figures of the engine and of its clients' requests, in Prometheus's text form."""
        return Response(metrics.render(), headers={"content-type": metrics.content_type})


def _add_page(app: FastAPI) -> None:
    folder = importlib.resources.files("ciuic_runtime.server") / "page"

    def add(path: str, content: bytes, kind: str) -> None:
        @app.get(path, include_in_schema=False)
        async def page() -> Response:
            return Response(content, 200, PAGE_HEADERS, kind)

    for path, (name, kind) in PAGE.items():
        add(path, (folder / name).read_bytes(), kind)
