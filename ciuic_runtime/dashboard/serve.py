"""The dashboard of saved files as a server of its own: no model, no engine.
Knows the same guards and errors as `ciuic serve`."""

from __future__ import annotations

import socket
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI

from ciuic_runtime.dashboard.routes import Dashboard, add_dashboard
from ciuic_runtime.dashboard.source import Source
from ciuic_runtime.server.config import ServerConfig
from ciuic_runtime.server.errors import handle_errors
from ciuic_runtime.server.guards import Guards


def create_app(sources: Sequence[Source], config: ServerConfig) -> FastAPI:
    dashboard = Dashboard(sources)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await dashboard.close()

    app = FastAPI(
        title="ciuic dashboard", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False,
        lifespan=lifespan,
    )  # fmt: skip
    app.add_middleware(Guards, config=config)
    handle_errors(app)
    add_dashboard(app, dashboard)
    return app


class DashboardServer(uvicorn.Server):
    """Says its address when it is ready; a signal ends it."""

    def __init__(self, sources: Sequence[Source], config: ServerConfig, ready: Callable[[str], None]) -> None:
        settings = uvicorn.Config(
            create_app(sources, config), log_config=None, access_log=False, ws="none", proxy_headers=False,
            server_header=False, timeout_graceful_shutdown=1,
        )  # fmt: skip
        super().__init__(settings)
        self._host, self._ready = config.host, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and sockets:
            host = f"[{self._host}]" if ":" in self._host else self._host
            url = f"http://{host}:{sockets[0].getsockname()[1]}/dashboard"
            print(f"ciuic: dashboard at {url} (Ctrl-C ends it)", file=sys.stderr, flush=True)
            self._ready(url)


def serve_dashboard(
    sources: Sequence[Source], config: ServerConfig, address: socket.socket, ready: Callable[[str], None]
) -> None:
    DashboardServer(sources, config, ready).run(sockets=[address])
