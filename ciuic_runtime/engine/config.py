"""The settings of a run, resolved once: every "auto" becomes a value that fits, and it is said which and why.
Knows no weights; whether things fit is asked of the schedule."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from ciuic_runtime.devices.errors import InvalidInput, OutOfMemory
from ciuic_runtime.models.spec import ModelSpec
from ciuic_runtime.schedulers.schedule import Schedule
from ciuic_runtime.schedulers.workload import Workload

log = logging.getLogger("ciuic")

DEFAULT_CONTEXT = 4096
DEFAULT_BATCH = 8
SMALLEST_CONTEXT = 64


@dataclass(frozen=True, slots=True)
class RuntimeConfig:
    """What the user may set; None is "auto"."""

    max_model_len: int | None = None  # positions per sequence: prompt and output
    max_num_seqs: int | None = None  # sequences at once


def resolve(
    config: RuntimeConfig, spec: ModelSpec, workload: Workload | None, planner: Callable[[Workload], Schedule]
) -> tuple[int, int, Schedule]:
    """The longest context and largest batch that fit, where the user set none, and the schedule for them.

    `planner` makes (or checks) a schedule for a workload and raises OutOfMemory where it does not fit."""
    if config.max_model_len is not None and config.max_model_len > spec.max_positions:
        raise InvalidInput(
            f"a context of {config.max_model_len} tokens was asked for; {spec.name} allows {spec.max_positions}"
        )
    asked = workload.context if workload else DEFAULT_CONTEXT
    context = config.max_model_len or min(asked, spec.max_positions)
    batch = config.max_num_seqs or (workload.batch if workload else DEFAULT_BATCH)
    wanted = (context, batch)
    while True:
        try:
            schedule = planner(_workload(workload, context, batch))
            break
        except OutOfMemory:
            # The batch gives way first: a shorter context refuses prompts, a smaller batch only takes longer.
            if config.max_num_seqs is None and batch > 1:
                batch //= 2
            elif config.max_model_len is None and workload is None and context > SMALLEST_CONTEXT:
                context = max(SMALLEST_CONTEXT, context // 2)
            else:
                raise
    if (context, batch) != wanted:
        log.warning(
            "reduced to what fits in memory: context %d (asked %d), %d sequences at once (asked %d)",
            context, wanted[0], batch, wanted[1],
        )  # fmt: skip
    return context, batch, schedule


def _workload(workload: Workload | None, context: int, batch: int) -> Workload:
    if workload is not None and workload.context <= context:
        return replace(workload, batch=batch)
    prompt = max(1, context * 3 // 4)
    return Workload(prompt, max(1, context - prompt), batch)
