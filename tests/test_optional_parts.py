"""Every optional part taken away, one at a time and all at once: `run` still works, the doctor says what was lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KERNELS = ("ciuic_runtime.ops._kernels", "ciuic_runtime.devices._probe")
PARTS = {
    "compiler": (KERNELS, ("native kernels", "bandwidth probe")),
    "ray": (("ray",), ("ray",)),
    "nvml": (("pynvml",), ("NVIDIA driver",)),
    "triton": (("triton",), ("triton",)),
    "llguidance": (("llguidance",), ("llguidance",)),
    "server": (("fastapi", "uvicorn", "starlette"), ()),
}


def without(modules: tuple[str, ...], *arguments: object) -> subprocess.CompletedProcess[str]:
    """`ciuic` in a process of its own in which these modules cannot be imported."""
    code = f"import sys; sys.modules.update(dict.fromkeys({modules!r})); from ciuic_runtime.cli import main; main()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def complete(tiny_v3: Path, here_toml: Path) -> list[int]:
    return _tokens(
        without((), "run", tiny_v3, "--prompt", "Hello", "--devices", here_toml, "--max-tokens", 6, "--json")
    )


def _tokens(done: subprocess.CompletedProcess[str]) -> list[int]:
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["token_ids"]
    assert isinstance(found, list)
    return found


@pytest.mark.parametrize("part", ["all", *(pytest.param(part, marks=pytest.mark.slow) for part in PARTS)])
def test_run_works_without(part: str, complete: list[int], tiny_v3: Path, here_toml: Path) -> None:
    parts = PARTS.values() if part == "all" else [PARTS[part]]
    modules, checks = (tuple(chain(*names)) for names in zip(*parts, strict=True))
    options = ("--prompt", "Hello", "--devices", here_toml, "--max-tokens", 6, "--json")
    done = without(modules, "run", tiny_v3, *options)
    assert len(_tokens(done)) == len(complete)
    assert done.stderr.count("without native kernels") == (part in ("compiler", "all"))  # said once, and only then
    report = without(modules, "doctor", "--json")
    status = {c["name"]: c for c in json.loads(report.stdout)["checks"]}
    for name in checks:
        assert status[name]["status"] == "missing"
        assert status[name]["cost"]
        assert status[name]["fix"]


def test_the_reference_operators_give_the_same_tokens(complete: list[int], tiny_v3: Path, here_toml: Path) -> None:
    options = ("--prompt", "Hello", "--devices", here_toml, "--max-tokens", 6, "--json", "--dtype", "float32")
    native, reference = without((), "run", tiny_v3, *options), without(KERNELS, "run", tiny_v3, *options)
    assert _tokens(native) == _tokens(reference)


@pytest.mark.slow
def test_an_install_without_a_compiler_is_pure_python(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("ciuic_runtime", "devices", "schedulers"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    environment = {**os.environ, "CXX": "false", "CC": "false", "PIP_CONSTRAINT": str(ROOT / "constraints.txt")}
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(source)]
    subprocess.run(command, check=True, env=environment, capture_output=True, timeout=300)
    [wheel] = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert not [n for n in names if n.endswith(".so")]
    assert {n.split("/")[0].split("-")[0] for n in names} == {"ciuic_runtime"}
    assert "ciuic_runtime/devices/spec.py" in names
    assert "ciuic_runtime/models/known/deepseek-v3.json" in names
