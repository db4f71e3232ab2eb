"""Whether the compiled kernels are here, said once where they are not.
Knows nothing of what they compute."""

from __future__ import annotations

import logging
import os
from functools import lru_cache
from types import ModuleType

log = logging.getLogger("ciuic")


@lru_cache(maxsize=1)
def kernels() -> ModuleType | None:
    """The compiled module, or None (with one warning) where it was not built or CIUIC_KERNELS=reference forbids it."""
    if os.environ.get("CIUIC_KERNELS") == "reference":
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
