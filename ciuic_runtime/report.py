"""What a run amounted to, as the JSON object that `ciuic run --json` prints.
Knows where each figure comes from; how it is shown to people is `show.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ciuic_runtime.engine.llm import LLM
from ciuic_runtime.engine.request import RequestOutput


def run_report(llm: LLM, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    """Of one prompt, or of a batch: then the top-level fields are the first prompt's and `outputs` has them all."""
    trace = llm.trace
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
        "actual_against_forecast": llm.comparison.to_dict(),
        "notes": list(trace.notes),
    }


def _output(o: RequestOutput) -> dict[str, Any]:
    return {
        "text": o.text,
        "token_ids": list(o.token_ids),
        "prompt_token_ids": list(o.prompt_token_ids),
        "finish_reason": o.finish_reason,
        "seed": o.seed,
        "first_token_s": o.first_token_s,
    }
