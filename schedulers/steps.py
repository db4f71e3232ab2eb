"""The passes that the engine makes for a workload: prompts in chunks, then one token for everybody at a time.
Knows no device; what a pass takes is the cost model's and the simulator's business."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from ciuic_runtime.schedulers.graph import Step, TaskGraph
from ciuic_runtime.schedulers.workload import Workload


def workload_steps(graph: TaskGraph, workload: Workload) -> Iterator[Step]:
    """The passes that the engine makes: all prompts in chunks, then one decode step per further token."""
    for i in range(num_prefill_steps(graph, workload)):
        yield prefill_step(graph, workload, i)
    for i in range(1, workload.max_tokens):
        yield Step.decode(workload.prompt_tokens + i, workload.batch)


def pipeline_steps(graph: TaskGraph, workload: Workload, depth: int) -> Iterator[Step]:
    """The passes that the engine makes where so many are on their way at once, in the order in which they begin: each
    takes its share of the sequences, and none that decodes is in two of them."""
    sizes = group_sizes(workload.batch, depth)
    yield from pipeline_prefill(graph, workload, depth)
    for i in range(1, workload.max_tokens):
        for size in sizes:
            yield Step.decode(workload.prompt_tokens + i, size)


def group_sizes(batch: int, depth: int) -> list[int]:
    """How many sequences there are in each of the passes on their way."""
    most = -(-batch // depth)
    return [min(most, batch - at) for at in range(0, batch, most)]


def pipeline_prefill(graph: TaskGraph, workload: Workload, depth: int) -> Iterator[Step]:
    """Of these passes, those of prompts: whoever is in the fewest passes on their way comes first."""
    prompt, running = workload.prompt_tokens, workload.batch
    left, sent, flying = list(range(running)), [0] * running, [0] * running  # prompts; of each: tokens, passes
    way: deque[list[int]] = deque()  # who is in the passes on their way
    while left:
        if len(way) == depth:
            back = way.popleft()
            for i in back:
                flying[i] -= 1
            if workload.max_tokens == 1:
                running -= sum(sent[i] == prompt and not flying[i] for i in back)
        room, spans, those = graph.prefill_chunk, list[tuple[int, int]](), list[int]()
        for i in sorted(left, key=flying.__getitem__)[: -(-running // depth)]:
            if take := min(room, prompt - sent[i]):
                spans.append((sent[i], take))
                those.append(i)
                sent[i], flying[i], room = sent[i] + take, flying[i] + 1, room - take
        left = [i for i in left if sent[i] < prompt]
        way.append(those)
        yield Step.of("prefill", spans, sum(sent[i] == prompt for i in those))


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
