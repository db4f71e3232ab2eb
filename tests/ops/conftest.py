"""The kernel tests can be pointed at another build of the kernels, as the sanitizers' tests do: CIUIC_TEST_KERNELS is
the path of the compiled module."""

from __future__ import annotations

import importlib.util
import os
import sys

NAME = "ciuic_runtime.ops._kernels"

if path := os.environ.get("CIUIC_TEST_KERNELS"):
    import ciuic_runtime.ops

    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[NAME] = module
    ciuic_runtime.ops._kernels = module


def pytest_report_header() -> str | None:
    return f"kernels under test: {path}" if path else None
