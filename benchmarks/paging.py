"""A model larger than memory: ours and llama.cpp under one enforced memory limit, beside the bound the disk sets.

    python benchmarks/paging.py MODEL --limit 22GiB [--peer FOLDER --gguf FILE] [--rounds 3] [--out FILE]

MODEL is a packed folder (`make_model.py packed`) whose random weights choose experts evenly: the worst case. The bound
of a step is max(compute, compulsory misses / best disk rate). Compulsory misses are the bytes of routed experts that a
step uses x (1 - cache / all routed experts), the cache being what our budget leaves for routed experts; compute is our
own step without its waits; the disk rate is the best of a reader that does nothing else, at page size (`disk.py`). It
reads between our generations while our process sleeps, since disks of virtual machines change from minute to minute: a
generation has the better of the rates before and after it, and is void where they differ by more than 15 %. Beside it
stands what that reader gets while every core reads memory: the bound has compute and disk take nothing from each other,
which is not so where the disk's bytes and the kernels' go through one memory controller. Processes are started anew for
every turn, since two do not fit beside each other; our first generation fills the cache and does not count, nor does
the peer's first repeat.

The first token of a cold start is measured twice: on memory that the machine still holds (`ballast.py`), which is what
the goal is about, and as it comes, where a virtual machine may have to get its memory back from the host.

Goals: 90 % of the bound, for decode and for a prompt of 512; against llama.cpp 2.2 x in bf16, 5 x in int4; the first
token of a cold start within 1.2 x of what its bytes take; guessing hides 80 % of what the bound lets it hide."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ballast import have_memory_at_hand
from cases import model_arguments
from disk import best, disk_rates, memory_is_read
from limited import MemoryLimit
from ours import Ours, Run
from peer import Peer, peer_from
from process import Meter
from rounds import Report, against, note

from ciuic_runtime.devices.cpu import discover_cpus
from ciuic_runtime.devices.units import format_bytes, parse_bytes
from ciuic_runtime.model import Model
from ciuic_runtime.models.config import read_config
from ciuic_runtime.models.layout import page_layout
from ciuic_runtime.models.spec import ModelSpec
from ciuic_runtime.models.tensors import tensors_by_page

WARM, NEW, SHORT, LONG = 160, 33, 16, 512  # tokens: generated to fill the cache, measured each time, prompts
DECODES, PREFILLS = 5, 3  # generations that are measured in a turn
CONTEXT = 1024
GOALS = {"int4": 5.0, "int8": 5.0, "bfloat16": 2.2}  # x llama.cpp
LEFT_FREE = 3 << 30  # bytes of memory that are not touched for a cold start
MOST_OTHERS = 0.05  # of the processors' time
MOST_DISK_CHANGE = 0.15  # between before and after a generation


@dataclass(frozen=True)
class Generation:
    """Means of its steps of one phase, beside what the disk gave before or after it, whichever was more."""

    seconds: float
    waits: dict[str, float]  # cause -> seconds
    nbytes: float  # read
    hit_rate: float
    disk: float  # bytes/s
    bound: float  # seconds at the bound
    void: bool  # the disk changed meanwhile

    @property
    def share(self) -> float:
        """Of the bound's speed."""
        return self.bound / self.seconds


@dataclass(frozen=True)
class Turn:
    """Ours, once."""

    start_s: float  # from the process's start until prompts can be given
    first_token_s: float  # from the prompt to the token
    needed_s: float  # for the pages that it needs at the disk's rate
    decode: list[Generation]
    prefill: list[Generation]
    disk_beside_memory: float  # bytes/s, while every core reads memory
    peak: int  # bytes of the cgroup


