"""Curves: what is fitted gives the times back that were measured, what is kept comes back, and the commands say so."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from configs import TINY_V3

from ciuic_runtime import Model, plan
from ciuic_runtime.calibrate import _Fit, curves_of, measured_part
from ciuic_runtime.curves import can_be_calibrated, is_calibrated, load_calibration, store_curves
from ciuic_runtime.devices import limits
from ciuic_runtime.devices.limits import RATES, Limits
from ciuic_runtime.devices.manager import DeviceManager
from ciuic_runtime.devices.measure import fingerprint
from ciuic_runtime.devices.spec import DeviceSpec, Topology
from ciuic_runtime.engine.llm import LLM
from ciuic_runtime.models.config import load_spec, read_config
from ciuic_runtime.models.graph import build_graph
from ciuic_runtime.schedulers.calibration import (
    AROUND,
    BETWEEN,
    ENDS,
    SAMPLE,
    Calibration,
    Curve,
    Point,
    operator_of,
)
from ciuic_runtime.schedulers.cost import CostModel
from ciuic_runtime.schedulers.graph import Step
from ciuic_runtime.timed_passes import (
    BATCHES,
    CONTEXTS,
    PROMPTS,
    ROUNDS,
    Pass,
    Repetition,
    Timed,
    passes_of,
    time_passes,
    wanted_again,
)

CPU = DeviceSpec(
    "cpu", "CPU", model="a CPU", memory_bytes=1 << 36, memory_bandwidth=5e10, cores=4, threads=4, basis="measured",
    matrix_rates={"float32": 1e11, "bfloat16": 4e11, "int8": 1e12}, launch_overhead=1e-6,
)  # fmt: skip


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, in which the limits are known already."""
    hw = DeviceManager(path=None)
    monkeypatch.setenv("CIUIC_CACHE_DIR", str(tmp_path))
    for device in hw.get_devices("CPU"):
        limits.store(fingerprint(device), Limits(**{k: getattr(device, k) for k in RATES}))
    return tmp_path


def true_cost(format: str) -> CostModel:
    """A machine whose operators reach shares that depend on the rows; what a fit should find."""
    kinds = ("embedding", "norm", "attention.prefill", "attention.decode", "mlp", "router", "experts",
             "shared_experts", "head")  # fmt: skip
    rows = (1, 4, 16, 64, 256, 1024, 4096)
    curves = []
    for i, kind in enumerate(kinds):
        points = tuple(Point(r, 0.9 / (1 + 30 / r), 0.6 / (1 + r / 500) + 0.1 * (i % 3)) for r in rows)
        curves.append(Curve("cpu", 4, format, kind, 1e6, 2e-6, points))
    for phase, share in (("prefill", 0.4), ("decode", 0.2)):
        points = tuple(Point(r, share, share / 2) for r in (1, 100, 10_000))
        curves.append(Curve("cpu", 4, format, f"scores.{phase}", 1e5, 0.0, points))
    return CostModel(Topology((CPU,)), format, Calibration(curves=tuple(curves)))


@pytest.mark.parametrize("format", ["int4", "bfloat16"])
def test_a_fit_gives_the_measured_times_back(format: str) -> None:
    graph, truth = build_graph(load_spec("deepseek-v2-lite"), format), true_cost(format)
    passes = passes_of(load_spec("deepseek-v2-lite"), CONTEXTS, max(PROMPTS))
    timed: dict[Pass, Timed] = {}
    kinds = {task.kind: task for task in reversed(graph.tasks)}
    for one in passes:
        timed[one] = Timed(touched=[kinds["experts"].expected_experts(one.tokens)] * 3)
        timed[one].own.update({BETWEEN: [1e-5] * 3, ENDS: [2e-4] * 3, AROUND: [3e-4] * 3})
        for kind, task in kinds.items():
            timed[one].seconds[kind] += [truth.task(task, CPU, one.step).seconds] * 3
    curves = tuple(_Fit(graph, CPU, timed, {1: 1e-4, 4: 3e-4}).curves())
    fitted = CostModel(Topology((CPU,)), format, Calibration(curves=curves))
    for one in passes:
        for task in kinds.values():
            if task.prefill.per_sequence and one.phase == "prefill":
                continue  # a pass has as many sampled rows as sequences; measured by decodes
            expected, found = truth.task(task, CPU, one.step).seconds, fitted.task(task, CPU, one.step).seconds
            assert found == pytest.approx(expected, rel=0.08), (task.name, one)
    assert fitted.besides_tasks(CPU, 40) == pytest.approx(2e-4 + 40 * 1e-5)
    assert fitted.around_pass(CPU) == pytest.approx(3e-4)
    assert fitted.sampling(CPU, Step.decode(9), graph) == pytest.approx(1e-4)
    assert fitted.sampling(CPU, Step.decode(9, batch=4), graph) == pytest.approx(3e-4)


