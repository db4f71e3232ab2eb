"""Runs a checkpoint in a process of its own, so that its memory can be read from outside. Says in JSON lines how far
it is and how many bytes of weights and cache it used, and goes on when it is told to."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from ciuic_runtime.devices.spec import DeviceSpec, Topology
from ciuic_runtime.engine import executor
from ciuic_runtime.engine.llm import LLM
from ciuic_runtime.engine.sampling import SamplingParams


def main(folder: str, dtype: str, prompt_tokens: int, new_tokens: int) -> None:
    rates = {"float32": 2e11, "bfloat16": 2e11}
    cpu = DeviceSpec("cpu", "CPU", memory_bytes=12 << 30, memory_bandwidth=2e10, matrix_rates=rates, cores=2)
    say("imported")
    touched = record_experts()
    with LLM(
        folder, devices=Topology((cpu,)), dtype=dtype, max_model_len=512, max_num_seqs=1, threads=2
    ) as llm:  # fmt: skip
        say("opened")
        prompt = [i * 7 % 250 for i in range(prompt_tokens)]
        llm.generate(prompt, SamplingParams(max_tokens=new_tokens, ignore_eos=True))
        graph = llm.model.graph
        groups = [t for t in graph if t.num_experts]
        unused = sum(page.nbytes for t in groups for e, page in enumerate(t.pages) if (t.name, e) not in touched)
        if not llm.model.spec.tied_embeddings:
            unused += graph.task("embedding").nbytes  # a few rows of it are read
        say("done", weights=graph.nbytes, used=graph.nbytes - unused, cache=graph.kv_bytes_per_token * 512)


def record_experts() -> set[tuple[str, int]]:
    """(task, expert) of every routed expert that is picked from now on."""
    touched: set[tuple[str, int]] = set()
    original = executor._Run.execute

    def execute(self: Any, i: Any) -> None:
        if i.task.num_experts:
            ids: torch.Tensor = self._fetch(i.task.after[1], i.device)[0]
            touched.update((i.task.name, e) for e in ids.unique().tolist())
        original(self, i)

    executor._Run.execute = execute  # type: ignore[method-assign]
    return touched


def say(state: str, **figures: float) -> None:
    """One line, then wait for one: whoever started this reads our memory in between."""
    print(json.dumps({"state": state} | figures), flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
