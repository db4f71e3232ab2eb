"""Serves requests on paper: continuous batching with chunked prefill, and room in the cache as the limit.
Knows when a request is let in and what a pass takes of each; how a pass becomes jobs is in `passes.py`."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.schedulers.cost import CostModel
from ciuic_runtime.schedulers.events import Job, Shortage
from ciuic_runtime.schedulers.graph import Phase, Step, TaskGraph
from ciuic_runtime.schedulers.memory import capacity, memory_need
from ciuic_runtime.schedulers.passes import Run
from ciuic_runtime.schedulers.schedule import Schedule
from ciuic_runtime.schedulers.trace import Trace
from ciuic_runtime.schedulers.workload import CACHE_BLOCK_TOKENS, Workload

SEATS = "seats"  # the pool of sequences that may run at once


@dataclass(frozen=True, slots=True)
class Served:
    """One request as it went. Times are in seconds since the trace began."""

    arrival: float
    prompt_tokens: int
    max_tokens: int
    admitted: float | None = None  # when there was room for it
    first_token: float | None = None
    finish: float | None = None
    outcome: str = ""  # why it was not served


@dataclass(frozen=True)
class ServedTrace:
    trace: Trace
    requests: tuple[Served, ...]  # in the order given


def simulate_requests(
    schedule: Schedule,
    graph: TaskGraph,
    cost: CostModel,
    requests: Sequence[tuple[float, int, int]],  # arrival in s, prompt tokens, new tokens
    max_num_seqs: int,
) -> ServedTrace:
    """Continuous batching (Yu et al., Orca, 2022) with chunked prefill (Agrawal et al., Sarathi-Serve, 2024): a pass
    takes a token of every running sequence, and prompt tokens up to the graph's chunk in total. First come, first
    served; a request is let in when there is cache for all that it may become."""
    _check_requests(requests, max_num_seqs)
    queue = _Requests(schedule, graph, cost, requests, max_num_seqs)
    while queue.next():
        queue.step()
    return queue.served()


class _Requests:
    """Requests that wait, run and are done. Seats and cache are pools of the engine, taken in order of arrival."""

    def __init__(
        self, schedule: Schedule, graph: TaskGraph, cost: CostModel, requests: Sequence[tuple[float, int, int]],
        max_num_seqs: int,
    ) -> None:  # fmt: skip
        self.chunk = graph.prefill_chunk
        longest = [max((r[i] for r in requests), default=1) for i in (1, 2)]
        need = memory_need(schedule, graph, Workload(int(longest[0]), int(longest[1]), max_num_seqs))
        self.other = {name: n.weights + n.working for name, n in need.items()}  # bytes that are not cache
        room = {name: capacity(schedule.topology.device(name)) - nbytes for name, nbytes in self.other.items()}
        self.block = {name: 0.0 for name in room}  # bytes of cache that a block takes
        for task in graph:
            self.block[schedule.device_of(task.name)] += task.kv_bytes_per_token * CACHE_BLOCK_TOKENS
        pools = {name: float(max(0, nbytes)) for name, nbytes in room.items()}
        self.run = Run(schedule, graph, cost, {SEATS: float(max_num_seqs), **pools})
        self.requests = [Served(*request) for request in requests]
        self.admission: dict[int, int] = {}  # request -> job
        self.waiting: deque[int] = deque()
        self.running: dict[int, int] = {}  # request -> tokens computed
        for i in sorted(range(len(requests)), key=lambda i: requests[i][0]):
            self._arrive(i)

    def _arrive(self, i: int) -> None:
        engine, request = self.run.engine, self.requests[i]
        takes = self._takes(request)
        lacking = next((Shortage(f"request {i}", request.arrival, pool, need, engine.pools[pool], engine.pools[pool])
                        for pool, need in takes if need > engine.pools[pool]), None)  # fmt: skip
        if lacking:
            self.requests[i] = replace(request, outcome=str(lacking))
            return
        timer = engine.add(Job(f"arrival {i}", seconds=request.arrival))
        self.admission[i] = engine.add(Job(f"request {i}", (timer,), takes=takes))
        self.waiting.append(i)

    def _takes(self, request: Served) -> tuple[tuple[str, float], ...]:
        blocks = -(-(request.prompt_tokens + request.max_tokens) // CACHE_BLOCK_TOKENS)
        return ((SEATS, 1.0), *((name, blocks * nbytes) for name, nbytes in self.block.items() if nbytes))

    def next(self) -> bool:
        """Lets in who can be let in, waiting for the next arrival if nobody runs; whether there is anything to do."""
        if not self.running and self.waiting:
            self.run.engine.run(until=self.admission[self.waiting[0]])
        start = self.run.engine.start
        while self.waiting and not math.isnan(start[self.admission[self.waiting[0]]]):
            i = self.waiting.popleft()
            self.requests[i] = replace(self.requests[i], admitted=start[self.admission[i]])
            self.running[i] = 0
        return bool(self.running)

    def step(self) -> None:
        """One pass: decodes first, then prompts as they came."""
        decodes = {i: n for i, n in self.running.items() if n >= self.requests[i].prompt_tokens}
        room, chunks = self.chunk - len(decodes), {}
        for i, computed in self.running.items():
            if i not in decodes and room > 0:
                chunks[i] = min(room, self.requests[i].prompt_tokens - computed)
                room -= chunks[i]
        decode = self._step("decode", dict.fromkeys(decodes, 1)) if decodes else None
        prefill = self._step("prefill", chunks) if chunks else None
        if prefill is not None:
            self.run.step(prefill, decode)
        elif decode is not None:
            self.run.step(decode)
        for i, tokens in (chunks | dict.fromkeys(decodes, 1)).items():
            self._computed(i, tokens)

    def _step(self, phase: Phase, tokens: Mapping[int, int]) -> Step:
        """A pass over so many tokens of each request."""
        sampled = sum(self.running[i] + n >= self.requests[i].prompt_tokens for i, n in tokens.items())
        return Step.of(phase, [(self.running[i], n) for i, n in tokens.items()], sampled)

    def _computed(self, i: int, tokens: int) -> None:
        engine, request = self.run.engine, self.requests[i]
        self.running[i] += tokens
        new = self.running[i] - request.prompt_tokens + 1
        if new == 1:
            request = replace(request, first_token=engine.now)
        if new == request.max_tokens:
            request = replace(request, finish=engine.now)
            del self.running[i]
            engine.run(until=engine.add(Job(f"end of request {i}", gives=self._takes(request))))
        self.requests[i] = request

    def served(self) -> ServedTrace:
        outcome = "; ".join(r.outcome for r in self.requests if r.outcome)
        held = {name: int(nbytes + self.run.engine.high_water[name]) for name, nbytes in self.other.items()}
        return ServedTrace(replace(self.run.trace(), outcome=outcome, memory_bytes=held), tuple(self.requests))


def _check_requests(requests: Sequence[tuple[float, int, int]], max_num_seqs: int) -> None:
    if max_num_seqs < 1:
        raise InvalidInput(f"max_num_seqs is {max_num_seqs}; at least 1 sequence must be able to run")
    for i, (arrival, prompt_tokens, max_tokens) in enumerate(requests):
        if not 0 <= arrival < math.inf or prompt_tokens < 1 or max_tokens < 1:
            raise InvalidInput(
                f"request {i} arrives at {arrival} s with {prompt_tokens} prompt and {max_tokens} new tokens; it must "
                "arrive at 0 or later and have at least one of each"
            )
