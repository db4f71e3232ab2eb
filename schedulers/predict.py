"""What a schedule is forecast to do: rates and memory, from simulated passes.
Knows no other plan; which is best is the scheduler's business."""

from __future__ import annotations

from collections.abc import Iterable

from ciuic_runtime.schedulers.assignment import Prediction
from ciuic_runtime.schedulers.cost import CostModel
from ciuic_runtime.schedulers.graph import Step, TaskGraph
from ciuic_runtime.schedulers.memory import memory_need
from ciuic_runtime.schedulers.program import program_of
from ciuic_runtime.schedulers.schedule import Schedule
from ciuic_runtime.schedulers.simulate import simulate, simulate_stages
from ciuic_runtime.schedulers.steps import group_sizes, num_prefill_steps, pipeline_prefill, prefill_step
from ciuic_runtime.schedulers.trace import Trace
from ciuic_runtime.schedulers.workload import Workload

# Prompts of more passes than this are forecast from so many of them, evenly spaced: a pass's time is close to linear
# in where it starts.
PASSES = 32
ROUNDS, FILLING = 16, 4  # of a pipeline's decodes; while it fills, and in the last one, when it empties, none counts


def predict(schedule: Schedule, graph: TaskGraph, cost: CostModel, depth: int | None = None) -> Prediction:
    """`depth`: of a pipeline, how many passes may be on their way at once; None: the local executor's one."""
    work = schedule.workload
    if depth is None:
        program = program_of(schedule, graph)
        prefill = simulate(schedule, graph, cost, _prefill_steps(graph, work), program)
        decode = simulate(schedule, graph, cost, [work.mean_decode], program)
        decode_rate = decode.tokens_per_s("decode")
    else:
        prefill, decode = (
            simulate_stages(schedule, graph, cost, depth, steps)
            for steps in (_evenly(pipeline_prefill(graph, work, depth)), _rounds(work, depth))
        )
        decode_rate = _when_full(decode, work.batch)
    prefill_rate = prefill.tokens_per_s("prefill")
    assert prefill_rate is not None, f"{schedule.policy}: {prefill.steps} take no time"
    assert decode_rate is not None, f"{schedule.policy}: {decode.steps} take no time"
    error = cost.calibration.model_error
    return Prediction(
        first_token_s=work.batch * work.prompt_tokens / prefill_rate,
        prefill_tokens_per_s=prefill_rate,
        decode_tokens_per_s=decode_rate,
        range=(decode_rate / (1 + error), decode_rate * (1 + error)),
        bound_by=_binding(decode, graph, cost, work.mean_decode),
        memory_bytes={name: need.total for name, need in memory_need(schedule, graph, work).items()},
        basis=cost.basis(set(schedule.places_used())),
        seconds_per_token={
            "prefill": {k: s / prefill.tokens("prefill") for k, s in prefill.seconds_by_kind("prefill").items()},
            "decode": {k: s / decode.tokens("decode") for k, s in decode.seconds_by_kind("decode").items()},
        },
    )


def _evenly(steps: Iterable[Step]) -> list[Step]:
    every = list(steps)
    count = min(len(every), PASSES)
    return [every[(2 * i + 1) * len(every) // (2 * count)] for i in range(count)]


def _rounds(work: Workload, depth: int) -> list[Step]:
    """Decodes of the mean context, everybody's turn so often that the pipeline is full."""
    mean = work.mean_decode
    return [Step.decode(mean.positions / mean.sequences, size) for size in group_sizes(work.batch, depth)] * ROUNDS


def _when_full(decode: Trace, batch: int) -> float:
    """Tokens/s."""
    passes = len(decode.steps) // ROUNDS
    begin, end = decode.steps[FILLING * passes - 1].end, decode.steps[-1 - passes].end
    return (ROUNDS - FILLING - 1) * batch / (end - begin)


def _prefill_steps(graph: TaskGraph, work: Workload) -> list[Step]:
    total = num_prefill_steps(graph, work)
    count = min(total, PASSES)
    return [prefill_step(graph, work, (2 * i + 1) * total // (2 * count)) for i in range(count)]


def _binding(decode: Trace, graph: TaskGraph, cost: CostModel, step: Step) -> str:
    """The resource that the decode step spends most of its time on."""
    spent: dict[str, float] = {}
    disk = next((e.lane.partition(" ")[0] for e in decode.events if e.kind == "read"), "")
    known: dict[tuple[int, str], str] = {}  # what binds tasks that are alike
    for event in decode.events:
        if event.kind == "read":
            continue
        if event.kind == "copy":
            what = f"link {event.lane}"
        elif event.kind == "wait":
            what = f"reads from {disk}"
        elif event.kind == "sample":
            what = "overhead of the host"
        else:
            key = graph.shapes[event.task], event.lane
            if key not in known:
                known[key] = cost.task(graph.by_name[event.task], cost.topology.device(event.lane), step).bound_by
            what = f"{known[key]} of {event.lane}"
        spent[what] = spent.get(what, 0.0) + event.seconds
    return max(spent, key=lambda what: spent[what])
