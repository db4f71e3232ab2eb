"""The settings that a user may give a run, checked as they are given. None means that `setup.py` finds a value.
Knows no model and no hardware."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.models.graph import PREFILL_CHUNK
from ciuic_runtime.schedulers.placement import Placement
from ciuic_runtime.schedulers.policies.cache import cache_policy
from ciuic_runtime.schedulers.workload import Workload

MOST_LOOKAHEAD = 64
EXECUTORS = ("local", "ray")


@dataclass(frozen=True)
class RuntimeConfig:
    dtype: str = "auto"
    memory: Mapping[str, str | int] = field(default_factory=dict)  # device -> budget
    placement: Placement | None = None
    goal: str | None = None  # None: latency
    max_model_len: int | None = None  # positions per sequence: prompt and output
    max_num_seqs: int | None = None  # sequences at once
    threads: int | None = None  # None: the cores of the CPU devices in use
    prefill_chunk: int = PREFILL_CHUNK  # prompt tokens per pass
    workload: Workload | None = None  # what to plan for; None: the schedule's own, else a few sequences at once
    executor: str = "local"  # or "ray": each stage is a process of a cluster
    stages: int | None = None  # of a cluster; None: as many as the schedule has
    micro_batches: int | None = None  # passes on their way through the stages at once; None: one for each stage
    address: str | None = None  # of the Ray cluster; None: one of this machine's own, for this run
    insecure: bool = False  # a cluster without a token is joined
    use_new_nodes: bool = False  # that join the cluster while the model runs; else when `ciuic replan` asks
    cache_policy: str | None = None  # which routed experts stay in memory; None: the schedule's
    lookahead: int | None = None  # layers ahead that routed experts are guessed and read; None: the schedule's
    io_threads: int | None = None  # that read pages from disk
    paged: bool | None = None  # pages in slots; None: where the checkpoint is packed, or does not fit
    routing: str | Path | None = None  # a recording (`ciuic run --record-routing`) that says which experts are popular
    kv_tokens: int | None = None  # positions in the cache, all sequences together; None: every one's whole context
    serving: bool = False  # requests come at any time: prompts and decodes share passes, requests share prefixes
    kernels: str = "auto"  # instruction set of the native operators, "reference" for torch's; "auto": the best here

    def __post_init__(self) -> None:
        if self.executor not in EXECUTORS:
            raise InvalidInput(f"executor {self.executor!r} is not one of {', '.join(EXECUTORS)}")
        if self.executor == "local" and (self.stages or 1) > 1:
            raise InvalidInput(f"{self.stages} stages are processes of a cluster; give --executor ray for them")
        if self.use_new_nodes and (self.executor == "local" or self.address is None):
            raise InvalidInput("nodes join a cluster; to use new ones, give --executor ray and its --address")
        for name, most in (
            ("max_model_len", 2**31),
            ("max_num_seqs", 2**20),
            ("threads", 4096),
            ("prefill_chunk", 2**20),
            ("io_threads", 256),
            ("kv_tokens", 2**40),
            ("stages", 4096),
            ("micro_batches", 4096),
        ):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if value is not None and not (whole and 1 <= value <= most):
                raise InvalidInput(f"{name} is {value!r}; it must be a whole number from 1 to {most}")
        if self.lookahead is not None and not (type(self.lookahead) is int and 0 <= self.lookahead <= MOST_LOOKAHEAD):
            raise InvalidInput(
                f"lookahead is {self.lookahead!r}; it must be a whole number of layers from 0 to {MOST_LOOKAHEAD}"
            )
        if self.cache_policy is not None:
            cache_policy(self.cache_policy)
