"""From a model and hardware to a schedule: the one call that the command line, `LLM` and users make.
Knows neither weights nor devices beyond their facts."""

from __future__ import annotations

from collections.abc import Mapping

from ciuic_runtime.devices.manager import DeviceManager
from ciuic_runtime.devices.spec import Topology
from ciuic_runtime.model import Model
from ciuic_runtime.schedulers.cost import Calibration
from ciuic_runtime.schedulers.placement import Placement
from ciuic_runtime.schedulers.schedule import Schedule
from ciuic_runtime.schedulers.scheduler import TaskScheduler
from ciuic_runtime.schedulers.workload import Workload


def plan(
    model: Model,
    hw: DeviceManager | Topology | None = None,
    *,
    memory: Mapping[str, str | int] | None = None,
    goal: str = "latency",
    workload: Workload | None = None,
    placement: Placement | None = None,
    calibration: Calibration | None = None,
) -> Schedule:
    """The schedule for `model` on `hw` (None: this machine), with what it is forecast to do.

    Raises InvalidInput for what cannot be asked, OutOfMemory, with the figures, where nothing fits."""
    topology = hw if isinstance(hw, Topology) else (hw or DeviceManager(path=None)).topology
    scheduler = TaskScheduler(
        topology=topology,
        goal=goal,
        workload=workload or Workload(),
        memory=memory or {},
        placement=placement or Placement(),
        calibration=calibration or Calibration(),
    )
    return scheduler.schedule(model.graph)
