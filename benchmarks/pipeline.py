"""What a cluster adds to a model's stages: decode steps of a pipeline of two, on two raylets and on one, beside what
Ray itself takes on the same way.

    python benchmarks/pipeline.py [MODEL] [--rounds 7] [--out FILE]     MODEL: packed; else one is made for it
    python benchmarks/pipeline.py --quick                               one short round: whether it all works

Every step is compared with the sum of its stages' passes (from the trace) plus a null call: a chain of actors with the
same payload, on the same nodes, that spin for as long as the stages computed in the turn before; beside it, such actors
that read memory all the while, as stages do, and find their caches as cold. A pass makes three hops: driver, stage,
stage, driver. Then how busy the busier stage is with four passes on their way (stages that sleep in place of computing,
and in simulation), and the forecasts of all of these pipelines, each of which is alone on the machine."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ["RAY_AUTH_MODE"] = "token"  # before Ray is imported, by whomever
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

import numpy as np
import torch
from make_model import write_packed
from rounds import Measured, Report, Sample, against, common_arguments, note, take_turns

import ciuic_runtime as ciuic
from ciuic_runtime.calibrate import calibrate
from ciuic_runtime.cluster import runner
from ciuic_runtime.cluster.parcels import Call, pack
from ciuic_runtime.cluster.stage_worker import StageWorker
from ciuic_runtime.curves import load_calibration
from ciuic_runtime.devices.ray_calls import Spinner
from ciuic_runtime.devices.ray_nodes import NODE_ID
from ciuic_runtime.devices.ray_session import import_ray
from ciuic_runtime.engine.batching import Pass
from ciuic_runtime.engine.draw import Draw, Drawn
from ciuic_runtime.models.batch import Batch, Chunk
from ciuic_runtime.models.config import KNOWN_FOLDER
from ciuic_runtime.schedulers.cost import CostModel
from ciuic_runtime.schedulers.graph import Step
from ciuic_runtime.schedulers.pipeline import call_seconds, handling_seconds, pipeline_of
from ciuic_runtime.schedulers.simulate import besides_computing, simulate_stages
from ciuic_runtime.schedulers.stages import stages_of

STAGES, HOPS = 2, 3
IN_FLIGHT = 4
PROMPT = 16  # tokens
SLEEP = 10e-3  # s, of a stage's pass
READ = 128 << 20  # bytes, more than caches hold
LIMIT, MOST_DRIVER, LEAST_BUSY, MOST_ERROR = 1.5, 0.05, 0.85, 0.15
BATCHES = (1, 8)


class Stopwatch:
    """The engine's runner, with the time that the driver spends in it, which is Ray's and the stages'."""

    def __init__(self, runner: Any) -> None:
        self.runner, self.depth = runner, runner.depth
        self.ends: list[float] = []  # s, of passes
        self.inside = 0.0  # s, since the first of them
        self._inside: list[float] = []

    def begin(self, todo: Pass, draws: Sequence[Draw]) -> None:
        begin = time.perf_counter()
        self.runner.begin(todo, draws)
        self.inside += time.perf_counter() - begin

    def end(self) -> tuple[Pass, list[Drawn]]:
        begin = time.perf_counter()
        done: tuple[Pass, list[Drawn]] = self.runner.end()
        self.ends.append(time.perf_counter())
        self.inside = self.inside + self.ends[-1] - begin if len(self.ends) > 1 else 0.0
        return done

    def abandon(self) -> None:
        self.runner.abandon()


class NullStage(Spinner):
    """Ray's own null call: takes what a stage takes, computes nothing for as long, gives as much."""

    memory: np.ndarray | None = None

    def run(self, call: bytes, hidden: bytes | None, draws: bytes | None, seconds: float, answer: bytes) -> bytes:
        return self.spin(answer, seconds)

    def read(self, call: bytes, hidden: bytes | None, draws: bytes | None, seconds: float, answer: bytes) -> bytes:
        """Computes nothing either, and reads memory meanwhile."""
        end = time.perf_counter() + seconds
        if self.memory is None:
            self.memory = np.ones((READ >> 18, 1 << 15))
        while time.perf_counter() < end:
            for part in self.memory:
                part.sum()
                if time.perf_counter() >= end:
                    break
        return answer

    def pid(self) -> int:
        return os.getpid()


