"""How far forecasts are off on this machine: they are written down and committed before the runs that they are about.

    python benchmarks/predictions.py predict FOLDER [--only NAME ...]   # writes predictions/ROUND.json; commit that
    python benchmarks/predictions.py run FOLDER predictions/ROUND.json  # if committed; adds to runs.jsonl
    python benchmarks/predictions.py report predictions [--out FILE]

FOLDER holds the models, which are made where they are missing. A virtual machine's memory may be by turns half as fast,
for seconds, so a run is looked at in stretches: its prompts, then every eight passes. A stretch is void if what memory
or disk gave moved by more than 5 % between before and after it, or lay more than 10 % off what the forecast takes them
to give, which each round waits for, for a while. A rate counts if two prompts did, or 24 passes that decode. How much
was void is said, and what all come to.

Where paging is forced, the naive plan (experts by LRU, read when they are needed) is run in the same way."""

from __future__ import annotations

import argparse
import datetime
import json
import math
import random
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from limits import measure
from machine import machine_line

import ciuic_runtime as ciuic
from ciuic_runtime.devices.bandwidth import memory_rate
from ciuic_runtime.devices.units import parse_bytes
from ciuic_runtime.memory.read_rate import PageStream

MOST_CHANGE = 0.05  # between before and after
MOST_OFF = 0.1  # either of them, of what the forecast rests on: else the machine is another one at that moment
MEDIAN_GOAL, WORST_GOAL = 0.10, 0.20
LEAST_ROUNDS, MOST_ROUNDS, NAIVE_ROUNDS = 2, 6, 3
MOST_WAIT = 15.0  # s, before a round, for a machine like that which the forecast is of
LEAST_PROMPTS, LEAST_PASSES = 2, 24  # that count, of a configuration that counts
STRETCH = 8  # passes that decode between two looks at the memory
LOOKS, LOOK_SECONDS = 8, 0.15  # at the disk; the best of as many counts for multiplication, which varies little
PLANS = 5  # at most, of one configuration
NAIVE = {"cache_policy": "lru", "lookahead": 0}
PHASES = ("prefill", "decode")
CIUIC = Path(sys.executable).with_name("ciuic")


@dataclass(frozen=True, slots=True)
class Case:
    """One configuration."""

    name: str
    model: str  # a folder in FOLDER, or a known name (random weights)
    format: str  # what the weights are held in
    prompt_tokens: int
    max_tokens: int
    batch: int = 1
    threads: int = 2
    memory: str = ""  # budget; "": everything fits

    @property
    def work(self) -> ciuic.Workload:
        return ciuic.Workload(self.prompt_tokens, self.max_tokens, self.batch)


