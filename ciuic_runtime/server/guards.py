"""Who may come in, and with how much: the key, the name that the client called us by, the size of a body.
Knows headers and bytes; it stands before everything else, so that a refused request costs nothing."""

from __future__ import annotations

import hashlib
import hmac

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ciuic_runtime.dashboard.pages import ADDRESSES
from ciuic_runtime.server.config import ServerConfig
from ciuic_runtime.server.errors import ApiError

# Everything else asks for a key.
OPEN = frozenset({"/", "/chat.js", "/chat.css", "/chat.svg", "/health", "/openapi.json", *ADDRESSES})
LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})


class Guards:
    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self.app, self.config = app, config
        self._digests = [_digest(key.encode()) for key in config.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self._check_host(scope)
            self._check_key(scope)
            self._check_length(scope)
        except ApiError as error:
            await error.response(scope, receive, send)
        else:
            await self.app(scope, self._bounded(receive), send)

    def _check_host(self, scope: Scope) -> None:
        """A page of elsewhere can make its name mean this machine (DNS rebinding); the header has that name."""
        if not self.config.loopback:
            return
        names = [_without_port(host) for host in _headers(scope, b"host")]
        if len(names) != 1 or names[0] not in LOCAL_NAMES | {self.config.host}:
            raise ApiError(
                403, f"this server is for its own machine and was called {', '.join(names) or 'nothing'!r}; call it "
                "localhost or 127.0.0.1, or have it listen at another --host", code="host_not_allowed",
            )  # fmt: skip

    def _check_key(self, scope: Scope) -> None:
        if not self._digests or scope["path"] in OPEN:
            return
        given = _headers(scope, b"authorization")
        scheme, _, key = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        digest = _digest(key.strip())
        same = [hmac.compare_digest(digest, known) for known in self._digests]  # all of them, in constant time
        if scheme.lower() != b"bearer" or not any(same):
            says = "the API key is not one of this server's" if given else "this server asks for an API key"
            raise ApiError(
                401, f"{says}; send the header Authorization: Bearer KEY", code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip
        scope["ciuic.key"] = f"key {same.index(True)}"

    def _check_length(self, scope: Scope) -> None:
        for length in _headers(scope, b"content-length"):
            if length.isdigit() and int(length[:20]) > self.config.max_body_bytes:
                raise self._too_large()

    def _bounded(self, receive: Receive) -> Receive:
        """Counts what comes, since a length may be missing."""
        left = self.config.max_body_bytes

        async def counted() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise self._too_large()
            return message

        return counted

    def _too_large(self) -> ApiError:
        return ApiError(
            413, f"the body is larger than {self.config.max_body_bytes} bytes, the most that is read (--max-body); "
            "send less at a time", code="body_too_large", headers={"Connection": "close"},
        )  # fmt: skip


def _headers(scope: Scope, name: bytes) -> list[bytes]:
    return [value for key, value in scope["headers"] if key == name]


def _digest(key: bytes) -> bytes:
    """Of one length whatever was given, so that comparing says nothing about the key's."""
    return hashlib.sha256(key).digest()


def _without_port(host: bytes) -> str:
    name, colon, port = host.decode("latin-1").lower().rpartition(":")
    return name if colon and port.isdigit() else host.decode("latin-1").lower()
