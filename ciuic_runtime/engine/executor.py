"""Carries a schedule out on the devices of this machine: loads each page where the schedule has it, then runs every
pass task by task, copying between devices where the schedule crosses them. Decides nothing."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from ciuic_runtime.devices.backend import Backend
from ciuic_runtime.devices.cpu import parse_cpu_list
from ciuic_runtime.engine.expert_uses import ExpertUses, different
from ciuic_runtime.engine.paged import Ahead, Guess, PagedExperts, PagedFunction, PagedTable
from ciuic_runtime.engine.recorder import Recorder
from ciuic_runtime.engine.weights import load_native, load_tensors
from ciuic_runtime.memory.hierarchy import MemoryHierarchy
from ciuic_runtime.memory.kv_cache import KVCache
from ciuic_runtime.models.batch import Batch
from ciuic_runtime.models.checkpoint import Checkpoint
from ciuic_runtime.models.forward import Forward
from ciuic_runtime.models.layout import page_layout
from ciuic_runtime.models.native_composed import ComposedForward
from ciuic_runtime.models.native_forward import NativeForward
from ciuic_runtime.models.spec import ModelSpec
from ciuic_runtime.ops.custom import Replacements
from ciuic_runtime.ops.native import REFERENCE, operators
from ciuic_runtime.schedulers.graph import Phase, Step, Task, TaskGraph
from ciuic_runtime.schedulers.passes import ALL
from ciuic_runtime.schedulers.recording import COPY, EVICT, MEMORY, READ, SAMPLE, WAIT, WEIGHTS
from ciuic_runtime.schedulers.schedule import Schedule

Progress = Callable[[int, int], None]  # bytes done, bytes in all
DENSE_AHEAD = 3  # pages that every pass needs are read so many ahead


@dataclass(slots=True)
class _Instruction:
    """A task bound to its device, weights and function."""

    task: Task
    device: str
    backend: Backend
    number: int  # of the task in the recorder
    lane: int  # of the device in the recorder
    function: Callable[..., Any]  # routed experts: what combines their rows
    experts: dict[str, Callable[..., torch.Tensor]] = field(default_factory=dict)  # device -> its experts' rows
    shares: dict[str, torch.Tensor] = field(default_factory=dict)  # device -> the numbers of its experts
    paged: PagedFunction | None = None  # in place of `function`, where its page lies in a slot
    paged_experts: PagedExperts | None = None  # in place of `experts`
    routes: PagedExperts | None = None  # of a router: those that it chooses from
    uses: ExpertUses | None = None  # of a router, counted where its choice is in the host's memory anyway
    ahead: Ahead | None = None  # what is read ahead from here
    inputs: tuple[tuple[str, str], ...] = ()  # (task, device) of the values that it takes
    last_use: tuple[tuple[str, str], ...] = ()  # values that nobody reads after this


class LocalExecutor:
    """One process, any number of devices; one task at a time. `kernels` is an instruction set, or "reference";
    `replaced` are the user's operators. With a `memory`, pages are taken from its slots, whenever they are needed;
    `lookahead` is how many layers ahead routed experts are guessed and read."""

    def __init__(
        self,
        spec: ModelSpec,
        graph: TaskGraph,
        schedule: Schedule,
        checkpoint: Checkpoint,
        backends: Mapping[str, Backend],
        num_blocks: int,
        recorder: Recorder,
        progress: Progress | None = None,
        kernels: str = REFERENCE,
        threads: int = 1,
        replaced: Replacements | None = None,
        memory: MemoryHierarchy | None = None,
        lookahead: int = 0,
    ) -> None:
        schedule.validate(graph)
        self.spec = spec
        self.memory, self.lookahead = memory, lookahead
        self.on_routing: Callable[[int, torch.Tensor], None] | None = None  # layer, expert ids [tokens, k]
        self.touched: list[int] = []  # distinct experts that each layer used in the pass
        self.expert_uses: dict[str, ExpertUses] = {}  # by task
        self.graph, self.schedule, self.backends, self.recorder = graph, schedule, backends, recorder
        self.native, self.threads = kernels != REFERENCE, threads
        self.replaced = replaced or Replacements()
        self.dtype: torch.dtype = torch.float32 if graph.format == "float32" else torch.bfloat16
        self._checkpoint = checkpoint
        values = round(spec.kv_values_per_token / spec.num_layers)
        layer_of = {t.layer: schedule.device_of(t.name) for t in graph if t.kind == "attention" and t.layer is not None}
        self.cache = KVCache(
            dict.fromkeys(layer_of, values), num_blocks, self.dtype, lambda i, n: backends[layer_of[i]].allocate(n)
        )
        self.forwards: dict[str, Any] = {name: self._forward(spec, kernels, b) for name, b in backends.items()}
        self._pages: dict[tuple[str, str], Any] = {}
        self._read_lanes: list[float] = []  # when the last read on each lane ended
        routed = [t.num_experts / t.experts_per_token for t in graph if t.num_experts]
        self._most_routed = max(routed, default=1.0)  # tokens of a pass that uses most experts of a layer
        self._nearly_all_routed = max((math.log(1 - ALL) / math.log1p(-1 / n) for n in routed if n > 1), default=1.0)
        self._program = self._compile(progress or (lambda done, total: None))
        takes = {key for i in self._program for key in (*i.inputs, *((i.task.after[0], d) for d in i.experts))}
        self._received = {name: [d for n, d in sorted(takes) if n == name] for name in graph.given}

    def _forward(self, spec: ModelSpec, kernels: str, backend: Backend) -> Forward | NativeForward:
        if not self.native:
            return Forward(spec, self.cache, self.replaced)
        bound = str(backend.spec.facts.get("allowed_cpus", "")) if ":" in backend.spec.name else ""
        native = operators(kernels, self.threads, sorted(parse_cpu_list(bound)) if bound else ())
        if self.replaced:
            return ComposedForward(spec, self.cache, native, self.replaced)
        return NativeForward(spec, self.cache, native)

    @torch.inference_mode()
    def step(
        self, batch: Batch, phase: Phase, sampler: Callable[[torch.Tensor], None] | None = None,
        received: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Runs one pass; logits of the sampled rows, float32 [sampled, vocab] on the host. A part of the graph takes
        what the part before handed on, `received` [tokens, hidden], and hands on what its own last task made.

        What `sampler` does with logits belongs to the step, and is recorded on the lane "host"."""
        begin = time.perf_counter()
        with self.memory.alone() if self.memory is not None else nullcontext():
            logits = self._step(batch, phase, sampler, received)
            if self.memory is not None:
                self._sample_memory(self.memory)
            self.recorder.end_step(self._as_step(batch, phase), begin)
        return logits

    def _step(
        self, batch: Batch, phase: Phase, sampler: Callable[[torch.Tensor], None] | None,
        received: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        self.touched.clear()
        scanning = batch.num_tokens >= self._most_routed
        if self.memory is not None:
            self.memory.begin_step(scanning, last_scan=bool(len(batch.sampled_rows)))  # tokens are generated next
        complete = False
        try:
            run = _Run(self, batch, batch.num_tokens >= self._nearly_all_routed)
            if received is not None:
                run.receive(received)
            for instruction in self._program:
                run.execute(instruction)
            logits = run.host_value(self._program[-1].task.name)
            if sampler is not None:
                self._sample(sampler, logits)
            complete = True
        finally:
            if self.memory is not None:
                self.memory.end_step(phase, batch.num_tokens, complete)
            if not complete:
                self.recorder.abandon_step()
        return logits

    def _as_step(self, batch: Batch, phase: Phase) -> Step:
        """The pass as the cost model sees it, with the experts that it used and what it had to read."""
        touched = sum(self.touched) / len(self.touched) if self.touched else None
        read = float(self.memory.bytes_read_in_step) if self.memory is not None else None
        spans = [(s.position, s.length) for s in batch.sequences]
        return Step.of(phase, spans, len(batch.sampled_rows), touched, read)

    @property
    def handed_on(self) -> torch.dtype:
        """Of the residual stream between tasks."""
        return torch.float32 if self.native else self.dtype

    def read(self, page: str, nbytes: int, start: float, end: float) -> None:
        """Records a page's way from disk, on the first lane that is not busy meanwhile. What ended before the recording
        began is not of it."""
        if end <= self.recorder.begin:
            return
        start = max(start, self.recorder.begin)
        free = (i for i, busy_until in enumerate(self._read_lanes) if busy_until <= start)
        lane = next(free, len(self._read_lanes))
        self._read_lanes[lane:] = [end, *self._read_lanes[lane + 1 :]]
        assert self.memory is not None
        name = f"disk -> {self.memory.device}" + (f" ({lane + 1})" if lane else "")
        self.recorder.add(self.recorder.number(page), self.recorder.number(name), start, end, READ, nbytes)

    def evicted(self, page: str) -> None:
        """Records that a page has left."""
        assert self.memory is not None
        now, number = time.perf_counter(), self.recorder.number
        self.recorder.add(number(page), number(self.memory.device), now, now, EVICT)

    def _sample_memory(self, memory: MemoryHierarchy) -> None:
        now, number = time.perf_counter(), self.recorder.number
        self.recorder.add(number(WEIGHTS), number(memory.device), now, now, MEMORY, memory.state.used)

    def _sample(self, sampler: Callable[[torch.Tensor], None], logits: torch.Tensor) -> None:
        start = time.perf_counter()
        sampler(logits)
        number = self.recorder.number
        self.recorder.add(number("sample"), number("host"), start, time.perf_counter(), kind=SAMPLE)

    def close(self) -> None:
        """Gives back weights and cache; nothing can be run after this."""
        self._program.clear()
        self._pages.clear()
        self.cache.clear()
        if self.memory is not None:
            self.memory.close()

    def _compile(self, progress: Progress) -> list[_Instruction]:
        """Loads every page where the schedule has it and binds the tasks, in the graph's order."""
        total, done = sum(r.nbytes for r in self.schedule.assignments), 0
        last = {name: task.name for task in self.graph for name in task.after}
        experts_of = {task.after[1]: task for task in self.graph if task.num_experts}  # by router
        program = []
        for task in self.graph:
            device = self.schedule.device_of(task.name)
            number, lane = self.recorder.number(task.name), self.recorder.number(device)
            inputs = tuple((name, device) for name in task.after)
            last_use = tuple((name, d) for name in task.after if last[name] == task.name for d in self.backends)
            backend, forward = self.backends[device], self.forwards[device]
            if task.num_experts:
                function = forward.combine(task)
            elif self.memory is not None:
                function = _in_slot
            else:
                page = task.pages[0].name
                function = forward.function(task, self._load([page], device)[page])
            instruction = _Instruction(task, device, backend, number, lane, function, inputs=inputs, last_use=last_use)
            experts = experts_of.get(task.name)
            if experts is not None and backend.host_memory:
                instruction.uses = self.expert_uses[experts.name] = ExpertUses(experts.num_experts)
            if self.memory is not None:
                self._bind_slots(instruction)
            elif task.num_experts:
                self._bind_experts(instruction)
            done += task.nbytes
            if self.memory is None:
                progress(min(done, total), total)
            program.append(instruction)
        if self.memory is not None:
            self._bind_ahead(program)
            self.memory.on_read, self.memory.on_evict = self.read, self.evicted
            self.memory.begin_reading(progress)
        return program

    def _bind_slots(self, i: _Instruction) -> None:
        assert self.memory is not None
        layout = page_layout(self.spec, i.task.pages[0].name, self.graph.format)
        forward = self.forwards[i.device]
        if i.task.num_experts:
            run = forward.experts_in_slots(i.task, layout)
            i.paged_experts = PagedExperts(self.memory, i.task, layout, run, forward.experts)
        elif i.task.pages[0].row_nbytes:
            i.paged = PagedTable(self.memory, i.task, layout, forward.function, forward.embedding_by_rows)
        else:
            i.paged = PagedFunction(self.memory, i.task, layout, forward.function)

    def _bind_ahead(self, program: list[_Instruction]) -> None:
        """What is read ahead, and from where: the next pages that every pass needs; where a pass will use nearly all
        experts, at each router the next layer's; else, at the start of a layer, those that the router `lookahead`
        layers further would choose (at the start of the first, of all routers up to there)."""
        dense = [i.paged.page for i in program if i.paged and not i.task.pages[0].row_nbytes]
        experts = {i.task.layer: i.paged_experts for i in program if i.paged_experts and i.task.layer is not None}
        paged = {i.task.name: i.paged for i in program if i.paged}
        begun: set[int] = set()
        for i in program:
            dense = dense[1:] if i.paged and i.paged.page in dense[:1] else dense
            i.ahead = ahead = Ahead(tuple(dense[:DENSE_AHEAD]))
            layer, last = i.task.layer, (i.task.layer or 0) + self.lookahead
            i.routes = experts.get(layer) if i.task.kind == "router" and layer is not None else None
            if layer is None or not self.lookahead:
                continue
            if layer not in begun:
                guessed = [n for n in experts if n == last or (n < last and not begun)]
                ahead.guesses = tuple(
                    Guess(paged[f"layers.{n}.mlp_norm"], paged[f"layers.{n}.router"], experts[n], n - layer)
                    for n in guessed
                )
                begun.add(layer)
            if i.task.kind == "router":
                ahead.scan = next((tuple(e.pages) for n, e in experts.items() if n > layer), ())

    def _bind_experts(self, i: _Instruction) -> None:
        homes: dict[str, list[int]] = {}
        for e, home in enumerate(self.schedule.expert_devices(i.task)):
            homes.setdefault(home, []).append(e)
        for home, mine in homes.items():
            pages = self._load([i.task.pages[e].name for e in mine], home)
            i.experts[home] = self.forwards[home].experts(i.task, {e: pages[i.task.pages[e].name] for e in mine})
            i.shares[home] = torch.tensor(mine)

    def _load(self, pages: list[str], device: str) -> Mapping[str, Any]:
        """The pages on a device, as its operators take them; a page that two tasks read is loaded once."""
        backend, checkpoint = self.backends[device], self._checkpoint
        new = [page for page in pages if (page, device) not in self._pages]
        if self.native:
            loaded: Mapping[str, Any] = load_native(checkpoint, new, self.graph.format, backend, self.threads)
        else:
            loaded = {page: load_tensors(checkpoint, page, self.graph.format, self.dtype, backend) for page in new}
        self._pages.update({(page, device): weights for page, weights in loaded.items()})
        return {page: self._pages[page, device] for page in pages}


class _Run:
    """One pass: the values that tasks have handed on so far, by task and device."""

    def __init__(self, executor: LocalExecutor, batch: Batch, reads_all: bool) -> None:
        """`reads_all`: of routed experts all are read ahead, none is guessed."""
        self.x = executor
        self.batch, self.reads_all = batch, reads_all
        self.values: dict[tuple[str, str], Any] = {}
        self.passes: dict[str, Any] = {}

    def receive(self, value: torch.Tensor) -> None:
        """What another process computed, wherever tasks take it."""
        for name, devices in self.x._received.items():
            for device in devices:
                backend = self.x.backends[device]
                if backend.host_memory:
                    self.values[name, device] = value
                else:
                    copy = backend.launch(_empty_like, value, backend.torch_device, name="receive")
                    backend.copy(copy, value)
                    backend.synchronize()
                    self.values[name, device] = copy

    def execute(self, i: _Instruction) -> None:
        values = self.values
        if i.ahead is not None:
            self._look_ahead(i, i.ahead)
        if i.paged_experts:
            rows_of = i.paged_experts.at_hand()
            value = self._experts_at_home(i, rows_of) if rows_of else self._experts_in_slots(i, i.paged_experts)
        elif i.experts:
            value = self._experts(i)
        else:
            inputs = [values[key] if key in values else self._fetch(*key) for key in i.inputs]
            function = i.paged.at_hand() or self._waited(i, i.paged.bound) if i.paged else i.function
            value = self._launch(i, i.device, function, self._pass(i.device), *inputs)
        values[i.task.name, i.device] = value
        if i.task.kind == "router":
            self._routed(i, value[0])
        for key in i.last_use:
            values.pop(key, None)

    def _routed(self, i: _Instruction, ids: torch.Tensor) -> None:
        """A router has chosen: ids [tokens, k]."""
        chosen = i.uses.add(ids) if i.uses is not None else different(ids.cpu())
        if i.routes is not None:
            i.routes.ask(ids, chosen)
        self.x.touched.append(len(chosen))
        if self.x.on_routing is not None:
            assert i.task.layer is not None
            self.x.on_routing(i.task.layer, ids)

    def _experts(self, i: _Instruction) -> torch.Tensor:
        """Each device computes the rows of its experts; they are combined where the router runs."""
        x_name, router, *added = i.task.after
        home = i.device
        if i.experts.keys() == {home}:
            return self._experts_at_home(i, i.experts[home])
        p = self._pass(home)
        ids, weights = self._fetch(router, home)
        placed = []
        for device, rows_of in i.experts.items():
            here = None if len(i.experts) == 1 else _rows_of(ids, i.shares[device])
            if here is not None and not here.numel():
                continue
            x, local_ids = self._fetch(x_name, device), self._fetch(router, device)[0]
            part = self._launch(i, device, _chosen_rows, rows_of, self._pass(device), x, local_ids, here)
            placed.append((here, self._move(i.number, part, device, home)))
        inputs = [self._fetch(name, home) for name in added]
        total: torch.Tensor = self._launch(i, home, _combine, i.function, p, placed, weights, inputs)
        return total

    def _experts_at_home(self, i: _Instruction, rows_of: Callable[..., torch.Tensor]) -> torch.Tensor:
        """All of them are where the router runs."""
        x_name, router, *added = i.task.after
        home, p = i.device, self._pass(i.device)
        ids, weights = self._fetch(router, home)
        x, inputs = self._fetch(x_name, home), [self._fetch(name, home) for name in added]

        def all_experts() -> torch.Tensor:
            whole: torch.Tensor = i.function(p, rows_of(p, x, ids), weights, inputs)
            return whole

        result: torch.Tensor = self._launch(i, home, all_experts)
        return result

    def _experts_in_slots(self, i: _Instruction, paged: PagedExperts) -> torch.Tensor:
        """Experts that are there compute while others arrive."""
        x_name, router, *added = i.task.after
        home, p, values = i.device, self._pass(i.device), self.values
        ids, weights = values[router, home]
        x, inputs = values[x_name, home], [values[name, home] for name in added]
        rows: torch.Tensor | None = None
        come = paged.come()
        while True:
            slots = self._waited(i, lambda: next(come, None))
            if slots is None:
                break
            rows = self._launch(i, home, paged.run, p, x, ids, slots)
        assert rows is not None, f"{i.task.name}: no expert was chosen"
        result: torch.Tensor = self._launch(i, home, i.function, p, rows, weights, inputs)
        return result

    def _waited(self, i: _Instruction, act: Callable[[], Any]) -> Any:
        """What `act` returns; if it had to wait for a page, that is recorded, and for which."""
        memory = self.x.memory
        assert memory is not None
        before, start = memory.stalled, time.perf_counter()
        result = act()
        if memory.stalled != before:
            came = self.x.recorder.number(memory.came_last)
            self.x.recorder.add(i.number, i.lane, start, time.perf_counter(), WAIT, cause=came)
        return result

    def _look_ahead(self, i: _Instruction, ahead: Ahead) -> None:
        """Has pages read that will be needed: certain ones, and those that the routers of later layers would choose if
        the residual stayed as it is."""
        memory = self.x.memory
        assert memory is not None
        if memory.state.whole:
            return
        memory.expect_certain(ahead.dense)
        if self.reads_all:
            memory.expect(ahead.scan)
            return
        for guess in ahead.guesses:
            if guess.norm.is_there and guess.router.is_there:
                p, residual = self._pass(i.device), self.values[i.inputs[-1]]
                ids, _ = guess.router.peek()(p, guess.norm.peek()(p, residual))
                memory.expect(*guess.experts.guessed(ids, guess.ahead))

    def _fetch(self, name: str, device: str) -> Any:
        """A task's value on a device, copied there the first time it is asked for."""
        if (name, device) not in self.values:
            source = self.x.schedule.device_of(name)
            number = self.x.recorder.number(name)
            value = self.values[name, source]
            if isinstance(value, tuple):
                self.values[name, device] = tuple(self._move(number, part, source, device) for part in value)
            else:
                self.values[name, device] = self._move(number, value, source, device)
        return self.values[name, device]

    def _move(self, number: int, value: torch.Tensor, src: str, dst: str) -> torch.Tensor:
        """The value in the memory of another device. The device that is not the host does the copy."""
        if src == dst:
            return value
        target, origin = self.x.backends[dst], self.x.backends[src]
        start = time.perf_counter()
        origin.synchronize()
        moved = target.launch(_empty_like, value, target.torch_device, name="receive")
        copier = origin if target.host_memory else target
        copier.copy(moved, value)
        copier.synchronize()
        end = time.perf_counter()
        self.x.recorder.add(number, self.x.recorder.number(f"{src} -> {dst}"), start, end, COPY, value.nbytes)
        return moved

    def _launch(self, i: _Instruction, device: str, function: Callable[..., Any], *args: Any) -> Any:
        """Runs a task's function on a device and records it; asynchronous devices are waited for."""
        backend = i.backend if device == i.device else self.x.backends[device]
        start = time.perf_counter()
        if backend.host_memory:  # runs when called
            value = function(*args)
        else:
            value = backend.launch(function, *args, name=i.task.name)
            backend.synchronize()
        end = time.perf_counter()
        self.x.recorder.add(i.number, i.lane if device == i.device else self.x.recorder.number(device), start, end)
        return value

    def _pass(self, device: str) -> Any:
        if device not in self.passes:
            self.passes[device] = self.x.forwards[device].start(self.batch.to(self.x.backends[device].torch_device))
        return self.passes[device]

    def host_value(self, name: str) -> torch.Tensor:
        """A task's value in host memory; the way there is a copy like any other."""
        device = self.x.schedule.device_of(name)
        value: torch.Tensor = self.values[name, device]
        host = next((n for n, backend in self.x.backends.items() if backend.host_memory), None)
        if self.x.backends[device].host_memory or host is None:
            return value.cpu()
        return self._move(self.x.recorder.number(name), value, device, host)


def _in_slot(*arguments: Any) -> Any:
    raise AssertionError("the page is in a slot: its function is made when it is there")


def _rows_of(ids: torch.Tensor, mine: torch.Tensor) -> torch.Tensor:
    """The (token, k) rows, on the host, whose expert is one of these."""
    return torch.isin(ids.flatten().cpu(), mine).nonzero().flatten()


def _chosen_rows(
    rows_of: Callable[..., torch.Tensor], p: Any, x: torch.Tensor, ids: torch.Tensor, here: torch.Tensor | None
) -> torch.Tensor:
    """The rows of a device's experts; of those only `here`, where others have the rest."""
    rows = rows_of(p, x, ids)
    return rows if here is None else rows[here.to(x.device)]


def _combine(
    combine: Callable[..., torch.Tensor], p: Any, placed: list[tuple[torch.Tensor | None, torch.Tensor]],
    weights: torch.Tensor, added: list[torch.Tensor],
) -> torch.Tensor:  # fmt: skip
    """The routed experts' rows, from wherever they were computed, then the shared experts, then the residual."""
    rows = placed[0][1]
    if placed[0][0] is not None:
        rows = rows.new_empty(weights.numel(), rows.shape[1])
        for here, part in placed:
            assert here is not None
            rows[here.to(rows.device)] = part
    return combine(p, rows, weights, added)


def _empty_like(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.empty(value.shape, dtype=value.dtype, device=device)
