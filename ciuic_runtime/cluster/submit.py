"""Jobs on a cluster through Ray's job submission: submitted, listed, followed, stopped.
Knows what Ray tells of a job and what its driver says at its end; what a job does is in `run_job.py`."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import logging
import os
import re
import secrets
import shlex
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ciuic_runtime.cluster.asking import JOB_ID
from ciuic_runtime.devices.errors import CiuicError, InvalidInput
from ciuic_runtime.devices.ray_session import has_token, import_ray

if TYPE_CHECKING:
    from ciuic_runtime.cluster.job import Job

JOB = "CIUIC_JOB"  # environment variable of a driver: {"file": where the job file was, "text": what it said}
RESULT = "ciuic-result: "  # begins the line that a driver says at its end
FINAL = ("SUCCEEDED", "FAILED", "STOPPED")
ANSWER_SECONDS = 5.0  # for a connection
STOP_SECONDS = 20.0
LARGEST_JOB = 100_000  # bytes: what one environment variable may hold


class JobFailed(CiuicError):
    """Its exit code is the driver's."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit_code = code


class JobStopped(CiuicError):
    exit_code = 130


@dataclass(frozen=True, slots=True)
class JobState:
    """What Ray knows of a job."""

    id: str
    name: str
    kind: str
    status: str  # PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED
    exit_code: int | None  # of the driver; None: it runs, or was stopped
    started: float | None  # s since 1970
    seconds: float | None  # so far
    message: str = ""

    @property
    def ended(self) -> bool:
        return self.status in FINAL


class Jobs:
    """Those of one cluster."""

    def __init__(self, address: str | None, insecure: bool = False) -> None:
        """`address`: HOST:PORT of the cluster, or the URL of its dashboard; None: the one that runs on this machine.
        Raises InvalidInput for one that would be joined without a token, CiuicError where there is none."""
        import_ray(insecure)
        if not has_token() and not insecure:
            raise InvalidInput(
                "jobs would be sent without a token, so that anybody could; copy the token from the cluster's head "
                "(~/.ray/auth_token, or RAY_AUTH_TOKEN), or give --insecure"
            )
        from ray.job_submission import JobSubmissionClient

        logging.getLogger(JobSubmissionClient.__module__).setLevel(logging.WARNING)  # it tells of every connection
        self.url, self._insecure = _dashboard(address), insecure
        if not insecure and _asked(self.url) == 200:
            raise InvalidInput(
                f"the cluster at {self.url} takes jobs from anybody, without a token; start it with "
                "RAY_AUTH_MODE=token on every node, or give --insecure"
            )
        given = address is not None and "://" not in address and self.url != f"http://{address}"
        self._gcs = address if given else None
        os.environ["RAY_API_SERVER_ADDRESS"] = self.url  # Ray prefers its variables to what it is given
        try:
            self._client = JobSubmissionClient(self.url)
        except Exception as error:
            raise CiuicError(f"{self.url} does not take jobs: {_line(error)}; is the token this cluster's?") from error

    def submit(self, path: str | Path, text: str, job: Job) -> str:
        """Sends a job file's text; the job's id."""
        document = json.dumps({"file": str(Path(path).resolve()), "text": text})
        if len(document.encode()) > LARGEST_JOB:
            raise InvalidInput(f"job {path} has more than {LARGEST_JOB} bytes; put its rules into a placement file")
        slug = re.sub(r"[^a-z0-9]+", "-", job.name.lower()).strip("-")[:40] or "job"
        entry = [sys.executable, "-m", "ciuic_runtime.cluster.run_job", *(["--insecure"] if self._insecure else [])]
        if self._gcs:  # Ray tells its drivers the address of the cluster that was started last on their machine
            entry += ["--address", self._gcs]
        id = f"{slug}-{secrets.token_hex(3)}"
        with self._asking("the job was not taken"):
            found = self._client.submit_job(
                entrypoint=shlex.join(entry), submission_id=id,
                runtime_env={"env_vars": {JOB: document, JOB_ID: id}}, metadata={"name": job.name, "kind": job.kind},
            )  # fmt: skip
        return str(found)

    def all(self) -> list[JobState]:
        """The newest first."""
        with self._asking("jobs cannot be listed"):
            found = [job for job in self._client.list_jobs() if job.submission_id]
        return sorted(map(_state, found), key=lambda s: -(s.started or 0.0))

    def state(self, id: str) -> JobState:
        self._known(id)
        with self._asking(f"job {id} cannot be asked after"):
            return _state(self._client.get_job_info(id))

    def log(self, id: str) -> str:
        """What its driver printed so far, for people."""
        return "".join(f"{line}\n" for line in self._lines(id) if _for_people(line))

    def outcome(self, id: str) -> dict[str, Any] | None:
        """What its driver said at its end; None where it had no time to."""
        said = [line.removeprefix(RESULT) for line in self._lines(id) if line.startswith(RESULT)]
        found: dict[str, Any] | None = json.loads(said[-1]) if said else None
        return found

    def follow(self, id: str, show: Callable[[str], None]) -> JobState:
        """Shows every line of the log as it comes, and returns how the job ended."""
        self._known(id)
        with self._asking(f"job {id} cannot be followed further"):
            asyncio.run(_tail(self._client, id, lambda line: show(line) if _for_people(line) else None))
        while not (state := self.state(id)).ended:
            time.sleep(0.2)
        return state

    def stop(self, id: str) -> JobState:
        """Asks it to end and waits until it has; one that has ended already stays as it is."""
        if (state := self.state(id)).ended:
            return state
        with self._asking(f"job {id} cannot be stopped"):
            self._client.stop_job(id)
        limit = time.monotonic() + STOP_SECONDS
        while not (state := self.state(id)).ended:
            if time.monotonic() > limit:
                raise CiuicError(f"job {id} was asked to end {STOP_SECONDS:.0f} s ago and still runs; ask once more")
            time.sleep(0.2)
        return state

    def _lines(self, id: str) -> list[str]:
        self._known(id)
        with self._asking(f"the log of job {id} cannot be had"):
            return str(self._client.get_job_logs(id)).splitlines()

    def _known(self, id: str) -> None:
        known = [state.id for state in self.all()]
        if id not in known:
            there = f"there are {', '.join(known[:5])}" if known else "it has none yet"
            raise InvalidInput(f"no job {id!r} on the cluster at {self.url}; {there} (ciuic jobs)")

    @contextlib.contextmanager
    def _asking(self, failed: str) -> Iterator[None]:
        try:
            yield
        except CiuicError:
            raise
        except Exception as error:  # of HTTP, of websockets, and RuntimeError for what the server refuses
            raise CiuicError(f"{failed}: {_line(error)}; does the cluster at {self.url} still run?") from error