FAST, SLOW = 5e10, 3e10


def repetition(*looks: float, seconds: float = 1.0) -> Repetition:
    return Repetition({"mlp": seconds}, {BETWEEN: 0.0}, 2 * seconds, looks or None)


def test_what_was_timed_at_another_speed_of_the_memory_is_timed_again() -> None:
    decode, long = Pass.decode(1, 16), Pass.prompt(512)
    mixed = [repetition(FAST, FAST), repetition(FAST, SLOW), repetition(SLOW, SLOW)]
    timed = {decode: mixed, long: [repetition(FAST, FAST)] * 2}
    assert wanted_again(timed, FAST, 18.0) == [decode]
    assert wanted_again(timed, FAST, 3.0) == [decode, long], "there is time for all"
    assert wanted_again(timed, FAST, 40.0) == [], "there is time for none"
    assert wanted_again({decode: mixed[:1], long: mixed[:1]}, FAST, 40.0) == [decode, long], "so few are too few"
    assert wanted_again({decode: [repetition()] * 3}, None, 18.0) == [], "a memory that cannot be looked at"


def test_a_repetition_is_the_middle_of_some_runs() -> None:
    found = Repetition.middle([repetition(seconds=s) for s in (1.0, 9.0, 2.0)], (FAST, SLOW))
    assert (found.seconds["mlp"], found.touched, found.looks) == (2.0, 8.0, (FAST, SLOW))


def test_passes_count_that_were_timed_while_the_memory_was_as_it_usually_is(
    tiny_int4: Path,
) -> None:
    looks = iter([FAST, FAST, SLOW, *[FAST] * 100])  # the second pass of the first round, and the third
    decode, prompt, last = Pass.decode(1, 16), Pass.prompt(4), Pass.prompt(8)
    with LLM(tiny_int4, max_num_seqs=4) as llm:
        timed, rate = time_passes(llm, [decode, prompt, last], 0, lambda what: None, lambda: next(looks))
    assert rate == FAST
    assert [len(timed[one].touched) for one in (decode, prompt, last)] == [ROUNDS, ROUNDS - 1, ROUNDS - 1]


def test_between_points_shares_are_interpolated_in_log_space_and_beyond_them_held() -> None:
    curve = Curve("cpu", 4, "int4", "mlp", 1e6, 0.0, (Point(1, 0.01, 0.8), Point(16, 0.16, 0.8), Point(64, 0.64, 0.2)))
    assert curve.at(1) == pytest.approx((0.01, 0.8))
    assert curve.at(4) == pytest.approx((0.04, 0.8))
    assert curve.at(32) == pytest.approx((0.32, 0.4))
    assert curve.at(0.5) == pytest.approx((0.01, 0.8))
    assert curve.at(1000) == pytest.approx((0.64, 0.2))
    assert [curve.covers(rows) for rows in (0.5, 1, 7, 64, 65)] == [False, True, True, True, False]


def test_shares_are_of_the_limits_that_were_measured_beside_them() -> None:
    graph = build_graph(read_config(TINY_V3), "int4")
    mlp, step = next(task for task in graph if task.kind == "mlp"), Step.decode(5)
    curve = Curve("cpu", 4, "int4", "mlp", 1e6, 0.0, (Point(1, 0.5, 0.5),), 1e12, 5e10)

    def seconds(curve: Curve, cpu: DeviceSpec) -> float:
        cost = CostModel(Topology((cpu,)), "int4", Calibration(curves=(curve,)))
        return cost.task(mlp, cpu, step).seconds

    busy = replace(CPU, memory_bandwidth=2.5e10, matrix_rates={"int8": 5e11})
    assert seconds(curve, busy) == seconds(curve, CPU)
    assert seconds(replace(curve, peak=None, bandwidth=None), busy) == pytest.approx(2 * seconds(curve, CPU))
    assert seconds(replace(curve, threads=2), busy) == pytest.approx(2 * seconds(curve, CPU))  # not its own threads


