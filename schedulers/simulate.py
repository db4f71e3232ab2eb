"""Carries a schedule out on paper: passes become jobs for the engine of `events.py`, timed by the cost model.
Knows the order in which executors work (the local one one task at a time, a pipeline one per device), and no policy."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.devices.spec import Link
from ciuic_runtime.schedulers.assignment import Paging
from ciuic_runtime.schedulers.cost import CostModel
from ciuic_runtime.schedulers.events import Engine, Job, Shortage
from ciuic_runtime.schedulers.graph import Phase, Step, Task, TaskGraph
from ciuic_runtime.schedulers.memory import capacity, memory_need
from ciuic_runtime.schedulers.schedule import Schedule
from ciuic_runtime.schedulers.trace import Event, EventKind, StepInfo, Trace
from ciuic_runtime.schedulers.workload import CACHE_BLOCK_TOKENS, Workload

HOST = "host"  # the lane of sampling
SEATS = "seats"  # the pool of sequences that may run at once
ROUNDING = 1e-12  # of a task


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


def simulate(schedule: Schedule, graph: TaskGraph, cost: CostModel, steps: Iterable[Step] | None = None) -> Trace:
    """The trace that the local executor is forecast to leave: one task at a time over all devices, copies before the
    task that needs them, pages from elsewhere beside. For the schedule's workload, or for the steps that are given."""
    run = _Run(schedule, graph, cost)
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
    run = _Run(schedule, graph, cost)
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
        self.run = _Run(schedule, graph, cost, {SEATS: float(max_num_seqs), **pools})
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
        spans = [(self.running[i], self.running[i] + n) for i, n in tokens.items()]
        pairs = sum((end - start) * (start + end + 1) / 2 for start, end in spans)
        sampled = sum(self.running[i] + n >= self.requests[i].prompt_tokens for i, n in tokens.items())
        positions = float(sum(end for _, end in spans))
        return Step(phase, sum(tokens.values()), len(spans), pairs, positions, sampled)

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


# What a pass does


@dataclass(frozen=True, slots=True)
class _Source:
    """Pages of a task that are stored elsewhere than they are computed with."""

    home: str
    nbytes: int  # of a page
    experts: tuple[int, ...] = ()  # whose pages they are
    row_nbytes: int = 0  # of a table whose rows can be had one by one


@dataclass(frozen=True, slots=True)
class _Op:
    """One thing that every pass does, whatever its size."""

    task: Task
    device: str  # computes, or receives what is copied
    part: Literal["whole", "experts", "combine", "output", "rows"] = "whole"  # output, rows: a copy
    src: str = ""  # of a copy
    experts: tuple[int, ...] = ()  # those of this device, where others have the rest
    number: int = 0  # of its cost: equal numbers take equally long
    attends: bool = False  # whether that depends on the context
    sources: tuple[_Source, ...] = ()
    paged: bool = False
    apart: bool = False  # it, or what comes after it, waits for pages: others have to know when it begins

    def copied(self, step: Step) -> float:
        """Bytes."""
        if self.part == "rows":
            rows = step.tokens * self.task.experts_per_token * self.task.share(self.experts)
            return rows * self.task.output_bytes_per_token
        return self.task.output_bytes_per_token * self.task.work(step.phase).rows(step)


def _program(schedule: Schedule, graph: TaskGraph) -> tuple[_Op, ...]:
    """A pass in the order of the graph: each value is copied to a device the first time it is needed there."""
    ops: list[_Op] = []
    numbers: dict[tuple[object, ...], int] = {}
    where: dict[str, set[str]] = {}  # task -> devices that have its output

    def fetch(names: Iterable[str], device: str) -> None:
        for name in names:
            if device not in where[name]:
                ops.append(_Op(graph.by_name[name], device, "output", schedule.device_of(name)))
                where[name].add(device)

    def compute(task: Task, device: str, part: Literal["whole", "experts", "combine"], experts: Sequence[int]) -> None:
        works = (task.prefill, task.decode)
        shape = (task.kind, task.pages[0].nbytes, *works, task.num_experts, task.experts_per_token, task.popularity)
        key = (*shape, device, part, tuple(experts) if part == "experts" else ())
        attends = any(w.flops_per_pair or w.flops_per_position or w.bytes_per_position for w in works)
        paged = schedule.paging is not None and device == schedule.paging.device and part != "combine"
        sources = _sources(schedule, task, device, experts) if part != "combine" else ()
        number = numbers.setdefault(key, len(numbers))
        ops.append(_Op(task, device, part, "", tuple(experts), number, attends, sources, paged))

    for task in graph:
        home = schedule.device_of(task.name)
        spread = _experts_by_device(schedule, task) if task.num_experts else {}
        if spread.keys() <= {home}:
            fetch(task.after, home)
            compute(task, home, "whole", spread.get(home, ()))
        else:
            for device, experts in spread.items():
                fetch(task.after[:2], device)
                compute(task, device, "experts", experts)
                if device != home:
                    ops.append(_Op(task, home, "rows", device, tuple(experts)))
            fetch(task.after[1:], home)
            compute(task, home, "combine", ())
        where[task.name] = {home}
    if (host := _host(schedule)) is not None:
        fetch((graph.tasks[-1].name,), host)
    waits = [bool(op.sources) or op.paged for op in ops] + [False]
    return tuple(replace(op, apart=True) if waits[i] or waits[i + 1] else op for i, op in enumerate(ops))


