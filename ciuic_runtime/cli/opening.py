"""A model opened for a command: loaded with a progress bar, said in a line, closed at the end."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ciuic_runtime.cli.arguments import budgets_of, cluster_hardware, hardware, placement_of

if TYPE_CHECKING:
    from ciuic_runtime.devices.manager import DeviceManager
    from ciuic_runtime.engine.llm import LLM
    from ciuic_runtime.models.checkpoint import Checkpoint


@contextmanager
def opened(
    model: str | Checkpoint, *, schedule: Path | None, placement: Path | None, memory: str | None, devices: Path | None,
    context: int | None, **options: Any,
) -> Iterator[LLM]:  # fmt: skip
    """The model, loaded with a progress bar on the terminal; a line says what was planned."""
    import ciuic_runtime as ciuic
    from ciuic_runtime.show import plan_line, progress_bar

    saved = ciuic.Schedule.from_json(schedule) if schedule else None
    hw: DeviceManager | None = None
    if options.get("address") and not devices:
        hw = cluster_hardware(options["address"], options["insecure"])
    elif devices or not saved:
        hw = hardware(devices)
    with progress_bar("loading") as progress:
        llm = ciuic.LLM(
            model, schedule=saved, placement=placement_of(placement), memory=budgets_of(memory), devices=hw,
            max_model_len=context, progress=progress, **options,
        )  # fmt: skip
    with llm:
        print(f"ciuic: {plan_line(llm.schedule)}", file=sys.stderr)
        yield llm
