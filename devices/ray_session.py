"""Joining a Ray cluster, or starting one on this machine, with its token asked for everywhere.
Knows Ray's settings; what runs there is for others. Nothing of Ray is imported before this asks for it."""

from __future__ import annotations

import logging
import os
import secrets
from typing import Any

from ciuic_runtime.devices.errors import CiuicError, InvalidInput

OBJECT_STORE_BYTES = 100 << 20  # residual streams are small, and weights never go through it


def import_ray() -> Any:
    """Ray, told to ask for a token (its services listen on all interfaces). Raises InvalidInput where it is missing."""
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # of calls that were given up
    os.environ.setdefault("RAY_worker_niceness", "0")  # else everything else on a machine goes first
    try:
        import ray
    except ImportError as error:
        raise InvalidInput(
            f"clusters need Ray, which is not here ({error}); pip install 'ciuic_runtime[cluster]'"
        ) from error
    return ray


def join(address: str | None, insecure: bool = False) -> Any:
    """Ray, joined to the cluster at `address` (None: one of this machine's own). Raises CiuicError where there is none,
    InvalidInput where a cluster of elsewhere would be joined without a token."""
    ray = import_ray()
    if ray.is_initialized():
        return ray
    known = has_token()
    if address is not None and not known:
        if not insecure:
            raise InvalidInput(
                f"the cluster at {address} would be joined without a token, so that anybody could; make one with `ray "
                "get-auth-token --generate` on its head, copy it to every node, or give --insecure"
            )
        os.environ["RAY_AUTH_MODE"] = "disabled"
    if address is None and not known:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    if address is None:
        options |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    try:
        ray.init(address=address or "local", namespace="ciuic", **options)
    except Exception as error:
        where = f"the cluster at {address}" if address else "a Ray cluster on this machine"
        raise CiuicError(f"{where} could not be reached: {error}; is it running, and is the token its own?") from error
    return ray


def has_token() -> bool:
    """Whether this process knows a token: in its environment, or in the file where Ray keeps it."""
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = named or os.path.expanduser("~/.ray/auth_token")
    return bool(os.environ.get("RAY_AUTH_TOKEN")) or os.path.exists(path)
