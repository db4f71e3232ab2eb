"""The commands `calibrate`, `bench` and `score`: how fast it is, and how far off forecasts were.
Knows options; what is measured is in modules of these names, and in `history.py`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from ciuic_runtime.cli.app import app
from ciuic_runtime.cli.arguments import hardware
from ciuic_runtime.cli.opening import opened
from ciuic_runtime.cli.options import (
    BatchOption,
    CachePolicyOption,
    DevicesOption,
    Dtype,
    FormatOption,
    GoalOption,
    HtmlOption,
    IoThreads,
    JsonOption,
    Kernels,
    Lookahead,
    MaxTokens,
    MemoryOption,
    ModelArgument,
    PlacementOption,
    PromptTokens,
    ScheduleOption,
    Threads,
)
from ciuic_runtime.cli.output import result, say
from ciuic_runtime.devices.files import check_can_write


@app.command()
def calibrate(
    model: ModelArgument,
    format: FormatOption = "auto",
    threads: Threads = None,
    kernels: Kernels = "auto",
    fresh: Annotated[bool, typer.Option("--fresh", help="measure again what is known already")] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure how fast this machine computes a model's operators, so that plans rest on that; about a minute."""
    import ciuic_runtime as ciuic
    from ciuic_runtime.calibrate import calibrate as measure
    from ciuic_runtime.calibrate import curves_of
    from ciuic_runtime.devices.threads import with_threads
    from ciuic_runtime.show import curves_table

    known = ciuic.Model(model, format)
    topology = hardware(None).topology
    calibration = measure(known, topology, threads, kernels, fresh, say)
    curves = curves_of(known, with_threads(topology, threads), calibration)
    document = {
        "schema_version": 1, "model": known.spec.name, "format": known.format, "curves": [asdict(c) for c in curves],
    }  # fmt: skip
    result(as_json, document, lambda: curves_table(curves))


@app.command()
def bench(
    model: ModelArgument,
    prompt_tokens: PromptTokens = 512,
    max_tokens: MaxTokens = 128,
    batch: BatchOption = 1,
    rounds: Annotated[int, typer.Option("--rounds", min=1, max=1000, help="repetitions; the median is shown")] = 3,
    dtype: Dtype = "auto",
    schedule: ScheduleOption = None,
    placement: PlacementOption = None,
    memory: MemoryOption = None,
    goal: GoalOption = None,
    devices: DevicesOption = None,
    threads: Threads = None,
    kernels: Kernels = "auto",
    cache_policy: CachePolicyOption = None,
    lookahead: Lookahead = None,
    io_threads: IoThreads = None,
    html: HtmlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a workload with random prompts, and show the forecast beside it. A model without weights (a config.json
    or a known name) gets random ones."""
    import ciuic_runtime as ciuic
    from ciuic_runtime.bench import bench as measure
    from ciuic_runtime.bench import weights_for
    from ciuic_runtime.history import record_of, remember
    from ciuic_runtime.report import bench_report
    from ciuic_runtime.show import bench_summary

    work = ciuic.Workload(prompt_tokens, max_tokens, batch)
    if html:
        check_can_write(html)
    with opened(
        weights_for(model), dtype=dtype, schedule=schedule, placement=placement, memory=memory, goal=goal,
        devices=devices, threads=threads, kernels=kernels, context=None, workload=work, cache_policy=cache_policy,
        lookahead=lookahead, io_threads=io_threads,
    ) as llm:  # fmt: skip
        found = measure(llm, work, rounds, progress=say)
        for one in found.rounds:
            remember(record_of(llm, one.trace, one.comparison))
        if html:
            llm.schedule.to_html(html, llm.forecast_trace(), found.median.trace, llm.model.graph)
        document = bench_report(llm, found)
        result(as_json, document, lambda: bench_summary(llm, found))


@app.command()
def score(as_json: JsonOption = False) -> None:
    """Show how far the planner's forecasts were off in the runs so far."""
    from ciuic_runtime.history import history_file, read_history, scores
    from ciuic_runtime.show import score_table

    records = read_history()
    found = scores(records)
    document = {
        "schema_version": 1, "file": str(history_file()), "scores": {name: asdict(s) for name, s in found.items()},
        "runs": [asdict(r) for r in records],
    }  # fmt: skip
    result(as_json, document, lambda: score_table(found, records))
