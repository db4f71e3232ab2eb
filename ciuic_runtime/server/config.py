"""Where a server listens, whom it answers and how much it takes, checked as it is given.
Knows no model and no HTTP."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from ciuic_runtime.devices.errors import InvalidInput


@dataclass(frozen=True, slots=True)
class ServerConfig:
    host: str = "127.0.0.1"
    port: int = 8000  # 0: any that is free
    model_name: str | None = None  # None: the checkpoint's folder or file
    api_keys: tuple[str, ...] = ()  # any of them opens; none: everybody may come in
    insecure: bool = False  # listens beyond this machine without a key
    max_body_bytes: int = 8 << 20
    max_waiting: int = 256  # requests that wait for their turn
    max_choices: int = 16  # n
    max_seconds: float | None = None  # of a request: not begun by then, it is refused; begun, it ends as it is

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise InvalidInput(f"port {self.port} is not one; give 0 to 65535 (0: any that is free)")
        for name in ("max_body_bytes", "max_waiting", "max_choices"):
            if getattr(self, name) < 1:
                raise InvalidInput(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise InvalidInput(f"max_seconds is {self.max_seconds}; it must be above 0, or left out for no limit")
        for key in self.api_keys:
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise InvalidInput("an API key is empty or has blanks or characters that no header can hold; use ASCII")

    @property
    def loopback(self) -> bool:
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect there; a name other than localhost may mean anything."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_bind(config: ServerConfig) -> None:
    """Raises InvalidInput where others could use the machine without a key and nobody said that they may."""
    if not (config.loopback or config.api_keys or config.insecure):
        raise InvalidInput(
            f"--host {config.host} can be reached from other machines, and no key is asked for; give --api-key (or "
            "CIUIC_API_KEY), or --insecure if everybody who can connect may use it"
        )


def default_name(path: str | Path) -> str:
    """What clients call a model whose name nobody gave: its folder, or its file without the ending."""
    path = Path(path).resolve()
    return path.stem if path.is_file() else path.name
