"""Runs a model's operators on this machine, at the sizes of decoding and of prompts, and writes what share of the
machine's limits they reach. Times whole tasks as the executor runs them; which plan that makes, it does not know."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ciuic_runtime.calibrate_paging import can_be_paged, measure_paging
from ciuic_runtime.curves import can_be_calibrated, is_calibrated, kernels_of, load_calibration, store_curves
from ciuic_runtime.devices.backends import open_backend
from ciuic_runtime.devices.bandwidth import memory_rate
from ciuic_runtime.devices.limits import spread
from ciuic_runtime.devices.measure import matrix_rates, torch_threads
from ciuic_runtime.devices.spec import DeviceSpec, Topology
from ciuic_runtime.devices.threads import with_threads
from ciuic_runtime.engine.llm import LLM
from ciuic_runtime.engine.sampling import SamplingParams
from ciuic_runtime.model import Model
from ciuic_runtime.models.graph import build_graph
from ciuic_runtime.models.spec import ModelSpec
from ciuic_runtime.models.synthetic import SyntheticCheckpoint
from ciuic_runtime.ops.native import REFERENCE
from ciuic_runtime.schedulers.calibration import (
    AROUND,
    BETWEEN,
    ENDS,
    GUESS,
    PAGE,
    SAMPLE,
    Calibration,
    Curve,
    Point,
    operator_of,
    size_of,
)
from ciuic_runtime.schedulers.cost import CostModel, parts
from ciuic_runtime.schedulers.graph import PHASES, Task, TaskGraph
from ciuic_runtime.timed_passes import CONTEXTS, PROMPTS, SHORT, Pass, Progress, Timed, passes_of, time_passes

MODEL_BYTES = 3 << 29  # of the model that is measured: the whole one, or a few of its layers


def measure_curves(
    model: Model, device: DeviceSpec, threads: int, kernels: str = "auto", progress: Progress | None = None,
    seed: int = 0,
) -> tuple[Curve, ...]:  # fmt: skip
    """The curves of a model's operators in its format on a CPU with so many threads, and of the limits that the CPU has
    meanwhile. About a minute.

    Weights are random, and of a large model only some layers are made. Raises OutOfMemory where not even these fit."""
    say = progress or (lambda what: None)
    spec = measured_part(model.spec, model.format)
    contexts = [c for c in CONTEXTS if c <= spec.max_positions]
    longest = max([*contexts, min(max(PROMPTS), spec.max_positions)])
    say(f"measuring operators of {model.spec.name} in {model.format} with {threads} threads on {device.name}")
    with LLM(
        SyntheticCheckpoint(spec, seed), dtype=model.format, devices=Topology((device,)), threads=threads,
        kernels=kernels, max_model_len=longest, max_num_seqs=4, prefill_chunk=max(PROMPTS), paged=kernels != REFERENCE,
    ) as llm:  # fmt: skip
        before = _matrix_rates(device)
        passes = passes_of(spec, contexts, longest)
        timed, rate = time_passes(llm, passes, seed, say, lambda: memory_rate(device, threads))
        sampled = _timed_samples(llm)
        after = _matrix_rates(device)
    means = {dtype: (rate + after.get(dtype, rate)) / 2 for dtype, rate in before.items()}
    [used] = with_threads(Topology((replace(device, matrix_rates=means),)), threads).devices
    if rate is not None:
        used = replace(used, memory_bandwidth=rate)
    return tuple(_Fit(llm.model.graph, used, timed, sampled).curves())


def _matrix_rates(device: DeviceSpec) -> dict[str, float]:
    """At this moment: shares are of limits measured beside them, so that they are right on a busy machine too."""
    with torch_threads(device.cores):
        return matrix_rates(open_backend(device), 0.5)[0]


def measured_part(spec: ModelSpec, format: str) -> ModelSpec:
    """The model itself, or as many of its layers (a dense one first, if it has such) and experts as are worth the time
    to make them."""
    dense = min(1, spec.moe.first_dense) if spec.moe else 0
    moe = replace(spec.moe, first_dense=dense) if spec.moe else None
    some = replace(spec, num_layers=min(2, spec.num_layers), moe=moe)
    while some.num_layers < spec.num_layers:
        more = replace(some, num_layers=some.num_layers + 1)
        if build_graph(more, format).nbytes > MODEL_BYTES:
            break
        some = more
    else:
        return spec
    while some.moe and build_graph(some, format).nbytes > MODEL_BYTES:
        half = some.moe.num_experts // 2
        if half < 2 * some.moe.experts_per_token:
            break
        some = replace(some, moe=replace(some.moe, num_experts=half, num_groups=1, groups_per_token=1))
    return some


def _timed_samples(llm: LLM) -> dict[int, float]:
    """Seconds to choose the next tokens, by the number of sequences."""
    found = {}
    for batch in (1, llm.max_num_seqs):
        llm.generate([[1, 2, 3]] * batch, SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True))
        found[batch] = statistics.median(
            e.seconds for e in llm.trace.events if e.kind == "sample" and e.phase == "decode"
        )
    return found


class _Fit:
    """From times to shares of the limits."""

    def __init__(
        self, graph: TaskGraph, device: DeviceSpec, timed: Mapping[Pass, Timed], sampled: Mapping[int, float]
    ) -> None:
        self.graph, self.device, self.timed, self.sampled = graph, device, timed, sampled
        cost = CostModel(Topology((device,)), graph.format)
        self.peak, self.bandwidth = cost.peak(device), cost.peak_bandwidth(device)
        one = next(p for p in timed if p.phase == "decode")
        norm = next(t for t in graph if t.kind == "norm")
        part, _ = parts(norm, (one.step,), 0.0)
        self.call = max(0.0, timed[one].median("norm") - (part.weights + part.other) / self.bandwidth)  # s per call

    def curves(self) -> Iterator[Curve]:
        kinds = {task.kind: task for task in reversed(self.graph.tasks)}  # the first of each; they have one size
        for kind, task in kinds.items():
            if kind != "attention":
                yield from self._curve(task, [p for p in self.timed if self._counts(task, p)])
                continue
            for phase in ("decode", "prefill"):
                passes = [p for p in self.timed if p.phase == phase]
                scores = self._scores(task, passes)
                yield from filter(None, (scores,))
                yield from self._curve(task, [p for p in passes if self._is_short(p)], scores)
        for what, seconds in next(t for p, t in self.timed.items() if p.phase == "decode").own.items():
            yield self._of(what, 0.0, statistics.median(seconds), ())
        logits = self.graph.tasks[-1].output_bytes_per_token
        points = tuple(Point(n, 0.0, logits * n / (s * self.bandwidth)) for n, s in sorted(self.sampled.items()))
        yield self._of(SAMPLE, logits, 0.0, points)

    def _of(self, operator: str, size: float, overhead: float, points: tuple[Point, ...]) -> Curve:
        device = self.device
        return Curve(
            device.name, device.threads, self.graph.format, operator, size, overhead, points, self.peak, self.bandwidth,
            time.time(),
        )  # fmt: skip

    def _counts(self, task: Task, one: Pass) -> bool:
        """Passes with short contexts; of what only sampled sequences need, a pass for each number of them."""
        return self._is_short(one) and (one.phase == "decode" or not task.prefill.per_sequence)

    @staticmethod
    def _is_short(one: Pass) -> bool:
        return max(at for _, at in one.sequences) < SHORT

    def _curve(self, task: Task, passes: Sequence[Pass], scores: Curve | None = None) -> Iterator[Curve]:
        """Decodes and prompts of about as many rows are one point."""
        overhead = min(self.call, *(self.timed[p].median(task.kind) / 2 for p in passes))
        found: dict[float, list[Point]] = defaultdict(list)
        for one in passes:
            timed = self.timed[one]
            part, grows = parts(task, (one.step,), statistics.mean(timed.touched))
            seconds = [s - overhead - self._seconds(scores, grows) for s in timed.seconds[task.kind]]
            middle = max(statistics.median(seconds), 0.05 * timed.median(task.kind))
            compute = max(part.flops, 1.0) / (middle * self.peak)
            memory = max(part.weights + part.other, 1.0) / (middle * self.bandwidth)
            found[float(f"{part.rows:.2g}")].append(Point(part.rows, compute, memory, spread(timed.seconds[task.kind])))
        points = tuple(_mean(found[rows]) for rows in sorted(found))
        yield self._of(operator_of(task, passes[0].phase), size_of(task), overhead, points)

    def _seconds(self, scores: Curve | None, grows: Sequence[Any]) -> float:
        if scores is None:
            return 0.0
        total = 0.0
        for part in grows:
            compute, memory = scores.at(part.rows)
            total += max(part.flops / (self.peak * compute), part.other / (self.bandwidth * memory))
        return total

    def _scores(self, task: Task, passes: Sequence[Pass]) -> Curve | None:
        """What grows with the context, by the difference to the pass of as many tokens that attends least."""
        points = []
        for one in passes:
            base = min((p for p in passes if p.tokens == one.tokens), key=lambda p: p.step.pairs)
            if base is one:
                continue
            more = self.timed[one].median("attention") - self.timed[base].median("attention")
            [grows], [before] = (parts(task, (p.step,), 0.0)[1] for p in (one, base))
            if more > 0.02 * self.timed[one].median("attention"):
                compute = (grows.flops - before.flops) / (more * self.peak)
                memory = grows.other * compute * self.peak / (grows.flops * self.bandwidth)  # the same time
                points.append(Point(grows.rows, compute, memory, spread(self.timed[one].seconds["attention"])))
        if not points:
            return None
        work = task.work(passes[0].phase)
        return self._of(
            f"scores.{passes[0].phase}", work.flops_per_pair, 0.0, tuple(sorted(points, key=lambda p: p.rows))
        )


def _mean(points: Sequence[Point]) -> Point:
    mean = statistics.geometric_mean
    return Point(
        mean(p.rows for p in points), mean(p.compute for p in points), mean(p.memory for p in points),
        max(p.spread for p in points),
    )  # fmt: skip


def calibrate(
    model: Model, topology: Topology, threads: int | None = None, kernels: str = "auto", fresh: bool = False,
    progress: Progress | None = None,
) -> Calibration:  # fmt: skip
    """Measures what is not known yet of the model's operators on this machine's CPUs (`fresh`: all of them anew), and
    keeps it for later runs, which then forecast with it."""
    chosen = kernels_of(model, kernels)
    known = load_calibration(model, topology, chosen)
    for device in filter(can_be_calibrated, topology.devices):
        [used] = with_threads(Topology((device,)), threads).devices
        if fresh or not is_calibrated(model, used, known):
            store_curves(device, chosen, measure_curves(model, device, used.threads, chosen, progress))
            known = load_calibration(model, topology, chosen)
        if can_be_paged(model, chosen) and (fresh or not _knows_paging(model, used, known)):
            if progress:
                progress(f"measuring what it costs to read pages of {model.spec.name} meanwhile")
            cost = CostModel(Topology((used,)), model.format, known)
            store_curves(device, chosen, measure_paging(model, used, used.threads, chosen, cost))
    return load_calibration(model, topology, chosen)


def _knows_paging(model: Model, device: DeviceSpec, known: Calibration) -> bool:
    found = known.curve(device.name, device.threads, model.format, PAGE, 0.0)
    return found is not None and found.threads == device.threads


def curves_of(model: Model, topology: Topology, calibration: Calibration) -> list[Curve]:
    """Those curves that forecasts of the model go by."""
    found: dict[int, Curve] = {}
    logits = model.graph.tasks[-1].output_bytes_per_token
    wanted = {(BETWEEN, 0.0), (ENDS, 0.0), (AROUND, 0.0), (PAGE, 0.0), (GUESS, 0.0), (SAMPLE, logits)}
    for task in model.graph:
        for phase in PHASES:
            wanted.add((operator_of(task, phase), size_of(task)))
            if task.work(phase).flops_per_pair:
                wanted.add((f"scores.{phase}", task.work(phase).flops_per_pair))
    for device in topology.devices:
        for operator, size in wanted:
            curve = calibration.curve(device.name, device.threads, model.format, operator, size)
            if curve is not None:
                found[id(curve)] = curve
    return list(found.values())
