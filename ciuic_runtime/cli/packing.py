"""The command `pack`: options, progress, and what is said after Ctrl-C.
How pages are made is in `ciuic_runtime/packing.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ciuic_runtime.cli.app import Stopped, app
from ciuic_runtime.cli.options import CheckpointArgument, JsonOption, Threads
from ciuic_runtime.cli.output import result


@app.command()
def pack(
    model: CheckpointArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="folder to write; what is unfinished is in OUT.partial")],
    format: Annotated[str, typer.Option("--format", help="int4, int8 or bf16")] = "int4",
    threads: Threads = None,
    as_json: JsonOption = False,
) -> None:
    """Write a model's weights in fewer bits, as they are computed with; an interrupted packing can be gone on with."""
    from ciuic_runtime.packing import pack as pack_model
    from ciuic_runtime.show import pack_summary, progress_bar

    try:
        with progress_bar("packing") as progress:
            report = pack_model(model, out, format, threads, progress)
    except KeyboardInterrupt:
        raise Stopped(f"interrupted; the same command goes on with what is in {out}.partial") from None
    result(as_json, report.to_dict(), lambda: pack_summary(report))
