"""A Ray cluster of this machine alone, for as long as one job needs it; nothing of it is left afterwards.
Knows how Ray is started and ended here, and ends what it started only."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from ciuic_runtime.cluster.submit import answers
from ciuic_runtime.devices.errors import CiuicError
from ciuic_runtime.devices.ray_session import OBJECT_STORE_BYTES, has_token, import_ray

START_SECONDS = 60.0
END_SECONDS = 3.0


@contextmanager
def local_cluster() -> Iterator[str]:
    """The URL of its dashboard, which listens on this machine alone. A token is asked for: the user's, else one that is
    in a file for as long, `RAY_AUTH_TOKEN_PATH`."""
    import_ray()
    gcs, dashboard, agent, client = _free_ports(4)
    folder = Path(tempfile.mkdtemp(prefix="ciuic-ray-"))  # for this user's eyes
    if not has_token():
        token = folder / "token"
        token.write_text(secrets.token_hex(32))
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--node-ip-address=127.0.0.1",
        f"--port={gcs}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}", f"--temp-dir={folder}",
        f"--object-store-memory={OBJECT_STORE_BYTES}", "--disable-usage-stats",
        "--include-log-monitor=false",
    ]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")}
    output = folder / "start.log"
    with open(output, "wb") as log:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True,  # so that Ctrl-C is for us, who stop the job first
        )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{dashboard}"
        _wait_for(url, process, output)
        yield url
    finally:
        _end(process)
        shutil.rmtree(folder, ignore_errors=True)
        if os.environ.get("RAY_AUTH_TOKEN_PATH") == str(folder / "token"):
            del os.environ["RAY_AUTH_TOKEN_PATH"]


def _wait_for(url: str, process: subprocess.Popen[bytes], output: Path) -> None:
    limit = time.monotonic() + START_SECONDS
    while not answers(url):
        if process.poll() is not None or time.monotonic() > limit:
            said = output.read_text(errors="replace").strip().splitlines()
            what = f"ended with {process.returncode}" if process.returncode is not None else "is not up in a minute"
            raise CiuicError(f"a Ray cluster on this machine {what}: {' / '.join(said[-3:]) or 'no word of why'}")
        time.sleep(0.1)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends it and everything that it started, and waits for that."""
    try:
        parent = psutil.Process(process.pid)
        started = [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        started = []
    for signal in ("terminate", "kill"):
        for one in started:
            with suppress(psutil.NoSuchProcess):
                getattr(one, signal)()
        _, started = psutil.wait_procs(started, END_SECONDS)
    process.wait()


def _free_ports(count: int) -> list[int]:
    """That are free now, all different."""
    with ExitStack() as stack:
        taken = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in taken:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in taken]
