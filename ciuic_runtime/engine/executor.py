"""Carries a schedule out on the devices of this machine: loads each page where the schedule has it, then runs every
pass task by task, copying between devices where the schedule crosses them. Decides nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ciuic_runtime.devices.backend import Backend
from ciuic_runtime.engine.recorder import Recorder
from ciuic_runtime.memory.kv_cache import KVCache
from ciuic_runtime.models.batch import Batch
from ciuic_runtime.models.checkpoint import Checkpoint
from ciuic_runtime.models.forward import Forward, Pass, TaskFunction, Weights
from ciuic_runtime.models.graph import FLOAT32_ROLES
from ciuic_runtime.models.spec import ModelSpec
from ciuic_runtime.models.tensors import TensorSpec, tensors_by_page
from ciuic_runtime.ops.moe import combine, experts
from ciuic_runtime.schedulers.graph import Phase, Task, TaskGraph
from ciuic_runtime.schedulers.schedule import Schedule

Progress = Callable[[int, int], None]  # bytes done, bytes in all


@dataclass(slots=True)
class _Instruction:
    """A task bound to its device, weights and function."""

    task: Task
    device: str
    backend: Backend
    number: int  # of the task in the recorder
    lane: int  # of the device in the recorder
    function: TaskFunction | None  # None: routed experts
    experts: dict[str, dict[int, Weights]] = field(default_factory=dict)  # device -> expert -> weights
    last_use: tuple[str, ...] = ()  # values that nobody reads after this


class LocalExecutor:
    """One process, any number of devices; one task at a time."""

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
    ) -> None:
        schedule.validate(graph)
        self.graph, self.schedule, self.backends, self.recorder = graph, schedule, backends, recorder
        self.dtype: torch.dtype = getattr(torch, graph.format)
        self._checkpoint = checkpoint
        values = round(spec.kv_values_per_token / spec.num_layers)
        layer_of = {t.layer: schedule.device_of(t.name) for t in graph if t.kind == "attention" and t.layer is not None}
        self.cache = KVCache(
            dict.fromkeys(layer_of, values), num_blocks, self.dtype, lambda i, n: backends[layer_of[i]].allocate(n)
        )
        self.forward = Forward(spec, self.cache)
        self._pages: dict[tuple[str, str], Weights] = {}
        self._program = self._compile(tensors_by_page(spec), progress or (lambda done, total: None))

    @torch.inference_mode()
    def step(self, batch: Batch, phase: Phase, sampler: Callable[[torch.Tensor], None] | None = None) -> torch.Tensor:
        """Runs one pass; logits of the sampled rows, float32 [sampled, vocab] on the host.

        What `sampler` does with them belongs to the step, and is recorded on the lane "host"."""
        begin = time.perf_counter()
        run = _Run(self, batch)
        try:
            for instruction in self._program:
                run.execute(instruction)
            logits = run.host_value("head")
            if sampler is not None:
                self._sample(sampler, logits)
        except BaseException:
            self.recorder.abandon_step()
            raise
        self.recorder.end_step(phase, batch.num_tokens, len(batch.sequences), begin)
        return logits

    def _sample(self, sampler: Callable[[torch.Tensor], None], logits: torch.Tensor) -> None:
        start = time.perf_counter()
        sampler(logits)
        number = self.recorder.number
        self.recorder.add(number("sample"), number("host"), start, time.perf_counter(), kind=2)

    def close(self) -> None:
        """Gives back weights and cache; nothing can be run after this."""
        self._program.clear()
        self._pages.clear()
        self.cache.clear()

    def _compile(self, tensors: Mapping[str, tuple[TensorSpec, ...]], progress: Progress) -> list[_Instruction]:
        """Loads every page where the schedule has it and binds the tasks, in the graph's order."""
        total, done = sum(r.nbytes for r in self.schedule.assignments), 0
        last = {name: task.name for task in self.graph for name in task.after}
        program = []
        for task in self.graph:
            device = self.schedule.device_of(task.name)
            number, lane = self.recorder.number(task.name), self.recorder.number(device)
            last_use = tuple(name for name in task.after if last[name] == task.name)
            instruction = _Instruction(task, device, self.backends[device], number, lane, None, last_use=last_use)
            if task.num_experts:
                for e, home in enumerate(self.schedule.expert_devices(task)):
                    weights = self._load(task.pages[e].name, home, tensors)
                    instruction.experts.setdefault(home, {})[e] = weights
            else:
                instruction.function = self.forward.function(task, self._load(task.pages[0].name, device, tensors))
            done += task.nbytes
            progress(min(done, total), total)
            program.append(instruction)
        return program

    def _load(self, page: str, device: str, tensors: Mapping[str, tuple[TensorSpec, ...]]) -> Weights:
        """The page's tensors on a device: mapped from the file where the device is the host and the type fits, else
        copied into one block of the device's memory."""
        if (page, device) not in self._pages:
            backend = self.backends[device]
            loaded = {
                t.role: self._checkpoint.load(t, torch.float32 if t.role in FLOAT32_ROLES else self.dtype)
                for t in tensors[page]
            }
            self._pages[page, device] = loaded if backend.host_memory else _to_device(loaded, backend)
        return self._pages[page, device]


