"""One engine for many users over HTTP, as OpenAI's API has it."""

from __future__ import annotations

from ciuic_runtime.server.config import ServerConfig, check_bind

__all__ = ["ServerConfig", "check_bind"]
