"""What people see on the terminal: tables, the loading bar, the lines before and after a run.
Knows how figures are written, not where they come from."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ciuic_runtime.devices.units import format_bytes, format_rate

if TYPE_CHECKING:
    from ciuic_runtime.doctor import Check
    from ciuic_runtime.engine.llm import LLM
    from ciuic_runtime.packing import PackReport
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


def run_summary(llm: LLM, report: dict[str, Any]) -> str:
    """What the run amounted to, and the forecast beside it."""
    peak = ", ".join(f"{format_bytes(n)} on {d}" for d, n in report["peak_memory_bytes"].items())
    new = sum(len(o["token_ids"]) for o in report["outputs"])
    first = report["first_token_s"]
    came = f"first after {first:.3f} s" if first is not None else "none came"
    lines = [
        "",
        f"loaded in {report['load_s']:.2f} s; {new} new tokens ({report['finish_reason']}), {came}; "
        f"{llm.threads} threads; peak memory {peak}",
        str(llm.comparison),
        *([str(llm.paging)] if llm.paging else []),
        *report["notes"],
    ]
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
