"""From what the user asked to what will be run: devices, schedule, context and batch that fit, and the forecast.
Everything that can be refused is refused here, before a weight is read."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

from ciuic_runtime.basis import Basis
from ciuic_runtime.curves import load_calibration
from ciuic_runtime.devices.cpu import discover_cpus
from ciuic_runtime.devices.errors import InvalidInput, OutOfMemory
from ciuic_runtime.devices.manager import DeviceManager
from ciuic_runtime.devices.spec import DeviceSpec, Topology
from ciuic_runtime.devices.threads import with_threads
from ciuic_runtime.devices.units import format_bytes
from ciuic_runtime.engine.config import RuntimeConfig
from ciuic_runtime.engine.routing import read_routing
from ciuic_runtime.model import Model
from ciuic_runtime.models.checkpoint import Checkpoint
from ciuic_runtime.models.layout import PACKED_FORMATS
from ciuic_runtime.models.spec import ModelSpec
from ciuic_runtime.ops.custom import Replacements
from ciuic_runtime.ops.native import REFERENCE, instruction_set
from ciuic_runtime.planning import plan, with_disk
from ciuic_runtime.schedulers.calibration import Calibration
from ciuic_runtime.schedulers.forecaster import Forecaster, Pipelining
from ciuic_runtime.schedulers.graph import Step, TaskGraph
from ciuic_runtime.schedulers.memory import capacity, limit_memory, memory_need, node_of
from ciuic_runtime.schedulers.placement import Placement
from ciuic_runtime.schedulers.policies.mixing import PassTimes, Size
from ciuic_runtime.schedulers.schedule import Schedule
from ciuic_runtime.schedulers.trace import Trace
from ciuic_runtime.schedulers.workload import Workload

log = logging.getLogger("ciuic")

T = TypeVar("T")

DEFAULT_CONTEXT = 4096
DEFAULT_BATCH = 8
SMALLEST_CONTEXT = 64
NATIVE_KINDS = {"CPU", "SIM"}  # of devices on which native kernels compute


@dataclass(frozen=True)
class Setup:
    model: Model
    topology: Topology
    schedule: Schedule
    context: int  # positions per sequence
    max_num_seqs: int
    threads: int
    kernels: str  # instruction set, or "reference"
    replaced: Replacements = field(default_factory=Replacements)  # the user's operators, as registered now
    calibration: Calibration = field(default_factory=Calibration)
    config: RuntimeConfig = field(default_factory=RuntimeConfig)

    def forecast(self, work: Workload) -> Schedule:
        """The schedule with its forecast made anew for a workload; without one where a device's speed is not known."""
        schedule, graph = replace(self.schedule, workload=work), self.model.graph
        try:
            predicted = self.forecaster(schedule).predict()
        except InvalidInput as error:
            return replace(schedule, predicted=None, notes=(*schedule.notes, f"no forecast: {error}"))
        memory = {name: need.total for name, need in memory_need(schedule, graph, work).items()}
        return replace(schedule, predicted=replace(predicted, memory_bytes=memory))

    @property
    def room(self) -> Workload:
        """What memory must hold."""
        return _workload(self.config.workload, self.context, self.max_num_seqs, self.config.kv_tokens)

    def without_nodes(self, gone: Collection[str]) -> Setup:
        """Planned again over the nodes that are left. Raises OutOfMemory where what is left cannot hold the model."""
        left = [d.name for d in self.topology.devices if node_of(d.name) not in gone]
        return self.over(self.topology.only(left))

    def over(self, topology: Topology) -> Setup:
        """Planned again over other nodes, for the same context and batch; the user's rules and budgets count for what
        is there of what they name."""
        config, able = self.config, self.able(topology)
        rules, memory = what_counts(config.placement, config.memory, able)
        schedule = plan(
            self.model, able, memory=memory, goal=config.goal or self.schedule.goal, workload=self.room,
            placement=rules, kernels=config.kernels, calibration=self.calibration,
        )  # fmt: skip
        if left_out := self.left_out(topology):
            schedule = replace(schedule, notes=(*schedule.notes, left_out))
        planned = replace(self, topology=topology, schedule=schedule, config=replace(config, stages=None))
        return replace(planned, schedule=planned.forecast(self.schedule.workload))

    def able(self, topology: Topology) -> Topology:
        """Without devices on which the kernels in use compute nothing. Others could, and are not taken while the model
        runs: their tokens would not be the same."""
        if self.kernels == REFERENCE:
            return topology
        return topology.only(d.name for d in topology.devices if d.kind in NATIVE_KINDS or not d.can_compute)

    def left_out(self, topology: Topology) -> str | None:
        """What is not able, and why."""
        able = self.able(topology).compute_devices
        others = sorted({d.name for d in topology.compute_devices} - {d.name for d in able})
        if not others:
            return None
        return (
            f"{', '.join(others)} cannot compute with the {self.kernels} kernels that this model was opened with; open "
            "it again to use more"
        )

    def forecast_trace(self, schedule: Schedule) -> Trace:
        """What is forecast for the schedule's workload, pass by pass."""
        return self.forecaster(schedule).trace()

    def recost(self, schedule: Schedule, passes: Iterable[Step]) -> Trace:
        """What the cost model makes of passes as they came."""
        return self.forecaster(schedule).recost(passes)

    def pass_times(self) -> PassTimes | None:
        """Of passes of any size; None where a device's speed is not known."""
        try:
            forecaster = self.forecaster(self.schedule)
            times = PassTimes(forecaster.carried_out, self.model.graph, forecaster.cost)
            times.seconds(Size(1, 1))
        except InvalidInput as error:
            log.warning("prompts are computed before anybody's next token: %s", error)
            return None
        return times

    def forecaster(self, schedule: Schedule) -> Forecaster:
        """Of a schedule of this model, carried out as the settings say."""
        return self.basis(schedule).forecaster

    def basis(self, schedule: Schedule) -> Basis:
        """What its forecasts are made with."""
        config = self.config
        way = None
        if config.executor != "local":
            way = Pipelining(config.stages, config.micro_batches, config.threads)
        return Basis(self.model, schedule, self.calibration, way)


