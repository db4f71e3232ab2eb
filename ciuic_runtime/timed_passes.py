"""Passes of a model timed on this machine at the sizes of decoding and of prompts, each between looks at the memory,
which may be by turns half as fast. What the times mean is `calibrate.py`'s business."""

from __future__ import annotations

import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ciuic_runtime.devices.bandwidth import alike, usual_rate
from ciuic_runtime.engine.llm import LLM
from ciuic_runtime.memory.kv_cache import blocks_for
from ciuic_runtime.models.batch import Chunk
from ciuic_runtime.models.spec import ModelSpec
from ciuic_runtime.schedulers.calibration import AROUND, BETWEEN, ENDS
from ciuic_runtime.schedulers.graph import Phase, Step

Progress = Callable[[str], None]

BATCHES = (1, 2, 3, 4, 6, 8, 16, 32, 64)  # sequences that decode at once
PROMPTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)  # tokens of a prompt's chunk
CONTEXTS = (256, 1024, 4096)  # positions attended, for what grows with them
SHORT = 16  # positions attended where that is not to count
CHUNK = 512  # tokens of the prompt chunks that attend long contexts
ROUNDS, LEAST_ROUNDS, SECONDS = 5, 3, 20.0  # as many as fit into the time
LEAST_LONG = 2  # of a prompt's chunks that take most of the time
RUNS, CHEAP = 3, 64  # of passes of no more tokens
MOST_SECONDS = 35.0  # where the memory's speed changes: until enough was timed at the one that it usually has


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass that is timed: sequences as (new tokens, position of the first)."""

    phase: Phase
    sequences: tuple[tuple[int, int], ...]

    @staticmethod
    def decode(batch: int, context: int) -> Pass:
        return Pass("decode", ((1, context - 1),) * batch)

    @staticmethod
    def prompt(tokens: int, start: int = 0) -> Pass:
        return Pass("prefill", ((tokens, start),))

    @property
    def tokens(self) -> int:
        return sum(tokens for tokens, _ in self.sequences)

    @property
    def is_long(self) -> bool:
        return self.tokens >= CHUNK

    @property
    def runs(self) -> int:
        """How often it is timed at once: the cheap ones some times, the middle of which is one repetition."""
        return RUNS if self.tokens <= CHEAP else 1

    @property
    def least(self) -> int:
        """How often it is timed at least."""
        return LEAST_LONG if self.is_long else LEAST_ROUNDS

    @property
    def step(self) -> Step:
        return Step.of(self.phase, [(at, tokens) for tokens, at in self.sequences], len(self.sequences))


@dataclass(frozen=True)
class Repetition:
    """A pass as it was timed, between two looks at the memory."""

    seconds: Mapping[str, float]  # kind of task -> s per task
    own: Mapping[str, float]  # BETWEEN (per task), ENDS, AROUND -> s
    touched: float  # distinct experts per layer
    looks: tuple[float, float] | None = None  # bytes/s before and after; None: the memory cannot be looked at

    @classmethod
    def middle(cls, runs: Sequence[Repetition], looks: tuple[float, float] | None) -> Repetition:
        """Of several runs of the pass."""

        def medians(every: Sequence[Mapping[str, float]]) -> dict[str, float]:
            return {what: statistics.median(one[what] for one in every) for what in every[0]}

        touched = statistics.mean(run.touched for run in runs)
        return cls(medians([r.seconds for r in runs]), medians([r.own for r in runs]), touched, looks)

    def at(self, rate: float | None) -> bool:
        """Whether the memory had this rate before and after."""
        return rate is None or self.looks is None or all(alike(look, rate) for look in self.looks)


@dataclass
class Timed:
    """What the repetitions of one pass took: seconds per task of each operator, and of what is no task's."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # kind of task -> s per task
    own: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # BETWEEN (per task), ENDS, AROUND
    touched: list[float] = field(default_factory=list)  # distinct experts per layer

    def median(self, kind: str) -> float:
        return statistics.median(self.seconds[kind])

    @classmethod
    def of(cls, repetitions: Sequence[Repetition]) -> Timed:
        found = cls(touched=[one.touched for one in repetitions])
        for one in repetitions:
            for kind, seconds in one.seconds.items():
                found.seconds[kind].append(seconds)
            for what, seconds in one.own.items():
                found.own[what].append(seconds)
        return found


