"""What is installed and what is missing, what that costs, and what to try: the facts behind `ciuic doctor`.
Loads torch and our own compiled parts only; everything else is looked up without being imported."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Literal

from ciuic_runtime.devices.cpu import discover_cpus
from ciuic_runtime.devices.nvml import driver_state, list_gpus

Status = Literal["ok", "missing", "limited"]
REINSTALL = "install a C++ compiler (g++ or clang++) and reinstall the package: pip install --force-reinstall ."
COMPILERS = ("c++", "g++", "clang++")


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the doctor's report."""

    name: str
    status: Status
    found: str  # what is there
    cost: str = ""  # what is lost without it, or by its limits
    fix: str = ""  # what to try

    @property
    def ok(self) -> bool:
        return self.status == "ok"


def diagnose() -> list[Check]:
    """All checks, the ones that everything needs first."""
    return [check() for check in _CHECKS]


def _python() -> Check:
    found = f"{sys.version.split()[0]} ({sys.implementation.name})"
    if sys.dont_write_bytecode and not _is_kept_compiled("torch"):
        return Check(
            "python", "limited", f"{found}, which keeps nothing that it has compiled",
            "every process compiles torch anew: each command takes seconds more, and so does going on after a loss",
            "unset PYTHONDONTWRITEBYTECODE",
        )  # fmt: skip
    return Check("python", "ok", found)


def _torch() -> Check:
    torch = _imported("torch")
    if torch is None:
        cost = "no model can be run; planning works"
        return Check("torch", "missing", _why_absent("torch"), cost, "pip install torch")
    threads = torch.get_num_threads()
    capability = torch.backends.cpu.get_cpu_capability()
    found = f"{torch.__version__}, {threads} threads, {capability}"
    cores = sum(cpu.cores for cpu in discover_cpus())
    if threads < cores:
        cost = f"operators in torch use {threads} of {cores} cores"
        return Check("torch", "limited", found, cost, "unset OMP_NUM_THREADS, or pass --threads")
    return Check("torch", "ok", found)


def _kernels() -> Check:
    return _compiled("native kernels", "ciuic_runtime.ops._kernels", "operators run in torch, which is slower")


def _probe() -> Check:
    return _compiled("bandwidth probe", "ciuic_runtime.devices._probe", "memory bandwidth is measured low, with numpy")


def _compiled(name: str, module: str, cost: str) -> Check:
    try:
        importlib.import_module(module)
    except ImportError as error:
        found = f"compiled, but does not load: {error}" if _importable(module) else "not compiled in this installation"
        return Check(name, "missing", found, cost, REINSTALL)
    return Check(name, "ok", "compiled")


def _compiler() -> Check:
    wanted = os.environ.get("CXX") or next(filter(shutil.which, COMPILERS), COMPILERS[0])
    path = shutil.which(wanted.split()[0]) if wanted.split() else None
    if path is None:
        cost = "native kernels cannot be built here; what is built already works"
        return Check("C++ compiler", "missing", f"no {wanted}", cost, "install g++ or clang++")
    return Check("C++ compiler", "ok", path)


def _nvidia_driver() -> Check:
    state = driver_state()
    if not state.startswith("driver"):
        return Check("NVIDIA driver", "missing", state, "no GPUs are found", "with a GPU: install NVIDIA's driver")
    gpus = list_gpus()
    lost = [g for g in gpus if g.lost]
    found = f"{state}, {len(gpus)} GPU{'' if len(gpus) == 1 else 's'}"
    if lost:
        return Check("NVIDIA driver", "limited", found, f"{len(lost)} GPUs cannot be used", lost[0].lost)
    return Check("NVIDIA driver", "ok", found)


def _torch_cuda() -> Check:
    torch = _imported("torch")
    cost = "models run on the CPU only"
    if torch is None:
        return Check("CUDA in torch", "missing", "no torch", cost, "pip install torch")
    if torch.version.cuda is None:
        return Check(
            "CUDA in torch", "missing", "torch was built without CUDA", cost, "with a GPU: install torch's CUDA build"
        )
    if not torch.cuda.is_available():
        found = f"built for CUDA {torch.version.cuda}, but no GPU can be used"
        return Check("CUDA in torch", "limited", found, cost, "with a GPU: update its driver")
    return Check("CUDA in torch", "ok", f"CUDA {torch.version.cuda}, {torch.cuda.device_count()} GPUs")


def _package(name: str, cost: str, fix: str) -> Callable[[], Check]:
    def check() -> Check:
        if not _importable(name):
            return Check(name, "missing", _why_absent(name), cost, fix)
        return Check(name, "ok", _version(name))

    return check


def _imported(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _importable(name: str) -> bool:
    """Whether the module is there, without importing it; one blocked by sys.modules[name] = None is not."""
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):  # a parent is missing, or something half-imported stands in its place
        return False


def _is_kept_compiled(package: str) -> bool:
    """Or is not there at all."""
    spec = find_spec(package) if _importable(package) else None
    return spec is None or spec.cached is None or Path(spec.cached).exists()


def _why_absent(name: str) -> str:
    blocked = name in sys.modules and sys.modules[name] is None
    return "import is blocked" if blocked else "not installed"


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "of unknown version"


_CHECKS: tuple[Callable[[], Check], ...] = (
    _python,
    _torch,
    _kernels,
    _probe,
    _compiler,
    _package("safetensors", "checkpoints cannot be read", "pip install safetensors"),
    _package("xxhash", "packed folders can be neither read nor written", "pip install xxhash"),
    _package("tokenizers", "prompts must be given as token ids", "pip install tokenizers"),
    _nvidia_driver,
    _torch_cuda,
    _package("triton", "nothing yet: only GPU kernels, which come later, need it", "pip install 'ciuic_runtime[gpu]'"),
    _package("ray", "clusters: --executor ray, ciuic launch", "pip install 'ciuic_runtime[cluster]'"),
    _package("llguidance", "a server's response_format", "pip install 'ciuic_runtime[guided]'"),
    _package("transformers", "nothing when running models: only tests compare with it", "pip install transformers"),
)
