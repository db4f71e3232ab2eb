"""The command `ciuic`: what people type, turned into calls of the public API.
Knows options, exit codes and streams; what it prints is in `show.py`. A module for commands that belong together: what
they need besides is imported when they are called, so that `ciuic --help` does not wait for torch."""

from ciuic_runtime.cli import dashboard, generating, inspecting, jobs, measuring, packing, planning, serving  # noqa: F401
from ciuic_runtime.cli.app import main

__all__ = ["main"]
