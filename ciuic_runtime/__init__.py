"""Plan, run and inspect DeepSeek models on whatever hardware there is. Public names are loaded when first used."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ciuic_runtime.devices.errors import CiuicError, InvalidInput, OutOfMemory
    from ciuic_runtime.devices.manager import DeviceManager
    from ciuic_runtime.devices.spec import DeviceSpec, Link, Topology
    from ciuic_runtime.engine.llm import LLM
    from ciuic_runtime.engine.request import RequestOutput
    from ciuic_runtime.engine.sampling import SamplingParams
    from ciuic_runtime.memory.hierarchy import MemoryHierarchy
    from ciuic_runtime.memory.pool import TensorPool
    from ciuic_runtime.memory.tensor import CiuicTensor
    from ciuic_runtime.model import Model
    from ciuic_runtime.ops.custom import Cost, CustomOperator, register_operator, unregister_operator
    from ciuic_runtime.planning import plan
    from ciuic_runtime.schedulers.calibration import Calibration
    from ciuic_runtime.schedulers.cost import CostModel
    from ciuic_runtime.schedulers.graph import Task, TaskGraph
    from ciuic_runtime.schedulers.placement import Placement
    from ciuic_runtime.schedulers.schedule import Schedule
    from ciuic_runtime.schedulers.scheduler import TaskScheduler, policy
    from ciuic_runtime.schedulers.simulate import simulate
    from ciuic_runtime.schedulers.trace import Trace
    from ciuic_runtime.schedulers.workload import Workload

__version__ = "0.2.0"

# torch's threads wait for each other in a busy loop by default. With one other busy process on two cores that made
# decoding two to ten times slower; waiting asleep costs a tenth of the speed on an idle machine (benchmarks/results,
# thread waiting). Read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_HOMES = {
    "CiuicError": "devices.errors",
    "InvalidInput": "devices.errors",
    "OutOfMemory": "devices.errors",
    "DeviceManager": "devices.manager",
    "DeviceSpec": "devices.spec",
    "Link": "devices.spec",
    "Topology": "devices.spec",
    "LLM": "engine.llm",
    "RequestOutput": "engine.request",
    "SamplingParams": "engine.sampling",
    "MemoryHierarchy": "memory.hierarchy",
    "TensorPool": "memory.pool",
    "CiuicTensor": "memory.tensor",
    "Model": "model",
    "Cost": "ops.custom",
    "CustomOperator": "ops.custom",
    "register_operator": "ops.custom",
    "unregister_operator": "ops.custom",
    "plan": "planning",
    "Calibration": "schedulers.calibration",
    "CostModel": "schedulers.cost",
    "Task": "schedulers.graph",
    "TaskGraph": "schedulers.graph",
    "Placement": "schedulers.placement",
    "Schedule": "schedulers.schedule",
    "TaskScheduler": "schedulers.scheduler",
    "policy": "schedulers.scheduler",
    "simulate": "schedulers.simulate",
    "Trace": "schedulers.trace",
    "Workload": "schedulers.workload",
}
__all__ = [
    "LLM", "Calibration", "CiuicError", "CiuicTensor", "Cost", "CostModel", "CustomOperator", "DeviceManager",
    "DeviceSpec", "InvalidInput", "Link", "MemoryHierarchy", "Model", "OutOfMemory", "Placement", "RequestOutput",
    "SamplingParams", "Schedule", "Task", "TaskGraph", "TaskScheduler", "TensorPool", "Topology", "Trace",
    "Workload", "plan", "policy", "register_operator", "simulate", "unregister_operator",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ciuic_runtime' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ciuic_runtime.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
