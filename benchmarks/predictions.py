"""How far forecasts are off on this machine: they are written down and committed before the runs that they are about.

    python benchmarks/predictions.py predict FOLDER [--only NAME ...]   # writes predictions/ROUND.json; commit that
    python benchmarks/predictions.py run FOLDER predictions/ROUND.json  # if committed; adds to runs.jsonl
    python benchmarks/predictions.py report predictions [--out FILE]

FOLDER holds the models (`--make` makes them). A configuration is run three times after its prediction, the median is
compared. A run is void if a limit of the machine that it depends on (memory, multiplication, for paged ones the disk)
moved by more than 5 % between before and after it. A limit is the best of some looks, not their median: a virtual
machine's memory is by turns half as fast and back within seconds. Void configurations are predicted anew and run again;
how many there were is said.

Where paging is forced, the naive plan (experts by LRU, read when they are needed) takes turns with ours."""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from limits import Limits, measure
from machine import machine_line

from ciuic_runtime.memory.read_rate import read_rate

MOST_CHANGE = 0.05
MEDIAN_GOAL, WORST_GOAL = 0.10, 0.20
LOOKS = 12  # at the machine, the best of which counts: memory may have two speeds, and which is met is luck
DISK_LOOKS = 3
ROUNDS = 3
NAIVE = ("--cache-policy", "lru", "--lookahead", "0")
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
    def options(self) -> list[str]:
        found = ["--prompt-tokens", str(self.prompt_tokens), "--max-tokens", str(self.max_tokens)]
        found += ["--batch", str(self.batch), "--threads", str(self.threads)]
        return found + (["--memory", f"cpu={self.memory}"] if self.memory else [])


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
    reporting = commands.add_parser("report")
    reporting.add_argument("into", type=Path)
    reporting.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.command == "predict":
        print(predict(args.folder, args.into, _chosen(args), args.calibrate))
    elif args.command == "run":
        run(args.folder, args.file)
    else:
        text = report(args.into)
        print(text)
        if args.out:
            args.out.write_text(text + "\n")


def _chosen(args: argparse.Namespace) -> list[Case]:
    done = {r["case"]["name"] for r in _runs(args.into) if not r["void"]} if args.missing else set()
    return [case for case in CASES if (not args.only or case.name in args.only) and case.name not in done]


# Before


