"""What a schedule is forecast to do, whoever carries it out: one process, or the stages of a cluster.
Knows how each is simulated; where the schedule came from is not its business."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property

from ciuic_runtime.schedulers.assignment import Prediction
from ciuic_runtime.schedulers.calibration import Calibration
from ciuic_runtime.schedulers.cost import CostModel
from ciuic_runtime.schedulers.graph import Step, TaskGraph
from ciuic_runtime.schedulers.pipeline import pipeline_of
from ciuic_runtime.schedulers.predict import predict
from ciuic_runtime.schedulers.schedule import Schedule
from ciuic_runtime.schedulers.simulate import simulate, simulate_stages
from ciuic_runtime.schedulers.steps import pipeline_steps, workload_steps
from ciuic_runtime.schedulers.trace import Trace


@dataclass(frozen=True, slots=True)
class Pipelining:
    """How a cluster carries a schedule out. None: as many stages as it has, a pass for each on its way, all cores."""

    stages: int | None = None
    micro_batches: int | None = None
    threads: int | None = None


@dataclass(frozen=True)
class Forecaster:
    schedule: Schedule
    graph: TaskGraph
    calibration: Calibration = field(default_factory=Calibration)
    pipelining: Pipelining | None = None  # None: one process does everything

    def predict(self) -> Prediction:
        """For the schedule's workload. This and all others raise InvalidInput for what a cluster cannot cut into
        stages, and where a device's speed is not known."""
        return predict(self.carried_out, self.graph, self.cost, self.depth)

    def trace(self) -> Trace:
        """Of the schedule's workload, pass by pass."""
        graph, work, depth = self.graph, self.schedule.workload, self.depth
        return self.recost(workload_steps(graph, work) if depth is None else pipeline_steps(graph, work, depth))

    def recost(self, passes: Iterable[Step]) -> Trace:
        """What the cost model makes of passes as they came."""
        if self.depth is None:
            return simulate(self.carried_out, self.graph, self.cost, passes)
        return simulate_stages(self.carried_out, self.graph, self.cost, self.depth, passes)

    def planned(self, step: Step) -> Trace:
        """One pass of this size as the plan has it: with the experts and the reads that are expected, whatever came."""
        return self.recost([replace(step, touched=None, read_bytes=None)])

    @cached_property
    def carried_out(self) -> Schedule:
        """The schedule as it is simulated: of a cluster, every stage on devices of its own."""
        return self._way[0]

    @cached_property
    def cost(self) -> CostModel:
        return self._way[1]

    @property
    def depth(self) -> int | None:
        """Passes that may be on their way at once; None: one process does one at a time."""
        return self._way[2]

    @cached_property
    def _way(self) -> tuple[Schedule, CostModel, int | None]:
        schedule, way = self.schedule, self.pipelining
        work, format = schedule.workload, self.graph.format
        if way is None:
            return schedule, CostModel(schedule.topology, format, self.calibration, work), None
        pipeline = pipeline_of(schedule, self.graph, way.stages, way.micro_batches, way.threads)
        known = self.calibration.under(pipeline.names)
        return pipeline.schedule, CostModel(pipeline.schedule.topology, format, known, work), pipeline.depth