def passes_of(spec: ModelSpec, contexts: Sequence[int], longest: int) -> list[Pass]:
    """Those that a model's operators are measured by; `longest`: tokens of a prompt at most."""
    short = min(SHORT, spec.max_positions)
    passes = [Pass.decode(batch, short) for batch in BATCHES]
    passes += [Pass.decode(1, context) for context in contexts]
    passes += [Pass.prompt(tokens) for tokens in PROMPTS if tokens <= longest]
    passes.append(Pass("prefill", ((short, 0),) * (CHUNK // short)))
    passes += [Pass.prompt(CHUNK, context - CHUNK) for context in contexts if context > CHUNK]
    return passes


def time_passes(
    llm: LLM, passes: Sequence[Pass], seed: int, say: Progress, look: Callable[[], float | None]
) -> tuple[dict[Pass, Timed], float | None]:
    """Every pass in turn, several rounds of all: a bad moment of the machine spoils one repetition of each. Those count
    that were timed while the memory was as fast as it usually is: that rate, and they."""
    timed: dict[Pass, list[Repetition]] = {one: [] for one in passes}
    generator = torch.Generator().manual_seed(seed)
    begin, before, usual, wanted = time.perf_counter(), look(), None, list(passes)
    while wanted:
        say(f"round {max(map(len, timed.values())) + 1}: {len(wanted)} of {len(passes)} passes")
        for one in wanted:
            runs = [_run(llm, one, generator) for _ in range(one.runs + (not one.is_long))]
            after = look()
            # The first one, of passes that are not long, brings caches and buffers into shape.
            timed[one].append(Repetition.middle(runs[-one.runs :], (before, after) if before and after else None))
            before = after
        every = [look for found in timed.values() for one in found if one.looks for look in one.looks]
        usual = usual_rate(every) if every else None
        wanted = wanted_again(timed, usual, time.perf_counter() - begin)
    return {one: Timed.of([r for r in found if r.at(usual)] or found) for one, found in timed.items()}, usual


def wanted_again(timed: Mapping[Pass, Sequence[Repetition]], usual: float | None, seconds: float) -> list[Pass]:
    """What is timed once more: everything as long as there is time, then what was rarely timed at the usual rate."""
    rounds = max(map(len, timed.values()))
    if rounds < ROUNDS and seconds * (rounds + 1) / rounds < SECONDS:
        return list(timed)
    if (lacking := [one for one, found in timed.items() if len(found) < one.least]) or seconds > MOST_SECONDS:
        return lacking
    return [one for one, found in timed.items() if sum(r.at(usual) for r in found) < one.least]


def _chunks(llm: LLM, one: Pass, generator: torch.Generator) -> list[Chunk]:
    vocab, blocks, taken = llm.model.spec.vocab_size, blocks_for(llm.context) * llm.max_num_seqs, 0
    chunks = []
    for tokens, at in one.sequences:
        need = blocks_for(tokens + at)
        table = tuple((taken + i) % blocks for i in range(need))
        taken += need
        ids = torch.randint(vocab, (tokens,), generator=generator).tolist()
        chunks.append(Chunk(ids, at, table, prompt=one.phase == "prefill"))
    return chunks


def _run(llm: LLM, one: Pass, generator: torch.Generator) -> Repetition:
    """A pass, and what was recorded of it."""
    whole = llm.run_pass(_chunks(llm, one, generator), one.phase)
    trace = llm.trace
    tasks: Counter[str] = Counter(task.kind for task in llm.model.graph)
    step = trace.steps[-1]
    by_kind = trace.seconds_by_kind(step.phase).items()
    first, last = min(e.start for e in trace.events), max(e.end for e in trace.events)
    between = last - first - sum(e.seconds for e in trace.events)
    assert step.step is not None
    return Repetition(
        {kind: seconds / tasks[kind] for kind, seconds in by_kind if kind in tasks},
        {
            BETWEEN: max(0.0, between) / len(llm.model.graph.tasks),
            ENDS: first - step.start + step.end - last,
            AROUND: whole - (step.end - step.start),
        },
        step.step.touched or 0.0,
    )
