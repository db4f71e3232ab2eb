"""Measuring gives finite positive figures and says how they came about; the cache keeps them and survives damage."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ciuic_runtime.devices import bandwidth, limits, measure
from ciuic_runtime.devices.cpu import CpuBackend, discover_cpus
from ciuic_runtime.devices.limits import Limits, load, spread, store
from ciuic_runtime.devices.spec import DeviceSpec

MIB = 1 << 20
SOME = Limits(
    memory_bandwidth=1.5e10,
    memory_bandwidth_by_threads={1: 1e10, 2: 1.5e10},
    bandwidth_by_access={65536: 1e9},
    matrix_rates={"float32": 1e11},
    matrix_vector_rates={"bfloat16": 7e9},
    launch_overhead=1e-6,
    threads=2,
    facts={"bandwidth_by": "probe", "spread_memory_bandwidth": 0.02},
)


@pytest.fixture
def spec(monkeypatch: pytest.MonkeyPatch) -> DeviceSpec:
    """This CPU, with little memory to walk through."""
    monkeypatch.setattr(bandwidth, "WORKING_SET", 128 * MIB)
    return discover_cpus()[0]


def sensible(rates: dict[str, float] | dict[int, float]) -> bool:
    return all(math.isfinite(r) and 1e6 < r < 1e18 for r in rates.values())


def test_everything_is_measured_and_threads_are_put_back(spec: DeviceSpec) -> None:
    said: list[str] = []
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        found = measure.measure_device(spec, 0.5, said.append)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
    assert set(found.memory_bandwidth_by_threads) >= {1, spec.cores}
    assert found.memory_bandwidth == found.memory_bandwidth_by_threads[spec.cores]
    assert {"float32", "bfloat16"} <= set(found.matrix_rates)
    assert set(found.matrix_vector_rates) == {"float32", "bfloat16"}
    for rates in (found.memory_bandwidth_by_threads, found.matrix_rates, found.matrix_vector_rates):
        assert sensible(dict(rates))
    assert found.launch_overhead is not None
    assert 1e-8 < found.launch_overhead < 1e-2
    assert set(found.matrix_launch_overhead) >= {"float32", "bfloat16"}
    assert all(1e-8 < seconds < 1e-1 for seconds in found.matrix_launch_overhead.values())
    assert found.threads == spec.cores
    assert {"bandwidth_by", "spread_memory_bandwidth", "spread_matrix_float32"} <= set(found.facts)
    assert len(said) == 2
    measured = found.on(spec)
    assert (measured.basis, measured.cores, measured.matrix_rates) == ("measured", spec.cores, found.matrix_rates)
    assert measured.facts["allowed_cpus"] == spec.facts["allowed_cpus"]


def test_the_measured_memory_is_given_back(spec: DeviceSpec) -> None:
    backend = CpuBackend(spec)
    measure.matrix_vector_rates(backend, 0.1)
    assert backend.memory().peak >= 64 * MIB
    assert backend.memory().used == 0


def test_a_dtype_that_fails_is_left_out(spec: DeviceSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("not implemented for 'Char'")

    monkeypatch.setattr(torch, "_int_mm", refuse)
    rates, _ = measure.matrix_rates(CpuBackend(spec), 0.1)
    assert set(rates) == {"float32", "bfloat16"}


def test_without_the_probe_numpy_measures_and_says_so(spec: DeviceSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    import ciuic_runtime.devices

    monkeypatch.setitem(sys.modules, "ciuic_runtime.devices._probe", None)
    monkeypatch.delattr(ciuic_runtime.devices, "_probe", raising=False)
    found = bandwidth.memory_rates(spec, 0.2)
    assert found.facts["bandwidth_by"] == "numpy"
    assert sensible(dict(found.memory_bandwidth_by_threads))


def test_the_probe_counts_what_it_reads() -> None:
    probe = pytest.importorskip("ciuic_runtime.devices._probe", reason="the probe is not compiled here")
    windows = probe.read_bandwidth(4 * MIB, 2, 0.05, 5, [])
    assert len(windows) == 5
    assert all(1e8 < w < 1e13 for w in windows)
    (bound,) = probe.read_bandwidth(MIB, 1, 0.01, 1, [min(os.sched_getaffinity(0))])
    assert bound > 1e8
    assert probe.instruction_set() in ("avx512f", "avx2", "portable")
    for threads, seconds, count in [(0, 0.1, 1), (1, 0.0, 1), (1, float("nan"), 1), (1, 0.1, 0)]:
        with pytest.raises(ValueError, match="must be positive"):
            probe.read_bandwidth(MIB, threads, seconds, count, [])


def test_little_memory_is_not_walked_through(spec: DeviceSpec) -> None:
    tight = replace(spec, memory_free_bytes=100 * MIB)
    found = bandwidth.memory_rates(tight, 0.1)
    assert (found.memory_bandwidth, dict(found.facts)) == (None, {"bandwidth_not_measured": "too little free memory"})
    assert measure.matrix_vector_rates(CpuBackend(tight), 0.1) == ({}, {})


def test_thread_counts_are_powers_of_two_and_all(spec: DeviceSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "_reader", lambda spec: (lambda nbytes, threads, seconds: [1e9 * threads], "fake"))
    for cores, counts in [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])]:
        found = bandwidth.memory_rates(replace(spec, cores=cores), 0.1)
        assert list(found.memory_bandwidth_by_threads) == counts
        assert found.memory_bandwidth == cores * 1e9


def test_a_set_that_the_cache_may_hold_is_labelled(spec: DeviceSpec) -> None:
    large_cache = replace(spec, cache_bytes={"L3": 96 * MIB})
    assert "caches may help" in str(bandwidth.memory_rates(large_cache, 0.05).facts["bandwidth_note"])
    assert "bandwidth_note" not in bandwidth.memory_rates(replace(spec, cache_bytes={"L3": MIB}), 0.05).facts


def test_the_usual_rate_is_that_of_most_looks_and_of_two_the_higher() -> None:
    assert bandwidth.usual_rate([57e9, 33e9, 34e9, 33e9, 56e9]) == 33e9
    assert bandwidth.usual_rate([33e9, 57e9]) == 57e9
    assert bandwidth.usual_rate([5e9]) == 5e9
    assert bandwidth.alike(57e9, 52e9)
    assert bandwidth.alike(52e9, 57e9)
    assert not bandwidth.alike(57e9, 51e9)


def test_a_look_at_the_memory(spec: DeviceSpec) -> None:
    rate = bandwidth.memory_rate(spec, 1)
    assert rate is not None
    assert 1e8 < rate < 1e13
    assert bandwidth.memory_rate(replace(spec, memory_free_bytes=100 * MIB), 1) is None


def test_spread() -> None:
    assert spread([5.0]) == 0.0
    assert spread([1.0, 1.0, 1.0]) == 0.0
    assert spread([90.0, 95.0, 100.0, 105.0, 110.0]) == pytest.approx(0.1)


def test_the_fingerprint_follows_what_matters(spec: DeviceSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    key = measure.fingerprint(spec)
    assert key == measure.fingerprint(replace(spec, memory_free_bytes=1))
    others = [replace(spec, cores=99), replace(spec, memory_bytes=1), replace(spec, model="other")]
    assert len({key, *map(measure.fingerprint, others)}) == 4
    monkeypatch.setattr(measure, "_torch_version", lambda: "9.9")
    assert measure.fingerprint(spec) != key
    monkeypatch.undo()
    monkeypatch.setattr(measure, "find_spec", lambda name: None)
    assert measure.fingerprint(spec) != key


def test_what_is_stored_is_loaded(tmp_path: Path) -> None:
    file = tmp_path / "deep/limits.json"
    store("a", SOME, file)
    store("b", replace(SOME, threads=7), file)
    assert load("a", file) == SOME
    assert load("b", file) == replace(SOME, threads=7)
    assert load("c", file) is None
    assert [f.name for f in file.parent.iterdir()] == ["limits.json"]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"version": 0, "limits": {"a": {}}}', '{"limits": 3}', "\xff"]
)
def test_a_damaged_cache_is_ignored_and_rewritten(tmp_path: Path, content: str) -> None:
    file = tmp_path / "limits.json"
    file.write_text(content, encoding="latin-1")
    assert load("a", file) is None
    store("a", SOME, file)
    assert load("a", file) == SOME


@pytest.mark.parametrize(
    "damage",
    [
        {"memory_bandwidth": -1.0},
        {"memory_bandwidth": "fast"},
        {"matrix_rates": {"float32": math.nan}},
        {"matrix_rates": [1]},
        {"threads": None},
        {"memory_bandwidth_by_threads": {"x": 1.0}},
        {"launch_overhead": 0},
        {"matrix_launch_overhead": {"float32": "slow"}},
    ],
)
def test_a_damaged_entry_is_measured_again(
    tmp_path: Path, damage: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "limits.json"
    store("a", SOME, file)
    content = json.loads(file.read_text())
    content["limits"]["a"] |= damage
    file.write_text(json.dumps(content))
    assert load("a", file) is None
    assert "measured again" in caplog.text


def test_another_version_of_the_cache_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "limits.json"
    store("a", SOME, file)
    monkeypatch.setattr(limits, "MEASURE_VERSION", limits.MEASURE_VERSION + 1)
    assert load("a", file) is None


def test_an_entry_without_a_field_is_measured_again(tmp_path: Path) -> None:
    file = tmp_path / "limits.json"
    store("a", SOME, file)
    file.write_text(file.read_text().replace('"launch_overhead"', '"other"'))
    assert load("a", file) is None


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        store("a", SOME, tmp_path / "file/limits.json")
    assert "not cached" in caplog.text
    assert "CIUIC_CACHE_DIR" in caplog.text


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIUIC_CACHE_DIR", str(tmp_path))
    assert limits.cache_file() == tmp_path / "limits.json"
    monkeypatch.delenv("CIUIC_CACHE_DIR")
    assert limits.cache_file() == Path.home() / ".cache/ciuic/limits.json"