class SleepingStage(StageWorker):
    """A stage that sleeps in place of computing, and records that."""

    def load(self) -> None:
        super().load()
        executor, recorder = self._host.executor, self._host.recorder
        vocab = executor.spec.vocab_size
        last = executor.graph.tasks[-1].kind == "head"

        def step(
            batch: Batch, phase: Any, sampler: Callable[[torch.Tensor], None] | None = None,
            received: torch.Tensor | None = None,
        ) -> torch.Tensor:  # fmt: skip
            begin = time.perf_counter()
            time.sleep(SLEEP)
            recorder.add(recorder.number("sleep"), recorder.number("cpu"), begin, time.perf_counter())
            spans = [(s.position, s.length) for s in batch.sequences]
            shape = (len(batch.sampled_rows), vocab) if last else (batch.num_tokens, executor.spec.hidden_size)
            made = torch.zeros(shape, dtype=torch.float32 if last else executor.handed_on)
            if sampler is not None:
                sampler(made)
            recorder.end_step(Step.of(phase, spans, len(batch.sampled_rows)), begin)
            return made

        executor.step = step  # type: ignore[method-assign]


@dataclass
class Pipeline:
    """A model in two stages, and as many actors that only spin, where these are."""

    name: str
    llm: ciuic.LLM
    new: int  # tokens
    spinners: list[Any] = field(default_factory=list)
    stages: dict[int, list[float]] = field(default_factory=dict)  # batch -> s of each stage's pass, in the last turn

    def __post_init__(self) -> None:
        self.watch = Stopwatch(self.llm.engine.runner)
        self.llm.engine.runner = self.watch
        self.stage_of = {t.name: i for i, tasks in enumerate(_tasks_of(self.llm)) for t in tasks} | {"sample": 1}

    def generate(self, batch: int) -> None:
        """Decode steps with equal prompts, timed."""
        self.watch.ends.clear()
        params = ciuic.SamplingParams(max_tokens=self.new, temperature=0.0, ignore_eos=True)
        self.llm.generate([[5 + i] * PROMPT for i in range(batch)], params)

    def decode(self, batch: int) -> Sample:
        """One pass at a time."""
        self.generate(batch)
        trace, ends = self.llm.trace, self.watch.ends
        steps = [b - a for a, b in pairwise(ends)]
        spans: dict[tuple[int, int], tuple[float, float]] = {}
        for e in (e for e in trace.events if e.kind in ("compute", "sample")):
            key = (e.step, self.stage_of[e.task])
            first, last = spans.get(key, (e.start, e.end))
            spans[key] = (min(first, e.start), max(last, e.end))
        passes = [[spans[i, s][1] - spans[i, s][0] for s in range(STAGES)] for i in range(1, len(trace.steps))]
        self.stages[batch] = [statistics.median(one[s] for one in passes) for s in range(STAGES)]
        compute = statistics.median(map(sum, passes))
        step = statistics.median(steps)
        driver = (ends[-1] - ends[0] - self.watch.inside) / len(steps)
        facts = {
            "step": step,
            "compute": compute,
            "driver": driver,
            "stage0": self.stages[batch][0],
            "stage1": self.stages[batch][1],
        }
        return Sample(batch / step, facts | {"forecast_error": self.forecast_error()})

    def forecast_error(self) -> float:
        """Of the decode rate: actual / forecast - 1; NaN where there is no forecast."""
        predicted, actual = self.llm.schedule.predicted, self.llm.trace.tokens_per_s("decode")
        return actual / predicted.decode_tokens_per_s - 1 if predicted and actual else float("nan")

    def null(self, ray: Any, batch: int, method: str) -> Sample:
        """Rounds through actors that spin, or read, as long as the stages computed."""
        chunks = [Chunk((1,), PROMPT + 8, (i,), prompt=False) for i in range(batch)]
        params = ciuic.SamplingParams(max_tokens=self.new, temperature=0.0, ignore_eos=True)
        draws = [Draw(i, 1, params, 0, PROMPT + 9, wanted=True) for i in range(batch)]
        call, wanted = pack(Call(tuple(chunks), "decode", 0)), pack(draws)
        answers = [bytes(batch * self.llm.model.spec.hidden_size * 4), pack([Drawn(1)] * batch)]
        spin, ends = self.stages[batch], list[float]()
        for _ in range(self.new):
            hidden = None
            for i, actor in enumerate(self.spinners):
                last = wanted if i == STAGES - 1 else None
                hidden = getattr(actor, method).remote(call, hidden, last, spin[i], answers[i])
            ray.get(hidden)
            ends.append(time.perf_counter())
        took = statistics.median(b - a for a, b in pairwise(ends))
        return Sample(1 / took, {"null": took - sum(spin)})


