"""GPU discovery against a fake of the binding, and of the C library below the real binding."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pynvml
import pytest

from ciuic_runtime.devices.cuda import TorchGpus, discover_gpus
from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.devices.nvml import driver_state, list_gpus
from ciuic_runtime.devices.spec import DeviceSpec

CPU = DeviceSpec("cpu", "CPU", memory_bytes=1 << 30)
NO_CUDA = TorchGpus("torch was built without CUDA")

Nvml = Callable[..., None]


def raising(error: type[Exception]) -> Callable[..., None]:
    def call(*args: object) -> None:
        raise error

    return call


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Nvml:
    """Plays GPUs that say only what a test gives them; everything else is NotSupported."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def play(*gpus: dict[str, object], init: type[Exception] | None = None) -> None:
        for name in [n for n in vars(pynvml) if n.startswith(("nvmlDeviceGet", "nvmlSystemGet"))]:
            monkeypatch.setattr(pynvml, name, raising(pynvml.NVMLError_NotSupported))
        monkeypatch.setattr(pynvml, "nvmlInit", raising(init) if init else lambda: None)
        monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: None)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: len(gpus))
        monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: gpus[index])
        for name in {name for gpu in gpus for name in gpu}:
            monkeypatch.setattr(pynvml, name, answer(name))

    return play


def answer(name: str) -> Callable[..., object]:
    def call(gpu: dict[str, object], *args: object) -> object:
        value = gpu.get(name, pynvml.NVMLError_NotSupported)
        if isinstance(value, type) and issubclass(value, Exception):
            raise value
        return value(*args) if callable(value) else value

    return call


def gpu(index: int, **more: object) -> dict[str, object]:
    return {
        "nvmlDeviceGetName": "NVIDIA GeForce RTX 4090",
        "nvmlDeviceGetUUID": f"GPU-aa{index}",
        "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=24 << 30, free=20 << 30),
        "nvmlDeviceGetPciInfo": SimpleNamespace(busId=f"00000000:0{index}:00.0"),
        "nvmlDeviceGetMaxPcieLinkGeneration": 4,
        "nvmlDeviceGetMaxPcieLinkWidth": 16,
        "nvmlDeviceGetCudaComputeCapability": (8, 9),
        **more,
    }


