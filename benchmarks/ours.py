"""Our runtime in a process of its own, so that its memory and processor time are read from outside and it sleeps while
a rival runs. `Ours` is the parent's end; run as a program, this file is the child's.

The child reads one JSON request per line (prompts as token ids, how many new tokens) and answers with its steps."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from limited import MemoryLimit
from process import Memory, memory_of


@dataclass(frozen=True, slots=True)
class Step:
    phase: str  # prefill, decode
    tokens: int
    sequences: int
    start: float  # s
    end: float


@dataclass(frozen=True)
class Run:
    steps: tuple[Step, ...]
    token_ids: tuple[tuple[int, ...], ...]  # new ones of each prompt
    first_token_s: float  # of the first prompt
    paging: dict[str, dict[str, Any]]  # phase -> what was read and waited for; empty where everything is in memory
    seconds_by_kind: dict[str, dict[str, float]]  # phase -> kind of task -> s

    def rate(self, phase: str, sequences: int) -> float:
        """Tokens/s from the first such step's start to the last one's end, what lies between steps included."""
        steps = [s for s in self.steps if s.phase == phase and s.sequences == sequences]
        assert steps, f"no {phase} step with {sequences} sequences among {len(self.steps)}"
        return sum(s.tokens for s in steps) / (steps[-1].end - steps[0].start)

    def distinct_tokens(self) -> float:
        """New tokens that differ from all others, as a share: 1 unless sequences repeat themselves or each other."""
        every = [t for ids in self.token_ids for t in ids]
        return len(set(every)) / len(every)


class Ours:
    def __init__(self, model: str | Path, limit: MemoryLimit | None = None, **settings: Any) -> None:
        """`settings` are those of `LLM`; `limit` is enforced by the system."""
        command = [sys.executable, __file__, str(model), json.dumps(settings)]
        command = limit.command(command) if limit else command
        self.begin = time.monotonic()
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.ready = self._answer()  # vocab_size, load_s

    @property
    def pid(self) -> int:
        return self._child.pid

    def memory(self) -> Memory:
        return memory_of(self.pid)

    def run(self, prompts: list[list[int]], new: int, temperature: float = 0.0) -> Run:
        assert self._child.stdin is not None
        request = {"prompts": prompts, "new": new, "temperature": temperature}
        print(json.dumps(request), file=self._child.stdin, flush=True)
        answer = self._answer()
        steps = tuple(Step(*s) for s in answer["steps"])
        return Run(
            steps, tuple(map(tuple, answer["token_ids"])), answer["first_token_s"], answer["paging"] or {},
            answer["seconds_by_kind"],
        )  # fmt: skip

    def prompts(self, count: int, tokens: int, seed: int = 0) -> list[list[int]]:
        """Random token ids."""
        draw = random.Random(seed)
        return [[draw.randrange(self.ready["vocab_size"]) for _ in range(tokens)] for _ in range(count)]

    def close(self) -> None:
        if self._child.stdin is not None:
            self._child.stdin.close()
        self._child.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise SystemExit(f"our process ended with code {self._child.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found

    def __enter__(self) -> Ours:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _serve(model: str, settings: dict[str, Any]) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints must not mix with the answers
    import ciuic_runtime as ciuic

    with ciuic.LLM(model, **settings) as llm:
        ready = {
            "vocab_size": llm.model.spec.vocab_size, "load_s": llm.load_s,
            "cache_bytes": llm.schedule.paging.cache_bytes if llm.schedule.paging else 0,
        }  # fmt: skip
        print(json.dumps(ready), file=answers, flush=True)
        for line in sys.stdin:
            request = json.loads(line)
            params = [
                ciuic.SamplingParams(
                    max_tokens=request["new"], temperature=request["temperature"], ignore_eos=True, seed=i
                )
                for i in range(len(request["prompts"]))
            ]
            outputs = llm.generate(request["prompts"], params)
            trace = llm.trace
            answer = {
                "steps": [(s.phase, s.tokens, s.sequences, s.start, s.end) for s in trace.steps],
                "token_ids": [list(o.token_ids) for o in outputs],
                "first_token_s": outputs[0].first_token_s,
                "paging": llm.paging.to_dict() if llm.paging else None,
                "seconds_by_kind": {p: trace.seconds_by_kind(p) for p in ("prefill", "decode")},
            }
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1], json.loads(sys.argv[2]))
