"""The doctor's facts: nothing heavy is loaded for them, and what is missing is said with its cost and its remedy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ciuic_runtime import doctor
from ciuic_runtime.doctor import Check, diagnose

NAMES = [
    "python", "torch", "native kernels", "bandwidth probe", "C++ compiler", "safetensors", "xxhash",
    "tokenizers", "NVIDIA driver", "CUDA in torch", "triton", "ray", "llguidance", "transformers",
]  # fmt: skip


def check(name: str) -> Check:
    return next(c for c in diagnose() if c.name == name)


def test_every_part_is_looked_at_and_every_gap_explained() -> None:
    checks = diagnose()
    assert [c.name for c in checks] == NAMES
    for found in checks:
        assert found.status in ("ok", "missing", "limited")
        assert found.found
        assert found.ok or (found.cost and found.fix), found


@pytest.mark.parametrize("name", ["ray", "triton", "tokenizers", "transformers", "safetensors"])
def test_a_blocked_import_is_missing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    found = check(name)
    assert (found.status, found.found) == ("missing", "import is blocked")


def test_an_installed_package_shows_its_version() -> None:
    import safetensors

    assert check("safetensors") == Check("safetensors", "ok", safetensors.__version__)


def test_later_parts_are_called_later() -> None:
    probe = doctor._package("triton_that_is_not_there", "nothing yet", "pip")()
    assert (probe.status, probe.found) == ("missing", "not installed")
    source = [c for c in [check("triton")] if not c.ok]
    assert all("come later" in c.cost for c in source)


@pytest.mark.parametrize(
    ("name", "module"),
    [("native kernels", "ciuic_runtime.ops._kernels"), ("bandwidth probe", "ciuic_runtime.devices._probe")],
)
def test_without_compiled_parts_the_remedy_is_a_compiler(
    name: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    found = check(name)
    assert (found.status, found.found) == ("missing", "not compiled in this installation")
    assert "compiler" in found.fix


def test_without_torch_the_other_checks_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert [c.name for c in diagnose()] == NAMES
    assert check("torch").status == check("CUDA in torch").status == "missing"


def test_fewer_threads_than_cores_is_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch, "get_num_threads", lambda: 0)
    found = check("torch")
    assert found.status == "limited"
    assert "use 0 of" in found.cost


@pytest.mark.parametrize(("keeps", "status"), [("", "ok"), ("1", "limited")])
def test_python_that_compiles_torch_in_every_process_is_a_limit(keeps: str, status: str, tmp_path: Path) -> None:
    program = "from ciuic_runtime import doctor; found = doctor._python(); print(found.status, found.fix)"
    surroundings = {"PYTHONPYCACHEPREFIX": str(tmp_path), "PYTHONDONTWRITEBYTECODE": keeps}  # nothing is kept there yet
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **surroundings}, capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[0] == status
    assert ("PYTHONDONTWRITEBYTECODE" in done.stdout) == bool(keeps)


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    assert check("C++ compiler").status == "missing"
    monkeypatch.setenv("CXX", f"{sys.executable} -O2")
    assert check("C++ compiler") == Check("C++ compiler", "ok", sys.executable)


def test_only_torch_is_loaded() -> None:
    program = (
        "import sys; from ciuic_runtime.doctor import diagnose; diagnose(); "
        "print([m for m in ('ray', 'triton', 'transformers', 'tokenizers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