def _tasks_of(llm: ciuic.LLM) -> list[Sequence[Any]]:
    return [stage.graph.tasks for stage in stages_of(llm.schedule, llm.model.graph, STAGES)]


def halves(path: Path, hardware: ciuic.DeviceManager, first: str, second: str) -> ciuic.Placement:
    """The first half of the model, by bytes, on one device, the second on another."""
    model, placement = ciuic.Model(path), ciuic.Placement().put("*", on=first)
    for task in stages_of(ciuic.plan(model, hardware, placement=placement), model.graph, 2)[1].graph.tasks:
        for row, _ in task.rows:
            placement = placement.put(row, on=second)
    return placement


class Cluster:
    """Two raylets on this machine, and everything that is measured on them."""

    def __init__(self, model: Path, new: int) -> None:
        from ray.cluster_utils import Cluster as RayCluster

        small = {"num_cpus": 16, "object_store_memory": 100 << 20}
        self.ray, self.model, self.new = import_ray(), model, new
        self.raylets = RayCluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
        self.raylets.add_node(**small)
        self.raylets.wait_for_nodes()
        self.hardware = ciuic.DeviceManager.from_ray(self.raylets.address, path=model)
        self.pipeline: Pipeline | None = None  # the one that is there

    def open(self, name: str, nodes: int, micro_batches: int, spinners: bool = False) -> Pipeline:
        """In place of the one before."""
        self.end_pipeline()
        note(f"starting {name}")
        llm = ciuic.LLM(
            self.model, devices=self.hardware, executor="ray", address=self.raylets.address, threads=1, stages=STAGES,
            placement=halves(self.model, self.hardware, "node0/cpu", "node1/cpu") if nodes == 2
            else ciuic.Placement().put("*", on="node0/cpu"),
            micro_batches=micro_batches, max_model_len=PROMPT + self.new, max_num_seqs=max(BATCHES),
        )  # fmt: skip
        made = [self._spinner(i % nodes) for i in range(STAGES)] if spinners else []
        self.pipeline = Pipeline(name, llm, self.new, made)
        return self.pipeline

    def _spinner(self, node: int) -> Any:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        node_id = self.hardware.topology.device(f"node{node}/cpu").facts[NODE_ID]
        where = NodeAffinitySchedulingStrategy(node_id, soft=False)
        return self.ray.remote(NullStage).options(num_cpus=0, scheduling_strategy=where).remote()

    def processes(self) -> list[int]:
        """That are ours while the benchmark runs, beside its own."""
        nodes = self.raylets.list_all_nodes()
        services = [p.process.pid for node in nodes for one in node.all_processes.values() for p in one]
        assert self.pipeline is not None
        spinners = self.ray.get([actor.pid.remote() for actor in self.pipeline.spinners])
        return [*services, *self.pipeline.watch.runner.processes(), *spinners]

    def measure(self, rivals: Mapping[str, Callable[[], Sample]], args: argparse.Namespace) -> Measured:
        for warm in rivals.values():
            warm()
        return take_turns(rivals, args.rounds, args.threads, self.processes(), 1 if args.quick else 2)

    def end_pipeline(self) -> None:
        if self.pipeline is not None:
            self.pipeline.llm.close()
            for actor in self.pipeline.spinners:
                self.ray.kill(actor)
        self.pipeline = None

    def close(self) -> None:
        self.end_pipeline()
        self.ray.shutdown()
        self.raylets.shutdown()


