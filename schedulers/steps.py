"""The passes that the engine makes for a workload: prompts in chunks, then one token for everybody at a time.
Knows no device; what a pass takes is the cost model's and the simulator's business."""

from __future__ import annotations

from collections.abc import Iterator

from ciuic_runtime.schedulers.graph import Step, TaskGraph
from ciuic_runtime.schedulers.workload import Workload


def workload_steps(graph: TaskGraph, workload: Workload) -> Iterator[Step]:
    """The passes that the engine makes: all prompts in chunks, then one decode step per further token."""
    for i in range(num_prefill_steps(graph, workload)):
        yield prefill_step(graph, workload, i)
    for i in range(1, workload.max_tokens):
        yield Step.decode(workload.prompt_tokens + i, workload.batch)


def num_prefill_steps(graph: TaskGraph, workload: Workload) -> int:
    return -(-workload.batch * workload.prompt_tokens // graph.prefill_chunk)


def prefill_step(graph: TaskGraph, workload: Workload, index: int) -> Step:
    """Pass `index` over the prompts: they are laid end to end and cut into chunks, so one pass may end a prompt and
    begin the next."""
    prompt, at = workload.prompt_tokens, index * graph.prefill_chunk
    end = min(at + graph.prefill_chunk, workload.batch * prompt)
    tokens, sequences, sampled, pairs, positions = end - at, 0, 0, 0.0, 0.0
    while at < end:
        start = at % prompt
        stop = min(prompt, start + end - at)
        sequences, sampled = sequences + 1, sampled + (stop == prompt)
        pairs += (stop - start) * (start + stop + 1) / 2
        positions += stop
        at += stop - start
    return Step("prefill", tokens, sequences, pairs, positions, sampled)
