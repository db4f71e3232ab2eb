"""Decode of one sequence in bf16 beside Hugging Face transformers, same weights, same number of threads.

    python benchmarks/transformers_bf16.py MODEL [--layers 27] [--rounds 5] [--out FILE]

MODEL is a bf16 folder with a part of the layers (`make_model.py bf16`): all of them would not fit into this memory
twice. What `--layers` would take is extrapolated from runs with all and with half of the layers that there are."""

from __future__ import annotations

import time
from typing import Any

import torch
from cases import Bench, circumstances, line, model_arguments, sample_of
from rounds import Sample
from transformers import AutoModelForCausalLM
from transformers.utils import logging as hf_logging
from wall import decode_wall

NEW = 17


class Transformers:
    def __init__(self, path: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()

    @torch.inference_mode()
    def decode(self, prompt: list[int], layers: int) -> Sample:
        self.model.config.num_hidden_layers = layers
        out = self.model(torch.tensor([prompt]), use_cache=True)
        begin = time.perf_counter()
        for _ in range(NEW - 1):
            out = self.model(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
        return Sample((NEW - 1) / (time.perf_counter() - begin))


def main() -> None:
    parser = model_arguments(__doc__, rounds=5)
    parser.add_argument("--layers", type=int, default=27)
    args = parser.parse_args()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    bench = Bench("Decode in bf16 beside transformers", args, max_model_len=128, max_num_seqs=1)
    theirs, there = Transformers(str(args.model), args.threads), bench.spec.num_layers
    half, [prompt] = there // 2, bench.ours.prompts(1, 1)
    theirs.decode(prompt, there)
    bench.peer = None
    found = bench.take_turns(
        {
            "ciuic": lambda: sample_of(bench.ours.run([prompt], NEW), "decode", 1),
            "transformers": lambda: theirs.decode(prompt, there),
            "half": lambda: theirs.decode(prompt, half),
        },
        {},
    )
    wall = decode_wall(bench.spec, bench.format, context=NEW / 2)
    name = f"decode {bench.format}, {there} layers"
    bench.report.line(line(name, found, wall, 1, rival="transformers"))
    per_layer = (1 / found.median("transformers") - 1 / found.median("half")) / (there - half)
    whole = 1 / found.median("transformers") + per_layer * (args.layers - there)
    bench.report.line(
        f"transformers: {found.median('half'):.2f} tok/s with {half} layers, {found.median('transformers'):.2f} with "
        f"{there}; extrapolated to {args.layers}: {1 / whole:.2f} tok/s"
    )
    bench.report.line(circumstances(found))
    bench.close()


if __name__ == "__main__":
    main()