def _host(schedule: Schedule) -> str | None:
    """Where tokens are sampled."""
    return next((n for n in schedule.devices_used() if schedule.topology.device(n).kind == "CPU"), None)


def _experts_by_device(schedule: Schedule, task: Task) -> dict[str, list[int]]:
    spread: dict[str, list[int]] = {}
    for expert, device in enumerate(schedule.expert_devices(task)):
        spread.setdefault(device, []).append(expert)
    return spread


def _sources(schedule: Schedule, task: Task, device: str, experts: Sequence[int]) -> tuple[_Source, ...]:
    """What has to come to `device` in every pass, by where it is stored; what is paged is not among it."""
    paging, page = schedule.paging, task.pages[0]
    paged = (paging.device, paging.disk) if paging else None
    if not task.num_experts:
        home = schedule.rows[task.name].home
        kept = home == device or (device, home) == paged
        return () if kept else (_Source(home, page.nbytes, row_nbytes=page.row_nbytes),)
    by_home: dict[str, list[int]] = {}
    for expert in experts:
        home = schedule.rows[task.pages[expert].name].home
        if home != device and (device, home) != paged:
            by_home.setdefault(home, []).append(expert)
    return tuple(_Source(home, page.nbytes, tuple(those)) for home, those in by_home.items())


# Passes as jobs


@dataclass(frozen=True, slots=True)
class _Row:
    """A job that leaves events: tasks that follow one another on a device, or one transfer."""

    job: int
    lane: str
    device: str  # which waits if the job begins late
    kind: EventKind
    names: tuple[str, ...]
    ends: tuple[float, ...] = ()  # s since the job began, of each task; (): there is one
    nbytes: int = 0


@dataclass(slots=True)
class _Stream:
    """Double buffering: pages that a device gets from elsewhere, one after the other, into two slots."""

    ops: tuple[_Op, ...]  # of a pass, whose pages they are
    loaded: tuple[int, ...] = ()  # the last load
    slots: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())  # what frees them, the one to be filled next first
    ahead: deque[int] = field(default_factory=deque)  # loads of what the next pass begins with

    def upcoming(self, index: int) -> _Op | None:
        """What comes so many pages after the end of a pass, if that is known before."""
        ops = [self.ops[i % len(self.ops)] for i in range(index + 1)]
        return None if any(op.task.num_experts for op in ops) else ops[-1]

    def computed(self, job: int) -> None:
        """The page in the other slot is done with when this job ends."""
        self.slots = (self.slots[1], (job,))


class _Disk:
    """Pages that a device reads while it computes, as much of each as is not expected to be in its cache."""

    def __init__(self, paging: Paging, schedule: Schedule, graph: TaskGraph) -> None:
        self.paging = paging
        self.read: tuple[int, ...] = ()  # the last read
        mine = [p for row, p in graph.rows.items() if schedule.rows[row].device == paging.device and not p.row_nbytes]
        experts = {page.name for task in graph if task.num_experts for page in task.pages}
        dense = sum(page.nbytes for page in mine if page.name not in experts)
        routed = sum(page.nbytes for page in mine if page.name in experts)
        left = max(0, paging.cache_bytes - dense)
        self.stays = min(1.0, paging.cache_bytes / dense) if dense else 1.0  # share of what every pass needs
        self.routed_stays = min(1.0, left / routed) if routed else 1.0

    def needs(self, op: _Op, step: Step) -> tuple[float, float]:
        """Bytes that a pass needs of a task, and those of them that are expected to be read."""
        page = op.task.pages[0]
        if page.row_nbytes:
            rows = float(op.task.work(step.phase).rows(step) * page.row_nbytes)
            return rows, rows
        if op.task.num_experts:
            nbytes = _touched(op.task, step, op.experts) * page.nbytes
            return nbytes, (1 - self.routed_stays) * nbytes
        return page.nbytes, (1 - self.stays) * page.nbytes

    def excess(self, step: Step, program: Iterable[_Op]) -> float:
        """How many times as much was read as is expected, where that is known."""
        if step.read_bytes is None:
            return 1.0
        expected = sum(self.needs(op, step)[1] for op in program if op.paged)
        return step.read_bytes / expected if expected else 0.0


