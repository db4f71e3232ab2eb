"""What a pass costs besides its tasks where pages are missing: guessing experts, and having each page read.
Carries out some layers of a packed model in half of their memory; operators are `calibrate.py`'s business."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path

import torch

from ciuic_runtime.devices.backends import open_backend
from ciuic_runtime.devices.spec import DeviceSpec, Topology
from ciuic_runtime.engine.executor import LocalExecutor
from ciuic_runtime.engine.host import DEFAULT_LOOKAHEAD
from ciuic_runtime.engine.recorder import Recorder
from ciuic_runtime.memory.hierarchy import MemoryHierarchy
from ciuic_runtime.memory.read_rate import READER
from ciuic_runtime.model import Model
from ciuic_runtime.models.batch import Chunk, make_batch
from ciuic_runtime.models.checkpoint import Checkpoint, open_checkpoint
from ciuic_runtime.ops.native import REFERENCE
from ciuic_runtime.schedulers.calibration import GUESS, PAGE, Curve
from ciuic_runtime.schedulers.cost import CostModel
from ciuic_runtime.schedulers.graph import Task, TaskGraph
from ciuic_runtime.schedulers.policies.trivial import all_on
from ciuic_runtime.schedulers.recording import COMPUTE, READ, WAIT, Recording
from ciuic_runtime.schedulers.stages import part_of

LAYERS = 6  # at most, with routed experts
MODEL_BYTES = 3 << 29  # that they have together, at most, but for:
LEAST_LAYERS = DEFAULT_LOOKAHEAD + 1
WARM, PASSES, SECONDS = 50, 50, 5.0  # as many as fit into the time; pages are verified when they come the first time


def can_be_paged(model: Model, kernels: str) -> bool:
    """Whether its pages come from disk as they are, by the compiled reader."""
    packed = model.spec.packed and Path(model.source).is_dir()
    return bool(packed and model.spec.moe and kernels != REFERENCE and find_spec(READER))


def measure_paging(
    model: Model, device: DeviceSpec, threads: int, kernels: str, cost: CostModel, seed: int = 0
) -> tuple[Curve, ...]:
    """Seconds for each page that is read and for each layer that is guessed, on a CPU with so many threads, beyond what
    `cost` knows of passes that miss nothing. A few seconds."""
    checkpoint = open_checkpoint(model.source)
    try:
        graph = some_layers(model.graph)
        guesses = sum(bool(task.num_experts) for task in graph)
        known = cost.besides_tasks(device, len(graph.tasks))
        executor, recorder = _executor(model, graph, checkpoint, device, threads, kernels)
        try:
            same, others = _decode(executor, recorder, model.spec.hidden_size, seed)
        finally:
            executor.close()
    finally:
        checkpoint.close()
    page, guess = page_and_guess([(p.reads, p.besides - known) for p in (same, others)], guesses)
    return tuple(
        Curve(device.name, threads, model.format, what, 0.0, seconds, measured=time.time())
        for what, seconds in ((PAGE, page), (GUESS, guess))
    )


def page_and_guess(measured: Sequence[tuple[float, float]], guesses: int) -> tuple[float, float]:
    """Seconds for each page and for each guess that come nearest to what passes took (pages that were read, seconds),
    each of which guessed so often; never negative."""
    from scipy.optimize import nnls

    pages, seconds = zip(*measured, strict=True)
    (page, guess), _ = nnls([(read, guesses) for read in pages], [max(0.0, took) for took in seconds])
    return float(page), float(guess)


def some_layers(graph: TaskGraph) -> TaskGraph:
    """The first layers with routed experts, as a part that is given what comes before them."""
    first = next(task.layer for task in graph if task.num_experts)
    layers: dict[int, list[Task]] = {}
    for task in graph:
        if task.layer is not None and first is not None and task.layer >= first:
            layers.setdefault(task.layer, []).append(task)
    taken: list[Task] = []
    for number, tasks in enumerate(list(layers.values())[:LAYERS]):
        if number >= LEAST_LAYERS and sum(t.nbytes for t in (*taken, *tasks)) > MODEL_BYTES:
            break
        taken += tasks
    before = list(takewhile(lambda task: task is not taken[0], graph))
    return part_of(graph, taken, (before[-1].name,))


def _executor(
    model: Model, graph: TaskGraph, checkpoint: Checkpoint, device: DeviceSpec, threads: int, kernels: str
) -> tuple[LocalExecutor, Recorder]:
    """Of these layers, in half of their memory."""
    topology, recorder = Topology((device,)), Recorder()
    backend = open_backend(device, topology)
    schedule = all_on(graph, topology, CostModel(topology, graph.format), device=device.name)
    half = min(sum(task.nbytes for task in graph) // 2, MODEL_BYTES)
    memory = MemoryHierarchy(checkpoint, memory={device.name: half}, format=model.format, graph=graph, backend=backend)
    executor = LocalExecutor(
        model.spec, graph, schedule, checkpoint, {device.name: backend}, 1, recorder, None, kernels, threads,
        memory=memory, lookahead=DEFAULT_LOOKAHEAD,
    )  # fmt: skip
    return executor, recorder


@dataclass
class _Passes:
    seconds: list[float] = field(default_factory=list)  # besides computing and waiting
    pages: list[int] = field(default_factory=list)  # that were read

    def note(self, pass_: Recording) -> None:
        [step], rows = pass_.steps, pass_.rows
        ours = rows[(rows["kind"] == COMPUTE) | (rows["kind"] == WAIT)]
        self.seconds.append(step.end - step.start - float((ours["end"] - ours["start"]).sum()))
        self.pages.append(int((rows["kind"] == READ).sum()))

    @property
    def besides(self) -> float:
        return statistics.median(self.seconds)

    @property
    def reads(self) -> float:
        return statistics.mean(self.pages)


def _decode(executor: LocalExecutor, recorder: Recorder, width: int, seed: int) -> tuple[_Passes, _Passes]:
    """One token a pass, by turns the same one, whose experts stay, and another one every time."""
    generator, batch = torch.Generator().manual_seed(seed), make_batch([Chunk((0,), 0, (0,), prompt=False)])
    kept = torch.randn(1, width, generator=generator)
    same, others, begin = _Passes(), _Passes(), time.perf_counter()
    for number in range(WARM + PASSES):
        seconds = time.perf_counter() - begin
        if seconds > SECONDS:
            break
        for passes in (same, others):
            given = kept if passes is same else torch.randn(1, width, generator=generator)
            executor.step(batch, "decode", received=given.to(executor.handed_on))
            if number >= WARM or seconds > SECONDS / 2:
                passes.note(recorder.snapshot(recorder.num_steps - 1))
    return same, others
