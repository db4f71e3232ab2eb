"""How long a task takes on a device: a roofline over the device's measured limits, with the utilisation our kernels
reach. Knows no placement; which share that is, `calibration.py` holds as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.devices.spec import DeviceSpec, Topology
from ciuic_runtime.schedulers.calibration import (
    AROUND,
    ASSUMED_COMPUTE_UTILISATION,
    ASSUMED_LAUNCH_OVERHEAD,
    ASSUMED_MEMORY_UTILISATION,
    BETWEEN,
    ENDS,
    ESTIMATED_LAUNCH_OVERHEAD,
    ESTIMATED_MEMORY_UTILISATION,
    ESTIMATED_PACKED_COMPUTE_UTILISATION,
    GUESS,
    PAGE,
    SAMPLE,
    Calibration,
    Curve,
    operator_of,
    size_of,
)
from ciuic_runtime.schedulers.graph import Step, Task, TaskGraph, Work
from ciuic_runtime.schedulers.workload import Workload

Bound = Literal["compute", "memory", "overhead", "link"]

# The device's rates that products in a packed format go by, the first that is known: kernels multiply 8-bit integers.
_RATES = {"int4": ("int8", "bfloat16"), "int8": ("int8", "bfloat16")}


@dataclass(frozen=True, slots=True)
class Cost:
    """Time of one task in one step, and what it was made of."""

    compute_s: float
    memory_s: float
    overhead_s: float
    binds: Bound | None = None  # where a measured curve says so; None: the larger of the times
    scores: Cost | None = None  # of attention, what grows with the context, beside its projections

    @property
    def seconds(self) -> float:
        return self.overhead_s + max(self.compute_s, self.memory_s) + (self.scores.seconds if self.scores else 0.0)

    @property
    def bound_by(self) -> Bound:
        work = max(self.compute_s, self.memory_s)
        if self.scores and self.scores.seconds > self.overhead_s + work:
            return self.scores.bound_by
        if self.overhead_s > work:
            return "overhead"
        return self.binds or ("compute" if self.compute_s >= self.memory_s else "memory")


@dataclass(frozen=True, slots=True)
class Part:
    """Work that is timed as one, and what its curve is found by."""

    operator: str
    size: float
    rows: float
    flops: float
    weights: float  # bytes
    other: float  # bytes


@dataclass(frozen=True)
class CostModel:
    """time = overhead + max(flops / (peak x u_c), bytes / (bandwidth x u_m))  (roofline, Williams 2009), the shares u
    from the operator's measured curve, else assumed."""

    topology: Topology
    dtype: str = "bfloat16"
    calibration: Calibration = field(default_factory=Calibration)
    workload: Workload = field(default_factory=Workload)  # what policies plan for

    def task(self, task: Task, device: DeviceSpec, step: Step, beside: Step | None = None) -> Cost:
        """All of a task on one device. `beside`: further sequences in the same pass, such as decodes beside a chunk of
        a prompt; weights are read once for both."""
        steps = (step,) if beside is None else (step, beside)
        touched = task.distinct_experts(*steps)
        return self._cost(task, device, steps, touched, 1.0, whole=True)

    def experts(self, task: Task, device: DeviceSpec, step: Step, experts: Sequence[int]) -> Cost:
        """Some of a layer's routed experts; putting all their rows together is `combine`."""
        touched = task.expected_experts(step.tokens, experts)
        return self._cost(task, device, (step,), touched, task.share(experts), whole=False)

    def combine(self, task: Task, device: DeviceSpec, step: Step) -> Cost:
        curve = self._curve(device, operator_of(task, step.phase), size_of(task))
        launches = task.work(step.phase).launches
        return Cost(0.0, 0.0, launches * self.launch_overhead(device) if curve is None else curve.overhead)

    def sampling(self, device: DeviceSpec, step: Step, graph: TaskGraph) -> float:
        """Seconds to choose the next tokens of a pass; 0 where that was not measured."""
        logits = graph.tasks[-1].output_bytes_per_token
        curve = self._curve(device, SAMPLE, logits)
        if curve is None or not step.sampled:
            return 0.0
        return self._on_curve(
            curve, device, Part(SAMPLE, logits, step.sampled, 0.0, logits * step.sampled, 0.0)
        ).seconds

    def besides_tasks(self, device: DeviceSpec, tasks: int) -> float:
        """Seconds of a process's pass of so many tasks that lie between them, before and after; 0 where that was not
        measured."""
        return self._own(device, BETWEEN) * tasks + self._own(device, ENDS)

    def around_pass(self, device: DeviceSpec) -> float:
        """Seconds from when a process is given a pass until it begins, and from its end until its values can be handed
        on; 0 where that was not measured."""
        return self._own(device, AROUND)

    def paging(self, device: DeviceSpec, pages: float, guesses: int) -> float:
        """Seconds, besides the tasks, for so many pages that are read and layers whose experts are guessed; 0 where
        that was not measured."""
        return self._own(device, PAGE) * pages + self._own(device, GUESS) * guesses

    def _own(self, device: DeviceSpec, what: str) -> float:
        curve = self._curve(device, what, 0.0)
        return curve.overhead if curve else 0.0

    def outside(self, task: Task, device: DeviceSpec, step: Step) -> str:
        """What of a task lies outside of what was measured, "" if nothing: the nearest measured share is used there."""
        operator = operator_of(task, step.phase)
        curve = self._curve(device, operator, size_of(task))
        rows = parts(task, (step,), task.distinct_experts(step))[0].rows
        if curve is None or not rows or curve.covers(rows):
            return ""
        low, high = curve.points[0].rows, curve.points[-1].rows
        return f"{operator} of {rows:.3g} rows (measured: {low:.3g} to {high:.3g})"

    def _cost(
        self, task: Task, device: DeviceSpec, steps: Sequence[Step], touched: float, share: float, whole: bool
    ) -> Cost:
        """A task of which this device has `share`, and on it `touched` distinct experts to read."""
        part, scores = parts(task, steps, touched, share)
        curve = self._curve(device, part.operator, part.size)
        if curve is None:
            return self._assumed(part, scores, device, task, steps, touched, whole)
        cost = self._on_curve(curve, device, part, whole=whole)
        for one in scores:
            curve = self._curve(device, one.operator, one.size)
            if curve is not None:
                cost = _plus(cost, self._on_curve(curve, device, one))
        return cost

    def _on_curve(self, curve: Curve, device: DeviceSpec, part: Part, whole: bool = True) -> Cost:
        compute, memory = curve.at(part.rows)
        own = curve.threads == device.threads
        peak = (curve.peak if own else None) or self.peak(device)
        bandwidth = (curve.bandwidth if own else None) or self.peak_bandwidth(device)
        compute_s = part.flops / (peak * compute) if part.flops else 0.0
        memory_s = (part.weights + part.other) / (bandwidth * memory)
        return Cost(compute_s, memory_s, curve.overhead if whole else 0.0, "compute" if compute > memory else "memory")

    def _assumed(
        self, part: Part, scores: Sequence[Part], device: DeviceSpec, task: Task, steps: Sequence[Step],
        touched: float, whole: bool,
    ) -> Cost:  # fmt: skip
        rows = sum(task.work(step.phase).rows(step) for step in steps)
        flops = part.flops + sum(one.flops for one in scores)
        other = part.other + sum(one.other for one in scores)
        return Cost(
            compute_s=flops / self.matrix_rate(device),
            memory_s=part.weights / self.weight_bandwidth(device, rows) + other / self.bandwidth(device),
            overhead_s=self._launches(task, steps, device, touched, whole),
        )

    def _launches(self, task: Task, steps: Sequence[Step], device: DeviceSpec, experts: float, whole: bool) -> float:
        """Seconds of overhead of a task's operator calls."""
        work = task.work(steps[0].phase)
        launches = (work.launches if whole else 0) + work.launches_per_expert * experts
        products = (work.products if any(step.tokens for step in steps) else 0) + work.products_per_expert * experts
        for step in steps:
            launches += task.work(step.phase).launches_per_sequence * step.sequences
            products += task.work(step.phase).products_per_sequence * step.sequences
        return launches * self.launch_overhead(device) + products * device.matrix_launch_overhead.get(self.dtype, 0.0)

    def _curve(self, device: DeviceSpec, operator: str, size: float) -> Curve | None:
        return self.calibration.curve(device.name, device.threads, self.dtype, operator, size)

    def transfer(self, src: str, dst: str, nbytes: float) -> float:
        return 0.0 if src == dst else self.topology.link(src, dst).transfer_time(nbytes)

    def bandwidth(self, device: DeviceSpec) -> float:
        """Bytes/s that operators without a curve are taken to reach."""
        return self.peak_bandwidth(device) * self.memory_utilisation(device)

    def matrix_rate(self, device: DeviceSpec) -> float:
        """Operations per second that operators without a curve are taken to reach."""
        packed = self.dtype in _RATES and device.basis == "estimated"
        assumed = ESTIMATED_PACKED_COMPUTE_UTILISATION if packed else ASSUMED_COMPUTE_UTILISATION
        return self.peak(device) * self.calibration.compute_utilisation.get(device.name, assumed)

    def peak_bandwidth(self, device: DeviceSpec) -> float:
        if not device.memory_bandwidth:
            raise InvalidInput(
                f"{device.name} has no known memory bandwidth, so nothing can be forecast on it; "
                "measure it (ciuic devices --measure fresh) or give memory_bandwidth in the hardware file"
            )
        return device.memory_bandwidth

    def peak(self, device: DeviceSpec) -> float:
        rates = (device.matrix_rates.get(dtype) for dtype in (*_RATES.get(self.dtype, (self.dtype,)), "float32"))
        rate = next(filter(None, rates), None)
        if not rate:
            raise InvalidInput(
                f"{device.name} has no known matrix rate for {self.dtype}, so nothing can be forecast on it; "
                "measure it (ciuic devices --measure fresh) or give matrix_rates in the hardware file"
            )
        return rate

    def weight_bandwidth(self, device: DeviceSpec, tokens: int) -> float:
        """Weights at one token are read by a matrix-vector product, whose own rate is used where it was measured."""
        vector = device.matrix_vector_rates.get(self.dtype)
        if tokens == 1 and vector:
            return vector * self.memory_utilisation(device)
        return self.bandwidth(device)

    def memory_utilisation(self, device: DeviceSpec) -> float:
        estimated = device.basis == "estimated"
        assumed = ESTIMATED_MEMORY_UTILISATION if estimated else ASSUMED_MEMORY_UTILISATION
        return self.calibration.memory_utilisation.get(device.name, assumed)

    def launch_overhead(self, device: DeviceSpec) -> float:
        known = self.calibration.launch_overhead.get(device.name, device.launch_overhead)
        if known is not None:
            return known
        assumed = ESTIMATED_LAUNCH_OVERHEAD if device.basis == "estimated" else ASSUMED_LAUNCH_OVERHEAD
        return assumed.get(device.kind, 0.0)

    def basis(self, devices: set[str]) -> Literal["measured", "estimated", "mixed"]:
        """Measured only if both the devices' limits and the kernels' utilisation were."""
        kinds = {self.topology.device(name).basis for name in devices}
        for name in devices:
            known = self.topology.device(name).can_compute and self.calibration.calibrated(name, self.dtype)
            if self.topology.device(name).can_compute:
                kinds.add("measured" if known else self.calibration.basis)
        if kinds == {"measured"}:
            return "measured"
        return "mixed" if "measured" in kinds else "estimated"