CASES = (
    Case("int4", "v2-lite-int4", "int4", 512, 64),
    Case("int4 context 2048", "v2-lite-int4", "int4", 2048, 32),
    Case("int4 short", "v2-lite-int4", "int4", 64, 96),
    Case("int4 batch 4", "v2-lite-int4", "int4", 256, 48, batch=4),
    Case("int4 batch 16", "v2-lite-int4", "int4", 128, 32, batch=16),
    Case("int4 1 thread", "v2-lite-int4", "int4", 256, 48, threads=1),
    Case("int8, 9 layers", "v2-lite-int8-9", "int8", 512, 64),
    Case("int8, 9 layers, batch 8", "v2-lite-int8-9", "int8", 192, 48, batch=8),
    Case("bf16, 6 layers", "v2-lite-bf16-6", "bfloat16", 512, 64),
    Case("bf16, 6 layers, batch 2, context 1024", "v2-lite-bf16-6", "bfloat16", 1024, 32, batch=2),
    Case("int4 in 7.5 GB", "v2-lite-int4", "int4", 512, 48, memory="7.5GB"),
    Case("int4 in 6.3 GB", "v2-lite-int4", "int4", 512, 48, memory="6.3GB"),
    Case("int4 in 4 GB", "v2-lite-int4", "int4", 512, 32, memory="4GB"),
    Case("bf16, 6 layers, in 5 GB", "v2-lite-bf16-6", "bfloat16", 256, 32, memory="5GB"),
    Case("int8, 9 layers, in 3 GB, batch 2", "v2-lite-int8-9", "int8", 128, 32, batch=2, memory="3GB"),
    Case("int4 in 5 GB, context 1024", "v2-lite-int4", "int4", 1024, 32, memory="5GB"),
    Case("int4 in 6 GB, batch 4", "v2-lite-int4", "int4", 128, 32, batch=4, memory="6GB"),
    Case("int4 in 7 GB, 1 thread", "v2-lite-int4", "int4", 128, 32, threads=1, memory="7GB"),
    Case("int8, 9 layers, in 4 GB", "v2-lite-int8-9", "int8", 512, 48, memory="4GB"),
    Case("int8, 9 layers, in 2 GB", "v2-lite-int8-9", "int8", 256, 32, memory="2GB"),
    Case("bf16, 6 layers, in 4 GB", "v2-lite-bf16-6", "bfloat16", 512, 32, memory="4GB"),
    Case("bf16, 6 layers, in 6 GB, batch 2", "v2-lite-bf16-6", "bfloat16", 256, 32, batch=2, memory="6GB"),
)
MAKE = {
    "v2-lite-int4": ("--format", "int4"),
    "v2-lite-int8-9": ("--format", "int8", "--layers", "9"),
    "v2-lite-bf16-6": ("--format", "bfloat16", "--layers", "6"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    predicting = commands.add_parser("predict")
    predicting.add_argument("folder", type=Path)
    predicting.add_argument("--into", type=Path, default=Path("benchmarks/predictions"))
    predicting.add_argument("--only", nargs="*", help="names of cases; default: all")
    predicting.add_argument("--missing", action="store_true", help="only those without a run that counts")
    predicting.add_argument("--calibrate", action="store_true", help="measure the operators anew first")
    running = commands.add_parser("run")
    running.add_argument("folder", type=Path)
    running.add_argument("file", type=Path)
    running.add_argument("--only", nargs="*", help="names of cases; default: all of the file")
    reporting = commands.add_parser("report")
    reporting.add_argument("into", type=Path)
    reporting.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.command == "predict":
        print(predict(args.folder, args.into, _chosen(args), args.calibrate))
    elif args.command == "run":
        run(args.folder, args.file, args.only)
    else:
        text = report(args.into)
        print(text)
        if args.out:
            args.out.write_text(text + "\n")


def _chosen(args: argparse.Namespace) -> list[Case]:
    done = {o.case.name for o in _outcomes(args.into) if all(map(o.counts, PHASES))} if args.missing else set()
    return [case for case in CASES if (not args.only or case.name in args.only) and case.name not in done]


# Before


def predict(folder: Path, into: Path, cases: list[Case], calibrate: bool) -> Path:
    """Forecasts of the cases, and the machine's limits that they rest on; the file is to be committed."""
    for name, options in MAKE.items():
        if any(c.model == name for c in cases) and not (folder / name).exists():
            subprocess.run([sys.executable, str(Path(__file__).with_name("make_model.py")), "packed",
                            str(folder / name), *options], check=True)  # fmt: skip
    predictions = []
    memory = {
        key: _calibrated(folder / key[0], key[1], calibrate)
        for key in dict.fromkeys((c.model, c.threads) for c in cases)
    }
    for case in cases:
        plan, disk = _forecast(case, folder)
        predictions.append({
            "case": asdict(case), "predicted": plan["predicted"], "policy": plan["policy"],
            "limits": {"memory": memory[case.model, case.threads], "disk": disk},
        })  # fmt: skip
        print(f"{case.name}: {plan['predicted']['prefill_tokens_per_s']:.4g} and "
              f"{plan['predicted']['decode_tokens_per_s']:.4g} tokens/s", file=sys.stderr)  # fmt: skip
    into.mkdir(exist_ok=True)
    now = datetime.datetime.now(datetime.UTC)
    file = into / f"{now:%Y-%m-%dT%H%M%S}.json"
    file.write_text(
        json.dumps({"machine": machine_line(), "time": f"{now:%Y-%m-%d %H:%M}", "cases": predictions}, indent=1)
    )
    return file


def _calibrated(model: Path, threads: int, fresh: bool) -> float:
    """Bytes/s of the memory, at which the model's operators were measured."""
    options = ["--threads", str(threads), "--json", *(["--fresh"] if fresh else [])]
    curves = json.loads(_ciuic("calibrate", str(model), *options))["curves"]
    return statistics.mode(c["bandwidth"] for c in curves if c["bandwidth"] and c["threads"] == threads)


def _forecast(case: Case, folder: Path) -> tuple[dict[str, Any], float | None]:
    """By the planner alone, no model is opened but for its config; and the disk's rate as the plan has it. Made again
    where several looks at the disk say that the planner's own one met a bad moment."""
    budget = {"cpu": parse_bytes(case.memory)} if case.memory else {}
    with _disk_of(case, folder) as disk:
        for _ in range(PLANS):
            here = ciuic.DeviceManager(path=None)
            plan = ciuic.plan(
                ciuic.Model(str(folder / case.model)), here, workload=case.work, memory=budget, threads=case.threads
            )
            rate = plan.topology.device(plan.paging.disk).memory_bandwidth if plan.paging else None
            if rate is None or _same(rate, _disk_rate(disk) or rate):
                break
    return plan.to_dict(), rate


# After


def run(folder: Path, file: Path, only: list[str] | None) -> None:
    """The cases of a file of predictions, which must be committed as it is."""
    commit = _commit_of(file)
    for one in json.loads(file.read_text())["cases"]:
        case, then = Case(**one["case"]), one["limits"]
        if only and case.name not in only:
            continue
        before = _multiplication(case.threads)
        ours = _measured(case, folder, MOST_ROUNDS, then)
        naive = _measured(case, folder, NAIVE_ROUNDS, **NAIVE) if case.memory else []
        kept = {
            "case": one["case"], "commit": commit, "file": file.name, "predicted": one["predicted"], "then": then,
            "multiplication": (before, _multiplication(case.threads)),
            "ours": [asdict(s) for s in ours], "naive": [asdict(s) for s in naive],
        }  # fmt: skip
        with (file.parent / "runs.jsonl").open("a") as runs:
            runs.write(json.dumps(kept) + "\n")
        print(Outcome(kept), flush=True)


@dataclass(frozen=True, slots=True)
class Stretch:
    """Some passes between two looks at the machine."""

    memory: tuple[float, float]  # bytes/s, before and after
    disk: tuple[float, float] | None
    tokens: dict[str, int]  # by phase
    seconds: dict[str, float]

    def counts(self, then: dict[str, Any]) -> bool:
        """Whether the machine was before and after as it was taken to be when the forecast was made."""
        pairs = [(self.memory, then["memory"]), *([(self.disk, then["disk"])] if self.disk else [])]
        return all(_same(a, b) and _same(a, c, MOST_OFF) and _same(b, c, MOST_OFF) for (a, b), c in pairs)


def _same(one: float, other: float, most: float = MOST_CHANGE) -> bool:
    return abs(one / other - 1) <= most


def _measured(
    case: Case, folder: Path, rounds: int, then: dict[str, Any] | None = None, **settings: Any
) -> list[Stretch]:
    """So many rounds; of fewer, if enough of them counts as `then`, which each one waits for."""
    budget = {"cpu": case.memory} if case.memory else {}
    found: list[Stretch] = []
    with (
        ciuic.LLM(folder / case.model, threads=case.threads, memory=budget, workload=case.work, **settings) as llm,
        _disk_of(case, folder) as disk,
    ):
        if case.memory:
            _round(llm, case.work, disk, -1)  # fills the memory: forecasts are of what comes then
        for number in range(rounds):
            if then:
                _await(lambda: _same(_memory_rate(llm), then["memory"], MOST_OFF))
            found += _round(llm, case.work, disk, number)
            if then and number + 1 >= LEAST_ROUNDS and all(_is_enough(found, p, case, then) for p in PHASES):
                break
    return found


def _round(llm: ciuic.LLM, work: ciuic.Workload, disk: PageStream | None, number: int) -> list[Stretch]:
    """Prompts that nobody has seen, and then tokens; the memory is looked at after the prompts and every few passes."""
    source, vocab = random.Random(number), llm.model.spec.vocab_size
    prompts = [[source.randrange(vocab) for _ in range(work.prompt_tokens)] for _ in range(work.batch)]
    params = ciuic.SamplingParams(max_tokens=work.max_tokens, temperature=0.0, ignore_eos=True)
    before = _disk_rate(disk)
    looks = [(0, _memory_rate(llm))]
    for given, _ in enumerate(llm.stream(prompts, params), 1):
        if given == work.batch or given % (STRETCH * work.batch) == 0:
            looks.append((len(llm.recording(counts=False).steps), _memory_rate(llm)))
    steps, after = llm.trace.steps, _disk_rate(disk)
    looks.append((len(steps), _memory_rate(llm)))
    found = []
    for (first, one), (end, other) in pairwise(looks):
        tokens: dict[str, int] = defaultdict(int)
        seconds: dict[str, float] = defaultdict(float)
        for step in steps[first:end]:
            tokens[step.phase] += step.tokens
            seconds[step.phase] += step.end - step.start
        if tokens:
            found.append(
                Stretch((one, other), (before, after) if before and after else None, dict(tokens), dict(seconds))
            )
    return found


def _await(is_so: Callable[[], bool]) -> None:
    """For a while."""
    since = time.perf_counter()
    while not is_so() and time.perf_counter() - since < MOST_WAIT:
        time.sleep(0.5)


def _is_enough(found: list[Stretch], phase: str, case: Case, then: dict[str, Any]) -> bool:
    tokens = sum(s.tokens.get(phase, 0) for s in found if s.counts(then))
    return tokens >= case.batch * (LEAST_PASSES if phase == "decode" else LEAST_PROMPTS * case.prompt_tokens)


def _rate(stretches: list[Stretch], phase: str) -> float:
    """Tokens/s; NaN where there are none."""
    seconds = sum(s.seconds.get(phase, 0.0) for s in stretches)
    return sum(s.tokens.get(phase, 0) for s in stretches) / seconds if seconds else math.nan


def _memory_rate(llm: ciuic.LLM) -> float:
    """Bytes/s, the middle of three looks."""
    [cpu] = llm.schedule.topology.by_kind("CPU")
    return statistics.median(memory_rate(cpu, llm.threads) or 0.0 for _ in range(3))


@contextmanager
def _disk_of(case: Case, folder: Path) -> Iterator[PageStream | None]:
    with closing(PageStream(folder / case.model)) if case.memory else nullcontext() as disk:
        yield disk


def _disk_rate(disk: PageStream | None) -> float | None:
    """Bytes/s, the middle of some looks."""
    return None if disk is None else statistics.median(disk.rate(LOOK_SECONDS) for _ in range(LOOKS))


def _multiplication(threads: int) -> float:
    """Operations/s, the best of some looks."""
    return max(measure(threads).int8_peak for _ in range(LOOKS))


def _ciuic(*arguments: str) -> str:
    return subprocess.run([str(CIUIC), *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout


def _commit_of(file: Path) -> str:
    """The commit that holds the file as it is now."""
    if subprocess.run(["git", "diff", "--quiet", "HEAD", "--", str(file)]).returncode:
        raise SystemExit(f"{file} differs from what is committed; predictions come before runs: commit it")
    found = subprocess.run(["git", "log", "-1", "--format=%h", "--", str(file)], capture_output=True, text=True).stdout
    if not found:
        raise SystemExit(f"{file} is not committed; predictions come before runs: commit it")
    return found.strip()


# Report


@dataclass(frozen=True)
class Outcome:
    """What is kept of a configuration's forecast and runs."""

    kept: dict[str, Any]

    @property
    def case(self) -> Case:
        return Case(**self.kept["case"])

    @property
    def ours(self) -> list[Stretch]:
        return [Stretch(**s) for s in self.kept["ours"]]

    @property
    def steady(self) -> list[Stretch]:
        return [s for s in self.ours if s.counts(self.kept["then"])]

    def counts(self, phase: str) -> bool:
        return _same(*self.kept["multiplication"]) and _is_enough(self.ours, phase, self.case, self.kept["then"])

    def measured(self, phase: str) -> float:
        """Tokens/s of the stretches that count, where there are enough, else of all."""
        return _rate(self.steady if self.counts(phase) else self.ours, phase)

    def error(self, phase: str) -> float:
        """Relative: forecast / measured - 1."""
        return float(self.kept["predicted"][f"{phase}_tokens_per_s"] / self.measured(phase) - 1)

    @property
    def gain(self) -> float | None:
        """Our decode rate over the naive plan's, of all stretches of both."""
        naive = [Stretch(**s) for s in self.kept["naive"]]
        return _rate(self.ours, "decode") / _rate(naive, "decode") if naive else None

    def __str__(self) -> str:
        rates = (
            f"{phase} {self.kept['predicted'][f'{phase}_tokens_per_s']:6.4g} -> {self.measured(phase):6.4g} "
            f"({self.error(phase):+.0%}{'' if self.counts(phase) else ', void'})"
            for phase in PHASES
        )
        naive = f", {self.gain:.2f} x naive" if self.gain else ""
        return (
            f"{self.kept['commit']} {self.case.name:<40} {'   '.join(f'{rate:<38}' for rate in rates)}"
            f"{len(self.steady)} of {len(self.ours)} stretches{naive}"
        )


def _outcomes(into: Path) -> list[Outcome]:
    file = into / "runs.jsonl"
    return [Outcome(json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []


def report(into: Path) -> str:
    every = _outcomes(into)
    counting: dict[tuple[str, str], Outcome] = {}
    for one in every:
        for phase in filter(one.counts, PHASES):
            counting.setdefault((one.case.name, phase), one)  # the first that counts: no choice among several
    found = [abs(one.error(phase)) for (_, phase), one in counting.items()]
    rates = [abs(one.error(phase)) for one in every for phase in PHASES]
    gains = [one.gain for one in every if one.gain]
    stretches, steady = (sum(len(s) for s in kind) for kind in zip(*((o.ours, o.steady) for o in every), strict=True))
    both = sum(all((case.name, phase) in counting for phase in PHASES) for case in CASES)
    lines = [
        machine_line(),
        f"{both} of {len(CASES)} configurations of which both rates count, {len(found)} rates in all; "
        f"void: {len(rates) - sum(o.counts(p) for o in every for p in PHASES)} of {len(rates)} rates, "
        f"{stretches - steady} of {stretches} stretches",
        *([f"what counts: median error {statistics.median(found):.1%} (goal {MEDIAN_GOAL:.0%}), worst {max(found):.1%} "
           f"(goal {WORST_GOAL:.0%})"] if found else []),
        f"void rates too, of all their stretches: median error {statistics.median(rates):.1%}, worst {max(rates):.1%}",
        *([f"paging forced, {len(gains)} runs: decode {min(gains):.2f} to {max(gains):.2f} x the naive plan"]
          if gains else []),
        "",
        "commit of the forecast; forecast -> measured tokens/s",
        *map(str, every),
    ]  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    main()
