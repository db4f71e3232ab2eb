"""The manager puts discovery, measuring and the cache together; what is measured once is not measured again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ciuic_runtime.devices import DeviceManager, DeviceSpec, InvalidInput, Link, Topology, manager
from ciuic_runtime.devices.limits import Limits

CPU = DeviceSpec("cpu", "CPU", "Some CPU", memory_bytes=8 << 30, memory_free_bytes=4 << 30, cores=4)
SIM = DeviceSpec(
    "sim:0", "SIM", "Big accelerator", memory_bytes=80 << 30, matrix_rates={"bfloat16": 4e14}, basis="estimated"
)
LOST = DeviceSpec("cuda:0", "GPU", usable=False, why_not_usable="it fell off the bus")


class Measuring:
    """Counts what is measured instead of measuring it."""

    def __init__(self) -> None:
        self.devices: list[str] = []
        self.disk = Limits(memory_bandwidth=2e9, bandwidth_by_access={1 << 20: 2e9}, facts={"read_latency_s": 1e-4})

    def device(self, spec: DeviceSpec, seconds: float, progress: object) -> Limits:
        self.devices.append(spec.name)
        return Limits(memory_bandwidth=2e10 + len(self.devices), matrix_rates={"float32": 1e11}, threads=spec.cores)

    def folder(self, path: object, seconds: float) -> Limits:
        self.devices.append("disk")
        return self.disk


@pytest.fixture
def measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Measuring:
    monkeypatch.setenv("CIUIC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(manager, "discover_gpus", lambda cpus: ([], []))
    counted = Measuring()
    monkeypatch.setattr(manager, "measure_device", counted.device)
    monkeypatch.setattr(manager, "measure_disk", counted.folder)
    return counted


def num_cpus() -> int:
    return len(DeviceManager(measure="never").get_devices("CPU"))


def test_the_second_time_nothing_is_measured(measuring: Measuring, tmp_path: Path) -> None:
    first = DeviceManager(tmp_path)
    measured = list(measuring.devices)
    assert len(measured) == num_cpus() + 1
    second = DeviceManager(tmp_path)
    assert measuring.devices == measured
    cpu, again = first.get_devices("cpu")[0], second.get_devices("cpu")[0]
    assert cpu.basis == again.basis == "measured"
    assert cpu.memory_bandwidth == again.memory_bandwidth == 2e10 + 1
    assert first.topology.links == second.topology.links


def test_fresh_measures_again_and_the_cache_has_the_new_figures(measuring: Measuring) -> None:
    DeviceManager()
    again = DeviceManager(measure="fresh").get_devices("CPU")[0].memory_bandwidth
    assert len(measuring.devices) == 2 * (num_cpus() + 1)
    assert DeviceManager().get_devices("CPU")[0].memory_bandwidth == again != 2e10 + 1


def test_never_measures_nothing_and_knows_no_rates(measuring: Measuring) -> None:
    devices = DeviceManager(measure="never")
    assert measuring.devices == []
    assert {d.basis for d in devices.get_devices()} == {"unknown"}
    assert devices.topology.links == ()


def test_the_disk_link_is_measured(measuring: Measuring) -> None:
    devices = DeviceManager()
    cpu = devices.get_devices("CPU")[0].name
    assert devices.topology.link("disk", cpu) == Link("disk", cpu, 2e9, 1e-4, "measured")
    assert devices.topology.link(cpu, "disk").basis == "estimated"  # writing was not measured


def test_a_disk_that_was_not_measured_says_why_and_is_tried_again(measuring: Measuring) -> None:
    measuring.disk = Limits(facts={"not_measured": "it is read-only"})
    for _ in range(2):
        (disk,) = DeviceManager().get_devices("disk")
        assert (disk.basis, disk.facts["not_measured"]) == ("unknown", "it is read-only")
    assert measuring.devices.count("disk") == 2


def test_figures_of_a_busy_machine_are_said_to_vary(measuring: Measuring, caplog: pytest.LogCaptureFixture) -> None:
    DeviceManager()
    assert "vary" not in caplog.text
    measuring.disk = replace(measuring.disk, facts={"spread_read": 0.1, "spread_other": 0.45})
    DeviceManager(measure="fresh")
    assert "the figures of disk vary by 45 %" in caplog.text


def test_what_cannot_be_used_is_not_measured(measuring: Measuring, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manager, "discover_gpus", lambda cpus: ([LOST], []))
    devices = DeviceManager()
    assert devices.get_devices("gpu") == [LOST]
    assert "cuda:0" not in measuring.devices


def test_progress_is_told(measuring: Measuring) -> None:
    said: list[str] = []
    DeviceManager(progress=said.append)
    assert said == ["measuring how fast the disk under . reads"]


def test_kinds() -> None:
    devices = DeviceManager.from_topology(Topology((CPU, SIM)))
    assert devices.get_devices() == [CPU, SIM]
    assert devices.get_devices("cpu") == devices.get_devices("CPU") == [CPU]
    assert devices.get_devices("Sim") == [SIM]
    assert devices.get_devices("GPU") == []
    with pytest.raises(InvalidInput, match="no kind of device is called 'TPU'; kinds are CPU, GPU, SIM, DISK"):
        devices.get_devices("TPU")


def test_modes() -> None:
    with pytest.raises(InvalidInput, match="measure='always' is not known; choose one of cached, never, fresh"):
        DeviceManager(measure="always")


def test_it_reads_as_a_table() -> None:
    cpu = replace(CPU, memory_bandwidth=2.05e10, matrix_rates={"float32": 1.5e11}, basis="measured")
    topology = Topology((cpu, SIM, LOST), (Link("cpu", "sim:0", 25e9, 1e-5, "estimated"),))
    lines = str(DeviceManager.from_topology(topology)).splitlines()
    assert lines[0].split() == ["device", "kind", "model", "cores", "memory", "reads", "matrix", "products", "basis"]
    assert "8 GiB, 4 GiB free" in lines[1]
    assert "20.5 GB/s" in lines[1]
    assert "float32 150 Gop/s" in lines[1]
    assert "SIM (simulated)" in lines[2]
    assert lines[4] == "cuda:0 cannot be used: it fell off the bus"
    assert lines[-1].split() == ["cpu", "->", "sim:0", "25", "GB/s", "10", "us", "estimated"]
    assert repr(DeviceManager.from_topology(topology)) == "DeviceManager(cpu, sim:0, cuda:0)"
