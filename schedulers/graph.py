"""What has to be computed: tasks, the pages they read, and how much work each is for a given step.
Knows no device and no clock; a model's graph is built by `ciuic_runtime.models.graph`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, get_args

from ciuic_runtime.devices.errors import InvalidInput

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = get_args(Phase)
TaskKind = Literal["embedding", "norm", "attention", "mlp", "router", "experts", "shared_experts", "head", "other"]


@dataclass(frozen=True, slots=True)
class Page:
    """The unit that moves between tiers: bytes that are used together, under one name everywhere."""

    name: str  # layers.14.experts.27
    nbytes: int
    row_nbytes: int = 0  # of a table of which a pass needs single rows, which can be read one by one; 0: needed whole


@dataclass(frozen=True, slots=True)
class Step:
    """The size of one pass over the graph: what a batch looks like to the cost model."""

    phase: Phase
    tokens: int  # new tokens in the pass, all sequences together
    sequences: int
    pairs: float  # (new token, attended position) pairs
    positions: float  # cached positions read, all sequences together
    sampled: int  # sequences whose next token is wanted: all in decode, in prefill those whose prompt ends here
    touched: float | None = None  # distinct routed experts per layer, where it is known; None: as many as are expected
    read_bytes: float | None = None  # of pages read from disk during the pass; None: as many as are expected

    @staticmethod
    def of(
        phase: Phase, spans: Sequence[tuple[int, int]], sampled: int, touched: float | None = None,
        read_bytes: float | None = None,
    ) -> Step:  # fmt: skip
        """A pass over `spans` of sequences: (position of the first new token, new tokens), causally attended."""
        pairs = sum(n * at + n * (n + 1) / 2 for at, n in spans)
        tokens, positions = sum(n for _, n in spans), float(sum(at + n for at, n in spans))
        return Step(phase, tokens, len(spans), pairs, positions, sampled, touched, read_bytes)

    @staticmethod
    def prefill(prompt_tokens: int, batch: int = 1, start: int = 0) -> Step:
        """The last `prompt_tokens` of `batch` prompts, from position `start` on, causally attended."""
        pairs = batch * (prompt_tokens * start + prompt_tokens * (prompt_tokens + 1) / 2)
        return Step("prefill", batch * prompt_tokens, batch, pairs, batch * (start + prompt_tokens), batch)

    @staticmethod
    def decode(context: float, batch: int = 1) -> Step:
        """One new token for each of `batch` sequences, each attending `context` positions (itself included)."""
        return Step("decode", batch, batch, batch * context, batch * context, batch)


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
    products: int = 0  # of the calls, matrix products, each with the device's further overhead for one
    products_per_expert: int = 0
    products_per_sequence: int = 0
    per_sequence: bool = False  # computed only for the last token of sequences that are sampled (the head)

    def rows(self, step: Step) -> int:
        """Tokens of the step that the task computes."""
        return step.sampled if self.per_sequence else step.tokens


@dataclass(frozen=True, slots=True)
class Task:
    """A unit of compute that can be placed. The routed experts of a layer are one task with a page for each; it comes
    `after` (input, router, what is added to the result), and its rows are combined where the router runs."""

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

    def __post_init__(self) -> None:
        pages = self.num_experts or 1
        assert len(self.pages) == pages, f"{self.name} has {len(self.pages)} pages, {pages} are needed"
        assert len(self.popularity) in (0, pages), f"{self.name}: {len(self.popularity)} popularities, {pages} experts"

    @property
    def nbytes(self) -> int:
        return sum(p.nbytes for p in self.pages)

    @property
    def rows(self) -> tuple[tuple[str, Page], ...]:
        """(name, page) of what is assigned a device: the task, or each of its routed experts."""
        return tuple((p.name, p) for p in self.pages) if self.num_experts else ((self.name, self.pages[0]),)

    def work(self, phase: Phase) -> Work:
        return self.prefill if phase == "prefill" else self.decode

    def distinct_experts(self, *steps: Step) -> float:
        """Routed experts that a pass of these steps touches: as many as came, else as are expected."""
        if steps[0].touched is not None:
            return min(steps[0].touched, self.num_experts)
        return self.expected_experts(sum(step.tokens for step in steps))

    def expected_experts(self, tokens: int, experts: Sequence[int] | None = None) -> float:
        """Distinct routed experts (of `experts`, else of all) that `tokens` tokens touch, each choosing for itself."""
        if not self.num_experts:
            return 0.0
        if self.popularity:
            picks = self.popularity if experts is None else [self.popularity[e] for e in experts]
            return sum(1.0 - (1.0 - min(p, 1.0)) ** tokens for p in picks)
        count = self.num_experts if experts is None else len(experts)
        return count * (1.0 - (1.0 - self.experts_per_token / self.num_experts) ** tokens)

    def share(self, experts: Sequence[int]) -> float:
        """The share of all picks that these routed experts are expected to get."""
        if self.popularity:
            return sum(self.popularity[e] for e in experts) / sum(self.popularity)
        return len(experts) / self.num_experts


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
    working_bytes_per_position: float = 0.0  # of one attended position: keys and values of one sequence, expanded
    working_bytes_per_pair: float = 0.0  # of one (token, attended position) pair: scores of one sequence
    working_bytes_per_sequence: float = 0.0  # logits
    prefill_chunk: int = 512  # tokens that one pass takes at most
    score_rows: int = 256  # tokens of a sequence whose scores are held at once
    given: tuple[str, ...] = ()  # tasks that are computed elsewhere and whose values come in, of a part of a graph

    def __post_init__(self) -> None:
        if not self.tasks:
            raise InvalidInput(f"graph {self.name} has no tasks; there is nothing to place")
        seen = set(self.given)
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
        return hash((self.name, self.format, len(self.tasks)))  # equal graphs have equal hashes; all tasks are too many

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

    @cached_property
    def rows(self) -> dict[str, Page]:
        """The page of everything that a schedule assigns a device, in the order of the tasks."""
        return {name: page for task in self.tasks for name, page in task.rows}

    @cached_property
    def shared_pages(self) -> frozenset[str]:
        """Names of pages that several rows read: of tied embeddings, the one table."""
        count = Counter(page.name for page in self.rows.values())
        return frozenset(name for name, rows in count.items() if rows > 1)

    @cached_property
    def shapes(self) -> dict[str, int]:
        """By task: tasks of equal numbers do the same work, with pages of the same size."""
        numbers: dict[tuple[object, ...], int] = {}
        return {t.name: numbers.setdefault(_shape(t), len(numbers)) for t in self.tasks}

    @cached_property
    def nbytes(self) -> int:
        return sum(page.nbytes for page in self.pages.values())

    def working_bytes(self, batch: int, prompt_tokens: int, context: int) -> float:
        """Temporaries of the largest pass: a prefill chunk at the end of the context, and every sequence's logits.
        Attention takes one sequence at a time, so its share does not grow with the batch."""
        tokens = max(min(batch * prompt_tokens, self.prefill_chunk), batch)
        positions = min(context, self.max_positions or context)
        rows = min(prompt_tokens, self.prefill_chunk, self.score_rows)
        return (
            self.working_bytes_per_token * tokens
            + self.working_bytes_per_position * positions
            + self.working_bytes_per_pair * positions * rows
            + self.working_bytes_per_sequence * batch
        )

    @cached_property
    def kv_bytes_per_token(self) -> float:
        return sum(task.kv_bytes_per_token for task in self.tasks)


def _shape(t: Task) -> tuple[object, ...]:
    return t.kind, t.pages[0].nbytes, t.prefill, t.decode, t.num_experts, t.experts_per_token, t.popularity


def task_kind(name: str) -> str:
    """layers.3.attention -> attention; all norms are one kind."""
    last = name.rsplit(".", 1)[-1]
    return "norm" if last.endswith("_norm") else last
