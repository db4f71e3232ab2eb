"""What has to be computed: tasks, the pages they read, and how much work each is for a given step.
Knows no device and no clock; a model's graph is built by `ciuic_runtime.models.graph`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from ciuic_runtime.devices.errors import InvalidInput

Phase = Literal["prefill", "decode"]
TaskKind = Literal["embedding", "norm", "attention", "mlp", "router", "experts", "shared_experts", "head", "other"]


@dataclass(frozen=True, slots=True)
class Page:
    """The unit that moves between tiers: bytes that are used together, under one name everywhere."""

    name: str  # layers.14.experts.27
    nbytes: int


@dataclass(frozen=True, slots=True)
class Step:
    """The size of one pass over the graph: what a batch looks like to the cost model."""

    phase: Phase
    tokens: int  # new tokens in the pass, all sequences together
    sequences: int
    pairs: float  # (new token, attended position) pairs
    positions: float  # cached positions read, all sequences together

    @staticmethod
    def prefill(prompt_tokens: int, batch: int = 1, start: int = 0) -> Step:
        """`batch` prompts (or chunks of them that begin at position `start`), causally attended."""
        pairs = batch * (prompt_tokens * start + prompt_tokens * (prompt_tokens + 1) / 2)
        return Step("prefill", batch * prompt_tokens, batch, pairs, batch * (start + prompt_tokens))

    @staticmethod
    def decode(context: float, batch: int = 1) -> Step:
        """One new token for each of `batch` sequences, each attending `context` positions (itself included)."""
        return Step("decode", batch, batch, batch * context, batch * context)


@dataclass(frozen=True, slots=True)
class Work:
    """What a task does in one phase, as coefficients of the step."""

    flops_per_token: float = 0.0
    flops_per_pair: float = 0.0  # attention scores and weighted values
    flops_per_position: float = 0.0  # latents expanded to keys and values
    bytes_fixed: float = 0.0  # weights read once however many tokens there are
    bytes_per_token: float = 0.0  # activations, embedding rows
    bytes_per_position: float = 0.0  # cache entries read
    bytes_per_expert: float = 0.0  # weights of one routed expert, read if any token picks it
    launches: int = 1  # operator calls, each with the device's launch overhead
    launches_per_expert: int = 0
    launches_per_sequence: int = 0
    per_sequence: bool = False  # computed for the last token of each sequence only (the head)


@dataclass(frozen=True, slots=True)
class Task:
    """A unit of compute that can be placed. The routed experts of a layer are one task with many pages."""

    name: str  # layers.3.attention
    kind: TaskKind
    layer: int | None
    pages: tuple[Page, ...]
    prefill: Work
    decode: Work
    after: tuple[str, ...] = ()  # the tasks whose output it reads
    output_bytes_per_token: float = 0.0  # what it hands on
    num_experts: int = 0
    experts_per_token: int = 0
    popularity: tuple[float, ...] = ()  # expected picks per token of each expert, summing to experts_per_token
    kv_bytes_per_token: float = 0.0  # grows the cache on the device that computes it

    @property
    def nbytes(self) -> int:
        return sum(p.nbytes for p in self.pages)

    def work(self, phase: Phase) -> Work:
        return self.prefill if phase == "prefill" else self.decode

    def expected_experts(self, tokens: int) -> float:
        """Distinct routed experts that `tokens` tokens touch, were each to pick independently by popularity."""
        if not self.num_experts:
            return 0.0
        if self.popularity:
            return sum(1.0 - (1.0 - min(p, 1.0)) ** tokens for p in self.popularity)
        return self.num_experts * (1.0 - (1.0 - self.experts_per_token / self.num_experts) ** tokens)


@dataclass(frozen=True)
class Layer:
    """Tasks that belong together (`model.layers[3]`); what `TaskScheduler.add_task` takes as one."""

    name: str  # layers.3
    tasks: tuple[Task, ...]
    graph: TaskGraph = field(repr=False, compare=False)

    @property
    def weights(self) -> tuple[Page, ...]:
        return tuple(page for task in self.tasks for page in task.pages)

    @property
    def nbytes(self) -> int:
        return sum(task.nbytes for task in self.tasks)


@dataclass(frozen=True)
class TaskGraph:
    """Tasks in an order in which they can run. Names are unique and dependencies point backwards (so: no cycles)."""

    name: str
    tasks: tuple[Task, ...]
    format: str = ""  # what weights are held in: bfloat16
    parameters: int = 0
    active_parameters: int = 0
    hidden_bytes_per_token: float = 0.0  # of the residual stream
    max_positions: int = 0
    working_bytes_per_token: float = 0.0  # temporaries of one token in a prefill chunk
    working_bytes_per_pair: float = 0.0  # of one (token, attended position) pair in a chunk
    working_bytes_per_sequence: float = 0.0  # logits
    prefill_chunk: int = 512  # tokens that one pass takes at most

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for task in self.tasks:
            if task.name in seen:
                raise InvalidInput(f"task {task.name} occurs twice in graph {self.name}")
            if missing := [name for name in task.after if name not in seen]:
                raise InvalidInput(
                    f"task {task.name} depends on {missing[0]}, which does not come before it; "
                    "list tasks in an order in which they can run (a cycle has none)"
                )
            seen.add(task.name)

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)

    def __hash__(self) -> int:
        return id(self)

    @cached_property
    def by_name(self) -> dict[str, Task]:
        return {task.name: task for task in self.tasks}

    def task(self, name: str) -> Task:
        if name not in self.by_name:
            raise InvalidInput(
                f"no task named {name} in {self.name}; tasks are like {self.tasks[0].name}, {self.tasks[-1].name}"
            )
        return self.by_name[name]

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        numbers = sorted({t.layer for t in self.tasks if t.layer is not None})
        return tuple(Layer(f"layers.{n}", tuple(t for t in self.tasks if t.layer == n), self) for n in numbers)

    @cached_property
    def pages(self) -> dict[str, Page]:
        """Every page once, though tied embeddings are read by two tasks."""
        return {page.name: page for task in self.tasks for page in task.pages}

    @property
    def nbytes(self) -> int:
        return sum(page.nbytes for page in self.pages.values())

    def working_bytes(self, batch: int, prompt_tokens: int, context: int) -> float:
        """Temporaries of the largest pass: a prefill chunk at the end of the context, and every sequence's logits."""
        tokens = min(batch * prompt_tokens, self.prefill_chunk)
        pairs = tokens * min(context, self.max_positions or context)
        return (
            self.working_bytes_per_token * tokens
            + self.working_bytes_per_pair * pairs
            + self.working_bytes_per_sequence * batch
        )

    @property
    def kv_bytes_per_token(self) -> float:
        return sum(task.kv_bytes_per_token for task in self.tasks)


def task_kind(name: str) -> str:
    """layers.3.attention -> attention; all norms are one kind."""
    last = name.rsplit(".", 1)[-1]
    return "norm" if last.endswith("_norm") else last
