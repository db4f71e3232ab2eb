"""Discrete-event simulation: jobs that wait for one another, for exclusive resources, for memory, and that share links.
Knows no model and no schedule; `simulate.py` says which jobs there are."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from ciuic_runtime.devices.units import format_bytes


@dataclass(frozen=True, slots=True)
class Job:
    """Something that takes time: first `seconds`, then `nbytes` that flow as fast as `limit` and others let them."""

    name: str
    after: tuple[int, ...] = ()  # numbers of the jobs that have ended before
    on: str = ""  # what it has to itself: a stream, a copy engine, the queue of a disk; first come, first served
    seconds: float = 0.0
    nbytes: float = 0.0
    limit: float = math.inf  # bytes/s
    via: tuple[str, ...] = ()  # shared links and domains that the bytes flow through
    takes: tuple[tuple[str, float], ...] = ()  # (pool, bytes) when it starts; it waits until they are there
    gives: tuple[tuple[str, float], ...] = ()  # (pool, bytes) when it ends


@dataclass(frozen=True, slots=True)
class Shortage:
    """A job that waits for memory which nobody will give back."""

    job: str
    time: float  # s, since when
    pool: str
    need: float  # bytes
    free: float
    capacity: float

    def __str__(self) -> str:
        return (
            f"{self.job} needs {format_bytes(int(self.need))} of {self.pool} at {self.time:.6g} s; "
            f"{format_bytes(int(self.free))} of {format_bytes(int(self.capacity))} are free and nothing will free more"
        )


@dataclass(slots=True)
class _Flow:
    """A transfer under way, as of the last time that its rate changed."""

    left: float  # bytes
    rate: float = 0.0  # bytes/s
    since: float = 0.0  # s
    version: int = 0  # of the end that was foretold


class Engine:
    """The state of a simulation. Jobs can be added while it stands still; equal inputs give equal times: what happens
    at the same time happens in the order in which jobs were added."""

    def __init__(self, shared: Mapping[str, float] | None = None, pools: Mapping[str, float] | None = None) -> None:
        """`shared`: bytes/s of links and domains that flows share; `pools`: bytes of memory."""
        self.now = 0.0
        self.jobs: list[Job] = []
        self.start: list[float] = []  # s, by number of the job; NaN: not yet
        self.end: list[float] = []
        self.pools = dict(pools or {})
        self.free = dict(self.pools)
        self.high_water = dict.fromkeys(self.pools, 0.0)  # bytes held at most
        self._shared = dict(shared or {})
        self._missing: list[int] = []  # how many jobs each one still waits for
        self._dependents: list[list[int]] = []
        self._ready: list[int] = []
        self._queues: dict[str, deque[int]] = {}  # of exclusive resources; the first in each has it
        self._lacking: list[tuple[int, float]] = []  # (job, since when) that wait for memory
        self._heap: list[tuple[float, int, int]] = []  # (time, job, 0: its end, -1: its bytes begin, else: of a flow)
        self._flows: dict[int, _Flow] = {}
        self._changed = False  # whether a flow came or went

    def add(self, job: Job) -> int:
        """The number of the job. It waits for jobs that were added before it only, so there is no cycle."""
        number, missing = len(self.jobs), 0
        for earlier in job.after:
            assert earlier < number, f"{job.name} comes after job {earlier}, which is not there yet"
            if math.isnan(self.end[earlier]):
                self._dependents[earlier].append(number)
                missing += 1
        self.jobs.append(job)
        self.start.append(math.nan)
        self.end.append(math.nan)
        self._missing.append(missing)
        self._dependents.append([])
        if not missing:
            self._ready.append(number)
        return number

    def run(self, until: int | None = None) -> None:
        """Lets time pass until a job has ended, else until nothing can happen any more."""
        heap, end = self._heap, self.end
        self._begin_ready()
        while heap and (until is None or math.isnan(end[until])):
            now = heap[0][0]
            while heap and heap[0][0] == now:
                _, number, version = heappop(heap)
                if version:
                    self._flow(number, version, now)
                else:
                    self._finish(number, now)
            self._begin_ready()

    @property
    def shortage(self) -> Shortage | None:
        """Who has waited longest for memory, if nothing else can happen."""
        if self._heap or not self._lacking:
            return None
        number, since = self._lacking[0]
        job = self.jobs[number]
        pool, need = next((p, n) for p, n in job.takes if n > self.free[p])
        return Shortage(job.name, since, pool, need, self.free[pool], self.pools[pool])

    def _begin_ready(self) -> None:
        jobs, queues = self.jobs, self._queues
        ready, self._ready = self._ready, []
        if len(ready) > 1:
            ready.sort()
        for number in ready:
            on = jobs[number].on
            if not on:
                self._ask(number)
                continue
            queue = queues.get(on)
            if queue is None:
                queue = queues[on] = deque()
            queue.append(number)
            if len(queue) == 1:
                self._ask(number)
        if self._changed:
            self._share()

    def _ask(self, number: int) -> None:
        """The job starts if the memory is there that it takes; nobody overtakes who waits for the same pool."""
        takes = self.jobs[number].takes
        if takes:
            asked = {pool for waiting, _ in self._lacking for pool, _ in self.jobs[waiting].takes}
            if any(pool in asked or need > self.free[pool] for pool, need in takes):
                self._lacking.append((number, self.now))
                return
        self._begin(number)

    def _begin(self, number: int) -> None:
        job, now = self.jobs[number], self.now
        for pool, nbytes in job.takes:
            self.free[pool] -= nbytes
            self.high_water[pool] = max(self.high_water[pool], self.pools[pool] - self.free[pool])
        self.start[number] = now
        if job.via and job.nbytes > 0:
            heappush(self._heap, (now + job.seconds, number, -1))
        elif job.nbytes > 0:
            heappush(self._heap, (now + (job.seconds + job.nbytes / job.limit), number, 0))
        else:
            heappush(self._heap, (now + job.seconds, number, 0))

    def _finish(self, number: int, now: float) -> None:
        job, missing = self.jobs[number], self._missing
        self.now = self.end[number] = now
        for dependent in self._dependents[number]:
            missing[dependent] -= 1
            if not missing[dependent]:
                self._ready.append(dependent)
        if job.gives:
            for pool, nbytes in job.gives:
                self.free[pool] += nbytes
            self._serve()
        if job.on:
            queue = self._queues[job.on]
            queue.popleft()
            if queue:
                self._ask(queue[0])

    def _serve(self) -> None:
        """Those that wait for memory start in the order in which they asked."""
        lacking, self._lacking = self._lacking, []
        asked: set[str] = set()
        for number, since in lacking:
            takes = self.jobs[number].takes
            if any(pool in asked or need > self.free[pool] for pool, need in takes):
                self._lacking.append((number, since))
                asked.update(pool for pool, _ in takes)
            else:
                self._begin(number)

    def _flow(self, number: int, version: int, now: float) -> None:
        if version < 0:
            self._flows[number] = _Flow(self.jobs[number].nbytes, since=now)
        elif number not in self._flows or self._flows[number].version != version:
            return  # foretold at a rate that has changed since
        else:
            del self._flows[number]
            self._finish(number, now)
        self.now, self._changed = now, True

    def _share(self) -> None:
        """New rates for the flows under way; the end of each whose rate changes is foretold anew."""
        self._changed = False
        jobs = [self.jobs[number] for number in self._flows]
        rates = max_min([job.limit for job in jobs], [job.via for job in jobs], self._shared)
        for (number, flow), rate in zip(self._flows.items(), rates, strict=True):
            if rate != flow.rate:
                flow.left = max(0.0, flow.left - flow.rate * (self.now - flow.since))
                flow.rate, flow.since, flow.version = rate, self.now, flow.version + 1
                heappush(self._heap, (self.now + flow.left / rate, number, flow.version))


def max_min(limits: Sequence[float], paths: Sequence[Sequence[str]], capacity: Mapping[str, float]) -> list[float]:
    """Max-min fair rates of flows, each with its own limit and the links on its path: progressive filling (Bertsekas
    and Gallager, Data Networks, 6.5.2). All rates rise together until a link is full or a flow is at its limit."""
    rates = [0.0] * len(limits)
    rising = dict.fromkeys(range(len(limits)))
    left = dict(capacity)
    while rising:
        # Step 1: the links that rising flows cross, and how many each carries
        crossing: dict[str, int] = {}
        for flow in rising:
            for link in paths[flow]:
                crossing[link] = crossing.get(link, 0) + 1
        # Step 2: the level at which the first of them is full, or a flow has all that it may have
        share, full = min(((left[link] / count, link) for link, count in crossing.items()), default=(math.inf, ""))
        level = min(share, min(limits[flow] for flow in rising))
        # Step 3: those flows keep the level; their links have as much less
        done = [f for f in rising if limits[f] <= level or (share == level and full in paths[f])]
        for flow in done:
            del rising[flow]
            rates[flow] = level
            for link in paths[flow]:
                left[link] = max(0.0, left[link] - level)
    return rates
