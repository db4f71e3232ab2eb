"""What another machine, workload or format would do: the planner asked again about a changed topology.
Knows how a change is read and laid over what a run was planned with; the figures are those of `ciuic plan` with the
command and the device file that come with them."""

from __future__ import annotations

import shlex
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, get_args

from ciuic_runtime.basis import Basis
from ciuic_runtime.curves import load_calibration
from ciuic_runtime.dashboard.changed import added, bandwidth_of, faster, larger, not_measured
from ciuic_runtime.dashboard.placement import candidates, placement
from ciuic_runtime.devices.catalogue import DEVICES
from ciuic_runtime.devices.errors import InvalidInput, OutOfMemory
from ciuic_runtime.devices.spec import DeviceSpec, Topology
from ciuic_runtime.devices.toml import topology_to_toml
from ciuic_runtime.model import FORMATS, Model
from ciuic_runtime.planning import plan
from ciuic_runtime.schedulers.calibration import Calibration
from ciuic_runtime.schedulers.memory import capacity
from ciuic_runtime.schedulers.reading import read_as
from ciuic_runtime.schedulers.schedule import Schedule
from ciuic_runtime.schedulers.workload import Goal, Workload

DEVICES_FILE = "whatif.toml"
MOST_KEPT = 128  # answers
MOST_ADDED = 16  # accelerators


@dataclass(frozen=True, slots=True)
class Tokens:
    """None: as it is."""

    prompt_tokens: int | None = None
    max_tokens: int | None = None
    batch: int | None = None


@dataclass(frozen=True)
class Change:
    """What is asked; what is left out stays."""

    format: str | None = None
    goal: Goal | None = None
    workload: Tokens = field(default_factory=Tokens)
    memory: Mapping[str, int] = field(default_factory=dict)  # device -> budget, bytes
    bandwidth: Mapping[str, float] = field(default_factory=dict)  # device -> bytes/s
    ram: Mapping[str, int] = field(default_factory=dict)  # device -> bytes in all, of a larger or smaller machine
    add: tuple[str, ...] = ()  # accelerators of the catalogue

    @staticmethod
    def of(data: Any) -> Change:
        """Raises InvalidInput for what cannot be asked."""
        change: Change = read_as(Change, data, "what-if")
        if len(change.add) > MOST_ADDED:
            raise InvalidInput(f"what-if: {len(change.add)} devices to add; at most {MOST_ADDED} can be")
        return change


class WhatIf:
    """Asked by one thread at a time."""

    def __init__(self, basis: Basis) -> None:
        self.basis = basis
        self._known: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._bases: dict[str, Schedule | None] = {}  # by the devices of which a rate was changed

    def choices(self) -> dict[str, Any]:
        """What can be changed, and how things are."""
        basis, model = self.basis, self.basis.model
        formats = [model.spec.packed] if model.spec.packed else [f for f in FORMATS if f != "auto"]
        work = asdict(basis.schedule.workload)
        del work["kv_tokens"]
        return {
            "model": model.spec.name, "format": model.format, "formats": formats, "goal": basis.schedule.goal,
            "goals": list(get_args(Goal)), "workload": work,
            "devices": [_device(d, basis.schedule.topology) for d in basis.schedule.topology.devices],
            "gpus": [
                {"name": d.name, "memory_bytes": d.memory_bytes, "bandwidth": d.memory_bandwidth}
                for d in DEVICES if d.kind == "GPU"
            ],
            "base": self.ask({}),
        }  # fmt: skip

    def ask(self, data: Any) -> dict[str, Any]:
        """Raises InvalidInput for what cannot be asked; what does not fit is an answer."""
        key = repr(change := Change.of(data))
        if key not in self._known:
            self._known[key] = self._answer(change)
            if len(self._known) > MOST_KEPT:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return self._known[key]

    def _answer(self, change: Change) -> dict[str, Any]:
        begin = time.perf_counter()
        asked = Asked.of(self.basis, change)
        found: Schedule | None = None
        error: str | None = None
        try:
            found = asked.plan()
        except OutOfMemory as lacking:
            error = str(lacking)
        delta = self._delta(asked, found)
        notes = [*(found.notes if found else ()), *asked.notes]
        if change == Change() and found and found.policy != (mine := self.basis.schedule.policy):
            notes.append(
                f"what runs is {mine!r}, planned with room for longer contexts or larger batches, or by hand; for this "
                f"workload alone the planner chooses {found.policy!r}"
            )
        if delta and found and found.predicted and (base := self._base(asked)) and base.predicted:
            before, now = base.predicted.basis, found.predicted.basis
            if before != now:
                notes.append(
                    f"the present plan's forecast is {before} and this one's {now}: part of the difference may be that"
                )
        return {
            "took_s": time.perf_counter() - begin, "feasible": found is not None, "error": error,
            "policy": found.policy if found else "",
            "predicted": found.to_dict()["predicted"] if found else None, "delta": delta,
            "bound_by": found.predicted.bound_by if found and found.predicted else "",
            "memory": _memory(found) if found else [], "candidates": candidates(found) if found else [],
            "placement": placement(found, asked.model.graph) if found else None, "notes": notes,
            "command": asked.command, "devices_toml": topology_to_toml(asked.topology),
        }  # fmt: skip

    def _delta(self, asked: Asked, found: Schedule | None) -> dict[str, float] | None:
        """Beside the present machine and workload, forecast on the same basis."""
        base = self._base(asked)
        if base is None or found is None or base.predicted is None or found.predicted is None:
            return None
        before, now = base.predicted, found.predicted
        keys = ("decode_tokens_per_s", "prefill_tokens_per_s", "first_token_s")
        return {key: getattr(now, key) / getattr(before, key) - 1 for key in keys}

    def _base(self, asked: Asked) -> Schedule | None:
        """Planned as things are; devices of which a rate was changed count as estimated there too, so that the shares
        which our kernels reach of it are the same."""
        key = ", ".join(sorted(asked.change.bandwidth))
        if key not in self._bases:
            topology = not_measured(self.basis.schedule.topology, set(asked.change.bandwidth))
            plain = replace(Asked.of(self.basis, Change()), topology=topology)
            try:
                self._bases[key] = plain.plan()
            except OutOfMemory:
                self._bases[key] = None
        return self._bases[key]