class _Run:
    """A schedule being carried out on the engine."""

    def __init__(
        self, schedule: Schedule, graph: TaskGraph, cost: CostModel, pools: Mapping[str, float] | None = None
    ) -> None:
        self.schedule, self.graph, self.cost = schedule, graph, cost
        self.engine = Engine({d.name: d.bandwidth for d in cost.topology.domains}, pools)
        self.program = _program(schedule, graph)
        self.devices = {d.name: d for d in schedule.topology.devices}
        self.sampler = self.devices[_host(schedule) or schedule.device_of(graph.tasks[-1].name)]
        self.disk = _Disk(schedule.paging, schedule, graph) if schedule.paging else None
        bringing = [op for op in self.program if op.sources and not op.sources[0].row_nbytes]
        self.streams = {op.device: _Stream(tuple(o for o in bringing if o.device == op.device)) for op in bringing}
        self.passes: list[tuple[Step, tuple[_Row, ...], int]] = []  # with the last job of each
        self.events: list[Event] = []
        self.infos: list[StepInfo] = []
        self._costs: dict[tuple[Step, Step | None], dict[int, float]] = {}
        self._links: dict[tuple[str, str], Link] = {}
        self._transfers: dict[tuple[str, str, float], float] = {}

    def step(self, step: Step, beside: Step | None = None) -> None:
        """One pass, now, while nothing else goes on but reads. `beside`: decodes that share a pass with prompts."""
        begin = self.engine.now
        self.engine.run(until=self.add(step, (), beside))
        self._record(*self.passes.pop(), begin, alone=True)

    def all_steps(self) -> None:
        """What was added, side by side."""
        self.engine.run()
        begin, end = 0.0, self.engine.end
        for one in sorted(self.passes, key=lambda one: end[one[2]]):
            self._record(*one, begin, alone=False)
            begin = end[one[2]]

    def trace(self) -> Trace:
        used = self.schedule.devices_used()
        notes = tuple(f"{name} is simulated" for name in used if self.devices[name].simulated)
        return Trace(tuple(self.events), tuple(self.infos), "simulated", used, notes)

    def add(self, step: Step, after: tuple[int, ...], beside: Step | None = None) -> int:
        """The jobs of one pass; the number of the last one."""
        whole = step if beside is None else _together(step, beside)
        varying = self._costs.setdefault((step, beside), {})
        fixed = self._costs.setdefault((_without_context(step), beside and _without_context(beside)), {})
        jobs = _Pass(self, whole, after)
        for op in self.program:
            if op.src:
                jobs.copy(op)
                continue
            costs = varying if op.attends else fixed
            seconds = costs.get(op.number)
            if seconds is None:
                seconds = costs[op.number] = self._seconds(op, step, beside, whole)
            jobs.compute(op, seconds)
        last = jobs.end(self.cost.sampling(self.sampler, whole, self.graph))
        self.passes.append((whole, tuple(jobs.rows), last))
        return last

    def transfer(self, name: str, src: str, dst: str, nbytes: float, after: tuple[int, ...]) -> int:
        """A job of a link's copy engine; domains that the link runs through are shared with other links."""
        if (src, dst) not in self._links:
            self._links[src, dst] = self.cost.topology.link(src, dst)
        link, lane = self._links[src, dst], _lane(src, dst)
        if link.domains:
            limit = link.bandwidth_at(nbytes)
            return self.engine.add(Job(name, after, lane, link.latency, nbytes, limit, link.domains))
        if (src, dst, nbytes) not in self._transfers:
            self._transfers[src, dst, nbytes] = self.cost.transfer(src, dst, nbytes)
        return self.engine.add(Job(name, after, lane, self._transfers[src, dst, nbytes]))

    def _seconds(self, op: _Op, step: Step, beside: Step | None, whole: Step) -> float:
        device = self.devices[op.device]
        if op.part == "combine":
            return self.cost.combine(op.task, device, whole).seconds
        if op.part == "experts":
            return self.cost.experts(op.task, device, whole, op.experts).seconds
        return self.cost.task(op.task, device, step, beside).seconds

    def _record(self, step: Step, rows: Iterable[_Row], last: int, begin: float, alone: bool) -> None:
        """The events of a pass. Of one that was alone, time between two of its jobs is a wait for pages."""
        number, phase, start, end = len(self.infos), step.phase, self.engine.start, self.engine.end
        events, done = self.events, begin
        for row in rows:
            at, then = start[row.job], end[row.job]
            if alone and row.kind != "read":
                if at > done:
                    events.append(Event(row.names[0], row.device, done, at, number, phase, "wait"))
                done = then
            if not row.ends:
                events.append(Event(row.names[0], row.lane, at, then, number, phase, row.kind, row.nbytes))
                continue
            task_start = at
            for name, offset in zip(row.names, row.ends, strict=True):
                task_end = at + offset
                events.append(Event(name, row.lane, task_start, task_end, number, phase, row.kind))
                task_start = task_end
        self.infos.append(StepInfo(phase, step.tokens, step.sequences, begin, end[last], step))