def what_counts(
    rules: Placement | None, memory: Mapping[str, T], topology: Topology
) -> tuple[Placement | None, dict[str, T]]:
    """Of rules and budgets that held once, what holds for the devices that are left."""
    there = {d.name for d in topology.devices}
    left = {device: size for device, size in memory.items() if device in there}
    return rules.left_on(topology) if rules else None, left


def set_up(
    checkpoint: Checkpoint, config: RuntimeConfig, schedule: Schedule | None, devices: DeviceManager | Topology | None
) -> Setup:
    """Raises InvalidInput for what cannot be asked, OutOfMemory, with the figures, for what does not fit."""
    spec = checkpoint.spec
    if spec.why_not_runnable:
        raise InvalidInput(spec.why_not_runnable)
    if config.max_model_len is not None and config.max_model_len > spec.max_positions:
        raise InvalidInput(
            f"a context of {config.max_model_len} tokens was asked for; {spec.name} allows {spec.max_positions}"
        )
    routing = read_routing(config.routing) if config.routing is not None else None
    model = Model(checkpoint.path, _format(config, schedule), spec, config.prefill_chunk, routing)
    topology = with_threads(_topology(devices, schedule), config.threads)
    if schedule is not None:
        _check_not_decided_twice(config)
        if any(schedule.topology.device(name).kind == "DISK" for name in schedule.places_used()):
            topology = with_disk(topology, checkpoint.path)
        schedule = replace(schedule, policy="as given", candidates=(), notes=())
        topology = limit_memory(topology, config.memory)
    calibration = load_calibration(model, topology, config.kernels)
    context, batch, schedule = _fit(model, topology, config, schedule)
    cores = sum(topology.device(n).cores for n in schedule.devices_used() if topology.device(n).kind == "CPU")
    threads = config.threads or max(1, cores or sum(d.cores for d in discover_cpus()))
    kernels, replaced = _kernels(config, model, schedule), Replacements.now()
    schedule = _paging(schedule, config, kernels)
    if kernels == REFERENCE and model.format in PACKED_FORMATS:
        _check_unpacked(model)
    _warn_of_unused(replaced, spec)
    setup = Setup(model, topology, schedule, context, batch, threads, kernels, replaced, calibration, config)
    expected = replace(config.workload or schedule.workload, batch=batch)
    stale = schedule.policy == "as given" or schedule.workload != expected or config.executor != "local"
    return replace(setup, schedule=setup.forecast(expected)) if stale else setup


