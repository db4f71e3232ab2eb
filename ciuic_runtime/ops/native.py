"""The compiled kernels: whether they are here, which instruction set was chosen and why, and the threads they run on.
Knows nothing of what they compute."""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any

from ciuic_runtime.devices.errors import InvalidInput

log = logging.getLogger("ciuic")
REFERENCE = "reference"  # the torch operators


@lru_cache(maxsize=1)
def kernels() -> ModuleType | None:
    """The compiled module, or None (with one warning) where it was not built or CIUIC_KERNELS=reference forbids it."""
    if os.environ.get("CIUIC_KERNELS") == REFERENCE:
        log.warning("running with the torch reference operators only (CIUIC_KERNELS=reference)")
        return None
    try:
        import ciuic_runtime.ops._kernels as found
    except ImportError:
        log.warning(
            "running without native kernels: they were not built (no C++ compiler at install time); "
            "results are the same, some operators are slower"
        )
        return None
    return found


def instruction_set(wanted: str = "auto") -> str:
    """The instruction set that kernels are taken from, or "reference"; `wanted` forces one.

    "auto" is CIUIC_KERNELS if set, else the best that this processor has. Raises InvalidInput for what is not here."""
    if wanted == "auto":
        wanted = os.environ.get("CIUIC_KERNELS") or "auto"
    module = None if wanted == REFERENCE else kernels()
    usable: list[str] = [] if module is None else module.instruction_sets()
    if wanted == "auto":
        return usable[0] if usable else REFERENCE
    if wanted != REFERENCE and wanted not in usable:
        here = ", ".join([*usable, REFERENCE])
        raise InvalidInput(f"kernels {wanted!r} were asked for; this installation and processor have {here}")
    return wanted


@lru_cache(maxsize=16)
def thread_pool(threads: int, cpus: tuple[int, ...]) -> Any:
    """The persistent pool of that many threads on those processors; one for each such choice in a process."""
    module = kernels()
    assert module is not None, "a pool is asked for where there are kernels"
    return module.ThreadPool(threads, list(cpus))


atexit.register(thread_pool.cache_clear)  # while the compiled module is still whole


def operators(chosen: str, threads: int, cpus: Sequence[int] = ()) -> Any:
    """The kernels of an instruction set, on that many threads bound to `cpus` (none given: those allowed)."""
    module = kernels()
    assert module is not None, "operators are asked for where there are kernels"
    allowed = tuple(cpus) or _allowed_cpus()
    return module.Operators(chosen, thread_pool(threads, allowed))


def _allowed_cpus() -> tuple[int, ...]:
    return tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else ()
