"""The portable kernels on another processor: aarch64, emulated, gives the bits that x86-64 gives."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "ciuic_runtime" / "csrc"
CROSS, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
@pytest.mark.skipif(
    not (shutil.which(CROSS) and shutil.which(EMULATOR)), reason="Debian's g++-aarch64-linux-gnu and qemu-user-static"
)
def test_aarch64_gives_the_same_bits(tmp_path: Path) -> None:
    def output(compiler: str, *runner: str) -> str:
        program = tmp_path / compiler
        sources = [HERE / "portable_bits.cpp", CSRC / "thread_pool.cpp", CSRC / "arena.cpp"]
        # As CMakeLists.txt compiles them.
        flags = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-static", "-pthread", f"-I{CSRC}"]
        subprocess.run([compiler, *flags, *map(str, sources), "-o", str(program)], check=True)
        return subprocess.run([*runner, str(program)], check=True, capture_output=True, text=True, timeout=300).stdout

    here = output("g++")
    assert len(here.splitlines()) == 4 * 5 * 3 + 16
    assert output(CROSS, EMULATOR) == here