def test_what_lies_outside_of_the_measured_range_is_said() -> None:
    graph, curve = (
        build_graph(read_config(TINY_V3), "int4"),
        Curve("cpu", 4, "int4", "mlp", 1e6, 0.0, (Point(2, 1, 1),)),
    )
    cost = CostModel(Topology((CPU,)), "int4", Calibration(curves=(curve,)))
    mlp = next(task for task in graph if task.kind == "mlp")
    assert cost.outside(mlp, CPU, Step.decode(5, batch=2)) == ""
    assert cost.outside(mlp, CPU, Step.prefill(300)) == "mlp of 300 rows (measured: 2 to 2)"


def test_the_nearest_threads_and_size_are_taken() -> None:
    def curve(threads: int, size: float) -> Curve:
        return Curve("cpu", threads, "int4", "mlp", size, 0.0, (Point(1, 1, 1),))

    curves = [curve(1, 1e6), curve(4, 1e6), curve(4, 1e8)]
    calibration = Calibration(curves=tuple(curves))
    assert calibration.curve("cpu", 4, "int4", "mlp", 2e6) is curves[1]
    assert calibration.curve("cpu", 8, "int4", "mlp", 5e7) is curves[2]
    assert calibration.curve("cpu", 1, "int4", "mlp", 1e8) is curves[0]
    assert calibration.curve("cpu", 4, "int8", "mlp", 1e6) is None
    assert calibration.curve("cuda:0", 4, "int4", "mlp", 1e6) is None


@pytest.mark.parametrize("name", ["deepseek-v2-lite", "deepseek-v2", "deepseek-v3"])
def test_of_a_large_model_some_layers_are_measured_that_have_all_its_operators(name: str) -> None:
    spec = load_spec(name)
    part = measured_part(spec, "int4")
    graph, whole = build_graph(part, "int4"), build_graph(spec, "int4")
    assert graph.nbytes < 5e9
    sizes = {operator_of(t, "decode"): t.pages[0].nbytes for t in whole if t.kind != "router"}
    assert {operator_of(t, "decode"): t.pages[0].nbytes for t in graph if t.kind != "router"} == sizes


def test_curves_are_kept_and_replaced(cache: Path) -> None:
    model, topology = Model("deepseek-v2-lite", "int4"), Topology((CPU,))
    assert load_calibration(model, topology, "avx2") == Calibration()
    first = Curve("cpu", 4, "int4", "mlp", 1e6, 1e-6, (Point(1, 0.5, 0.25, 0.01), Point(8, 0.5, 0.25)))
    other = replace(first, operator="head")
    store_curves(CPU, "avx2", [first, other])
    assert set(load_calibration(model, topology, "avx2").curves) == {first, other}
    better = replace(first, overhead=2e-6)
    store_curves(CPU, "avx2", [better])
    assert set(load_calibration(model, topology, "avx2").curves) == {better, other}
    assert load_calibration(model, topology, "portable") == Calibration()
    assert load_calibration(Model("deepseek-v2-lite", "int8"), topology, "avx2") == Calibration()
    assert load_calibration(model, Topology((replace(CPU, cores=8),)), "avx2") == Calibration()
    assert load_calibration(model, Topology((replace(CPU, basis="estimated"),)), "avx2") == Calibration()


def test_a_damaged_file_costs_nothing_but_time(cache: Path) -> None:
    model, topology, file = Model("deepseek-v2-lite", "int4"), Topology((CPU,)), cache / "calibration.json"
    store_curves(CPU, "avx2", [Curve("cpu", 4, "int4", "mlp", 1e6, 1e-6, (Point(1, 0.5, 0.25),))])
    good = json.loads(file.read_text())
    [key] = good["curves"]
    for damage in ({"points": 3}, {"size": "large"}, {"overhead": -1.0}, {"overhead": math.nan}, {"points": [{}]}):
        file.write_text(json.dumps({**good, "curves": {key: [good["curves"][key][0] | damage]}}))
        assert load_calibration(model, topology, "avx2") == Calibration()
    for text in ("", "[]", '{"version": 99, "curves": {}}', '{"version": 2, "curves": []}', "\0"):
        file.write_text(text)
        assert load_calibration(model, topology, "avx2") == Calibration()
    store_curves(CPU, "avx2", [Curve("cpu", 4, "int4", "mlp", 1e6, 1e-6, (Point(1, 0.5, 0.25),))])
    assert load_calibration(model, topology, "avx2").curves