def run(jobs: Jobs, id: str, job: Job, show: Callable[[str], None]) -> dict[str, Any]:
    """Follows a job to its end: what it came to. Raises JobFailed, with the node and the reason, and JobStopped; Ctrl-C
    stops the job."""
    kept = f"; {job.results}" if job.results else ""
    try:
        state = jobs.follow(id, show)
    except KeyboardInterrupt:
        jobs.stop(id)
        raise JobStopped(f"interrupted; job {id} was stopped{kept}") from None
    if state.status == "STOPPED":
        raise JobStopped(f"job {id} was stopped{kept}")
    said = jobs.outcome(id) or {}
    if state.status == "SUCCEEDED" and "result" in said:
        return {"id": id, "name": job.name, "kind": job.kind, "status": state.status, "exit_code": 0, **said}
    code = state.exit_code or 1
    error = said.get("error", {})
    where = f" on {error['node']}" if error.get("node") else ""
    reason = error.get("message") or _last_line(state.message) or "its driver ended without a word"
    raise JobFailed(f"job {id} failed{where}: {reason}{kept}", 128 - code if code < 0 else code)


async def _tail(client: Any, id: str, show: Callable[[str], None]) -> None:
    rest = ""
    async for piece in client.tail_job_logs(id):
        *lines, rest = (rest + piece).split("\n")
        for line in lines:
            show(line)
    if rest:
        show(rest)


def _for_people(line: str) -> bool:
    """Ray's own lines about a job that begins are not, nor is what the driver says to us."""
    return not line.startswith((RESULT, "Running entrypoint for job ")) and "INFO job_manager.py" not in line


def _state(info: Any) -> JobState:
    metadata, status = info.metadata or {}, getattr(info.status, "value", info.status)
    end = (info.end_time or time.time() * 1000) if info.start_time else None
    return JobState(
        info.submission_id, metadata.get("name", ""), metadata.get("kind", ""), str(status), info.driver_exit_code,
        info.start_time / 1000 if info.start_time else None, (end - info.start_time) / 1000 if end else None,
        info.message or "",
    )  # fmt: skip


def _dashboard(address: str | None) -> str:
    """The URL that takes jobs."""
    if address and "://" in address:
        return address.rstrip("/")
    if address:
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise InvalidInput(f"address {address!r} is not HOST:PORT, such as 192.168.1.5:6379")
        try:
            socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS).close()
        except OSError as error:
            raise CiuicError(
                f"no cluster answers at {address} ({error}); start one with `ray start --head`, or look at the address"
            ) from error
        if answers(f"http://{address}"):
            return f"http://{address}"
    from ray.dashboard.utils import ray_address_to_api_server_url

    try:
        url = str(ray_address_to_api_server_url(address))
    except Exception as error:
        where = f"at {address}" if address else "on this machine"
        raise CiuicError(f"no cluster was found {where} ({_line(error)}); give --address, or start one") from error
    if not answers(url):
        raise CiuicError(
            f"the cluster at {address or 'this machine'} takes jobs at {url}, which does not answer here; it "
            "listens on the head alone: launch there, or through a tunnel"
        )
    return url


def answers(url: str) -> bool:
    """Whether a dashboard is there; one that asks for a token is."""
    return _asked(url) in (200, 401, 403)


def _asked(url: str) -> int | None:
    """What a dashboard says to who has no token; None: nobody is there, or somebody else."""
    try:
        with urllib.request.urlopen(f"{url}/api/version", timeout=ANSWER_SECONDS) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, ValueError, http.client.HTTPException):
        return None


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]
