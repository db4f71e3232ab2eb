"""What paging costs a pass besides its tasks, measured with some layers of a packed model."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ciuic_runtime.calibrate import calibrate
from ciuic_runtime.calibrate_paging import LAYERS, can_be_paged, measure_paging, page_and_guess, some_layers
from ciuic_runtime.curves import kernels_of
from ciuic_runtime.devices.manager import DeviceManager
from ciuic_runtime.devices.spec import Topology
from ciuic_runtime.model import Model
from ciuic_runtime.ops.native import REFERENCE
from ciuic_runtime.schedulers.calibration import GUESS, PAGE
from ciuic_runtime.schedulers.cost import CostModel

pytest.importorskip("ciuic_runtime.memory._page_reader")


def test_the_layers_are_those_with_routed_experts_and_are_given_what_comes_before(tiny_int4: Path) -> None:
    graph = Model(str(tiny_int4)).graph
    some = some_layers(graph)
    assert all(task in graph.tasks for task in some)
    assert {task.layer for task in some} == {t.layer for t in graph if t.num_experts and t.layer is not None}
    assert len([task for task in some if task.num_experts]) <= LAYERS
    before = graph.tasks[graph.tasks.index(some.tasks[0]) - 1]
    assert some.given == (before.name,)
    needed = {name for task in some for name in task.after} - {task.name for task in some}
    assert needed == {before.name}


def test_a_page_that_is_read_and_a_layer_that_is_guessed_take_time(tiny_int4: Path) -> None:
    model, [cpu] = Model(str(tiny_int4)), DeviceManager(measure="never").topology.by_kind("CPU")
    nothing_known = CostModel(Topology((cpu,)), model.format)
    curves = measure_paging(model, cpu, 1, kernels_of(model), nothing_known)
    assert [curve.operator for curve in curves] == [PAGE, GUESS]
    assert all((curve.device, curve.threads, curve.format) == (cpu.name, 1, model.format) for curve in curves)
    page, guess = (curve.overhead for curve in curves)
    assert 0 <= page < 1
    assert 0 <= guess < 1
    assert page + guess > 0  # with nothing known, all that lies besides tasks is in them


@given(st.floats(0, 1), st.floats(0, 1), st.integers(0, 50), st.integers(1, 50))
def test_two_kinds_of_passes_tell_what_a_page_and_a_guess_take(page: float, guess: float, few: int, more: int) -> None:
    measured = [(pages, page * pages + guess * 5) for pages in (few, few + more)]
    assert page_and_guess(measured, 5) == pytest.approx((page, guess), abs=1e-6)


def test_neither_a_page_nor_a_guess_takes_less_than_nothing() -> None:
    assert page_and_guess([(1, 0.1), (10, 2.0)], 5) == pytest.approx((20.1 / 101, 0))  # pages alone: least squares
    assert page_and_guess([(1, 1.0), (10, 0.5)], 5) == pytest.approx((0, 0.15))
    assert page_and_guess([(0, -0.1), (10, -0.5)], 5) == (0, 0)


def test_only_what_is_packed_is_measured(tiny_int4: Path, tiny_v3: Path) -> None:
    assert can_be_paged(Model(str(tiny_int4)), kernels_of(Model(str(tiny_int4))))
    assert not can_be_paged(Model(str(tiny_int4)), REFERENCE)
    assert not can_be_paged(Model(str(tiny_v3)), REFERENCE)
    assert not can_be_paged(Model("deepseek-v2-lite"), "portable")


def test_calibrating_measures_paging_once(tiny_int4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the operators were measured before."""
    model, measured = Model(str(tiny_int4)), []
    topology = DeviceManager(path=None).topology
    monkeypatch.setenv("CIUIC_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("ciuic_runtime.calibrate.is_calibrated", lambda *_: True)

    def noted(*arguments: object) -> object:
        measured.append(arguments)
        return measure_paging(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("ciuic_runtime.calibrate.measure_paging", noted)
    for _ in range(2):
        found = calibrate(model, topology, 1)
        assert {PAGE, GUESS} <= {curve.operator for curve in found.curves}
    assert len(measured) == 1
