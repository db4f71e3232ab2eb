"""What a run amounted to, as the JSON object that `ciuic run --json` prints.
Knows where each figure comes from; how it is shown to people is `show.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ciuic_runtime.bench import Bench
from ciuic_runtime.engine.llm import LLM
from ciuic_runtime.engine.request import RequestOutput
from ciuic_runtime.schedulers.comparison import Comparison
from ciuic_runtime.schedulers.graph import PHASES
from ciuic_runtime.schedulers.trace import Trace


def run_report(
    llm: LLM, outputs: Sequence[RequestOutput], comparison: Comparison, trace: Trace | None = None
) -> dict[str, Any]:
    """Of one prompt, or of a batch: then the top-level fields are the first prompt's and `outputs` has them all.
    `trace`: None is the last run's."""
    trace = trace or llm.trace
    rows = [_output(o) for o in outputs]
    return {
        "schema_version": 1,
        **rows[0],
        "outputs": rows,
        "load_s": llm.load_s,
        "prefill_s": trace.seconds("prefill"),
        "decode_s": trace.seconds("decode"),
        "prefill_tokens_per_s": trace.tokens_per_s("prefill"),
        "decode_tokens_per_s": trace.tokens_per_s("decode"),
        "peak_memory_bytes": llm.peak_memory_bytes(),
        "threads": llm.threads,
        "kernels": llm.kernels,
        "schedule": llm.schedule.to_dict(),
        "paging": llm.paging.to_dict() if llm.paging else None,
        "actual_against_forecast": comparison.to_dict(),
        "notes": list(trace.notes),
    }


def bench_report(llm: LLM, found: Bench) -> dict[str, Any]:
    """The median repetition as a run's report, without its text; rates are medians of all, which are there too."""
    one = found.median
    report = run_report(llm, one.outputs, one.comparison, one.trace)
    for key in ("text", "token_ids", "prompt_token_ids", "outputs", "finish_reason", "seed"):
        del report[key]
    rounds = [
        {
            "prefill_tokens_per_s": r.trace.tokens_per_s("prefill"),
            "decode_tokens_per_s": r.trace.tokens_per_s("decode"),
            "memory_bandwidth": r.memory_bandwidth,
        }
        for r in found.rounds
    ]
    medians = {f"{phase}_tokens_per_s": found.tokens_per_s(phase) for phase in PHASES}
    return {**report, **medians, "rounds": rounds, "spread": found.spread, "drift": found.drift}


def _output(o: RequestOutput) -> dict[str, Any]:
    return {
        "text": o.text,
        "token_ids": list(o.token_ids),
        "prompt_token_ids": list(o.prompt_token_ids),
        "finish_reason": o.finish_reason,
        "seed": o.seed,
        "first_token_s": o.first_token_s,
    }
