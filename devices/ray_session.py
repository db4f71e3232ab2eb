"""Joining a Ray cluster, or starting one on this machine, with its token asked for everywhere.
Knows Ray's settings; what runs there is for others. Nothing of Ray is imported before this asks for it."""

from __future__ import annotations

import logging
import os
import secrets
import socket
from typing import Any

from ciuic_runtime.devices.errors import CiuicError, InvalidInput

ANSWER_SECONDS = 10.0
ALLOW = "give --insecure (ciuic serve: --join-insecure, Python: insecure=True)"
OBJECT_STORE_BYTES = 100 << 20  # residual streams are small, and weights never go through it


def import_ray(insecure: bool = False) -> Any:
    """Ray, told to ask for a token (its services listen on all interfaces), as it reads when it is imported first;
    `insecure`: only if this process knows one. Raises InvalidInput where it is missing."""
    os.environ["RAY_AUTH_MODE"] = "disabled" if insecure and not has_token() else "token"
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
    """Ray, joined to the cluster at `address` (None: what this process has joined, else one of this machine's own).
    Raises CiuicError where there is none, InvalidInput where there is no token, the cluster asks for none, or this
    process has joined another one."""
    ray = import_ray(insecure and address is not None)
    known, joined = has_token(), ray.is_initialized()
    if joined and address is None:
        return ray
    if address is not None and not known and not insecure:
        raise InvalidInput(
            f"the cluster at {address} would be joined without a token, so that anybody could; make one with `ray "
            f"get-auth-token --generate` on its head, copy it to every node, or {ALLOW}"
        )
    if not joined:
        _begin(ray, address, known)
    gcs = ray.get_runtime_context().gcs_address
    if joined and address is not None and not _same_place(address, gcs):
        raise InvalidInput(
            f"this process has joined the cluster at {gcs}, and {address} was asked for; leave it with ray.shutdown() "
            "first, or use another process"
        )
    if address is not None and not insecure and not asks_for_token(gcs):
        if not joined:
            ray.shutdown()
        raise InvalidInput(
            f"the cluster at {gcs} asks for no token, so that anybody can use it; start it with RAY_AUTH_MODE=token on "
            f"every node, or {ALLOW}"
        )
    return ray


def _begin(ray: Any, address: str | None, known: bool) -> None:
    """`known`: a token is."""
    if address is None and not known:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    _say_on_stderr(ray)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    if address is None:
        options |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    try:
        ray.init(address=address or "local", namespace="ciuic", **options)
    except Exception as error:
        where = f"the cluster at {address}" if address else "a Ray cluster on this machine"
        raise CiuicError(f"{where} could not be reached: {error}; is it running, and is the token its own?") from error


def _same_place(address: str, gcs: str) -> bool:
    """Whether HOST:PORT is the head at `gcs`: under another name, or, on its own machine, as localhost. "auto" is
    whatever runs here."""
    if address == "auto":
        return True
    import psutil  # type: ignore[import-untyped]

    (host, _, port), (head, _, at) = address.rpartition(":"), gcs.rpartition(":")
    if port != at:
        return False
    asked, there = _ip_addresses(host), _ip_addresses(head)
    if any(ip.startswith("127.") or ip == "::1" for ip in asked):
        asked |= {one.address for found in psutil.net_if_addrs().values() for one in found}
    return bool(asked & there)


def _ip_addresses(host: str) -> set[str]:
    try:
        return {str(found[4][0]) for found in socket.getaddrinfo(host.strip("[]"), None)}
    except OSError:
        return {host}


def _say_on_stderr(ray: Any) -> None:
    """What Ray says of the cluster, such as that a worker died, it prints on stdout, where results belong; there is no
    setting for it."""
    worker = ray._private.worker
    printed = worker.print_to_stdstream
    if getattr(printed, "on_stderr", False):
        return

    def on_stderr(data: dict[str, Any], ignore_prefix: bool) -> None:
        printed({**data, "is_err": True}, ignore_prefix)

    on_stderr.on_stderr = True  # type: ignore[attr-defined]
    worker.print_to_stdstream = on_stderr


def dashboard_address(ray: Any) -> str | None:
    """Of the cluster's own dashboard, as its head knows it; None: it has none, or nothing is joined any more."""
    found = ray._private.worker.get_dashboard_url() if ray.is_initialized() else None
    return f"http://{found}" if found else None


def asks_for_token(gcs: str) -> bool:
    """Whether the head that listens at this address lets nobody in without one: it is asked a question without."""
    import grpc

    with grpc.insecure_channel(gcs, options=(("grpc.enable_http_proxy", 0),)) as channel:
        try:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")(b"", timeout=ANSWER_SECONDS)
        except grpc.RpcError as error:
            code = error.code()
            if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
                return True
            if code is not grpc.StatusCode.UNIMPLEMENTED:  # then it heard us out
                raise CiuicError(
                    f"whether the cluster at {gcs} asks for a token could not be found out: {code.name}, "
                    f"{error.details()}; try again, or {ALLOW}"
                ) from error
    return False


def has_token() -> bool:
    """Whether this process knows a token: in its environment, or in the file where Ray keeps it."""
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = named or os.path.expanduser("~/.ray/auth_token")
    return bool(os.environ.get("RAY_AUTH_TOKEN")) or os.path.exists(path)
