"""The line that names the machine, above every benchmark's results."""

from __future__ import annotations

import torch

from ciuic_runtime.devices.manager import DeviceManager
from ciuic_runtime.devices.units import format_bytes, format_rate


def machine_line() -> str:
    cpu = DeviceManager(measure="cached").get_devices("CPU")[0]
    reads = format_rate(cpu.memory_bandwidth or 0, "B/s")
    isa = " ".join(i for i in cpu.isa if i in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "neon"))
    return (
        f"{cpu.model}, {cpu.cores} cores ({isa}), {format_bytes(cpu.memory_bytes)}, reads {reads} with {cpu.threads} "
        f"threads; torch {torch.__version__}"
    )