def predict(folder: Path, into: Path, cases: list[Case], calibrate: bool) -> Path:
    """Forecasts of the cases, and the machine's limits of this moment; the file is to be committed."""
    for name, options in MAKE.items():
        if any(c.model == name for c in cases) and not (folder / name).exists():
            subprocess.run([sys.executable, str(Path(__file__).with_name("make_model.py")), "packed",
                            str(folder / name), *options], check=True)  # fmt: skip
    for model, threads in dict.fromkeys((c.model, c.threads) for c in cases):
        fresh = ["--fresh"] if calibrate else []
        _ciuic("calibrate", str(folder / model), "--threads", str(threads), *fresh)
    looks = {threads: asdict(_look(threads)) for threads in {c.threads for c in cases}}
    disks = {model: _disk_rate(folder / model) for model in {c.model for c in cases if c.memory}}
    predictions = []
    for case in cases:
        plan = _forecast(case, folder)
        predictions.append({
            "case": asdict(case), "predicted": plan["predicted"], "policy": plan["policy"],
            "limits": looks[case.threads], "disk": disks.get(case.model) if case.memory else None,
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


def _forecast(case: Case, folder: Path) -> dict[str, Any]:
    """By the planner alone, in a process of its own: no model is opened but for its config."""
    code = (
        "import sys, json, ciuic_runtime as c\n"
        "from ciuic_runtime.devices.units import parse_bytes\n"
        "model, prompt, new, batch, threads, memory = sys.argv[1:]\n"
        "work = c.Workload(int(prompt), int(new), int(batch))\n"
        "budget = {'cpu': parse_bytes(memory)} if memory else {}\n"
        "here = c.DeviceManager(path=None)\n"
        "plan = c.plan(c.Model(model), here, workload=work, memory=budget, threads=int(threads))\n"
        "print(json.dumps(plan.to_dict()))\n"
    )
    arguments = [str(folder / case.model), case.prompt_tokens, case.max_tokens, case.batch, case.threads, case.memory]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], check=True, capture_output=True, text=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _look(threads: int) -> Limits:
    """The best of some looks at the machine."""
    looks = [measure(threads) for _ in range(LOOKS)]
    return Limits(**{name: max(getattr(x, name) for x in looks) for name in asdict(looks[0])})


# After


def run(folder: Path, file: Path) -> None:
    """Every case of a file of predictions, which must be committed as it is."""
    commit = _commit_of(file)
    for one in json.loads(file.read_text())["cases"]:
        case = Case(**one["case"])
        before = _looks(case, folder)
        ours = _bench(case, folder)
        after = _looks(case, folder)
        naive = _bench(case, folder, NAIVE) if case.memory else None
        result = {
            "case": one["case"], "commit": commit, "file": file.name, "predicted": one["predicted"],
            "actual": ours, "naive": naive, "then": {"limits": one["limits"], "disk": one["disk"]},
            "before": before, "after": after,
        }  # fmt: skip
        result["void"] = why_void(result)
        with (file.parent / "runs.jsonl").open("a") as runs:
            runs.write(json.dumps(result) + "\n")
        print(_line(result), flush=True)


def _looks(case: Case, folder: Path) -> dict[str, Any]:
    disk = _disk_rate(folder / case.model) if case.memory else None
    return {"limits": asdict(_look(case.threads)), "disk": disk}


def _disk_rate(model: Path) -> float | None:
    found = [rate.bandwidth for _ in range(DISK_LOOKS) if (rate := read_rate(model))]
    return max(found, default=None)


def _bench(case: Case, folder: Path, more: tuple[str, ...] = ()) -> dict[str, Any]:
    options = [*case.options, "--rounds", str(ROUNDS), "--json", *more]
    report = json.loads(_ciuic("bench", str(folder / case.model), *options))
    compared = report["actual_against_forecast"]
    return {
        "prefill": report["prefill_tokens_per_s"], "decode": report["decode_tokens_per_s"],
        "recosted": compared["decode_tokens_per_s"]["recosted"], "spread": report["spread"],
    }  # fmt: skip


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


def why_void(result: dict[str, Any]) -> str:
    """ "" for a run that counts."""
    one, other = result["before"], result["after"]
    rates = {
        "memory": (one["limits"]["read_bandwidth"], other["limits"]["read_bandwidth"]),
        "multiplication": (one["limits"]["vnni_int8"], other["limits"]["vnni_int8"]),
        "disk": (one["disk"], other["disk"]),
    }
    moved = [f"{what} {b / a - 1:+.0%}" for what, (a, b) in rates.items() if a and b and abs(b / a - 1) > MOST_CHANGE]
    return ", ".join(moved)


# Report


def _runs(into: Path) -> list[dict[str, Any]]:
    file = into / "runs.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def errors(result: dict[str, Any]) -> Iterator[float]:
    """Relative errors of the prefill and the decode rate: forecast / actual - 1."""
    for phase in ("prefill", "decode"):
        yield result["predicted"][f"{phase}_tokens_per_s"] / result["actual"][phase] - 1


def _line(r: dict[str, Any]) -> str:
    p, a = r["predicted"], r["actual"]
    prefill, decode = errors(r)
    naive = f"  naive {r['naive']['decode']:.4g}" if r["naive"] else ""
    verdict = f"void: {r['void']}" if r["void"] else "counts"
    return (
        f"{r['case']['name']:<40} prefill {p['prefill_tokens_per_s']:7.4g} -> {a['prefill']:7.4g} ({prefill:+.0%})   "
        f"decode {p['decode_tokens_per_s']:6.4g} -> {a['decode']:6.4g} ({decode:+.0%}){naive}   {verdict}"
    )


def report(into: Path) -> str:
    runs = _runs(into)
    counting: dict[str, dict[str, Any]] = {}
    for one in runs:
        if not one["void"]:
            counting.setdefault(one["case"]["name"], one)  # the first that counts: no choice among several
    found = [abs(e) for r in counting.values() for e in errors(r)]
    every = [abs(e) for r in runs for e in errors(r)]
    voids = [r for r in runs if r["void"]]
    paged = [r for r in runs if r["naive"]]
    gains = [r["actual"]["decode"] / r["naive"]["decode"] for r in paged]
    lines = [
        machine_line(),
        f"{len(counting)} of {len(CASES)} configurations with a run that counts; {len(voids)} of {len(runs)} runs void",
        *([f"counting runs: median error {statistics.median(found):.1%} (goal {MEDIAN_GOAL:.0%}), "
           f"worst {max(found):.1%} (goal {WORST_GOAL:.0%})"] if found else []),
        f"all runs, void ones too: median error {statistics.median(every):.1%}, worst {max(every):.1%}",
        *([f"paging forced, {len({r['case']['name'] for r in paged})} configurations: decode {min(gains):.2f} to "
           f"{max(gains):.2f} x the naive plan"] if gains else []),
        "",
        "forecast -> measured tokens/s; commit of the forecast",
        *(f"{r['commit']} {_line(r)}" for r in runs),
    ]  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    main()