def _kernels(config: RuntimeConfig, model: Model, schedule: Schedule) -> str:
    """Native kernels compute everything but float32 on CPUs and on what a CPU plays; else the torch operators do."""
    chosen = instruction_set(config.kernels)
    kinds = {schedule.topology.device(name).kind for name in schedule.devices_used()}
    if model.format != "float32" and kinds <= NATIVE_KINDS:
        return chosen
    if config.kernels not in ("auto", REFERENCE):
        what = "in float32" if model.format == "float32" else f"on {', '.join(sorted(schedule.devices_used()))}"
        raise InvalidInput(
            f"kernels {config.kernels!r} were asked for; {model.spec.name} {what} is computed by 'reference' only; "
            "leave the kernels out, or try another dtype or device"
        )
    return REFERENCE


def _paging(schedule: Schedule, config: RuntimeConfig, kernels: str) -> Schedule:
    """With the user's policy and lookahead, where pages are read while the model runs."""
    paging = schedule.paging
    if paging is None:
        return schedule
    if kernels == REFERENCE:
        raise OutOfMemory(
            f"{schedule.model.name} does not fit into memory, and torch's operators cannot read pages while they run; "
            "use native kernels (`ciuic doctor` says which there are), or take a smaller format or model"
        )
    policy = paging.policy if config.cache_policy is None else config.cache_policy
    lookahead = paging.lookahead if config.lookahead is None else config.lookahead
    return replace(schedule, paging=replace(paging, policy=policy, lookahead=lookahead))


def _check_unpacked(model: Model) -> None:
    """The torch operators compute with the values that packed weights stand for, in bfloat16."""
    need, room = 2 * model.graph.parameters, sum(capacity(d) for d in discover_cpus())
    if need > room:
        raise OutOfMemory(
            f"{model.spec.name} in {model.format} is computed by torch here, which takes {format_bytes(need)} for its "
            f"weights in bfloat16, and {format_bytes(room)} can be used; use the native kernels (`ciuic doctor` says "
            "what they lack), or a smaller model",
            need=need, capacity=room,
        )  # fmt: skip


def _warn_of_unused(replaced: Replacements, spec: ModelSpec) -> None:
    """Says which of the user's operators this model has no place for."""
    used = {"rms_norm", "silu"} | ({"route", "combine", spec.moe.scoring} if spec.moe else set())
    for found in replaced.by_replaced.values():
        if found.replaces not in used:
            log.warning(
                "operator %r replaces %s, which %s does not compute; it has %s",
                found.name, found.replaces, spec.name, ", ".join(sorted(used)),
            )  # fmt: skip


def _fit(model: Model, topology: Topology, config: RuntimeConfig, given: Schedule | None) -> tuple[int, int, Schedule]:
    """The context and batch asked for; where the user set none and they do not fit, the largest that do. Only where no
    batch and context lets all weights stay in memory are pages read from disk."""
    if given is not None or config.paged is False:
        return _largest(model, topology, config, given, paged=given is not None)
    if config.placement is not None and any(rule.store for rule in config.placement.rules):
        return _largest(model, with_disk(topology, model.source), config, None, paged=True)
    try:
        return _largest(model, topology, config, None, paged=False)
    except OutOfMemory:
        return _largest(model, with_disk(topology, model.source), config, None, paged=True)  # looks at it once


