"""How near forecasts for declared machines come to speeds that others published: every row of `published.csv` is
declared from data sheets and forecast by the cost model, with three constants fitted to all other rows.

    python benchmarks/published.py [--csv ../shared/published.csv] [--models ../shared/models] [--out FILE]

Fitted: the share of the bandwidth, the share of the int8 matrix rate, and the seconds per call on a GPU. All else is a
fact of the row, of the model's configuration, of `devices/catalogue.py`, or stated below with its reason."""

from __future__ import annotations

import argparse
import csv
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import product
from pathlib import Path

from ciuic_runtime.devices.catalogue import DRAM_REACHES, cpu_rates, find_device, find_link
from ciuic_runtime.devices.spec import DeviceSpec, Link, Topology
from ciuic_runtime.model import Model
from ciuic_runtime.schedulers.calibration import Calibration
from ciuic_runtime.schedulers.cost import CostModel
from ciuic_runtime.schedulers.graph import Phase, Step, Task, TaskGraph, Work

SHARED = Path(__file__).parents[2] / "shared"

# What the rows do not say

# Cores, vector units and base clock. These engines have no AMX kernels, so their Xeons count with VNNI; the virtual
# machine's clock is assumed.
CPUS = {
    "Ryzen 9 7950X": (16, "avx512_vnni_256", 4.5e9),
    "Xeon Gold 6454S, 1 socket": (32, "avx512_vnni", 2.2e9),
    "Xeon Gold 6454S, 2 sockets": (64, "avx512_vnni", 2.2e9),
    "Xeon 6980P": (128, "avx512_vnni", 2.0e9),
    "EPYC Rome": (64, "avx2", 2.25e9),
    "EPYC 9374F": (32, "avx512_vnni_256", 3.85e9),
    "2 cores Zen 5": (2, "avx512_bf16", 3.5e9),
}
# Bits per weight of routed experts and of everything else, where no file size is given. Files of 2 bits keep what is
# not a routed expert at 8: the size given is the whole.
BITS = {"IQ4_NL": (4.5, 4.5), "FP8": (8.0, 8.0), "MXFP4": (4.25, 8.0), "bf16": (16.0, 16.0)}
Q2_OTHERS = 8.5
PROMPT_PASS = 512  # tokens: llama-bench's prompt, llama.cpp's pass; p05 and p06 have 500
CONTEXT = 512  # where a row gives none
ALL_REDUCE = 15e-6  # s, of one token's activations among eight GPUs on NVLink; two in each layer
PAGING_READS = 2.0  # bytes that the kernel's paging reads of a mapped file per byte needed (measured with p14)
CPU_CALL = 5e-6  # s per operator call on a CPU; few and short beside the rest
SYSTEM_MEMORY = 1e9  # bytes of memory that are no page cache
LEVEL = 0.9  # of the stated ranges

# The grid on which constants are sought, in steps of about 5 to 12 %.


def _grid(low: float, high: float, num: int) -> list[float]:
    return [low * (high / low) ** (i / (num - 1)) for i in range(num)]


@dataclass(frozen=True, slots=True)
class Constants:
    memory: float  # share of the bandwidth, of CPUs and GPUs
    compute: float  # share of the int8 matrix rate, of both
    gpu_call: float  # s per operator call on a GPU; on CPUs it is CPU_CALL

    def calibration(self, devices: Iterable[DeviceSpec]) -> Calibration:
        devices = tuple(devices)
        return Calibration(
            compute_utilisation={d.name: self.compute for d in devices},
            memory_utilisation={d.name: self.memory for d in devices},
            launch_overhead={d.name: self.call(d.kind) for d in devices},
        )

    def call(self, kind: str) -> float:
        return self.gpu_call if kind == "GPU" else CPU_CALL


GRID = [Constants(*c) for c in product(_grid(0.3, 1.0, 25), _grid(0.03, 0.5, 28), _grid(2e-6, 6e-5, 20))]
RAW = Constants(memory=1.0, compute=1.0, gpu_call=0.0)  # the baseline: data sheets as they are


# One row of the table


