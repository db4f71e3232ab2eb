"""From a model and hardware to a schedule: the one call that the command line, `LLM` and users make.
Knows neither weights nor devices beyond their facts."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ciuic_runtime.curves import can_be_calibrated, is_calibrated, load_calibration
from ciuic_runtime.devices.errors import OutOfMemory
from ciuic_runtime.devices.manager import DeviceManager, measured_disk
from ciuic_runtime.devices.spec import Topology
from ciuic_runtime.devices.threads import with_threads
from ciuic_runtime.model import Model
from ciuic_runtime.schedulers.calibration import Calibration
from ciuic_runtime.schedulers.cost import CostModel
from ciuic_runtime.schedulers.memory import node_of
from ciuic_runtime.schedulers.passes import READ_TAKES
from ciuic_runtime.schedulers.placement import Placement
from ciuic_runtime.schedulers.schedule import Schedule
from ciuic_runtime.schedulers.scheduler import TaskScheduler
from ciuic_runtime.schedulers.steps import prefill_step
from ciuic_runtime.schedulers.workload import Workload

log = logging.getLogger("ciuic")


def plan(
    model: Model,
    hw: DeviceManager | Topology | None = None,
    *,
    memory: Mapping[str, str | int] | None = None,
    goal: str = "latency",
    workload: Workload | None = None,
    placement: Placement | None = None,
    calibration: Calibration | None = None,
    kernels: str = "auto",
    threads: int | None = None,
    disk: str | Path | None = None,
) -> Schedule:
    """The schedule for `model` on `hw` (None: this machine), with what it is forecast to do. Where memory is too small,
    pages may be read from `disk`, a folder (None: where the model is, if `hw` is this machine). `calibration`: what the
    operators reach (None: as measured before with these `kernels`; `ciuic calibrate` measures it).

    Raises InvalidInput for what cannot be asked, OutOfMemory, with the figures, where nothing fits."""
    hw = hw or DeviceManager(path=None)
    topology = with_threads(hw if isinstance(hw, Topology) else hw.topology, threads)
    if disk is None and isinstance(hw, DeviceManager) and hw.discovered and Path(model.source).exists():
        disk = Path(model.source)
    calibration = calibration or load_calibration(model, topology, kernels)

    def schedule(on: Topology) -> Schedule:
        found = _scheduler(on, memory, goal, workload, placement, calibration).schedule(model.graph)
        return replace(found, notes=(*found.notes, *_basis_notes(found, model, calibration)))

    if disk is not None and placement and any(rule.store for rule in placement.rules):
        topology = with_disk(topology, disk)
    try:
        return schedule(topology)
    except OutOfMemory:
        if disk is None or topology.by_kind("DISK"):
            raise
        return schedule(with_disk(topology, disk))


def with_disk(topology: Topology, path: str | Path) -> Topology:
    """The topology with the disk under `path`, unless it has one, or is of a cluster's nodes, whose disks are not here.
    As fast as it is now for the reader that paging uses, if that is a packed folder, else measured in general (or as
    measured before)."""
    if topology.by_kind("DISK"):
        return topology
    cpus = [d.name for d in topology.by_kind("CPU")]
    if any(node_of(cpu) for cpu in cpus):
        return topology
    disk, links = measured_disk(path, cpus, progress=lambda what: log.info("%s", what))
    from ciuic_runtime.memory.read_rate import read_rate  # loads torch, which most plans do without

    if (found := read_rate(path)) is not None:
        disk = replace(disk, memory_bandwidth=found.bandwidth, facts={**disk.facts, READ_TAKES: found.taken})
        links = [replace(link, bandwidth=found.bandwidth) for link in links]
    return replace(topology, devices=(*topology.devices, disk), links=(*topology.links, *links))


def _basis_notes(schedule: Schedule, model: Model, calibration: Calibration) -> list[str]:
    """What the forecast does not rest on measurements of, and what would."""
    notes = []
    devices = [schedule.topology.device(name) for name in schedule.devices_used()]
    if any(can_be_calibrated(d) and not is_calibrated(model, d, calibration) for d in devices):
        notes.append(
            f"how fast {model.spec.name}'s operators run here in {model.format} was not measured yet: "
            f"`ciuic calibrate {model.source} --format {model.format}` does, in less than a minute"
        )
    cost = CostModel(schedule.topology, model.format, calibration, schedule.workload)
    steps = (prefill_step(model.graph, schedule.workload, 0), schedule.workload.mean_decode)
    alike = {model.graph.shapes[task.name]: task for task in reversed(model.graph.tasks)}
    kinds = [alike[shape] for shape in sorted(alike)]
    beyond = {cost.outside(task, d, step): None for d in devices for task in kinds for step in steps}
    if said := [what for what in beyond if what]:
        notes.append(f"outside of what was measured, where the nearest measured share is taken: {', '.join(said)}")
    return notes


def _scheduler(
    topology: Topology, memory: Mapping[str, str | int] | None, goal: str, workload: Workload | None,
    placement: Placement | None, calibration: Calibration,
) -> TaskScheduler:  # fmt: skip
    return TaskScheduler(
        topology=topology,
        goal=goal,
        workload=workload or Workload(),
        memory=memory or {},
        placement=placement or Placement(),
        calibration=calibration,
    )
