"""A recording put together: what was recorded of passes, what the journal noted beside them, and what memory held.
Knows a schedule as it is carried out; where its passes run is the host's business."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from ciuic_runtime.basis import Basis
from ciuic_runtime.engine.journal import Journal
from ciuic_runtime.memory.kv_cache import BLOCK_TOKENS
from ciuic_runtime.schedulers.memory import capacity, memory_need
from ciuic_runtime.schedulers.recording import CACHE, COLUMNS, MEMORY, NONE, WEIGHTS, Recording, Rows
from ciuic_runtime.schedulers.workload import Workload


class Facts:
    """Of a schedule as it is carried out: its devices, and what each of them holds, and may hold."""

    def __init__(self, basis: Basis, room: Workload, num_blocks: int) -> None:
        """`room`: what memory must hold; `num_blocks`: of the KV cache."""
        schedule, graph = basis.forecaster.carried_out, basis.model.graph
        self._basis, self.schedule = basis, basis.schedule
        self.devices = schedule.devices_used()
        block: dict[str, float] = defaultdict(float)
        for task in graph:
            if task.kv_bytes_per_token:
                block[schedule.device_of(task.name)] += task.kv_bytes_per_token * BLOCK_TOKENS
        self.block_nbytes = {device: round(nbytes) for device, nbytes in block.items()}
        need = memory_need(schedule, graph, room)
        self.weights = {name: n.weights for name, n in need.items() if n.weights}
        self.capacity = {(name, CACHE): nbytes * num_blocks for name, nbytes in self.block_nbytes.items()}
        own = {device.name for device in basis.schedule.topology.devices}
        for name, n in need.items():
            if schedule.paging is not None and name == schedule.paging.device:
                self.capacity[name, WEIGHTS] = schedule.paging.cache_bytes
            elif name in own:  # else several stages share its memory
                self.capacity[name, WEIGHTS] = capacity(schedule.topology.device(name)) - n.cache - n.working

    @cached_property
    def basis(self) -> dict[str, Any]:
        return self._basis.to_dict()


def put_together(
    passes: Recording, journal: Journal, facts: Facts, begin: float, requests: bool = True
) -> Recording:  # fmt: skip
    """`passes`: what was recorded of them; `begin`: what its times are counted from, of time.perf_counter()."""
    noted = journal.passes(passes.first_step, len(passes.steps)) if journal.num_passes is not None else []
    names, rows = list(passes.names), passes.rows
    extra = _memory_rows(passes, [one.kv_blocks for one in noted], facts, names)
    if len(extra):
        rows = np.concatenate([rows, extra])
        rows = rows[np.argsort(rows["step"], kind="stable")]
    return replace(
        passes, rows=rows, names=names, passes=[one.note for one in noted],
        requests=journal.requests(begin) if requests else (), marks=journal.marks(begin), capacity=facts.capacity,
        devices=facts.devices,
    )  # fmt: skip


def _memory_rows(passes: Recording, kv_blocks: list[int], facts: Facts, names: list[str]) -> Rows:
    """After each pass the cache; at the first one weights that are where they are all the time."""
    if not passes.steps:
        return np.zeros(0, COLUMNS)
    numbers = {name: i for i, name in enumerate(names)}

    def number(name: str) -> int:
        if name not in numbers:
            numbers[name] = len(names)
            names.append(name)
        return numbers[name]

    kept = passes.rows[passes.rows["kind"] == MEMORY]
    sampled = {(names[task], names[lane]) for task, lane in np.unique(kept[["task", "lane"]]).tolist()}
    first = passes.steps[0]
    found = [
        (number(WEIGHTS), number(device), passes.first_step, MEMORY, nbytes, first.start, first.start, NONE)
        for device, nbytes in facts.weights.items()
        if (WEIGHTS, device) not in sampled
    ]
    for device, nbytes in facts.block_nbytes.items():
        task, lane = number(CACHE), number(device)
        found += [
            (task, lane, step, MEMORY, nbytes * blocks, info.end, info.end, NONE)
            for step, (info, blocks) in enumerate(zip(passes.steps, kv_blocks, strict=False), passes.first_step)
        ]
    return np.array(found, COLUMNS)