class Case:
    """One model under one limit."""

    def __init__(self, model: Path, limit: int, allowance: int, threads: int) -> None:
        self.model, self.limit, self.threads = model, limit, threads
        self.spec: ModelSpec = read_config(model)
        self.format = self.spec.packed
        moe = self.spec.moe
        assert moe is not None, f"{self.spec.name} has no routed experts"
        pages = {page: page_layout(self.spec, page, self.format).nbytes for page in tensors_by_page(self.spec)}
        self.expert = next(n for page, n in pages.items() if ".experts." in page)
        self.routed_total = sum(n for page, n in pages.items() if ".experts." in page)
        by_rows = sum(page.nbytes for page in Model(model).pages.values() if page.row_nbytes)
        self.dense = sum(pages.values()) - self.routed_total - by_rows
        self.whole = sum(pages.values())
        self.layers = self.routed_total // (self.expert * moe.num_experts)
        self.routed_decode = self.layers * moe.experts_per_token * self.expert
        self.budget = limit - allowance
        free = sum(d.memory_free_bytes or 0 for d in discover_cpus())
        self.at_hand = min(self.budget, free - LEFT_FREE) - self.dense
        self.cached = 0.0  # share of routed experts that fit, known when the plan is

    def _start(self, limit: MemoryLimit, **settings: Any) -> Ours:
        return Ours(
            self.model, limit, threads=self.threads, memory={"cpu": self.budget}, max_model_len=CONTEXT, max_num_seqs=1,
            **settings,
        )  # fmt: skip

    def cold_s(self) -> float:
        """To the first token of a prompt, in a new process and on memory as it comes."""
        with MemoryLimit(self.limit) as limit, self._start(limit) as ours:
            return ours.run(ours.prompts(1, SHORT, seed=1), 1).first_token_s

    def ours(self, **settings: Any) -> Turn:
        """A process of ours under the limit: cold start, warm-up, decode, prefill."""
        with MemoryLimit(self.limit) as limit:
            begin = time.monotonic()
            with self._start(limit, **settings) as ours:
                self.cached = min(1.0, max(0, ours.ready["cache_bytes"] - self.dense) / self.routed_total)
                start_s = time.monotonic() - begin
                have_memory_at_hand(self.at_hand)
                cold = ours.run(ours.prompts(1, SHORT, seed=1), 1)
                rate = self._disk_rate()
                needed = self.dense + self.expert * cold.paging["prefill"]["misses"]
                ours.run(ours.prompts(1, SHORT, seed=2), WARM)
                decode = self._generations(ours, "decode", SHORT, NEW, DECODES)
                with memory_is_read(self.threads):
                    beside = self._disk_rate()
                ours.run(ours.prompts(1, LONG, seed=3), 1)
                prefill = self._generations(ours, "prefill", LONG, 1, PREFILLS)
            return Turn(start_s, cold.first_token_s, needed / rate, decode, prefill, beside, limit.peak)

    def _disk_rate(self) -> float:
        return best(disk_rates(self.model, 0.3))

    def _generations(self, ours: Ours, phase: str, prompt: int, new: int, count: int) -> list[Generation]:
        found, before = [], self._disk_rate()
        for i in range(count):
            run = ours.run(ours.prompts(1, prompt, seed=10 + i), new)
            after = self._disk_rate()
            found.append(self._generation(run, phase, before, after))
            before = after
        return found

    def _generation(self, run: Run, phase: str, before: float, after: float) -> Generation:
        """What lies between steps included."""
        steps, paging = [s for s in run.steps if s.phase == phase], run.paging[phase]
        seconds, disk = (steps[-1].end - steps[0].start) / len(steps), max(before, after)
        waits = {cause: s / len(steps) for cause, s in paging["stall_s"].items()}
        routed = self.routed_decode if phase == "decode" else self.routed_total
        bound = max(seconds - sum(waits.values()), routed * (1 - self.cached) / disk)
        void = abs(before / after - 1) > MOST_DISK_CHANGE
        return Generation(seconds, waits, paging["bytes_read"] / len(steps), paging["hit_rate"], disk, bound, void)


def main() -> None:
    parser = model_arguments(__doc__, rounds=3)
    parser.add_argument("--limit", required=True, help="of memory, for each rival's process, such as 22GiB")
    parser.add_argument("--allowance", default="600MiB", help="of that, for our interpreter; the rest is --memory")
    args = parser.parse_args()
    case = Case(args.model, parse_bytes(args.limit), parse_bytes(args.allowance), args.threads)
    peer = peer_from(args)
    title = f"Paging, {case.spec.name}, {format_bytes(case.whole)} in {format_bytes(case.limit)}"
    report = Report(title, args.out)
    turns: list[Turn] = []
    blind: list[Turn] = []
    theirs: list[tuple[float, float]] = []
    as_it_comes: list[float] = []
    for i in range(args.rounds):
        rivals: list[tuple[str, Callable[[], None]]] = [
            ("ciuic", lambda: turns.append(case.ours())),
            ("ciuic without guessing", lambda: blind.append(case.ours(lookahead=0))),
            ("ciuic, first token only", lambda: as_it_comes.append(case.cold_s())),
        ]
        if peer is not None:
            rivals.append(("llama.cpp", lambda: theirs.append(_peer(peer, case.limit))))  # type: ignore[arg-type]
        for name, run in reversed(rivals) if i % 2 else rivals:
            meter = Meter()
            run()
            stolen, others = meter.stolen_and_others()
            note(f"round {i + 1}: {name}; stolen {stolen:.1%}, others {others:.1%}")
            if others > MOST_OTHERS or stolen > MOST_OTHERS:
                note("  the machine was not ours meanwhile")
        for phase in ("decode", "prefill"):
            for generation in getattr(turns[-1], phase):
                note(f"  {phase}: {_line(generation)}")
    _tell(report, case, turns, blind, theirs, as_it_comes)
    report.save()


