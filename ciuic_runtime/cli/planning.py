"""The commands `plan` and `replay`: what would be, before anything is loaded."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from ciuic_runtime.cli.app import app
from ciuic_runtime.cli.arguments import budgets_of, hardware, placement_of
from ciuic_runtime.cli.options import (
    BatchOption,
    DevicesOption,
    FormatOption,
    GoalOption,
    HtmlOption,
    JsonOption,
    MaxTokens,
    MemoryOption,
    ModelArgument,
    PlacementOption,
    PromptTokens,
    Threads,
)
from ciuic_runtime.cli.output import result
from ciuic_runtime.devices.errors import InvalidInput


@app.command()
def plan(
    model: ModelArgument,
    format: FormatOption = "auto",
    devices: DevicesOption = None,
    placement: PlacementOption = None,
    memory: MemoryOption = None,
    goal: GoalOption = None,
    prompt_tokens: PromptTokens = 512,
    max_tokens: MaxTokens = 128,
    batch: BatchOption = 1,
    threads: Threads = None,
    save: Annotated[Path | None, typer.Option("--save", metavar="FILE.json", help="write the schedule")] = None,
    trace: Annotated[
        Path | None, typer.Option("--trace", metavar="FILE.json", help="write the forecast as a Chrome trace")
    ] = None,
    html: HtmlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the schedule for a model before anything is loaded."""
    import ciuic_runtime as ciuic
    from ciuic_runtime.basis import Basis
    from ciuic_runtime.curves import load_calibration
    from ciuic_runtime.schedulers.chrome import write_recording
    from ciuic_runtime.schedulers.recording import Recording

    work = ciuic.Workload(prompt_tokens, max_tokens, batch)
    known = ciuic.Model(model, format)
    schedule = ciuic.plan(
        known, hardware(devices), memory=budgets_of(memory), goal=goal or "latency", workload=work,
        placement=placement_of(placement), threads=threads,
    )  # fmt: skip
    if save:
        schedule.to_json(save)
    if trace or html:
        basis = Basis(known, schedule, load_calibration(known, schedule.topology))
        forecast = basis.forecaster.trace()
        if trace:
            write_recording(replace(Recording.of(forecast), basis=basis.to_dict()), trace)
        if html:
            schedule.to_html(html, forecast, graph=known.graph)
    result(as_json, schedule.to_dict(), lambda: str(schedule))


@app.command()
def replay(
    recording: Annotated[Path, typer.Argument(metavar="FILE", help="written by ciuic run --record-routing")],
    memory: Annotated[str, typer.Option("--memory", metavar="cpu=16GiB", help="memory for weights")],
    as_json: JsonOption = False,
) -> None:
    """Score every cache policy on recorded routing, beside the optimum, and say which to use."""
    from ciuic_runtime.engine.routing import read_routing
    from ciuic_runtime.schedulers.replay import replay as replay_policies
    from ciuic_runtime.show import progress_bar, replay_table

    budgets = budgets_of(memory)
    if len(budgets) != 1:
        raise InvalidInput(f"--memory {memory!r}: a replay is of one device's memory; give one, such as cpu=16GiB")
    routing = read_routing(recording)
    with progress_bar("replaying") as progress:
        found = replay_policies(routing, next(iter(budgets.values())), progress)
    result(as_json, {"schema_version": 1, **asdict(found)}, lambda: replay_table(found, str(recording)))
