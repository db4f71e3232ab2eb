"""The command `ciuic dashboard`: saved traces and schedules in the browser, without a model.
What is shown is in `dashboard/`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ciuic_runtime.cli.app import app
from ciuic_runtime.cli.options import JsonOption
from ciuic_runtime.cli.output import print_json


@app.command()
def dashboard(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="traces (run --trace) and schedules (plan --save)")
    ],
    host: Annotated[str, typer.Option("--host", help="address to listen at")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="0: any that is free")] = 8001,
    api_key: Annotated[
        list[str] | None,
        typer.Option("--api-key", envvar="CIUIC_API_KEY", help="asked of browsers; may be repeated"),
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="other machines may come in without a key")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show saved traces and schedules in the browser: why was that token slow, and what would make it faster?"""
    from ciuic_runtime.dashboard.serve import serve_dashboard
    from ciuic_runtime.dashboard.source import open_file
    from ciuic_runtime.server.config import ServerConfig
    from ciuic_runtime.server.serve import listening

    config = ServerConfig(host, port, api_keys=tuple(api_key or ()), insecure=insecure)
    with listening(config) as address:
        sources = [open_file(file) for file in files]

        def ready(url: str) -> None:
            if as_json:
                print_json({"schema_version": 1, "url": url, "files": [str(file) for file in files]})
                sys.stdout.flush()

        serve_dashboard(sources, config, address, ready)