class _Pass:
    """One pass becoming jobs, each after the one before it, and beside them the pages that come from elsewhere."""

    def __init__(self, run: _Run, step: Step, after: tuple[int, ...]) -> None:
        self.run, self.step, self.chain = run, step, after
        self.rows: list[_Row] = []
        self.before_last = self.before = after  # what came before the task before this one, and before this one
        self.routed = False  # whether the task before this one is a router
        self.layers: list[tuple[int, ...]] = []  # what came before each layer's routed experts
        self.excess = run.disk.excess(step, run.program) if run.disk else 1.0
        self._device = ""  # of the tasks that follow one another there and are no job yet
        self._names: list[str] = []
        self._ends: list[float] = []  # s since the first of them began

    def copy(self, op: _Op) -> None:
        self._next()
        nbytes = op.copied(self.step)
        job = self.run.transfer(op.task.name, op.src, op.device, nbytes, self.chain)
        self._then(_Row(job, _lane(op.src, op.device), op.device, "copy", (op.task.name,), nbytes=int(nbytes)))
        self.routed = False

    def compute(self, op: _Op, seconds: float) -> None:
        if op.apart or op.device != self._device:
            self._next()
        if op.sources and op.sources[0].row_nbytes:
            self._looked_up(op, seconds, op.sources[0])
        elif op.sources:
            self._streamed(op, seconds, self.run.streams[op.device])
        elif op.paged and self.run.disk is not None:
            self._paged(op, seconds, self.run.disk)
        else:
            self._device = op.device
            self._names.append(op.task.name)
            self._ends.append(self._ends[-1] + seconds if self._ends else seconds)
        self.routed = op.task.kind == "router"

    def end(self, sampling: float) -> int:
        """The number of the last job. Streams go on with the first pages of the next pass."""
        self._flush()
        if sampling > 0:
            job = self.run.engine.add(Job("sample", self.chain, HOST, sampling))
            self._then(_Row(job, HOST, HOST, "sample", ("sample",)))
        for stream in self.run.streams.values():
            for slot in range(len(stream.ahead), len(stream.slots)):
                if (op := stream.upcoming(slot)) is not None:
                    waits = (*stream.loaded, *stream.slots[slot])
                    stream.ahead.append(self._load(op, op.sources[0], op.sources[0].nbytes, waits))
                    stream.loaded = (stream.ahead[-1],)
        return self.chain[0]

    def _paged(self, op: _Op, seconds: float, disk: _Disk) -> None:
        """Reads what is not there: routed experts from when they are guessed, `lookahead` layers earlier, other pages
        from the task before, rows of tables when they are needed. What is there computes meanwhile."""
        needed, missing = disk.needs(op, self.step)
        missing = min(needed, missing * self.excess)
        asked = self.before if op.task.pages[0].row_nbytes else self.before_last
        if op.task.num_experts:
            self.layers.append(self.before)
            asked = self.layers[max(0, len(self.layers) - 1 - disk.paging.lookahead)]
        if missing < 1:
            self._part(op, seconds)
            return
        job = self.run.transfer(op.task.name, disk.paging.disk, op.device, missing, (*disk.read, *asked))
        disk.read = (job,)
        self._brought(op, disk.paging.disk, job, missing)
        there = (1 - missing / needed) * seconds
        if there > 0:
            self._part(op, there)
        self._part(op, seconds - there, (job,))

    def _looked_up(self, op: _Op, seconds: float, table: _Source) -> None:
        """Rows of a table that is stored elsewhere come when they are needed."""
        nbytes = op.task.work(self.step.phase).rows(self.step) * table.row_nbytes
        job = self._load(op, table, nbytes, self.before)
        self._brought(op, table.home, job, nbytes)
        self._part(op, seconds, (job,))

    def _streamed(self, op: _Op, seconds: float, stream: _Stream) -> None:
        """What is stored here computes first. The rest comes page by page into two slots, each page as soon as there
        is a slot; of routed experts, when they are chosen. Of n equal pages, n - 1 compute while further ones come,
        one when all are there."""
        shares = [op.task.share(s.experts) / op.task.share(op.experts) if s.experts else 1.0 for s in op.sources]
        if (here := 1 - sum(shares)) > ROUNDING:
            self._part(op, here * seconds)
        chosen = self.before if self.routed else self.before_last
        for source, share in zip(op.sources, shares, strict=True):
            nbytes = (_touched(op.task, self.step, source.experts) if source.experts else 1) * source.nbytes
            first = min(nbytes, source.nbytes)
            if stream.ahead:
                job = stream.ahead.popleft()
            else:
                waits = (*stream.loaded, *stream.slots[0], *(chosen if source.experts else ()))
                job = self._load(op, source, first, waits)
                stream.loaded = (job,)
            self._brought(op, source.home, job, first)
            last = first / nbytes if nbytes > first else 1.0
            if last < 1:
                more = self._load(op, source, nbytes - first, (job, *stream.slots[1]))
                self._brought(op, source.home, more, nbytes - first)
                stream.computed(self._part(op, share * seconds * (1 - last), (job,)))
                stream.loaded, job = (more,), more
            stream.computed(self._part(op, share * seconds * last, (job,)))

    def _load(self, op: _Op, source: _Source, nbytes: float, after: tuple[int, ...]) -> int:
        return self.run.transfer(op.task.name, source.home, op.device, nbytes, after)

    def _brought(self, op: _Op, home: str, job: int, nbytes: float) -> None:
        self.rows.append(_Row(job, _lane(home, op.device), op.device, "read", (op.task.name,), nbytes=int(nbytes)))

    def _part(self, op: _Op, seconds: float, awaits: tuple[int, ...] = ()) -> int:
        job = self.run.engine.add(Job(op.task.name, (*self.chain, *awaits), op.device, seconds))
        self._then(_Row(job, op.device, op.device, "compute", (op.task.name,)))
        return job

    def _then(self, row: _Row) -> None:
        self.rows.append(row)
        self.chain = (row.job,)

    def _next(self) -> None:
        """Something begins that others have to know the beginning of."""
        self._flush()
        self.before_last, self.before = self.before, self.chain

    def _flush(self) -> None:
        """The tasks that follow one another become a job."""
        if self._names:
            job = self.run.engine.add(Job(self._names[0], self.chain, self._device, self._ends[-1]))
            self._then(_Row(job, self._device, self._device, "compute", tuple(self._names), tuple(self._ends)))
            self._device, self._names, self._ends = "", [], []


def _lane(src: str, dst: str) -> str:
    return f"{src} -> {dst}"


def _touched(task: Task, step: Step, experts: Sequence[int]) -> float:
    """How many of these routed experts the pass uses: of those that it did use their share, else as are expected."""
    expected = task.expected_experts(step.tokens, experts)
    every = task.expected_experts(step.tokens) if step.touched is not None else 0.0
    return task.distinct_experts(step) * expected / every if every else expected


def _together(step: Step, beside: Step) -> Step:
    return Step(
        step.phase, step.tokens + beside.tokens, step.sequences + beside.sequences, step.pairs + beside.pairs,
        step.positions + beside.positions, step.sampled + beside.sampled,
    )  # fmt: skip


def _without_context(step: Step) -> Step:
    return Step(step.phase, step.tokens, step.sequences, 0.0, 0.0, step.sampled, step.touched)
