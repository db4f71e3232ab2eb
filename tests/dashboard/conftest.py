"""A real run of a small model that reads its pages from disk, one of which came late, as a file and as a source."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from late_page import LatePage
from late_run import DELAY, LATE, Client

import ciuic_runtime as ciuic
from ciuic_runtime.dashboard.serve import create_app
from ciuic_runtime.dashboard.source import Source, open_file
from ciuic_runtime.devices.manager import DeviceManager
from ciuic_runtime.devices.spec import DeviceSpec, Link, Topology
from ciuic_runtime.ops.native import kernels
from ciuic_runtime.schedulers.chrome import write_recording
from ciuic_runtime.server.config import ServerConfig

sys.path.append(str(Path(__file__).parents[1] / "server"))


@pytest.fixture(scope="session")
def with_disk(here: Topology) -> Topology:
    """This machine and a disk, with declared rates."""
    disk = DeviceSpec("disk", "DISK", memory_bandwidth=2e9, basis="estimated")
    devices = (*(d for d in here.devices if d.kind != "DISK"), disk)
    return Topology(devices, (Link("disk", "cpu", 2e9, 1e-4, "estimated"),))


@pytest.fixture(scope="session")
def run_file(tiny_int4: Path, with_disk: Topology, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 2 prompts and 12 tokens each; in the seventh pass LATE came late."""
    if kernels() is None:
        pytest.skip("the native kernels are not built here")
    file = tmp_path_factory.mktemp("runs") / "run.json"
    devices = DeviceManager.from_topology(with_disk)
    with ciuic.LLM(
        tiny_int4, devices=devices, memory={"cpu": "1100KiB"}, max_model_len=128, max_num_seqs=2, threads=1
    ) as llm:  # fmt: skip
        assert llm.schedule.paging is not None
        stream = llm.stream([[5, 250, 17, 99], [7, 8, 9]], ciuic.SamplingParams(max_tokens=12, ignore_eos=True))
        for i, _ in enumerate(stream):
            if i == 10:  # between two passes
                llm.memory.evict(LATE)
                llm.memory._source = LatePage(llm.memory._source_of(), LATE, DELAY, once=True)  # type: ignore[assignment]
        write_recording(llm.recording(), file)
    return file


@pytest.fixture(scope="session")
def plan_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("plans") / "plan.json"
    hw = DeviceManager.from_toml(Path(__file__).parents[2] / "examples" / "two_gpus.toml")
    ciuic.plan(ciuic.Model("deepseek-v2-lite", "int4"), hw).to_json(file)
    return file


@pytest.fixture
def run(run_file: Path) -> Source:
    return open_file(run_file)


@pytest.fixture
def client() -> Client:
    """Of a dashboard of these sources, by HTTP without a socket."""

    @contextmanager
    def one(*sources: Source, **settings: Any) -> Iterator[TestClient]:
        with TestClient(create_app(sources, ServerConfig(**settings)), "http://127.0.0.1") as found:
            yield found

    return one
