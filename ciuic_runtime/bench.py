"""Runs a workload some times with random prompts and gives the median run, beside its forecast.
Knows how to repeat and choose; what is printed is in `report.py` and `show.py`."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ciuic_runtime.devices.bandwidth import memory_rate
from ciuic_runtime.devices.limits import spread
from ciuic_runtime.engine.llm import LLM
from ciuic_runtime.engine.request import RequestOutput
from ciuic_runtime.engine.sampling import SamplingParams
from ciuic_runtime.models.checkpoint import Checkpoint, open_checkpoint
from ciuic_runtime.models.config import load_spec
from ciuic_runtime.models.synthetic import SyntheticCheckpoint
from ciuic_runtime.schedulers.comparison import Comparison
from ciuic_runtime.schedulers.graph import Phase
from ciuic_runtime.schedulers.trace import Trace
from ciuic_runtime.schedulers.workload import Workload

LOOKS = 3  # at the memory, before each round


@dataclass(frozen=True)
class Round:
    """One repetition."""

    outputs: tuple[RequestOutput, ...]
    trace: Trace
    comparison: Comparison
    memory_bandwidth: float | None  # bytes/s, of the CPU, measured just before


@dataclass(frozen=True)
class Bench:
    """All repetitions of one workload."""

    workload: Workload
    rounds: tuple[Round, ...]

    @property
    def median(self) -> Round:
        """The repetition with the median decode rate (of one new token: prefill rate)."""
        return sorted(self.rounds, key=_rate)[len(self.rounds) // 2]

    def tokens_per_s(self, phase: Phase) -> float | None:
        """The median of all repetitions."""
        rates = [rate for one in self.rounds if (rate := one.trace.tokens_per_s(phase))]
        return statistics.median(rates) if rates else None

    @property
    def spread(self) -> float:
        """Relative interquartile range of the rates."""
        return spread([_rate(one) for one in self.rounds])

    @property
    def drift(self) -> float | None:
        """How far the memory's bandwidth moved between the repetitions: largest over smallest, less one."""
        rates = [one.memory_bandwidth for one in self.rounds if one.memory_bandwidth]
        return max(rates) / min(rates) - 1 if rates else None


def _rate(one: Round) -> float:
    return one.trace.tokens_per_s("decode") or one.trace.tokens_per_s("prefill") or 0.0


def bench(
    llm: LLM, work: Workload, rounds: int = 3, seed: int = 0, progress: Callable[[str], None] | None = None
) -> Bench:
    """Each round has prompts of its own, so that nothing is found in memory that a user would not find. Where pages are
    read from disk, a first round that does not count fills the memory: forecasts are of what comes then."""
    say, vocab = progress or (lambda what: None), llm.model.spec.vocab_size
    source, done = random.Random(seed), []
    params = SamplingParams(max_tokens=work.max_tokens, temperature=0.0, ignore_eos=True)
    first = 0 if llm.schedule.paging is None else -1
    for number in range(first, rounds):
        say(f"round {number + 1} of {rounds}" if number >= 0 else "a first round that does not count")
        bandwidth = _memory_bandwidth(llm)
        prompts = [[source.randrange(vocab) for _ in range(work.prompt_tokens)] for _ in range(work.batch)]
        outputs = llm.generate(prompts, params)
        if number >= 0:
            done.append(Round(tuple(outputs), llm.trace, llm.comparison, bandwidth))
    return Bench(work, tuple(done))


def weights_for(model: str) -> Checkpoint:
    """The model's checkpoint; for a config.json or a known name, random weights of its shapes."""
    if Path(model).is_dir() or Path(model).suffix == ".gguf":
        return open_checkpoint(model)
    return SyntheticCheckpoint(load_spec(model))


def _memory_bandwidth(llm: LLM) -> float | None:
    """Of the CPU in use with its threads; None where there is none."""
    used = [llm.schedule.topology.device(name) for name in llm.schedule.devices_used()]
    cpu = next((d for d in used if d.kind == "CPU" and d.basis == "measured"), None)
    looks = [memory_rate(cpu, llm.threads) for _ in range(LOOKS)] if cpu else []
    rates = [rate for rate in looks if rate]
    return statistics.median(rates) if rates else None
