"""The commands of `ciuic` for jobs on a cluster: launch, jobs, logs, stop, replan.
What is sent to Ray is in `cluster/submit.py`."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ciuic_runtime.cli.app import app
from ciuic_runtime.cli.options import Insecure, JsonOption
from ciuic_runtime.cli.output import print_json, result, say
from ciuic_runtime.devices.errors import InvalidInput

if TYPE_CHECKING:
    from ciuic_runtime.cluster.submit import JobState

JobFile = Annotated[Path, typer.Argument(metavar="JOB.toml", help="what is to be done; examples/job.toml is one")]
JobId = Annotated[str, typer.Argument(metavar="ID", help="as ciuic jobs has it")]
Address = Annotated[
    str | None,
    typer.Option("--address", metavar="HOST:PORT", help="of a Ray cluster; default: the one that runs on this machine"),
]


@app.command()
def launch(
    job: JobFile,
    address: Annotated[
        str | None,
        typer.Option("--address", metavar="HOST:PORT", help="of a Ray cluster; default: one is started for the job"),
    ] = None,
    insecure: Insecure = False,
    detach: Annotated[bool, typer.Option("--detach", help="send it and leave; ciuic logs follows it")] = False,
    as_json: JsonOption = False,
) -> None:
    """Run a job on a cluster, or on one of this machine's own: generate over a file of prompts, serve, or bench."""
    from ciuic_runtime.cluster.job import check_job, job_text
    from ciuic_runtime.cluster.local import local_cluster
    from ciuic_runtime.cluster.submit import Jobs, run

    if detach and not address:
        raise InvalidInput(
            "--detach leaves the job to its cluster, and one that is started here ends with it; give --address"
        )
    known, text = check_job(job), job_text(job)
    with _signals_interrupt(), nullcontext(address) if address else local_cluster() as where:
        jobs = Jobs(where, insecure)
        id = jobs.submit(job, text, known)
        if detach:
            result(as_json, {"schema_version": 1, "id": id, "address": address}, lambda: id)
            return
        token = os.environ.get("RAY_AUTH_TOKEN_PATH")
        known_as = f"RAY_AUTH_TOKEN_PATH={token} " if token and not address else ""
        say(f"job {id}; from another shell: {known_as}ciuic logs {id} --address {where}")
        found = run(jobs, id, known, lambda line: print(line, file=sys.stderr, flush=True))
        result(as_json, {"schema_version": 1, **found}, lambda: _ended(found))


@app.command()
def jobs(address: Address = None, insecure: Insecure = False, as_json: JsonOption = False) -> None:
    """List a cluster's jobs, the newest first."""
    from ciuic_runtime.cluster.submit import Jobs

    found = Jobs(address, insecure).all()
    result(as_json, {"schema_version": 1, "jobs": [asdict(s) for s in found]}, lambda: _table(found))


@app.command()
def logs(
    id: JobId,
    address: Address = None,
    insecure: Insecure = False,
    follow: Annotated[bool, typer.Option("--follow", help="go on until the job ends")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what a job printed so far."""
    from ciuic_runtime.cluster.submit import Jobs

    cluster = Jobs(address, insecure)
    if as_json:
        state = cluster.state(id)
        print_json({"schema_version": 1, **asdict(state), "log": cluster.log(id), "outcome": cluster.outcome(id)})
    elif follow:
        cluster.follow(id, lambda line: print(line, flush=True))
    else:
        print(cluster.log(id), end="")


@app.command()
def stop(id: JobId, address: Address = None, insecure: Insecure = False, as_json: JsonOption = False) -> None:
    """End a job; what it finished stays."""
    from ciuic_runtime.cluster.submit import Jobs

    state = Jobs(address, insecure).stop(id)
    result(as_json, {"schema_version": 1, **asdict(state)}, lambda: f"{state.id} {state.status}")


@app.command()
def replan(
    id: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="of a job, or of another model that runs; default: all of them")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option("--address", metavar="HOST:PORT", help="of a Ray cluster; default: the one that runs here"),
    ] = None,
    insecure: Insecure = False,
    as_json: JsonOption = False,
) -> None:
    """Have models that run on a cluster look for nodes that joined, and use them where that is faster."""
    from ciuic_runtime.cluster.asking import ask
    from ciuic_runtime.devices.ray_session import join

    if address and "://" in address:
        raise InvalidInput(f"address {address!r} is a dashboard's; give the cluster's HOST:PORT, where nodes join it")
    found = ask(join(address or "auto", insecure), id, say)
    document = {"schema_version": 1, "models": [asdict(answer) for answer in found]}
    result(as_json, document, lambda: "\n".join(f"{answer.id}: {answer.text}" for answer in found))


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Being ended, or a terminal that closes, is as Ctrl-C: the job and its cluster end with us."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ended(found: dict[str, Any]) -> str:
    result, restarts = found["result"], found["restarts"]
    again = f", {restarts} restarts" if restarts else ""
    if found["kind"] != "generate":
        return f"{found['id']} {found['status']}{again}"
    return (
        f"{result['output']}: {result['finished']} of {result['prompts']} prompts, {result['new_tokens']} new tokens "
        f"in {result['seconds']:.1f} s{again}"
    )


def _table(states: list[JobState]) -> str:
    if not states:
        return "no jobs"
    rows = [("id", "kind", "status", "exit", "started", "seconds")]
    for s in states:
        begun = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(s.started)) if s.started else "-"
        took = f"{s.seconds:.0f}" if s.seconds is not None else "-"
        rows.append((s.id, s.kind or "-", s.status, "-" if s.exit_code is None else str(s.exit_code), begun, took))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
