"""Carries a schedule out on paper: one task at a time as the local executor does, or micro-batches in a pipeline.
Knows the order of passes; how a pass becomes jobs is in `passes.py`, and no policy is known here."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from itertools import pairwise

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.schedulers.cost import CostModel
from ciuic_runtime.schedulers.events import Job
from ciuic_runtime.schedulers.graph import Phase, Step, TaskGraph
from ciuic_runtime.schedulers.memory import node_of
from ciuic_runtime.schedulers.passes import Run
from ciuic_runtime.schedulers.pipeline import call_seconds, given_share, handling_seconds
from ciuic_runtime.schedulers.program import Program
from ciuic_runtime.schedulers.schedule import Schedule
from ciuic_runtime.schedulers.steps import workload_steps
from ciuic_runtime.schedulers.trace import Trace


def simulate(
    schedule: Schedule, graph: TaskGraph, cost: CostModel, steps: Iterable[Step] | None = None,
    program: Program | None = None,
) -> Trace:  # fmt: skip
    """The trace that the local executor is forecast to leave: one task at a time over all devices, copies before the
    task that needs them, pages from elsewhere beside. For the schedule's workload, or for the steps that are given.
    `program`: the schedule's, if it was made before."""
    run = Run(schedule, graph, cost, program=program)
    for step in workload_steps(graph, schedule.workload) if steps is None else steps:
        run.step(step)
    return run.trace()


def simulate_pipeline(
    schedule: Schedule, graph: TaskGraph, cost: CostModel, micro_batches: int, steps: Iterable[Step] | None = None
) -> Trace:
    """The same with the batch of each step cut into micro-batches, of which every device has one at a time. A stage is
    a run of tasks on one device; each link copies beside. Chunks of prompts follow one another; a micro-batch's next
    token waits for its last one. Steps are the whole batch's; in the trace each micro-batch has its own, in the order
    in which they end, timed from the end of the one before."""
    if micro_batches < 1:
        raise InvalidInput(f"a pipeline of {micro_batches} micro-batches does nothing; it must be at least 1")
    run = Run(schedule, graph, cost)
    before: tuple[int, ...] = ()  # the last jobs of the step before, by micro-batch
    decoded: tuple[int, ...] = ()  # of the last decode step
    phase: Phase = "prefill"
    for step in workload_steps(graph, schedule.workload) if steps is None else steps:
        parts = micro_steps(step, micro_batches)
        own = step.phase == phase == "decode" and len(parts) == len(before)
        waits = decoded if step.phase == "prefill" else before
        before = tuple(run.add(part, (waits[i],) if own else waits) for i, part in enumerate(parts))
        phase, decoded = step.phase, before if step.phase == "decode" else decoded
    run.all_steps()
    return run.trace()


def simulate_stages(schedule: Schedule, graph: TaskGraph, cost: CostModel, depth: int, passes: Iterable[Step]) -> Trace:
    """The trace that the processes of a cluster are forecast to leave, with at most `depth` passes on their way at
    once: one begins when it has a place and its sequences are free, and the driver has heard of it. A sequence that is
    sampled is in no other pass until that one has ended; chunks of a prompt follow one another at once."""
    given = {name: given_share(schedule.topology.device(name)) for name in schedule.devices_used()}
    run = Run(schedule, graph, cost, handling=besides_computing(schedule, graph, cost), given=given)
    first, last = (schedule.topology.device(op.device) for op in (run.program[0], run.program[-1]))
    around = call_seconds(first) + call_seconds(last) - handling_seconds(first)
    way: deque[tuple[int, int]] = deque()  # passes: their last job, and the sequences that are sampled
    before: tuple[int, ...] = ()  # the last one that had ended when the next one began
    batch = schedule.workload.batch
    for step in passes:
        # More sequences than a pass of the workload has: there are more in the other passes, too
        running = batch if step.sequences <= -(-batch // depth) else step.sequences * depth
        free = running - sum(sampled for _, sampled in way)
        while way and (len(way) == depth or step.sequences > free):
            job, sampled = way.popleft()
            before, free = (job,), free + sampled
        called = run.engine.add(Job("there and back", before, seconds=around))
        way.append((run.add(step, (called,)), step.sampled))
    run.all_steps()
    return run.trace()


def besides_computing(schedule: Schedule, graph: TaskGraph, cost: CostModel) -> dict[str, float]:
    """By device: seconds that a stage's process is at work for a pass and does not compute."""
    tasks = Counter(node_of(schedule.device_of(task.name)) for task in graph)
    devices = {name: schedule.topology.device(name) for name in schedule.devices_used()}
    return {
        name: handling_seconds(device) + cost.around_pass(device) + cost.besides_tasks(device, tasks[node_of(name)])
        for name, device in devices.items()
    }


def micro_steps(step: Step, count: int) -> list[Step]:
    """The step's sequences in `count` parts that are as even as can be; a sequence is in one part only."""
    count = min(count, step.sequences)
    ends = [step.sequences * i // count for i in range(count + 1)]
    return [_part(step, start / step.sequences, end / step.sequences) for start, end in pairwise(ends)]


def _part(step: Step, start: float, end: float) -> Step:
    def whole(value: int) -> int:
        return round(value * end) - round(value * start)

    share = end - start
    touched = step.touched if share == 1 else None
    read = None if step.read_bytes is None else step.read_bytes * share
    return Step(
        step.phase, whole(step.tokens), whole(step.sequences), step.pairs * share, step.positions * share,
        whole(step.sampled), touched, read,
    )  # fmt: skip
