"""How long a task takes on a device: a roofline over the device's measured limits, with the utilisation our kernels
reach. Knows no placement; a `Calibration` is data, measured elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.devices.spec import DeviceSpec, Topology
from ciuic_runtime.schedulers.graph import Step, Task
from ciuic_runtime.schedulers.workload import Workload

Bound = Literal["compute", "memory", "overhead", "link"]


@dataclass(frozen=True, slots=True)
class Calibration:
    """What share of a device's raw limits our kernels reach, and how far a forecast may be off.

    Devices that are not named get the shares assumed below: then the plan's basis says "estimated" or "mixed".
    A forecast's range is as wide as `model_error` says."""

    compute_utilisation: Mapping[str, float] = field(default_factory=dict)  # device -> share of its matrix rate
    memory_utilisation: Mapping[str, float] = field(default_factory=dict)  # device -> share of its bandwidth
    launch_overhead: Mapping[str, float] = field(default_factory=dict)  # device -> s per operator call
    model_error: float = 1.0  # relative: rates from half to twice the forecast are to be expected
    basis: Literal["measured", "estimated"] = "estimated"


# What torch's operators reach of a CPU's raw limits on two small models, call overheads apart (benchmarks/results,
# against transformers): a third to four fifths of the matrix rate, about two thirds of the bandwidth. Assumed for
# every device that was not calibrated.
ASSUMED_COMPUTE_UTILISATION = 1 / 2
ASSUMED_MEMORY_UTILISATION = 2 / 3
# Where a device says nothing of its own launch overhead; estimated.
ASSUMED_LAUNCH_OVERHEAD = {"CPU": 5e-6, "GPU": 8e-6, "SIM": 0.0}  # s


# The device's rates that products in a packed format go by, the first that is known: kernels multiply 8-bit integers.
_RATES = {"int4": ("int8", "bfloat16"), "int8": ("int8", "bfloat16")}


@dataclass(frozen=True, slots=True)
class Cost:
    """Time of one task in one step, and what it was made of."""

    compute_s: float
    memory_s: float
    overhead_s: float

    @property
    def seconds(self) -> float:
        return self.overhead_s + max(self.compute_s, self.memory_s)

    @property
    def bound_by(self) -> Bound:
        if self.overhead_s > max(self.compute_s, self.memory_s):
            return "overhead"
        return "compute" if self.compute_s >= self.memory_s else "memory"


@dataclass(frozen=True)
class CostModel:
    """time = launches x overhead + max(flops / (peak x u_c), bytes / (bandwidth x u_m))  (roofline, Williams 2009)."""

    topology: Topology
    dtype: str = "bfloat16"
    calibration: Calibration = field(default_factory=Calibration)
    workload: Workload = field(default_factory=Workload)  # what policies plan for

    def task(self, task: Task, device: DeviceSpec, step: Step) -> Cost:
        """All of a task on one device."""
        return self._cost(task, device, step, task.expected_experts(step.tokens), 1.0, task.work(step.phase).launches)

    def experts(self, task: Task, device: DeviceSpec, step: Step, experts: Sequence[int]) -> Cost:
        """Some of a layer's routed experts; putting all their rows together is `combine`."""
        touched = task.expected_experts(step.tokens, experts)
        return self._cost(task, device, step, touched, task.share(experts), 0)

    def combine(self, task: Task, device: DeviceSpec, step: Step) -> Cost:
        return Cost(0.0, 0.0, task.work(step.phase).launches * self.launch_overhead(device))

    def _cost(self, task: Task, device: DeviceSpec, step: Step, experts: float, share: float, launches: float) -> Cost:
        """A task of which this device has `share`, and on it `experts` distinct experts to read."""
        work = task.work(step.phase)
        tokens = work.rows(step)
        attention = work.flops_per_pair * step.pairs + work.flops_per_position * step.positions
        flops = work.flops_per_token * tokens + attention
        weights = (work.bytes_fixed if tokens else 0.0) + work.bytes_per_expert * experts
        other = work.bytes_per_token * tokens + work.bytes_per_position * step.positions
        launches += work.launches_per_expert * experts + work.launches_per_sequence * step.sequences
        products = float(work.products) if tokens else 0.0
        products += work.products_per_expert * experts + work.products_per_sequence * step.sequences
        return Cost(
            compute_s=share * flops / self.matrix_rate(device),
            memory_s=weights / self.weight_bandwidth(device, tokens) + share * other / self.bandwidth(device),
            overhead_s=launches * self.launch_overhead(device)
            + products * device.matrix_launch_overhead.get(self.dtype, 0.0),
        )

    def transfer(self, src: str, dst: str, nbytes: float) -> float:
        return 0.0 if src == dst else self.topology.link(src, dst).transfer_time(nbytes)

    def bandwidth(self, device: DeviceSpec) -> float:
        if not device.memory_bandwidth:
            raise InvalidInput(
                f"{device.name} has no known memory bandwidth, so nothing can be forecast on it; "
                "measure it (ciuic devices --measure fresh) or give memory_bandwidth in the hardware file"
            )
        return device.memory_bandwidth * self.memory_utilisation(device)

    def weight_bandwidth(self, device: DeviceSpec, tokens: int) -> float:
        """Weights at one token are read by a matrix-vector product, whose own rate is used where it was measured."""
        vector = device.matrix_vector_rates.get(self.dtype)
        if tokens == 1 and vector:
            return vector * self.memory_utilisation(device)
        return self.bandwidth(device)

    def memory_utilisation(self, device: DeviceSpec) -> float:
        return self.calibration.memory_utilisation.get(device.name, ASSUMED_MEMORY_UTILISATION)

    def matrix_rate(self, device: DeviceSpec) -> float:
        rates = (device.matrix_rates.get(dtype) for dtype in (*_RATES.get(self.dtype, (self.dtype,)), "float32"))
        rate = next(filter(None, rates), None)
        if not rate:
            raise InvalidInput(
                f"{device.name} has no known matrix rate for {self.dtype}, so nothing can be forecast on it; "
                "measure it (ciuic devices --measure fresh) or give matrix_rates in the hardware file"
            )
        return rate * self.calibration.compute_utilisation.get(device.name, ASSUMED_COMPUTE_UTILISATION)

    def launch_overhead(self, device: DeviceSpec) -> float:
        known = self.calibration.launch_overhead.get(device.name, device.launch_overhead)
        return ASSUMED_LAUNCH_OVERHEAD.get(device.kind, 0.0) if known is None else known

    def basis(self, devices: set[str]) -> Literal["measured", "estimated", "mixed"]:
        """Measured only if both the devices' limits and the kernels' utilisation were."""
        kinds = {self.topology.device(name).basis for name in devices} | {self.calibration.basis}
        if kinds == {"measured"}:
            return "measured"
        return "mixed" if "measured" in kinds else "estimated"