def test_a_measured_model_is_calibrated_and_its_forecast_says_measured(
    ciuic, cache: Path, tiny_v3: Path, here_toml: Path
) -> None:
    result = ciuic("plan", tiny_v3, "--prompt-tokens", 20, "--max-tokens", 8)
    assert "was not measured yet" in result.out
    assert "ciuic calibrate" in result.out
    result = ciuic("calibrate", tiny_v3, "--json")
    assert result.code == 0, result.err
    curves = result.json["curves"]
    found = {curve["operator"] for curve in curves}
    assert found >= {"attention.decode", "attention.prefill", "mlp", "experts", "head", "router"}
    assert found >= {SAMPLE, BETWEEN, ENDS, AROUND}
    rows = {point["rows"] for curve in curves if curve["operator"] == "mlp" for point in curve["points"]}
    assert min(rows) == 1
    assert max(rows) >= max(BATCHES)
    assert all(p["compute"] >= 0 and p["memory"] > 0 for curve in curves for p in curve["points"])
    result = ciuic("plan", tiny_v3, "--prompt-tokens", 20, "--max-tokens", 8, "--json")
    schedule = result.json
    assert schedule["predicted"]["basis"] == "measured"
    assert not any("not measured" in note for note in schedule["notes"])
    result = ciuic("calibrate", tiny_v3)
    assert "experts" in result.out
    assert "rows" in result.out


def test_a_bench_is_compared_recosted_and_remembered(ciuic, cache: Path, tiny_v3: Path) -> None:
    result = ciuic("score")
    assert (result.code, "no run is on record" in result.out) == (0, True)
    arguments = ("bench", tiny_v3, "--prompt-tokens", 30, "--max-tokens", 12, "--batch", 2, "--rounds", 3)
    result = ciuic(*arguments, "--json")
    assert result.code == 0, result.err
    report = result.json
    assert len(report["rounds"]) == 3
    assert report["decode_tokens_per_s"] > 0
    compared = report["actual_against_forecast"]["decode_tokens_per_s"]
    assert compared["recosted"] > 0
    assert 1 + compared["error"] == pytest.approx((1 + compared["workload_error"]) * (1 + compared["model_error"]))
    assert "text" not in report
    result = ciuic("score", "--json")
    scored = result.json
    assert len(scored["runs"]) == 3
    assert scored["scores"]["all runs"]["runs"] == 3
    assert scored["scores"]["all runs"]["median"] >= 1
    with (cache / "history.jsonl").open("a") as file:
        file.write("{damaged\n")
    result = ciuic("score")
    assert "all runs" in result.out
    assert "1 of 4 lines" in result.err


def test_a_known_name_is_benched_with_random_weights(ciuic, cache: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(TINY_V3))
    result = ciuic("bench", config, "--prompt-tokens", 8, "--max-tokens", 4, "--rounds", 1, "--dtype", "int8")
    assert result.code == 0, result.err
    assert "decode tokens/s" in result.out


def test_curves_of_other_models_serve_until_there_are_own_ones(cache: Path) -> None:
    model = Model("deepseek-v2-lite", "int4")
    truth = true_cost("int4").calibration
    store_curves(CPU, "avx2", truth.curves)
    loaded = load_calibration(model, Topology((CPU,)), "avx2")
    assert can_be_calibrated(CPU)
    assert not is_calibrated(model, CPU, loaded)
    schedule = plan(model, Topology((CPU,)), calibration=loaded)
    assert schedule.predicted is not None
    assert schedule.predicted.basis == "measured"
    assert any("was not measured yet" in note for note in schedule.notes)
    assert {c.operator for c in curves_of(model, Topology((CPU,)), loaded)} >= {"mlp", "scores.decode"}