@dataclass(frozen=True)
class Asked:
    """A change laid over what a run was planned with."""

    change: Change
    model: Model
    topology: Topology
    goal: Goal
    workload: Workload
    calibration: Calibration | None  # None: as it is found on this machine
    notes: tuple[str, ...]

    @staticmethod
    def of(basis: Basis, change: Change) -> Asked:
        schedule, notes = basis.schedule, []
        model = _model(basis, change.format)
        topology = added(larger(faster(schedule.topology, change.bandwidth), change.ram), change.add)
        for name in change.memory:
            topology.device(name)
        work, tokens = schedule.workload, change.workload
        workload = Workload(
            work.prompt_tokens if tokens.prompt_tokens is None else tokens.prompt_tokens,
            work.max_tokens if tokens.max_tokens is None else tokens.max_tokens,
            work.batch if tokens.batch is None else tokens.batch,
        )
        if work.kv_tokens is not None:
            notes.append("planned with room in the cache for every sequence's whole context, whatever --kv-tokens says")
        if basis.pipelining is not None:
            notes.append("planned as one process carries it out: calls between the stages of a cluster are not in it")
        if any(task.popularity for task in model.graph):
            notes.append("the run knew how popular its experts are; the command does not, and may give other figures")
        calibration = _calibration(basis, model, topology)
        if calibration is not None:
            notes.append("forecast with what was measured where the run was; the command knows this machine's only")
        goal = change.goal or schedule.goal
        return Asked(change, model, topology, goal, workload, calibration, tuple(notes))

    def plan(self) -> Schedule:
        return plan(
            self.model, self.topology, memory=self.change.memory, goal=self.goal, workload=self.workload,
            calibration=self.calibration,
        )  # fmt: skip

    @property
    def command(self) -> str:
        work = self.workload
        words = [
            "ciuic", "plan", str(self.model.source), "--format", self.model.format, "--goal", self.goal,
            "--prompt-tokens", str(work.prompt_tokens), "--max-tokens", str(work.max_tokens),
            "--batch", str(work.batch),
        ]  # fmt: skip
        if self.change.memory:
            words += ["--memory", ",".join(f"{name}={size}" for name, size in self.change.memory.items())]
        return shlex.join([*words, "--devices", DEVICES_FILE])


# The model


def _model(basis: Basis, format: str | None) -> Model:
    """In another format its pages are others; how popular its experts are stays."""
    model = basis.model
    if format is None or format == model.format:
        return model
    other = Model(model.source, format, model.spec, model.prefill_chunk)
    liked = {task.name: task.popularity for task in model.graph if task.popularity}
    if liked:
        tasks = tuple(replace(task, popularity=liked.get(task.name, ())) for task in other.graph)
        other.__dict__["graph"] = replace(other.graph, tasks=tasks)
    return other


def _calibration(basis: Basis, model: Model, topology: Topology) -> Calibration | None:
    """Where this machine knows nothing of these devices, what the run knew of those that were not changed; None: as
    `ciuic plan` finds it."""
    if load_calibration(model, topology).curves:
        return None
    same = {d.name for d in topology.devices if d.basis == "measured"}
    curves = tuple(c for c in basis.calibration.curves if c.device in same and c.format == model.format)
    return replace(basis.calibration, curves=curves) if curves else None


# Shapes


def _device(device: DeviceSpec, topology: Topology) -> dict[str, Any]:
    return {
        "name": device.name, "kind": device.kind, "memory_bytes": device.memory_bytes,
        "usable_bytes": capacity(device), "bandwidth": bandwidth_of(device, topology), "basis": device.basis,
    }  # fmt: skip


def _memory(schedule: Schedule) -> list[dict[str, Any]]:
    held, needs = schedule.weight_bytes(), schedule.predicted.memory_bytes if schedule.predicted else {}
    return [
        {
            "device": d.name, "weights": held.get(d.name, 0), "needs": needs.get(d.name, 0), "usable": capacity(d),
        }
        for d in schedule.topology.devices if d.can_compute
    ]  # fmt: skip
