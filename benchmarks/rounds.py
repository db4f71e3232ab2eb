"""How every benchmark measures on a machine that others use too: rivals take turns, each measurement stands between two
looks at the machine's limits, medians of the rounds that count are reported, and how many did not count.

A round is void when the machine was not ours: a core taken away or memory slower than in the better rounds, time stolen
by the host, other processes at work. Knows nothing of models."""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from limits import Limits, mean, measure
from machine import machine_line
from process import Meter

# Of the upper quartile of this run's looks:
LEAST_CORES = 0.85
LEAST_BANDWIDTH = 0.80
LEAST_GIVEN = 0.70  # of the threads: so many cores in any case; rivals that live throughout take some all the time
MOST_STOLEN = 0.02  # of the processors' time, by the host
MOST_OTHERS = 0.05  # of the processors' time, by other processes of this system


@dataclass(frozen=True)
class Sample:
    """What a rival did in one turn."""

    rate: float  # tokens/s, or whatever the benchmark compares
    facts: Mapping[str, float] = field(default_factory=dict)  # anything else worth a median


@dataclass(frozen=True)
class Turn:
    sample: Sample
    before: Limits
    after: Limits
    stolen: float
    others: float

    @property
    def limits(self) -> Limits:
        return mean([self.before, self.after])

    def why_void(self, usual_cores: float, usual_bandwidth: float) -> str:
        worst = min((self.before, self.after), key=lambda x: x.cores_given)
        if worst.cores_given < max(LEAST_CORES * usual_cores, LEAST_GIVEN * worst.threads):
            return f"{worst.cores_given:.2f} of {worst.threads} cores, mostly {usual_cores:.2f}"
        slowest = min(self.before.read_bandwidth, self.after.read_bandwidth)
        if slowest < LEAST_BANDWIDTH * usual_bandwidth:
            return f"memory {slowest / 1e9:.1f} of {usual_bandwidth / 1e9:.1f} GB/s"
        if self.stolen > MOST_STOLEN:
            return f"{self.stolen:.1%} stolen by the host"
        return f"{self.others:.1%} used by other processes" if self.others > MOST_OTHERS else ""


Round = dict[str, Turn]  # by rival


@dataclass(frozen=True)
class Measured:
    rounds: tuple[Round, ...]  # those that count
    void: tuple[str, ...]  # why, of each that does not

    def median(self, rival: str, what: Callable[[Turn], float] = lambda turn: turn.sample.rate) -> float:
        return statistics.median(what(r[rival]) for r in self.rounds)

    def fact(self, rival: str, name: str) -> float:
        return self.median(rival, lambda turn: turn.sample.facts[name])

    def ratio(self, rival: str, other: str) -> float:
        """Median over rounds of the ratio within a round: what disturbs both cancels."""
        return statistics.median(r[rival].sample.rate / r[other].sample.rate for r in self.rounds)

    def spread(self, rival: str) -> float:
        """(largest - smallest) / median of the rates."""
        rates = [r[rival].sample.rate for r in self.rounds]
        return (max(rates) - min(rates)) / statistics.median(rates)

    @property
    def limits(self) -> Limits:
        return mean([turn.limits for r in self.rounds for turn in r.values()])

    def __str__(self) -> str:
        reasons = f" ({'; '.join(dict.fromkeys(self.void))})" if self.void else ""
        return f"{len(self.rounds)} rounds, {len(self.void)} void{reasons}"


def take_turns(
    rivals: Mapping[str, Callable[[], Sample]], rounds: int, threads: int, pids: Sequence[int] = (), patience: int = 2
) -> Measured:
    """Rounds of one turn each until `rounds` of them count, or `patience` x as many were tried; every other round goes
    backwards. If none counts, all do, and the reasons are still reported. `pids` are rivals that live throughout."""
    tried: list[Round] = []
    while True:
        tried.append(_round(rivals, threads, pids, backwards=len(tried) % 2 == 1))
        reasons = _why_void(tried)
        valid = [r for r, why in zip(tried, reasons, strict=True) if not why]
        if len(valid) >= rounds or len(tried) >= patience * rounds:
            break
    note(f"{len(tried)} rounds: " + ", ".join(why or "ok" for why in reasons))
    return Measured(tuple(valid or tried), tuple(why for why in reasons if why))


def _round(rivals: Mapping[str, Callable[[], Sample]], threads: int, pids: Sequence[int], backwards: bool) -> Round:
    turns: Round = {}
    before = measure(threads)
    for name in reversed(list(rivals)) if backwards else rivals:
        meter = Meter(pids)
        sample = rivals[name]()
        stolen, others = meter.stolen_and_others()
        after = measure(threads)
        turns[name] = Turn(sample, before, after, stolen, others)
        note(f"  {name}: {sample.rate:.2f}; {after}; stolen {stolen:.1%}, others {others:.1%}")
        before = after
    return turns


def _why_void(tried: list[Round]) -> list[str]:
    """Of each round; "" for one that counts."""
    looks = [x for r in tried for t in r.values() for x in (t.before, t.after)]
    each = ([x.cores_given for x in looks], [x.read_bandwidth for x in looks])
    usual = [sorted(found)[len(found) * 3 // 4] for found in each]
    return [", ".join(f"{name}: {why}" for name, t in turns.items() if (why := t.why_void(*usual))) for turns in tried]


def note(text: str) -> None:
    """What is going on, beside the results."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


# Output


def against(value: float, goal: float, unit: str = "", at_most: bool = False) -> str:
    """`value`, the goal beside it and whether it is reached."""
    reached = value <= goal if at_most else value >= goal
    shown, wanted = (f"{x:.1%}" if unit == "%" else f"{x:.2f}{unit}" for x in (value, goal))
    return f"{shown} (goal {'<=' if at_most else '>='} {wanted}: {'reached' if reached else 'MISSED'})"


class Report:
    """Lines of a benchmark, printed as they come and, if asked for, appended to a results file at the end."""

    def __init__(self, title: str, out: Path | None) -> None:
        self._title, self._out = title, out
        self._lines: list[str] = []
        self.line(machine_line())

    def line(self, text: str) -> None:
        print(text, flush=True)
        self._lines.append(text)

    def save(self) -> None:
        if self._out is None:
            return
        name = Path(sys.argv[0]).name
        new = not self._out.exists()
        with self._out.open("a") as file:
            if new:
                file.write(f"# {self._out.stem}\n\nWritten by the benchmarks (`--out`); Linux {platform.release()}.\n")
            when = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
            shown = " ".join(shlex.quote(_short(a)) for a in sys.argv[1:])
            file.write(f"\n## {self._title}\n\n`python benchmarks/{name} {shown}`, {when}\n\n```\n")
            file.write("\n".join(self._lines) + "\n```\n")


def _short(argument: str) -> str:
    """Paths of this machine do not belong into a results file: their last part only."""
    return Path(argument).name if os.sep in argument else argument


def common_arguments(description: str | None, rounds: int = 7) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=rounds, help="that count; at most twice as many are tried")
    parser.add_argument("--out", type=Path, help="results file (Markdown) to append to")
    return parser