def busy_when_sleeping(cluster: Cluster) -> float:
    """Share of the time that the busier stage does something, from when all passes are on their way until the last
    ones begin."""
    computing, runner.StageWorker = runner.StageWorker, SleepingStage  # type: ignore[misc]
    try:
        one = cluster.open("sleeping stages", 2, IN_FLIGHT)
    finally:
        runner.StageWorker = computing  # type: ignore[misc]
    one.stage_of["sleep"] = 0
    one.generate(max(BATCHES))
    return _busier([e for e in one.llm.trace.events if e.kind == "compute"], {})


def busy_in_simulation(one: Pipeline) -> float:
    """The same of the model as it is, with its costs as forecast: what a process does for a pass besides computing (it
    takes calls, lays batches out, goes from task to task) is work as well."""
    schedule, model = one.llm.schedule, one.llm.model
    assert schedule.workload.batch == max(BATCHES), schedule.workload
    pipeline = pipeline_of(schedule, model.graph, STAGES, IN_FLIGHT, 1).schedule
    known = load_calibration(model, pipeline.topology)
    cost = CostModel(pipeline.topology, model.format, known, schedule.workload)
    passes = [Step.decode(PROMPT + 1, max(BATCHES) // IN_FLIGHT)] * (16 * IN_FLIGHT)
    trace = simulate_stages(pipeline, model.graph, cost, IN_FLIGHT, passes)
    return _busier([e for e in trace.events if e.kind == "compute"], besides_computing(pipeline, model.graph, cost))


def _busier(events: Sequence[Any], besides: Mapping[str, float]) -> float:
    """`besides`: by lane, s of every pass that are work too, and in no event."""
    last = max(e.step for e in events)
    begin = min(e.start for e in events if e.step == IN_FLIGHT)
    end = min(e.start for e in events if e.step == last - IN_FLIGHT)
    inside = {lane: 0.0 for lane in sorted({e.lane for e in events})}
    for e in events:
        inside[e.lane] += max(0.0, min(e.end, end) - max(e.start, begin))
    passes = last - 2 * IN_FLIGHT
    return max(seconds + passes * besides.get(lane, 0.0) for lane, seconds in inside.items()) / (end - begin)


def packed_model(folder: Path, quick: bool) -> Path:
    """16 layers of DeepSeek-V2's kind, 1024 wide, 16 experts of which 4 are used and 2 shared: 5 to 10 ms in each of
    two stages on one core of 2025. `quick`: 4 layers, 256 wide."""
    size: dict[str, Any] = {
        "vocab_size": 4096, "bos_token_id": 4093, "eos_token_id": 4094, "num_hidden_layers": 16, "hidden_size": 1024,
        "intermediate_size": 4096, "moe_intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 8,
        "n_routed_experts": 16, "num_experts_per_tok": 4, "kv_lora_rank": 256,
    }  # fmt: skip
    if quick:
        size |= {"num_hidden_layers": 4, "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 128}
    write_packed(json.loads((KNOWN_FOLDER / "deepseek-v2-lite.json").read_text()) | size, folder, 0, "int4")
    return folder


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"


def measure_hops(cluster: Cluster, name: str, nodes: int, args: argparse.Namespace, report: Report) -> None:
    """A step of a pipeline beside null calls on the same way, and its forecast."""
    one = cluster.open(name, nodes, 1, spinners=True)
    rivals: dict[str, Callable[[], Sample]] = {}
    for batch in BATCHES:
        rivals[f"batch {batch}"] = lambda batch=batch: one.decode(batch)
        rivals[f"null, batch {batch}"] = lambda batch=batch: one.null(cluster.ray, batch, "run")
        rivals[f"null that reads, batch {batch}"] = lambda batch=batch: one.null(cluster.ray, batch, "read")
    found = cluster.measure(rivals, args)
    for batch in BATCHES:
        step, compute, driver, first, second = (
            found.fact(f"batch {batch}", fact) for fact in ("step", "compute", "driver", "stage0", "stage1")
        )
        null, reading = (found.fact(f"{rival}, batch {batch}", "null") for rival in ("null", "null that reads"))
        report.line(
            f"{name}, batch {batch}:".ljust(22)
            + f"step {ms(step)} = stages {ms(compute)} ({ms(first)} and {ms(second)}) + {ms((step - compute) / HOPS)} "
            f"per hop; null call {ms(null / HOPS)} per hop, {ms(reading / HOPS)} of actors that read"
        )
        added = against((step - compute) / null, LIMIT, "x", at_most=True)
        share = against(driver / step, MOST_DRIVER, "%", at_most=True)
        report.line(
            f"{'':22}beyond the stages, of the null call: {added}, of that of actors that read: "
            f"{(step - compute) / reading:.2f}x; of the driver: {share}"
        )
    tell_forecasts(found, report, name)


def measure_filled(cluster: Cluster, args: argparse.Namespace, report: Report) -> float:
    """The forecast with several passes at once; how busy the busier stage is in simulation."""
    name = f"two raylets, {IN_FLIGHT} at once"
    full = cluster.open(name, 2, IN_FLIGHT)

    def filled() -> Sample:
        full.generate(max(BATCHES))
        return Sample(full.llm.trace.tokens_per_s("decode") or 0.0, {"forecast_error": full.forecast_error()})

    tell_forecasts(cluster.measure({f"batch {max(BATCHES)}": filled}, args), report, name)
    return busy_in_simulation(full)


def tell_forecasts(found: Measured, report: Report, pipeline: str) -> None:
    errors = {
        name: statistics.median(r[name].sample.facts["forecast_error"] for r in found.rounds)
        for name in found.rounds[0]
        if "forecast_error" in found.rounds[0][name].sample.facts
    }
    for name, error in errors.items():
        size = against(abs(error), MOST_ERROR, "%", at_most=True)
        report.line(f"forecast of {pipeline}, {name}: actual {error:+.1%}; {size}")
    report.line(f"{pipeline}: {found}")


def main() -> None:
    parser = common_arguments(__doc__)
    parser.add_argument(
        "model", type=Path, nargs="?", help="packed; None: one is made, of which stages take 2 to 10 ms"
    )
    parser.add_argument("--quick", action="store_true", help="a small model, one round, nothing calibrated")
    args = parser.parse_args()
    args.rounds = 1 if args.quick else args.rounds
    with tempfile.TemporaryDirectory(prefix="ciuic-pipeline-") as name:
        run(args, args.model or packed_model(Path(name) / "packed", args.quick))


def run(args: argparse.Namespace, model: Path) -> None:
    new = 9 if args.quick else 65
    report = Report(f"Pipelines of two stages{', small model' if args.quick else ''}", args.out)
    if not args.quick:
        calibrate(ciuic.Model(model), ciuic.DeviceManager().topology, threads=1, progress=note)
    cluster = Cluster(model, new)
    try:
        cpu = cluster.hardware.topology.device("node1/cpu")
        call, handling = ms(call_seconds(cpu)), ms(handling_seconds(cpu))
        report.line(f"calls as the forecasts have them: {call}, of which {handling} keep a stage from computing")
        measure_hops(cluster, "two raylets", 2, args, report)
        measure_hops(cluster, "one raylet", 1, args, report)
        simulated, asleep = measure_filled(cluster, args, report), busy_when_sleeping(cluster)
        report.line(f"busier of two stages, {IN_FLIGHT} passes, simulated: {against(simulated, LEAST_BUSY, '%')}")
        report.line(
            f"busier of two stages, {IN_FLIGHT} passes, stages that sleep {ms(SLEEP)} in place of computing: "
            f"{against(asleep, LEAST_BUSY, '%')}"
        )
    finally:
        cluster.close()
    report.save()


if __name__ == "__main__":
    main()