def _peer(peer: Peer, nbytes: int) -> tuple[float, float]:
    with MemoryLimit(nbytes) as limit:
        return peer.limited(limit, 16, LONG, 1)


def _counted(turns: list[Turn], phase: str) -> list[Generation]:
    """Those that are not void; all where none is left."""
    every = [g for turn in turns for g in getattr(turn, phase)]
    return [g for g in every if not g.void] or every


def _line(g: Generation) -> str:
    waits = ", ".join(f"{cause} {s * 1e3:.1f}" for cause, s in g.waits.items())
    return (
        f"{g.seconds * 1e3:6.1f} ms a step, bound {g.bound * 1e3:6.1f}, {g.share:.1%} of it; waited "
        f"{sum(g.waits.values()) * 1e3:.1f} ms ({waits}); read {g.nbytes / 1e6:.0f} MB, hit rate {g.hit_rate:.1%}; "
        f"disk {g.disk / 1e9:.2f} GB/s{'  VOID: the disk changed' if g.void else ''}"
    )


def _tell(
    report: Report, case: Case, turns: list[Turn], blind: list[Turn], theirs: list[tuple[float, float]],
    as_it_comes: list[float],
) -> None:  # fmt: skip
    """Medians over the rounds."""
    median = statistics.median
    report.line(
        f"limit {case.limit / 1e9:.2f} GB enforced by the system (ours: budget {case.budget / 1e9:.2f} GB, peak of the "
        f"cgroup {max(t.peak for t in turns) / 1e9:.2f} GB); {case.routed_total / 1e9:.1f} GB of routed experts, "
        f"{case.dense / 1e9:.2f} GB other weights; {case.cached:.1%} of the experts fit"
    )
    for i, turn in enumerate(turns, 1):
        for phase in ("decode", "prefill"):
            for g in getattr(turn, phase):
                report.line(f"round {i}, {phase:7}: {_line(g)}")
    alone = median(g.disk for t in turns for g in t.decode)
    beside = median(t.disk_beside_memory for t in turns)
    report.line(
        f"disk: {alone / 1e9:.2f} GB/s beside nothing, {beside / 1e9:.2f} while {case.threads} processes read memory, "
        f"{beside / alone:.0%} of it"
    )
    for phase, tokens in (("decode", 1), ("prefill", LONG)):
        counted = _counted(turns, phase)
        rate = median(tokens / g.seconds for g in counted)
        share = median(g.share for g in counted)
        text = f"{phase}: {rate:.2f} tok/s, of the bound {against(share, 0.9, '%')}, {len(counted)} generations"
        if theirs:
            their = median(rates[phase == "prefill"] for rates in theirs)
            ratio = rate / their
            beside = against(ratio, GOALS[case.format], "x") if phase == "decode" else f"{ratio:.2f}x"
            text += f"; llama.cpp (mapped) {their:.2f} tok/s, against it {beside}"
        report.line(text)
    cold = median(t.first_token_s / t.needed_s for t in turns)
    report.line(
        f"cold start: first token after {median(t.first_token_s for t in turns):.2f} s "
        f"({median(t.start_s for t in turns):.2f} s after the process's start), "
        f"whose pages take the disk {median(t.needed_s for t in turns):.2f} s; times the disk's time: "
        f"{against(cold, 1.2, 'x', at_most=True)}; on memory as it comes {median(as_it_comes):.2f} s"
    )
    without = median(g.seconds for g in _counted(blind, "decode"))
    with_it = median(g.seconds for g in _counted(turns, "decode"))
    bound = median(g.bound for g in _counted(turns, "decode"))
    hidden = (without - with_it) / (without - bound)
    report.line(
        f"guessing ahead: {without * 1e3:.1f} ms a token without, {with_it * 1e3:.1f} with, {bound * 1e3:.1f} at the "
        f"bound; hidden of what can be {against(hidden, 0.8, '%')}"
    )


if __name__ == "__main__":
    main()
