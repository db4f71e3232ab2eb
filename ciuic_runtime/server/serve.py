"""The server as a process: an address, signals, and an end at which nothing that was begun is lost.
Knows uvicorn; what is answered is the application's business."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.engine.llm import LLM
from ciuic_runtime.engine.service import EngineService
from ciuic_runtime.server.app import create_app
from ciuic_runtime.server.config import ServerConfig, check_bind

# The engine's thread is in kernels most of the time, and wants the interpreter back between them: whoever else has it
# (answers, the dashboard) is asked for it after so long. With Python's 5 ms an open dashboard cost 1.7 to 3 % of a
# small model's rate, with this 0.2 to 0.6 % (benchmarks/dashboard.py).
SWITCH_SECONDS = 1e-4
LAST_SECONDS = 5  # for connections that do not take the end of what they were sent


@contextmanager
def listening(config: ServerConfig) -> Iterator[socket.socket]:
    """The address is taken before a model is loaded for it; nobody is let in yet."""
    check_bind(config)
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    taken = socket.socket(family, socket.SOCK_STREAM)
    with taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind((config.host, config.port))
        except OSError as error:
            raise InvalidInput(
                f"{config.host} port {config.port} cannot be listened at ({error.strerror or error}); give another "
                "--port (0: any that is free) or --host"
            ) from error
        yield taken


def serve(llm: LLM, config: ServerConfig, address: socket.socket, ready: Callable[[str], None] | None = None) -> None:
    """Answers until a signal comes. The first one lets nothing new begin, the second one cancels what runs, which
    raises KeyboardInterrupt at the end. Where the model itself ends, so does this, with what it ended by. `ready` is
    called with the URL, once requests are taken."""
    service = EngineService(llm, max_waiting=config.max_waiting)
    sys.setswitchinterval(SWITCH_SECONDS)
    server = Server(service, config, ready or (lambda url: None))
    server.run(sockets=[address])
    if server.cancelled:
        raise KeyboardInterrupt
    if service.failure is not None:
        raise service.failure


class Server(uvicorn.Server):
    def __init__(self, service: EngineService, config: ServerConfig, ready: Callable[[str], None]) -> None:
        settings = uvicorn.Config(
            create_app(service, config), log_config=None, access_log=False, ws="none", proxy_headers=False,
            server_header=False, timeout_graceful_shutdown=LAST_SECONDS,
        )  # fmt: skip
        super().__init__(settings)
        self._service, self._host, self._ready = service, config.host, ready
        self._signals = 0
        service.on_failure = self._failed

    @property
    def cancelled(self) -> bool:
        return self._signals > 1

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started and sockets:
            host = f"[{self._host}]" if ":" in self._host else self._host
            url = f"http://{host}:{sockets[0].getsockname()[1]}"
            _say(f"ready at {url} (Ctrl-C: finish what runs, and end)")
            self._ready(url)

    def handle_exit(self, sig: int, frame: FrameType | None = None) -> None:
        """Of signals, or called from another thread."""
        self._signals += 1
        if not self.started or self._signals > 2:
            self.should_exit = self.force_exit = True
        else:
            self.loop.call_soon_threadsafe(self._finish if self._signals == 1 else self._cancel)

    def _finish(self) -> None:
        """Meanwhile clients that come are told so (503), and so is whoever asks after our health."""
        _say("finishing what runs; once more cancels it")
        self._finishing = self.loop.create_task(self._drained())

    async def _drained(self) -> None:
        await self._service.drain()
        self.should_exit = True

    def _failed(self) -> None:
        """In the engine's thread, which has ended."""
        _say(f"the model has ended: {self._service.failure}")
        self.should_exit = True  # seen within a tenth of a second

    def _cancel(self) -> None:
        self._cancelling = self.loop.create_task(asyncio.to_thread(self._service.close))
        self.should_exit = True


def _say(what: str) -> None:
    print(f"ciuic: {what}", file=sys.stderr, flush=True)