def test_what_a_gpu_does_not_say_is_left_out(nvml: Nvml) -> None:
    nvml({"nvmlDeviceGetName": b"Tesla", "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=1 << 30, free=1 << 29)})
    (found,), links = discover_gpus([CPU], lambda: NO_CUDA)
    assert (found.name, found.model, found.memory_bytes, found.memory_free_bytes) == (
        "cuda:0",
        "Tesla",
        1 << 30,
        1 << 29,
    )
    assert dict(found.facts) == {}
    assert found.memory_bandwidth is None
    assert found.basis == "unknown"
    assert links == []


def test_a_function_that_the_binding_lacks_is_left_out(nvml: Nvml, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml(gpu(0))
    monkeypatch.delattr(pynvml, "nvmlDeviceGetNumaNodeId")
    assert discover_gpus([], lambda: NO_CUDA)[0][0].numa_node is None


@pytest.mark.parametrize("error", [pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded])
def test_no_library_or_driver_means_no_gpus_and_no_noise(
    nvml: Nvml, error: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    nvml(init=error)
    assert discover_gpus([CPU]) == ([], [])
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert "no NVIDIA driver" in driver_state()


def test_another_failure_to_start_is_said(nvml: Nvml, caplog: pytest.LogCaptureFixture) -> None:
    nvml(init=pynvml.NVMLError_LibRmVersionMismatch)
    assert list_gpus() == []
    assert "NVML did not start" in caplog.text


def test_torch_without_cuda_makes_gpus_unusable_but_listed(nvml: Nvml) -> None:
    nvml(gpu(0), gpu(1))
    found, _ = discover_gpus([CPU], lambda: NO_CUDA)
    assert [d.name for d in found] == ["cuda:0", "cuda:1"]
    assert not any(d.usable for d in found)
    assert "without CUDA" in found[0].why_not_usable


def test_torch_numbers_the_gpus(nvml: Nvml) -> None:
    nvml(gpu(0), gpu(1), gpu(2))
    found, _ = discover_gpus([], lambda: TorchGpus("", ("GPU-aa2", "GPU-aa0"), (24 << 30, 24 << 30)))
    assert [(d.name, d.facts["uuid"], d.usable) for d in found] == [
        ("cuda:0", "GPU-aa2", True),
        ("cuda:1", "GPU-aa0", True),
    ]


def test_an_instance_has_the_memory_torch_says(nvml: Nvml) -> None:
    nvml(gpu(0, nvmlDeviceGetMigMode=(1, 1)))
    found, _ = discover_gpus([], lambda: TorchGpus("", ("GPU-aa0",), (10 << 30,)))
    assert (found[0].memory_bytes, found[0].memory_free_bytes) == (10 << 30, 10 << 30)
    assert found[0].facts["mig"] is True


def test_a_gpu_that_only_torch_knows_has_what_torch_says(nvml: Nvml) -> None:
    nvml(gpu(0))
    (found,), links = discover_gpus([CPU], lambda: TorchGpus("", ("GPU-instance",), (5 << 30,)))
    assert (found.name, found.memory_bytes, found.usable, links) == ("cuda:0", 5 << 30, True, [])


@pytest.mark.parametrize(("said", "node"), [(1, 1), (0xFFFFFFFF, None)])
def test_no_numa_node_is_no_number(nvml: Nvml, said: int, node: int | None) -> None:
    nvml(gpu(0, nvmlDeviceGetNumaNodeId=said))
    assert discover_gpus([], lambda: NO_CUDA)[0][0].numa_node == node


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, ["GPU-aa0", "GPU-aa1", "GPU-aa2"]),
        ("2,0", ["GPU-aa2", "GPU-aa0"]),
        ("GPU-aa1", ["GPU-aa1"]),
        ("1,7,0", ["GPU-aa1"]),
        ("", []),
        ("-1", []),
        ("GPU-aa", []),
    ],
)
def test_hidden_gpus_are_not_listed(
    nvml: Nvml, monkeypatch: pytest.MonkeyPatch, visible: str | None, expected: list[str]
) -> None:
    nvml(gpu(0), gpu(1), gpu(2))
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found, _ = discover_gpus([], lambda: NO_CUDA)
    assert [d.facts["uuid"] for d in found] == expected


def test_a_lost_gpu_is_listed_last_as_unusable_and_has_no_links(nvml: Nvml) -> None:
    nvml({"nvmlDeviceGetName": pynvml.NVMLError_GpuIsLost}, gpu(1))
    found, links = discover_gpus([CPU], lambda: TorchGpus("", ("GPU-aa1",), (24 << 30,)))
    assert [(d.name, d.usable) for d in found] == [("cuda:0", True), ("cuda:1", False)]
    assert "reboot" in found[1].why_not_usable
    assert {x.src for x in links} == {"cuda:0", "cpu"}


def test_links_without_nvlink_are_estimated_from_pcie(nvml: Nvml) -> None:
    nvml(gpu(0), gpu(1, nvmlDeviceGetMaxPcieLinkWidth=4))
    _, links = discover_gpus([CPU], lambda: NO_CUDA)
    rates = {(x.src, x.dst): x.bandwidth for x in links}
    assert rates["cuda:0", "cpu"] == rates["cpu", "cuda:0"] == pytest.approx(1.969e9 * 16 * 0.8)
    assert rates["cuda:0", "cuda:1"] == rates["cuda:1", "cpu"] == pytest.approx(1.969e9 * 4 * 0.8)
    assert {x.basis for x in links} == {"estimated"}


def test_direct_nvlinks_count_only_towards_their_peer(nvml: Nvml) -> None:
    def bridge(peer: int) -> dict[str, object]:
        return {
            "nvmlDeviceGetNvLinkState": lambda link: 1 if link < 4 else pynvml.NVML_FEATURE_DISABLED,
            "nvmlDeviceGetNvLinkRemotePciInfo": SimpleNamespace(busId=f"00000000:0{peer}:00.0"),
        }

    nvml(gpu(0, **bridge(1)), gpu(1, **bridge(0)), gpu(2))
    _, links = discover_gpus([], lambda: NO_CUDA)
    rates = {(x.src, x.dst): x.bandwidth for x in links}
    assert rates["cuda:0", "cuda:1"] == pytest.approx(4 * 25e9 * 0.8)
    assert rates["cuda:0", "cuda:2"] == pytest.approx(1.969e9 * 16 * 0.8)


def test_the_backend_says_that_there_is_no_such_gpu() -> None:
    import torch

    from ciuic_runtime.devices import open_backend

    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    with pytest.raises(InvalidInput, match=rf"cuda:{there} is declared.*finds {there} CUDA devices"):
        open_backend(DeviceSpec(f"cuda:{there}", "GPU", memory_bytes=1 << 30))


# The real binding over a fake C library

PROGRAM = """
import json
from ciuic_runtime.devices.cuda import TorchGpus, discover_gpus
from ciuic_runtime.devices.spec import DeviceSpec
gpus, links = discover_gpus([DeviceSpec("cpu", "CPU", memory_bytes=1)], lambda: TorchGpus("no CUDA"))
print(json.dumps([
    [[d.name, d.model, d.memory_bytes, d.memory_bandwidth, d.numa_node, d.usable, dict(d.facts)] for d in gpus],
    [[x.src, x.dst, x.bandwidth] for x in links],
]))
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        pytest.skip("no C compiler to build the fake libnvidia-ml.so.1 with")
    folder = tmp_path_factory.mktemp("nvml")
    source = Path(__file__).with_name("fake_nvml.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / "libnvidia-ml.so.1", source], check=True)
    return folder


def discover_with(library: Path, **settings: object) -> tuple[list[list[object]], list[list[object]]]:
    environment = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    environment |= {"LD_LIBRARY_PATH": str(library), **{k: str(v) for k, v in settings.items()}}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    gpus, links = json.loads(done.stdout)
    return gpus, links


def test_eight_gpus_on_a_switch(library: Path) -> None:
    gpus, links = discover_with(library, FAKE_GPUS=8)
    assert [g[0] for g in gpus] == [f"cuda:{i}" for i in range(8)]
    model, memory, bandwidth, node, usable, facts = gpus[5][1:]
    assert (model, memory, node, usable) == ("NVIDIA H200", 141 << 30, 1, False)
    assert bandwidth == pytest.approx(6144 / 8 * 3201e6 * 2 * 0.8)
    assert facts == {
        "driver": "580.95.05",
        "uuid": "GPU-00000000-0000-0000-0000-000000000005",
        "pci_bus_id": "00000000:15:00.0",
        "pcie_gen": 5,
        "pcie_width": 16,
        "nvlinks": 18,
        "compute_capability": "9.0",
    }  # MIG is not supported: left out
    rates = {(src, dst): rate for src, dst, rate in links}
    assert len(rates) == 8 * 7 + 2 * 8
    assert rates["cuda:7", "cuda:0"] == pytest.approx(18 * 25e9 * 0.8)
    assert rates["cpu", "cuda:3"] == pytest.approx(16 * 3.938e9 * 0.8)


def test_a_gpu_that_fell_off_the_bus(library: Path) -> None:
    gpus, links = discover_with(library, FAKE_GPUS=3, FAKE_LOST=1)
    assert [(g[1], g[6].get("uuid", "")[-1:]) for g in gpus] == [("NVIDIA H200", "0"), ("", ""), ("NVIDIA H200", "2")]
    assert not [x for x in links if "cuda:1" in x[:2]]


@pytest.mark.parametrize("code", [pynvml.NVML_ERROR_DRIVER_NOT_LOADED, pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH])
def test_a_library_that_does_not_start(library: Path, code: int) -> None:
    assert discover_with(library, FAKE_GPUS=2, FAKE_INIT=code) == ([], [])
