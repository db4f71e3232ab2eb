"""The roofline by hand, launch overheads, and how many experts a batch touches."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from machines import device, machine, toy_task

from ciuic_runtime.devices.spec import Link
from ciuic_runtime.schedulers.calibration import Calibration
from ciuic_runtime.schedulers.cost import CostModel
from ciuic_runtime.schedulers.graph import Page, Step, Task, Work

CPU = device("cpu", bandwidth=100.0, rate=1000.0, launch_overhead=0.5)
WORK = Work(
    flops_per_token=10, flops_per_pair=3, flops_per_position=7, bytes_fixed=500, bytes_per_token=2,
    bytes_per_position=4, launches=2, launches_per_sequence=1,
)  # fmt: skip


def experts(num: int = 8, k: int = 2, popularity: tuple[float, ...] = ()) -> Task:
    pages = tuple(Page(f"layers.0.experts.{e}", 100) for e in range(num))
    work = Work(flops_per_token=10, bytes_per_token=6, bytes_per_expert=100, launches=4, launches_per_expert=2)
    return Task("layers.0.experts", "experts", 0, pages, work, work, (), 8.0, num, k, popularity)


def test_roofline_by_hand() -> None:
    cost = CostModel(machine(CPU)).task(toy_task("a", work=WORK), CPU, Step.prefill(4, batch=2, start=6))
    # per sequence: 4 tokens attend 7 + 8 + 9 + 10 positions, and the cache holds 10
    assert cost.compute_s == (10 * 8 + 3 * 2 * 34 + 7 * 2 * 10) / 1000
    assert cost.memory_s == (500 + 2 * 8 + 4 * 20) / 100
    assert cost.overhead_s == (2 + 2) * 0.5
    assert cost.seconds == cost.overhead_s + cost.memory_s
    assert cost.bound_by == "memory"


def test_bounds() -> None:
    model, step = CostModel(machine(CPU)), Step.decode(1)
    assert model.task(toy_task("a", work=Work(flops_per_token=1e6)), CPU, step).bound_by == "compute"
    assert model.task(toy_task("a", work=Work(bytes_fixed=1e6)), CPU, step).bound_by == "memory"
    assert model.task(toy_task("a", work=Work(bytes_fixed=1)), CPU, step).bound_by == "overhead"


def test_calibration_scales_limits() -> None:
    model = CostModel(
        machine(CPU), calibration=Calibration({"cpu": 0.5}, {"cpu": 0.25}, {"cpu": 2.0}, basis="measured")
    )
    plain, slowed = (m.task(toy_task("a", work=WORK), CPU, Step.decode(3)) for m in (CostModel(machine(CPU)), model))
    assert slowed.compute_s == pytest.approx(2 * plain.compute_s)
    assert slowed.memory_s == pytest.approx(4 * plain.memory_s)
    assert slowed.overhead_s == 4 * plain.overhead_s


def test_one_token_reads_weights_at_the_vector_rate() -> None:
    cpu = replace(CPU, matrix_vector_rates={"bfloat16": 50.0})
    model, task = CostModel(machine(cpu)), toy_task("a", work=WORK)
    assert model.task(task, cpu, Step.decode(1)).memory_s == 500 / 50 + 6 / 100
    assert model.task(task, cpu, Step.decode(1, batch=2)).memory_s == (500 + 12) / 100


@pytest.mark.parametrize(
    ("missing", "word"), [("memory_bandwidth", "memory bandwidth"), ("matrix_rates", "matrix rate")]
)
def test_unknown_rates_say_what_to_do(missing: str, word: str) -> None:
    cpu = replace(CPU, **{missing: None if missing == "memory_bandwidth" else {}})
    with pytest.raises(ValueError, match=f"cpu has no known {word}.*measure it.*{missing}"):
        CostModel(machine(cpu)).task(toy_task("a"), cpu, Step.decode(1))


def test_basis() -> None:
    measured = machine(replace(CPU, basis="measured"), device("cuda:0", basis="estimated"))
    both = CostModel(measured, calibration=Calibration(basis="measured"))
    assert both.basis({"cpu"}) == "measured"
    assert both.basis({"cpu", "cuda:0"}) == "mixed"
    assert CostModel(measured).basis({"cpu"}) == "mixed"
    assert CostModel(measured).basis({"cuda:0"}) == "estimated"


def test_transfer() -> None:
    topology = machine(CPU, device("cuda:0"), links=(Link("cpu", "cuda:0", 100.0, 0.25),))
    model = CostModel(topology)
    assert model.transfer("cpu", "cuda:0", 50) == 0.75
    assert model.transfer("cpu", "cpu", 50) == 0
    assert model.transfer("cuda:0", "cpu", 1e10) == pytest.approx(1.0, rel=1e-3)  # assumed where nothing is known


def picked(rng: random.Random, popularity: tuple[float, ...], tokens: int) -> set[int]:
    return {e for _ in range(tokens) for e, p in enumerate(popularity) if rng.random() < p}


def test_expected_experts() -> None:
    uniform = experts(8, 2)
    assert uniform.expected_experts(0) == 0
    assert uniform.expected_experts(1) == pytest.approx(2)
    assert uniform.expected_experts(10**6) == pytest.approx(8)
    assert uniform.expected_experts(3, [0, 5]) == pytest.approx(uniform.expected_experts(3) / 4)
    assert toy_task("a").expected_experts(5) == 0


def test_expected_experts_against_draws() -> None:
    rng = random.Random(0)
    task = experts(8, 2)
    drawn = [len({e for _ in range(5) for e in rng.sample(range(8), 2)}) for _ in range(4000)]
    assert task.expected_experts(5) == pytest.approx(sum(drawn) / len(drawn), rel=0.02)

    popularity = (0.9, 0.5, 0.3, 0.2, 0.05, 0.03, 0.02, 0.0)
    task = experts(8, 2, popularity)
    sets = [picked(rng, popularity, 5) for _ in range(4000)]
    assert task.expected_experts(5) == pytest.approx(sum(map(len, sets)) / len(sets), rel=0.02)
    some = sum(len(s & {1, 4}) for s in sets) / len(sets)
    assert task.expected_experts(5, [1, 4]) == pytest.approx(some, rel=0.05)
    assert task.expected_experts(5) < experts(8, 2).expected_experts(5)  # skewed picks touch fewer


def test_experts_split_over_devices_add_up() -> None:
    for popularity in ((), (0.9, 0.5, 0.3, 0.2, 0.05, 0.03, 0.02, 0.0)):
        task, model, step = experts(8, 2, popularity), CostModel(machine(CPU)), Step.decode(1, batch=7)
        whole = model.task(task, CPU, step)
        parts = [model.experts(task, CPU, step, e) for e in ([0, 3], [1, 2, 4, 5, 6, 7])]
        parts.append(model.combine(task, CPU, step))
        for part in ("compute_s", "memory_s", "overhead_s"):
            assert sum(getattr(p, part) for p in parts) == pytest.approx(getattr(whole, part))


def test_without_calibration_a_share_of_the_limits_is_assumed() -> None:
    from ciuic_runtime.schedulers import cost

    gpu = device("cuda:0")
    assert gpu.memory_bandwidth is not None
    assumed = CostModel(machine(gpu), "bfloat16")
    assert assumed.bandwidth(gpu) == gpu.memory_bandwidth * cost.ASSUMED_MEMORY_UTILISATION < gpu.memory_bandwidth
    assert assumed.matrix_rate(gpu) == gpu.matrix_rates["bfloat16"] * cost.ASSUMED_COMPUTE_UTILISATION
    told = Calibration(compute_utilisation={"cuda:0": 0.9}, memory_utilisation={"cuda:0": 0.8})
    assert CostModel(machine(gpu), "bfloat16", told).bandwidth(gpu) == gpu.memory_bandwidth * 0.8