def parts(task: Task, steps: Sequence[Step], touched: float, share: float = 1.0) -> tuple[Part, list[Part]]:
    """What a task has to do in a pass of these steps, of which a device has `share` and `touched` distinct experts to
    read: and, of attention, the scores of each step, which grow with the context."""
    done = [(task.work(step.phase), step) for step in steps]
    rows = sum(work.rows(step) for work, step in done)
    each = rows * task.experts_per_token / touched if task.num_experts and touched else rows
    part = Part(
        operator_of(task, steps[0].phase),
        size_of(task),
        share * each if task.num_experts else each,
        share * sum(work.flops_per_token * work.rows(step) for work, step in done),
        max(work.bytes_fixed if rows else 0.0 for work, _ in done) + done[0][0].bytes_per_expert * touched,
        share * sum(work.bytes_per_token * work.rows(step) for work, step in done),
    )
    return part, [_scores(work, step, share) for work, step in done if work.flops_per_pair and step.tokens]


def _scores(work: Work, step: Step, share: float) -> Part:
    flops = work.flops_per_pair * step.pairs + work.flops_per_position * step.positions
    other = work.bytes_per_position * step.positions
    name = f"scores.{step.phase}"
    return Part(name, work.flops_per_pair, step.pairs / step.tokens, share * flops, 0.0, share * other)


def _plus(cost: Cost, scores: Cost) -> Cost:
    if cost.scores is None:
        return replace(cost, scores=scores)
    one = cost.scores
    both = Cost(one.compute_s + scores.compute_s, one.memory_s + scores.memory_s, one.overhead_s + scores.overhead_s)
    return replace(cost, scores=both)
