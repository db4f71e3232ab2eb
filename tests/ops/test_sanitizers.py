"""The kernels under the compilers' sanitizers: a read beside a buffer, an undefined shift, a race of two threads.
Memory and undefined behaviour are watched while the kernel tests run, races in a program without Python."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_cases import native_only

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CSRC = ROOT / "ciuic_runtime" / "csrc"
REPORT = re.compile(r"ERROR: AddressSanitizer|runtime error:|WARNING: ThreadSanitizer")
COMPILER = next((found for name in ("g++", "c++") if (found := shutil.which(name))), None)

pytestmark = [
    pytest.mark.slow,
    native_only,
    pytest.mark.skipif(COMPILER is None or sys.platform != "linux", reason="needs a C++ compiler on Linux"),
]


def run(command: list[str], timeout: int, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, timeout=timeout, capture_output=True, text=True
    )


def must(command: list[str], timeout: int, **environment: str) -> str:
    done = run(command, timeout, **environment)
    assert done.returncode == 0, f"{command[0]} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled module with address and undefined-behaviour checks."""
    cmake = shutil.which("cmake")
    if cmake is None or importlib.util.find_spec("nanobind") is None:
        pytest.skip("needs cmake and nanobind beside the compiler: pip install cmake nanobind")
    folder = tmp_path_factory.mktemp("sanitized")
    binding = must([sys.executable, "-m", "nanobind", "--cmake_dir"], 60).strip()
    flags = "-fsanitize=address,undefined -fno-omit-frame-pointer -g1"
    python = [f"-DPython_EXECUTABLE={sys.executable}", f"-Dnanobind_DIR={binding}"]
    compiler = [f"-DCMAKE_CXX_COMPILER={COMPILER}", f"-DCMAKE_CXX_FLAGS={flags}", "-DCMAKE_BUILD_TYPE=RelWithDebInfo"]
    must([cmake, "-S", str(ROOT), "-B", str(folder), *python, *compiler], 120)
    must([cmake, "--build", str(folder), "--target", "_kernels", "-j", str(os.cpu_count() or 1)], 1800)
    return next(folder.glob("_kernels*.so"))


def runtime_libraries() -> str:
    """To be loaded first; without libstdc++ the first C++ exception ends the process."""
    names = ("libasan.so", "libstdc++.so")
    return " ".join(must([str(COMPILER), f"-print-file-name={name}"], 60).strip() for name in names)


@pytest.mark.parametrize("file", ["linear", "moe", "attention", "thread_pool"])
def test_kernels_under_address_and_undefined_behaviour_sanitizers(file: str, sanitized: Path) -> None:
    name = f"test_{file}.py" if file == "thread_pool" else f"test_{file}_kernels.py"
    environment = {
        "CIUIC_TEST_KERNELS": str(sanitized), "LD_PRELOAD": runtime_libraries(), "HYPOTHESIS_PROFILE": "gate",
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=99",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1:exitcode=99",
    }  # fmt: skip
    pytest_on = [sys.executable, "-m", "pytest", "-x", "-s", "-v", "-p", "no:cacheprovider"]
    command = [*pytest_on, str(HERE / name), "-k", "not after_a_fork"]  # that has a process of its own
    done = run(command, 1500, **environment)
    told = done.stdout + done.stderr
    assert not REPORT.search(told), told[-6000:]
    assert done.returncode == 0, told[-6000:]
    assert f"kernels under test: {sanitized}" in told
    assert re.search(r"\d+ passed", told)


@pytest.fixture(scope="module")
def stress(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("races") / "stress"
    sources = [HERE / "thread_pool_stress.cpp", CSRC / "thread_pool.cpp", CSRC / "arena.cpp", CSRC / "kernels_isa.cpp"]
    flags = ["-std=c++17", "-O1", "-g1", "-fsanitize=thread", "-pthread", "-DCIUIC_ISA=portable", f"-I{CSRC}"]
    must([str(COMPILER), *flags, *map(str, sources), "-o", str(program)], 600)
    return program


def test_threads_under_the_thread_sanitizer(stress: Path) -> None:
    done = run([str(stress)], 900, TSAN_OPTIONS="halt_on_error=1:exitcode=66")
    assert not REPORT.search(done.stderr), done.stderr[-6000:]
    assert (done.returncode, done.stdout.strip()) == (0, "done"), done.stderr[-6000:]


def test_the_thread_sanitizer_sees_a_race(tmp_path: Path) -> None:
    """Else its silence would say nothing."""
    source = tmp_path / "race.cpp"
    source.write_text(
        "#include <thread>\nint n;\nint main() { std::thread t([] { ++n; }); ++n; t.join(); return n == 0; }\n"
    )
    program = tmp_path / "race"
    must([str(COMPILER), "-fsanitize=thread", "-pthread", "-O0", str(source), "-o", str(program)], 120)
    assert "data race" in run([str(program)], 60).stderr


def test_the_address_sanitizer_sees_a_read_beside_a_buffer(sanitized: Path) -> None:
    """The same: a weight that is shorter than its matrix says."""
    script = (
        f"import sys; sys.path.insert(0, {str(HERE)!r}); import conftest, torch; from kernel_cases import *\n"
        "w, x, out = torch.zeros(100), torch.zeros(1, 50), torch.zeros(1, 50)\n"
        "m = native.Matrix('f32-rows', 1, 50, 50, w.data_ptr())\n"
        "operators('portable').linear(m, 0, x.data_ptr(), 1, 0, out.data_ptr())\n"
    )
    done = run(
        [sys.executable, "-c", script], 300, CIUIC_TEST_KERNELS=str(sanitized), LD_PRELOAD=runtime_libraries(),
        ASAN_OPTIONS="detect_leaks=0",
    )  # fmt: skip
    assert "heap-buffer-overflow" in done.stderr