def _largest(
    model: Model, topology: Topology, config: RuntimeConfig, given: Schedule | None, paged: bool
) -> tuple[int, int, Schedule]:
    work = config.workload or (given.workload if given else None)
    asked = work.context if work else DEFAULT_CONTEXT
    most = min(model.spec.max_positions, config.kv_tokens or model.spec.max_positions)
    context = config.max_model_len or min(asked, most)
    batch = config.max_num_seqs or (work.batch if work else 1 if paged else DEFAULT_BATCH)
    wanted = (context, batch)
    while True:
        try:
            room = _workload(work, context, batch, config.kv_tokens)
            schedule = _schedule_for(room, model, topology, config, given, paged)
            break
        except OutOfMemory:
            # The batch gives way first: a shorter context refuses prompts, a smaller batch only takes longer.
            if config.max_num_seqs is None and batch > 1:
                batch //= 2
            elif config.max_model_len is None and work is None and context > SMALLEST_CONTEXT:
                context = max(SMALLEST_CONTEXT, context // 2)
            else:
                raise
    if (context, batch) != wanted:
        log.warning(
            "reduced to what fits in memory: context %d (asked %d), %d sequences at once (asked %d)",
            context, wanted[0], batch, wanted[1],
        )  # fmt: skip
    return context, batch, schedule


def _schedule_for(
    work: Workload, model: Model, topology: Topology, config: RuntimeConfig, given: Schedule | None, paged: bool
) -> Schedule:
    if given is None:
        if not paged:
            topology = topology.only(d.name for d in topology.devices if d.kind != "DISK")
        schedule = plan(
            model, topology, memory=config.memory, goal=config.goal or "latency", workload=work,
            placement=config.placement, kernels=config.kernels,
        )  # fmt: skip
    else:
        schedule = replace(given, workload=work, topology=topology.only(given.places_used()))
        schedule.validate(model.graph)
        if schedule.why_not_run:
            raise InvalidInput(f"the schedule of {schedule.model.name} cannot be run: {schedule.why_not_run}")
        schedule.check_memory(model.graph, work)
    _check_host(schedule, model.graph, work)
    return schedule


def _workload(work: Workload | None, context: int, batch: int, kv_tokens: int | None) -> Workload:
    """What memory must hold: `batch` sequences that fill the context, with as many new tokens as are expected."""
    new = min(work.max_tokens if work else context // 4, context - 1) or 1
    return Workload(max(1, context - new), new, batch, kv_tokens)


def _check_host(schedule: Schedule, graph: TaskGraph, work: Workload) -> None:
    """CPUs and simulated devices, however they were declared, all live in this host's memory."""
    need = memory_need(schedule, graph, work)
    kinds = {d.name: d.kind for d in schedule.topology.devices if not node_of(d.name)}  # other nodes have their own
    on_host = {name: n.total for name, n in need.items() if kinds.get(name) in ("CPU", "SIM")}
    room = sum(capacity(d) for d in discover_cpus())
    if sum(on_host.values()) > room:
        each = ", ".join(f"{format_bytes(n)} for {name}" for name, n in on_host.items())
        raise OutOfMemory(
            f"{graph.name} needs {format_bytes(sum(on_host.values()))} of this host's memory ({each}) and "
            f"{format_bytes(room)} can be used; try a shorter context, fewer sequences at once, or a smaller model",
            need=sum(on_host.values()), capacity=room,
        )  # fmt: skip


def _format(config: RuntimeConfig, schedule: Schedule | None) -> str:
    if schedule is None:
        return config.dtype
    if config.dtype not in ("auto", schedule.model.format):
        raise InvalidInput(
            f"dtype {config.dtype} was asked for and the schedule is for {schedule.model.format}; plan again with "
            f"--format {config.dtype}, or leave the dtype out"
        )
    return schedule.model.format


def _check_not_decided_twice(config: RuntimeConfig) -> None:
    if config.placement is not None or config.goal is not None:
        raise InvalidInput(
            "a schedule was given together with a placement or a goal, but it says already what goes where; "
            "leave one of them out, or plan again with the rules and save that"
        )


def _topology(devices: DeviceManager | Topology | None, schedule: Schedule | None) -> Topology:
    """The devices to run on: those given, else this machine's together with those that a schedule declares and any
    machine can play."""
    if devices is None:
        devices = DeviceManager(path=None)
    here = devices if isinstance(devices, Topology) else devices.topology
    if schedule is None:
        return here
    known = {d.name for d in here.devices}
    declared = [d for d in schedule.topology.devices if d.name not in known and _stands_in(d)]
    links = [x for x in schedule.topology.links if {x.src, x.dst} & {d.name for d in declared}]
    names = known | {d.name for d in declared}
    links = [replace(link, domains=()) for link in links if {link.src, link.dst} <= names]
    return replace(here, devices=(*here.devices, *declared), links=(*here.links, *links))


def _stands_in(device: DeviceSpec) -> bool:
    """Simulated devices, and further shares of the host (cpu:1)."""
    return device.kind in ("SIM", "CPU") and "/" not in device.name
