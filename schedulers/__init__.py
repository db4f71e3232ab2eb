"""What should run where, and when. Loads neither torch nor ray."""

from ciuic_runtime.schedulers.assignment import Assignment, Candidate, Prediction
from ciuic_runtime.schedulers.calibration import Calibration
from ciuic_runtime.schedulers.comparison import Comparison
from ciuic_runtime.schedulers.cost import Cost, CostModel
from ciuic_runtime.schedulers.draft import ScheduleDraft
from ciuic_runtime.schedulers.graph import Layer, Page, Step, Task, TaskGraph, Work
from ciuic_runtime.schedulers.placement import Placement
from ciuic_runtime.schedulers.schedule import Schedule
from ciuic_runtime.schedulers.scheduler import TaskScheduler, policy
from ciuic_runtime.schedulers.simulate import simulate
from ciuic_runtime.schedulers.trace import Event, Trace
from ciuic_runtime.schedulers.workload import Workload

__all__ = [
    "Assignment", "Calibration", "Candidate", "Comparison", "Cost", "CostModel", "Event", "Layer", "Page", "Placement",
    "Prediction", "Schedule", "ScheduleDraft", "Step", "Task", "TaskGraph", "TaskScheduler", "Trace", "Work",
    "Workload", "policy", "simulate",
]  # fmt: skip
