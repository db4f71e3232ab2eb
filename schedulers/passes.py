"""Passes become jobs for the engine of `events.py`, timed by the cost model, and the jobs become the events of a trace.
Knows how pages come while others are computed with (paging, double buffering); which passes there are, it is told."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ciuic_runtime.devices.spec import Link
from ciuic_runtime.schedulers.assignment import Paging
from ciuic_runtime.schedulers.cost import CostModel
from ciuic_runtime.schedulers.events import Engine, Job
from ciuic_runtime.schedulers.graph import Page, Step, Task, TaskGraph
from ciuic_runtime.schedulers.hits import hit_rates
from ciuic_runtime.schedulers.memory import node_of
from ciuic_runtime.schedulers.policies.cache import cache_policy
from ciuic_runtime.schedulers.program import Op, Program, Source, host_of, program_of
from ciuic_runtime.schedulers.schedule import Schedule
from ciuic_runtime.schedulers.trace import Event, EventKind, StepInfo, Trace

HOST = "host"  # the lane of sampling
ROUNDING = 1e-12  # of a task
ALL = 0.95  # of a layer's experts: a pass that uses so many has all of the next layer's read ahead
DISPLACING = 2  # layers at the beginning of a pass over all experts, while which nothing can go that was used
READ_TAKES = "read_takes_s"  # a disk's fact: seconds that those who compute on all cores lose by each byte read


@dataclass(frozen=True, slots=True)
class _Row:
    """A job that leaves events: tasks that follow one another on a device, or one transfer; or, without names, none."""

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

    ops: tuple[Op, ...]  # of a pass, whose pages they are
    loaded: tuple[int, ...] = ()  # the last load
    slots: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())  # what frees them, the one to be filled next first
    ahead: deque[int] = field(default_factory=deque)  # loads of what the next pass begins with

    def upcoming(self, index: int) -> Op | None:
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
        device, disk = (schedule.topology.device(name) for name in (paging.device, paging.disk))
        busy = 0 < device.cores <= device.threads  # else a core that does not compute is there for it
        self.taken = float(disk.facts.get(READ_TAKES, 0.0)) if busy else 0.0
        mine = [p for row, p in graph.rows.items() if schedule.rows[row].device == paging.device and not p.row_nbytes]
        routed = [t for t in graph if t.num_experts]
        names = {page.name for task in routed for page in task.pages}
        dense = sum(page.nbytes for page in mine if page.name not in names)
        left = max(0, paging.cache_bytes - dense)
        self.stays = min(1.0, paging.cache_bytes / dense) if dense else 1.0  # share of what every pass needs
        own = {page.name for page in mine} & names
        uses = [(page, picks) for task in routed for page, picks in _picks(task) if page.name in own]
        room = left / (sum(page.nbytes for page, _ in uses) / len(uses)) if uses else 0.0
        policy, _ = cache_policy(paging.policy)
        rates = hit_rates(np.array([picks for _, picks in uses]), room, policy)
        self.there = {page.name: float(rate) for (page, _), rate in zip(uses, rates, strict=True)}  # routed experts
        layers = [t for t in routed if t.pages[0].name in own]
        self._first, later = layers[:DISPLACING], layers[DISPLACING:]
        self._from_end = {task.name: i for i, task in enumerate(reversed(later))}

    def needs(self, op: Op, step: Step) -> tuple[float, float]:
        """Bytes that a pass needs of a task, and those of them that are expected to be read."""
        page = op.task.pages[0]
        if page.row_nbytes:
            rows = float(op.task.work(step.phase).rows(step) * page.row_nbytes)
            return rows, rows
        if not op.task.num_experts:
            return page.nbytes, (1 - self.stays) * page.nbytes
        nbytes = _touched(op.task, step, op.experts) * page.nbytes
        missing = nbytes * self._missing(op, step.tokens)
        if self.scans(op.task, step):
            missing += self._displaced(op.task, nbytes - missing, step)
        return nbytes, missing

    def scans(self, task: Task, step: Step) -> bool:
        """Whether the pass uses so many of a layer's experts that all of the next layer's are read ahead."""
        return task.distinct_experts(step) >= ALL * task.num_experts

    def _displaced(self, task: Task, there: float, step: Step) -> float:
        """Bytes of a layer that a pass over all experts reads although they were `there`: while the first layer
        computes, and the second is read, nothing has been used yet, so what these two lack takes the place of what is
        used last: of the last layer, and of those before it where that is not enough."""
        if task.name not in self._from_end:
            return 0.0
        displaced = sum(
            first.distinct_experts(step) * first.pages[0].nbytes
            * self._missing(Op(first, self.paging.device), step.tokens)
            for first in self._first
        )  # fmt: skip
        return min(there, max(0.0, displaced - self._from_end[task.name] * there))

    def _missing(self, op: Op, tokens: int) -> float:
        """Of the routed experts that so many tokens touch, the share that is not there."""
        experts = op.experts or range(op.task.num_experts)
        away = [1 - self.there[op.task.pages[e].name] for e in experts]
        if not op.task.popularity:
            return sum(away) / len(away)
        touched = [op.task.expected_experts(tokens, (e,)) for e in experts]
        return sum(t * a for t, a in zip(touched, away, strict=True)) / (sum(touched) or 1.0)

    def excess(self, step: Step, program: Iterable[Op]) -> float:
        """How many times as much was read as is expected, where that is known."""
        if step.read_bytes is None:
            return 1.0
        expected: float = sum(self.needs(op, step)[1] for op in program if op.paged)
        return step.read_bytes / expected if expected else 0.0


class Run:
    """A schedule being carried out on the engine."""

    def __init__(
        self, schedule: Schedule, graph: TaskGraph, cost: CostModel, pools: Mapping[str, float] | None = None,
        handling: Mapping[str, float] | None = None, program: Program | None = None,
        given: Mapping[str, float] | None = None,
    ) -> None:  # fmt: skip
        """`handling`: s, of each process that carries out a part of a pass, when it is called; by device. With it, time
        besides the tasks is in it. `given`: share of a device that its tasks get, by device; None: all of it."""
        self.schedule, self.graph, self.cost, self.handling = schedule, graph, cost, handling or {}
        self.given = given or {}
        self.engine = Engine({d.name: d.bandwidth for d in cost.topology.domains}, pools)
        self.program = program or program_of(schedule, graph)
        self.devices = {d.name: d for d in schedule.topology.devices}
        self.sampler = self.devices[host_of(schedule, graph) or schedule.device_of(graph.tasks[-1].name)]
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
        jobs.called(self.program[0].device)
        for op in self.program:
            if op.src:
                jobs.copy(op)
                continue
            costs = varying if op.attends else fixed
            seconds = costs.get(op.number)
            if seconds is None:
                seconds = costs[op.number] = self._seconds(op, step, beside, whole)
            jobs.compute(op, seconds)
        besides = 0.0 if self.handling else self.cost.besides_tasks(self.sampler, len(self.graph.tasks))
        last = jobs.end(self.cost.sampling(self.sampler, whole, self.graph), besides)
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

    def _seconds(self, op: Op, step: Step, beside: Step | None, whole: Step) -> float:
        device = self.devices[op.device]
        if op.part == "combine":
            cost = self.cost.combine(op.task, device, whole)
        elif op.part == "experts":
            cost = self.cost.experts(op.task, device, whole, op.experts)
        else:
            cost = self.cost.task(op.task, device, step, beside)
        return cost.seconds / self.given.get(op.device, 1.0)

    def _record(self, step: Step, rows: Iterable[_Row], last: int, begin: float, alone: bool) -> None:
        """The events of a pass. Of one that was alone, time between two of its jobs is a wait for pages."""
        number, phase, start, end = len(self.infos), step.phase, self.engine.start, self.engine.end
        events, done = self.events, begin
        for row in rows:
            at, then = start[row.job], end[row.job]
            if not row.names:
                done = then
                continue
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

    def __init__(self, run: Run, step: Step, after: tuple[int, ...]) -> None:
        self.run, self.step, self.chain = run, step, after
        self.rows: list[_Row] = []
        self.before_last = self.before = after  # what came before the task before this one, and before this one
        self.routed = False  # whether the task before this one is a router
        self.layers: list[tuple[int, ...]] = []  # what came before each layer's routed experts
        self.excess = run.disk.excess(step, run.program) if run.disk else 1.0
        self._device = ""  # of the tasks that follow one another there and are no job yet
        self._names: list[str] = []
        self._ends: list[float] = []  # s since the first of them began

    def copy(self, op: Op) -> None:
        self._next()
        nbytes = op.copied(self.step)
        job = self.run.transfer(op.task.name, op.src, op.device, nbytes, self.chain)
        self._then(_Row(job, _lane(op.src, op.device), op.device, "copy", (op.task.name,), nbytes=int(nbytes)))
        self.routed = False
        if node_of(op.src) != node_of(op.device):
            self.called(op.device)

    def called(self, device: str) -> None:
        """Another process goes on with the pass."""
        if seconds := self.run.handling.get(device, 0.0):
            self.chain = (self.run.engine.add(Job("call", self.chain, device, seconds)),)

    def compute(self, op: Op, seconds: float) -> None:
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

    def end(self, sampling: float, besides: float) -> int:
        """The number of the last job. Streams go on with the first pages of the next pass. Time `besides` the tasks is
        added up here: it belongs to the pass, and to no task."""
        self._flush()
        if sampling > 0:
            lane = self.run.sampler.name if self.run.handling else HOST  # of a stage's process, or the only one
            job = self.run.engine.add(Job("sample", self.chain, lane, sampling))
            self._then(_Row(job, HOST, HOST, "sample", ("sample",)))
        for stream in self.run.streams.values():
            for slot in range(len(stream.ahead), len(stream.slots)):
                if (op := stream.upcoming(slot)) is not None:
                    waits = (*stream.loaded, *stream.slots[slot])
                    stream.ahead.append(self._load(op, op.sources[0], op.sources[0].nbytes, waits))
                    stream.loaded = (stream.ahead[-1],)
        if besides > 0:
            self.chain = (self.run.engine.add(Job("besides tasks", self.chain, HOST, besides)),)
        return self.chain[0]

    def _paged(self, op: Op, seconds: float, disk: _Disk) -> None:
        """Reads what is not there: routed experts from when they are guessed, `lookahead` layers earlier, or one layer
        where all are read; other pages from the task before, rows of tables when they are needed. What is there
        computes meanwhile, but for what reading takes of cores and memory."""
        needed, missing = disk.needs(op, self.step)
        missing = min(needed, missing * self.excess)
        asked = self.before if op.task.pages[0].row_nbytes else self.before_last
        if op.task.num_experts:
            self.layers.append(self.before)
            ahead = 1 if disk.scans(op.task, self.step) else disk.paging.lookahead
            asked = self.layers[max(0, len(self.layers) - 1 - ahead)]
        self._asking(op, missing, disk)
        if missing < 1:
            self._part(op, seconds)
            return
        job = self.run.transfer(op.task.name, disk.paging.disk, op.device, missing, (*disk.read, *asked))
        disk.read = (job,)
        self._brought(op, disk.paging.disk, job, missing)
        seconds += missing * disk.taken
        # Experts compute one after the other as they come: when the last page is there, only it is left.
        last = min(missing, op.task.pages[0].nbytes) / needed
        if last < 1:
            self._part(op, (1 - last) * seconds)
        self._part(op, last * seconds, (job,))

    def _asking(self, op: Op, missing: float, disk: _Disk) -> None:
        """Besides the task: its pages are asked for and taken in, a later layer's experts are guessed."""
        page = op.task.pages[0]
        pages = 0.0 if page.row_nbytes else missing / page.nbytes
        guesses = op.task.num_experts > 0 and disk.paging.lookahead > 0 and not disk.scans(op.task, self.step)
        if not pages and not guesses:  # most tasks: no curve is looked for
            return
        device = self.run.devices[op.device]
        if seconds := self.run.cost.paging(device, pages, int(guesses)):
            job = self.run.engine.add(Job("besides tasks", self.chain, op.device, seconds))
            self._then(_Row(job, op.device, op.device, "compute", ()))

    def _looked_up(self, op: Op, seconds: float, table: Source) -> None:
        """Rows of a table that is stored elsewhere come when they are needed."""
        nbytes = op.task.work(self.step.phase).rows(self.step) * table.row_nbytes
        job = self._load(op, table, nbytes, self.before)
        self._brought(op, table.home, job, nbytes)
        self._part(op, seconds, (job,))

    def _streamed(self, op: Op, seconds: float, stream: _Stream) -> None:
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

    def _load(self, op: Op, source: Source, nbytes: float, after: tuple[int, ...]) -> int:
        return self.run.transfer(op.task.name, source.home, op.device, nbytes, after)

    def _brought(self, op: Op, home: str, job: int, nbytes: float) -> None:
        self.rows.append(_Row(job, _lane(home, op.device), op.device, "read", (op.task.name,), nbytes=int(nbytes)))

    def _part(self, op: Op, seconds: float, awaits: tuple[int, ...] = ()) -> int:
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


def _picks(task: Task) -> list[tuple[Page, float]]:
    """Each routed expert's page, and how often a token is expected to pick it."""
    even = (task.experts_per_token / task.num_experts,) * task.num_experts
    return list(zip(task.pages, task.popularity or even, strict=True))


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
