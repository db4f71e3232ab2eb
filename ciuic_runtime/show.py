"""What people see on the terminal: tables, the loading bar, the lines before and after a run.
Knows how figures are written, not where they come from."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ciuic_runtime.devices.units import format_bytes, format_rate

if TYPE_CHECKING:
    from ciuic_runtime.bench import Bench
    from ciuic_runtime.doctor import Check
    from ciuic_runtime.engine.llm import LLM
    from ciuic_runtime.history import Record, Score
    from ciuic_runtime.packing import PackReport
    from ciuic_runtime.schedulers.calibration import Curve
    from ciuic_runtime.schedulers.comparison import Comparison
    from ciuic_runtime.schedulers.replay import Replay
    from ciuic_runtime.schedulers.schedule import Schedule


def checks_table(checks: Sequence[Check]) -> str:
    width = max(len(c.name) for c in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.name:<{width}}  {check.status:<7}  {check.found}")
        if not check.ok:
            lines.append(f"{'':<{width}}           costs: {check.cost}")
            lines.append(f"{'':<{width}}           try:   {check.fix}")
    return "\n".join(lines)


def plan_line(schedule: Schedule) -> str:
    """The schedule in one line: where, how much, how fast, what binds."""
    held = ", ".join(f"{format_bytes(n)} on {d}" for d, n in schedule.weight_bytes().items())
    p = schedule.predicted
    if p is None:
        return f"{schedule.model.name}, {schedule.policy}: {held}"
    low, high = p.range
    return (
        f"{schedule.model.name} in {schedule.model.format}, {schedule.policy}: {held}; forecast "
        f"{p.decode_tokens_per_s:.3g} tokens/s ({low:.3g} to {high:.3g}, {p.basis}), bound by {p.bound_by}"
    )


def run_summary(llm: LLM, report: dict[str, Any], comparison: Comparison) -> str:
    """What the run amounted to, and the forecast beside it."""
    peak = ", ".join(f"{format_bytes(n)} on {d}" for d, n in report["peak_memory_bytes"].items())
    new = sum(len(o["token_ids"]) for o in report["outputs"])
    first = report["first_token_s"]
    came = f"first after {first:.3f} s" if first is not None else "none came"
    lines = [
        "",
        f"loaded in {report['load_s']:.2f} s; {new} new tokens ({report['finish_reason']}), {came}; "
        f"{llm.threads} threads; peak memory {peak}",
        str(comparison),
        *([str(llm.paging)] if llm.paging else []),
        *report["notes"],
    ]
    return "\n".join(lines)


def bench_summary(llm: LLM, found: Bench) -> str:
    """The median repetition beside its forecast."""
    one = found.median
    drift = f"; the memory's bandwidth moved by {found.drift:.0%} meanwhile" if found.drift is not None else ""
    lines = [
        f"{found.workload}: median of {len(found.rounds)} repetitions, which vary by {found.spread:.1%}{drift}",
        str(one.comparison),
        *one.trace.notes,
    ]
    return "\n".join(lines)


def curves_table(curves: Sequence[Curve]) -> str:
    """What share of which limit each operator reaches, at a few numbers of rows."""
    shown = (1, 8, 64, 512)
    head = "".join(f"{f'{n} rows':>13}" for n in shown)
    lines = [f"{'operator':<18}{'size':>10}{'per call':>10}{head}{'varies by':>11}"]
    for curve in sorted(curves, key=lambda c: c.operator):
        size = "" if curve.operator.startswith("scores") or not curve.size else format_bytes(curve.size)
        cells = "".join(f"{_share(curve, n):>13}" for n in shown)
        lines.append(f"{curve.operator:<18}{size:>10}{1e6 * curve.overhead:>7.1f} us{cells}{curve.spread:>11.1%}")
    return "\n".join([*lines, "shares of the limit that is nearer: c of the matrix rate, m of the memory's bandwidth"])


def _share(curve: Curve, rows: float) -> str:
    if not curve.points:
        return ""
    compute, memory = curve.at(rows)
    held = "" if curve.covers(rows) else "*"
    return f"{compute:.0%} c{held}" if compute > memory else f"{memory:.0%} m{held}"


def score_table(found: dict[str, Score], records: Sequence[Record]) -> str:
    """How many times too high or too low forecasts were, and the last runs."""
    if not found:
        return "no run is on record yet: `ciuic run` and `ciuic bench` keep what they forecast and what came"
    width = max(map(len, found))
    lines = [f"{'':<{width}}{'runs':>6}{'median':>9}{'worst':>9}{'recent':>9}{'in range':>10}"]
    for name, s in found.items():
        inside = f"{s.inside:.0%}" if s.inside is not None else "-"
        lines.append(f"{name:<{width}}{s.runs:>6}{s.median:>8.2f}x{s.worst:>8.2f}x{s.recent:>8.2f}x{inside:>10}")
    lines += ["", f"{'last runs (UTC)':<27}{'prefill':>20}{'decode':>20}   actual/forecast tokens/s"]
    for r in records[-10:]:
        cells = [f"{x.actual:.4g}/{x.forecast:.4g}" if x else "-" for x in (r.prefill, r.decode)]
        lines.append(f"{r.time:<27}{cells[0]:>20}{cells[1]:>20}   {r.model}, {r.format}, {r.workload}")
    return "\n".join(lines)


def replay_table(found: Replay, file: str) -> str:
    """Policies by their hit rates on the second half of a recording, beside the best fixed set and Belady."""
    lines = [
        f"{found.model}: room for {found.capacity} of {found.experts} experts",
        f"{'policy':<16}{'hit rate':>9}{'read per token':>17}",
    ]
    for score in (found.belady, found.stationary, *found.scores):
        by = "" if score in found.scores else " (by hindsight)"
        lines.append(f"{score.policy:<16}{score.hit_rate:>9.1%}{format_bytes(score.bytes_per_token):>17}{by}")
    also = f" --routing {file}" if found.chosen == "popularity" else ""
    return "\n".join([*lines, f"use: --cache-policy {found.chosen}{also}"])


def pack_summary(report: PackReport) -> str:
    """What was written, how fast, and how many bits a weight takes where."""
    kinds = ", ".join(f"{name} {bits:.3g}" for name, bits in report.bits_per_weight.items() if name != "all")
    kept = f" ({report.pages_kept} of them kept from before)" if report.pages_kept else ""
    return "\n".join(
        [
            f"{report.path}: {report.pages} pages{kept}, {format_bytes(report.nbytes)} in {report.format} from "
            f"{format_bytes(report.source_nbytes)}",
            f"took {report.seconds:.1f} s: {format_rate(report.read_rate, 'B/s')} packed, "
            f"{format_rate(report.write_rate, 'B/s')} written",
            f"{report.bits_per_weight['all']:.3g} bits per weight: {kinds}",
        ]
    )


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with rate and time left on a terminal; nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(file=sys.stderr)
    columns = (TextColumn(what), BarColumn(), DownloadColumn(True), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
