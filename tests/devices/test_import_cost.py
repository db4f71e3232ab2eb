"""Looking at the hardware loads nothing heavy: torch comes with an opened backend, ray never."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("torch", "ray", "pynvml", "transformers", "triton", "numpy")


def loaded_after(program: str) -> set[str]:
    program += f"\nimport sys; print(','.join(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(filter(None, done.stdout.strip().split(",")))


def test_importing_the_layer_loads_nothing_heavy() -> None:
    assert loaded_after("import ciuic_runtime.devices") == set()


def test_only_opening_a_backend_loads_torch() -> None:
    find = "from ciuic_runtime.devices import *; m = DeviceManager(measure='never'); c = m.get_devices('CPU')[0]"
    assert loaded_after(find) <= {"pynvml"}
    assert "torch" in loaded_after(f"{find}; open_backend(c)")