@dataclass(frozen=True)
class Row:
    id: str
    model: str
    precision: str
    engine: str
    placement: str
    cpu: str
    cpu_bandwidth: float  # bytes/s that a stream gets; 0: no CPU takes part
    gpus: str
    batch: int
    context: int
    models: Path

    @property
    def num_gpus(self) -> int:
        return int(self.gpus.partition(" x ")[0]) if " x " in self.gpus else 1

    @property
    def experts_on_cpu(self) -> bool:
        return self.placement.startswith("experts on cpu")

    @cached_property
    def topology(self) -> Topology:
        """The declared machine; eight GPUs with tensor parallelism are one of eight times everything."""
        devices, links = [], []
        if self.cpu:
            cores, isa, clock = next(facts for name, facts in CPUS.items() if self.cpu.startswith(name))
            rates = cpu_rates(cores, isa, clock)
            devices.append(DeviceSpec("cpu", "CPU", memory_bandwidth=self.cpu_bandwidth, matrix_rates=rates))
        if self.gpus:
            known = find_device(re.sub(r"^\d+ x | \(.*\)$", "", self.gpus))
            gpu, n = known.device("cuda:0"), self.num_gpus
            rates = {dtype: rate * n for dtype, rate in gpu.matrix_rates.items()}
            devices.append(replace(gpu, memory_bandwidth=(gpu.memory_bandwidth or 0.0) * n, matrix_rates=rates))
            pcie = find_link("pcie4-x16" if "PCIe 4" in self.gpus else known.pcie)
            links = [pcie.link("cpu", "cuda:0"), pcie.link("cuda:0", "cpu")] if self.cpu else []
        if (disk := re.search(r"disk ([\d.]+)-([\d.]+) GB/s", self.precision)) is not None:
            devices.append(DeviceSpec("disk", "DISK"))
            links.append(Link("disk", "cpu", (float(disk[1]) + float(disk[2])) / 2 * 1e9))
        return Topology(tuple(devices), tuple(links))

    @cached_property
    def graph(self) -> TaskGraph:
        """The model's, its weights' bytes scaled to the row's precision."""
        graph = _graph(self.models / f"{self.model}.json")
        routed, others = self._bits(graph)
        return replace(graph, tasks=tuple(self._scaled(t, routed if t.num_experts else others) for t in graph))

    def _bits(self, graph: TaskGraph) -> tuple[float, float]:
        """Per weight: of routed experts, of everything else."""
        format = self.precision.split()[0]
        size = re.search(r"\(([\d.]+) (GB|GiB)", self.precision)
        if format in BITS or size is None:
            return BITS[format]
        nbytes = float(size[1]) * {"GB": 1e9, "GiB": 2**30}[size[2]]
        if format != "Q2":
            return (nbytes * 8 / graph.parameters,) * 2
        routed = sum(t.nbytes / 2 for t in graph if t.num_experts)
        return (nbytes * 8 - Q2_OTHERS * (graph.parameters - routed)) / routed, Q2_OTHERS

    def _scaled(self, task: Task, bits: float) -> Task:
        """Latents have no heads to divide among GPUs: each reads all of them. V4's attention reads at most what it
        caches, which is compressed."""
        positions = float(self.num_gpus)
        if "v4" in self.model and task.kind == "attention":
            positions *= task.kv_bytes_per_token / task.decode.bytes_per_position

        def work(w: Work) -> Work:
            return replace(
                w,
                bytes_fixed=w.bytes_fixed * bits / 16,
                bytes_per_expert=w.bytes_per_expert * bits / 16,
                bytes_per_position=w.bytes_per_position * positions,
                flops_per_pair=w.flops_per_pair * positions / self.num_gpus,
            )

        return replace(task, prefill=work(task.prefill), decode=work(task.decode))

    def step(self, phase: Phase) -> Step:
        """A decode step at the row's context, or the middle one of its prompt's passes."""
        if phase == "decode":
            return Step.decode(max(1, self.context), self.batch)
        return Step.prefill(PROMPT_PASS, 1, max(0, (self.context - PROMPT_PASS) // 2))

    def cost(self, calibration: Calibration) -> CostModel:
        dtype = "bfloat16" if self.precision.startswith("bf16") else "int8"  # the packed formats multiply int8
        return CostModel(self.topology, dtype, calibration)


@cache
def _graph(config: Path) -> TaskGraph:
    return Model(config, format="bfloat16").graph


# Forecasts


@dataclass(frozen=True)
class Way:
    """One way to run a step: the device of each task, and the seconds that no constant changes."""

    where: Callable[[Task], DeviceSpec]
    fixed: float


@dataclass(frozen=True)
class Figure:
    """One published speed, and what its forecast is made of."""

    row: Row
    phase: Phase
    published: float  # tokens/s

    @property
    def name(self) -> str:
        return f"{self.row.id} {self.phase}"

    def forecast(self, constants: Constants) -> float:
        """Tokens/s by the cost model, the fastest way that the placement allows."""
        cost = self.row.cost(constants.calibration(self.row.topology.compute_devices))
        step = self.row.step(self.phase)
        seconds = (w.fixed + sum(cost.task(t, w.where(t), step).seconds for t in self.row.graph) for w in self.ways)
        return step.tokens / min(seconds)

    @cached_property
    def ways(self) -> list[Way]:
        topology, step = self.row.topology, self.row.step(self.phase)
        devices = {d.kind: d for d in topology.devices}
        dense = devices.get("GPU") or devices["CPU"]
        layers = [t for t in self.row.graph if t.num_experts]
        if not self.row.experts_on_cpu:
            return [Way(lambda task: dense, self._disk_seconds() + self._all_reduce_seconds())]
        cost, cpu = self.row.cost(Calibration()), devices["CPU"]
        hidden = self.row.graph.hidden_bytes_per_token * step.tokens
        there = sum(cost.transfer(dense.name, "cpu", hidden) + cost.transfer("cpu", dense.name, hidden) for _ in layers)
        beside = Way(lambda task: cpu if task.num_experts else dense, there)
        if self.phase == "decode":
            return [beside]
        nbytes = [t.expected_experts(step.tokens) * t.prefill.bytes_per_expert for t in layers]
        streamed = Way(lambda task: dense, sum(cost.transfer("cpu", dense.name, n) for n in nbytes))
        return [beside, streamed]

    def _all_reduce_seconds(self) -> float:
        return 2 * len(self.row.graph.layers) * ALL_REDUCE if self.row.num_gpus > 1 else 0.0

    def _disk_seconds(self) -> float:
        """Reads of the routed experts that the page cache does not hold, between which nothing is computed."""
        memory = re.search(r"([\d.]+) GiB RAM", self.row.precision)
        if memory is None:
            return 0.0
        graph, step = self.row.graph, self.row.step(self.phase)
        layers = [t for t in graph if t.num_experts]
        held = sum(t.work(self.phase).bytes_per_expert * t.num_experts for t in layers)
        others = sum(t.work(self.phase).bytes_fixed for t in graph)
        resident = min(1.0, (float(memory[1]) * 2**30 - SYSTEM_MEMORY - others) / held)
        needed = sum(t.work(self.phase).bytes_per_expert * t.expected_experts(step.tokens) for t in layers)
        return self.row.cost(Calibration()).transfer("disk", "cpu", PAGING_READS * (1 - resident) * needed)

    # The same forecast, fast enough for a fit: equal tasks are costed once, at constants of one.

    @cached_property
    def terms(self) -> list[tuple[float, list[tuple[int, str, float, float, float]]]]:
        """Per way: fixed seconds, and (count, kind of device, compute s, memory s, calls) of its distinct tasks."""
        devices = self.row.topology.compute_devices
        ones = {d.name: 1.0 for d in devices}
        cost, step = self.row.cost(Calibration(ones, ones, ones)), self.row.step(self.phase)
        found = []
        for way in self.ways:
            tasks = ((way.where(t).kind, cost.task(t, way.where(t), step)) for t in self.row.graph)
            counts = Counter((kind, c.compute_s, c.memory_s, c.overhead_s) for kind, c in tasks)
            found.append((way.fixed, [(n, *distinct) for distinct, n in counts.items()]))
        return found

    def log_error(self, constants: Constants) -> float:
        """log(forecast / published)."""
        calls = {kind: constants.call(kind) for kind in ("CPU", "GPU")}
        seconds = min(
            fixed
            + sum(n * (max(c / constants.compute, m / constants.memory) + calls[k] * o) for n, k, c, m, o in tasks)
            for fixed, tasks in self.terms
        )
        return math.log(self.row.step(self.phase).tokens / seconds / self.published)


def read_figures(table: Path, models: Path) -> list[Figure]:
    with table.open(newline="") as file:
        return [figure for line in csv.DictReader(file) for figure in _figures(line, models)]


def _figures(line: dict[str, str], models: Path) -> list[Figure]:
    reached = DRAM_REACHES if line["cpu_bandwidth_kind"] == "nominal" else 1.0
    row = Row(
        id=line["id"],
        model=line["model"],
        precision=line["precision"],
        engine=re.split(r"[ ,]", line["engine"])[0],
        placement=line["placement"],
        cpu=line["cpu"],
        cpu_bandwidth=float(line["cpu_memory_gbps"] or 0) * 1e9 * reached,
        gpus=line["gpus"],
        batch=int(line["batch"]),
        context=int(line["context_tokens"] or CONTEXT),
        models=models,
    )
    phases: tuple[Phase, ...] = ("decode", "prefill")
    rates = {phase: line[f"{phase}_tokens_per_s"] for phase in phases}
    return [Figure(row, phase, float(rate)) for phase, rate in rates.items() if rate]


# The fit, and how well it forecasts what it has not seen


@dataclass(frozen=True, slots=True)
class Forecast:
    figure: Figure
    constants: Constants  # fitted without the figure's row
    rate: float  # tokens/s
    factor: float  # of the range's ends

    @property
    def error(self) -> float:
        """Factor by which it is off, either way."""
        return max(self.rate / self.figure.published, self.figure.published / self.rate)

    @property
    def covered(self) -> bool:
        return self.error <= self.factor


class Fit:
    """Least absolute log errors, on the grid, over whichever figures are asked for."""

    def __init__(self, figures: Sequence[Figure]) -> None:
        self.figures = figures
        self._errors = [[figure.log_error(constants) for figure in figures] for constants in GRID]

    def without(self, left_out: Callable[[Figure], bool]) -> tuple[Constants, list[float]]:
        """The constants that fit all other figures best, and those figures' log errors."""
        kept = [i for i, figure in enumerate(self.figures) if not left_out(figure)]
        best = min(range(len(GRID)), key=lambda g: sum(abs(self._errors[g][i]) for i in kept))
        return GRID[best], [self._errors[best][i] for i in kept]


def leave_one_out(fit: Fit, group: Callable[[Figure], str]) -> list[Forecast]:
    """Each figure forecast from the figures of other groups (rows, or engines)."""
    fitted = {name: fit.without(lambda f, name=name: group(f) == name) for name in {group(f) for f in fit.figures}}
    found = []
    for figure in fit.figures:
        constants, errors = fitted[group(figure)]
        factor = math.exp(conformal_quantile([abs(e) for e in errors], LEVEL))
        found.append(Forecast(figure, constants, figure.forecast(constants), factor))
    return found


def conformal_quantile(errors: Sequence[float], level: float) -> float:
    """Below which a further error lies with this probability, if it is like these (split conformal prediction, Lei et
    al. 2018)."""
    rank = math.ceil(level * (len(errors) + 1))
    return sorted(errors)[min(rank, len(errors)) - 1]


def median_error(forecasts: Iterable[Forecast], phase: Phase | None = None) -> float:
    return statistics.median(f.error for f in forecasts if phase in (None, f.figure.phase))


def coverage(forecasts: Iterable[Forecast], phase: Phase | None = None) -> float:
    """The share of figures that lie in their range."""
    return statistics.mean(f.covered for f in forecasts if phase in (None, f.figure.phase))


def rows_covered(forecasts: Iterable[Forecast]) -> float:
    """The share of rows of which every figure does."""
    rows: dict[str, bool] = {}
    for f in forecasts:
        rows[f.figure.row.id] = rows.get(f.figure.row.id, True) and f.covered
    return statistics.mean(rows.values())


# The report


def report(figures: Sequence[Figure]) -> list[str]:
    fit = Fit(figures)
    by_row, by_engine = (leave_one_out(fit, group) for group in (lambda f: f.row.id, lambda f: f.row.engine))
    lines = [_line(f) for f in by_row]
    phases: dict[str, Phase | None] = {"all": None, "decode": "decode", "prefill": "prefill"}
    for left_out, found in (("row", by_row), ("engine", by_engine)):
        lines += [
            f"without its own {left_out}, {what:8} median error factor {median_error(found, phase):.2f}   "
            f"in their range {coverage(found, phase):.0%}"
            for what, phase in phases.items()
        ]
        width = statistics.median(f.factor for f in found)
        lines.append(
            f"without its own {left_out}, rows with every figure in its range: {rows_covered(found):.0%}   "
            f"ranges in the middle x / {width:.2f}"
        )
    raw = statistics.median(math.exp(abs(f.log_error(RAW))) for f in figures)
    best, errors = fit.without(lambda f: False)
    q = math.exp(conformal_quantile([abs(e) for e in errors], LEVEL))
    lines.append(f"data sheets as they are (shares of 1, calls free): median error factor {raw:.2f}")
    lines.append(
        f"fitted to all rows: {best.memory:.3f} of the bandwidth, {best.compute:.3f} of the int8 rate, "
        f"{best.gpu_call * 1e6:.1f} us a call on a GPU; range x / {q:.2f}"
    )
    return lines


def _line(f: Forecast) -> str:
    low, high = f.rate / f.factor, f.rate * f.factor
    raw = f.figure.forecast(RAW)
    return (
        f"{f.figure.name:12} {f.figure.row.engine:12} forecast {f.rate:8.4g} ({low:8.4g} to {high:8.4g}) tok/s   "
        f"published {f.figure.published:7.4g}   {f.error:.2f}x {'' if f.covered else 'OUTSIDE '}  raw {raw:8.4g}"
    ).rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=SHARED / "published.csv")
    parser.add_argument("--models", type=Path, default=SHARED / "models", help="folder of their config.json files")
    parser.add_argument("--out", type=Path, help="results file (Markdown) to append to")
    args = parser.parse_args()
    lines = report(read_figures(args.csv, args.models))
    print("\n".join(lines))
    if args.out is not None:
        with args.out.open("a") as file:
            file.write(
                "\n## Published speeds\n\n`python benchmarks/published.py`\n\n```\n" + "\n".join(lines) + "\n```\n"
            )


if __name__ == "__main__":
    main()