class _Run:
    """One pass: the values that tasks have handed on so far, by task and device."""

    def __init__(self, executor: LocalExecutor, batch: Batch) -> None:
        self.x = executor
        self.batch = batch
        self.values: dict[tuple[str, str], Any] = {}
        self.passes: dict[str, Pass] = {}

    def execute(self, i: _Instruction) -> None:
        if i.function is None:
            value = self._experts(i)
        else:
            inputs = [self._fetch(name, i.device) for name in i.task.after]
            value = self._launch(i, i.device, i.function, self._pass(i.device), *inputs)
        self.values[i.task.name, i.device] = value
        for name in i.last_use:
            for device in self.x.backends:
                self.values.pop((name, device), None)

    def _experts(self, i: _Instruction) -> torch.Tensor:
        """Each device computes the rows of its experts; they are combined where the router runs."""
        x_name, router, *added = i.task.after
        home = i.device
        ids, weights = self._fetch(router, home)
        if i.experts.keys() == {home}:
            x, inputs = self._fetch(x_name, home), [self._fetch(name, home) for name in added]
            whole: torch.Tensor = self._launch(i, home, _all_experts, x, ids, i.experts[home], weights, inputs)
            return whole
        placed = []
        for device, mine in i.experts.items():
            here = None if len(i.experts) == 1 else _rows_of(ids, mine)
            if here is not None and not here.numel():
                continue
            x, local_ids = self._fetch(x_name, device), self._fetch(router, device)[0]
            part = self._launch(i, device, _expert_rows, x, local_ids, mine, here)
            placed.append((here, self._move(i.number, part, device, home)))
        inputs = [self._fetch(name, home) for name in added]
        total: torch.Tensor = self._launch(i, home, _combine, placed, weights, inputs)
        return total

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
        self.x.recorder.add(number, self.x.recorder.number(f"{src} -> {dst}"), start, end, 1, value.nbytes)
        return moved

    def _launch(self, i: _Instruction, device: str, function: Callable[..., Any], *args: Any) -> Any:
        """Runs a task's function on a device and records it; asynchronous devices are waited for."""
        backend = self.x.backends[device]
        start = time.perf_counter()
        value = backend.launch(function, *args, name=i.task.name)
        backend.synchronize()
        end = time.perf_counter()
        self.x.recorder.add(i.number, i.lane if device == i.device else self.x.recorder.number(device), start, end)
        return value

    def _pass(self, device: str) -> Pass:
        if device not in self.passes:
            self.passes[device] = self.x.forward.start(self.batch.to(self.x.backends[device].torch_device))
        return self.passes[device]

    def host_value(self, name: str) -> torch.Tensor:
        """A task's value in host memory; the way there is a copy like any other."""
        device = self.x.schedule.device_of(name)
        value: torch.Tensor = self.values[name, device]
        host = next((n for n, backend in self.x.backends.items() if backend.host_memory), None)
        if self.x.backends[device].host_memory or host is None:
            return value.cpu()
        return self._move(self.x.recorder.number(name), value, device, host)


def _rows_of(ids: torch.Tensor, mine: Mapping[int, Weights]) -> torch.Tensor:
    """The (token, k) rows, on the host, whose expert is one of these."""
    return torch.isin(ids.flatten().cpu(), torch.tensor(sorted(mine))).nonzero().flatten()


def _expert_rows(
    x: torch.Tensor, ids: torch.Tensor, mine: Mapping[int, Weights], here: torch.Tensor | None
) -> torch.Tensor:
    """The rows [tokens x k, hidden] of a device's experts; of those only `here`, where others have the rest."""
    rows = x.new_empty(ids.numel(), x.shape[1])
    experts(x, ids, mine, rows)
    return rows if here is None else rows[here.to(x.device)]


def _all_experts(
    x: torch.Tensor, ids: torch.Tensor, mine: Mapping[int, Weights], weights: torch.Tensor, added: list[torch.Tensor]
) -> torch.Tensor:
    """Where one device has them all and the router too."""
    return _combine([(None, _expert_rows(x, ids, mine, None))], weights, added)


def _combine(
    placed: list[tuple[torch.Tensor | None, torch.Tensor]], weights: torch.Tensor, added: list[torch.Tensor]
) -> torch.Tensor:
    """The routed experts' rows, from wherever they were computed, then the shared experts, then the residual."""
    rows = placed[0][1]
    if placed[0][0] is not None:
        rows = rows.new_empty(weights.numel(), rows.shape[1])
        for here, part in placed:
            assert here is not None
            rows[here.to(rows.device)] = part
    total = combine(rows, weights)
    for value in added:
        total = total + value
    return total


def _empty_like(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.empty(value.shape, dtype=value.dtype, device=device)


def _to_device(weights: Weights, backend: Backend) -> Weights:
    """One contiguous block of the device's memory, each tensor at a multiple of 64 bytes."""
    offsets, end = {}, 0
    for role, tensor in weights.items():
        offsets[role] = end
        end += -(-tensor.nbytes // 64) * 64
    block = backend.allocate(end)
    placed = {}
    for role, tensor in weights.items():
        view = block[offsets[role] : offsets[role] + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        backend.copy(view, tensor)
        placed[role] = view
    backend.synchronize()
    return placed
