"""One stage of a schedule, in this process: takes a residual stream as bytes, hands on one, or draws tokens.
Knows no Ray and no other stage."""

from __future__ import annotations

import json
import os
from bisect import bisect_left
from dataclasses import dataclass, field

import torch

from ciuic_runtime.cluster.gathering import StageRecord, wall_offset
from ciuic_runtime.cluster.parcels import Call, pack, unpack
from ciuic_runtime.engine.config import RuntimeConfig
from ciuic_runtime.engine.draw import Drawn, draw_all
from ciuic_runtime.engine.host import LocalHost
from ciuic_runtime.model import Model
from ciuic_runtime.models.batch import make_batch
from ciuic_runtime.models.checkpoint import open_checkpoint
from ciuic_runtime.ops.native import REFERENCE, instruction_set
from ciuic_runtime.schedulers.schedule import Schedule
from ciuic_runtime.schedulers.stages import part_of


@dataclass(frozen=True, slots=True)
class StagePlan:
    """All that a stage's process is told: plain data, of which it makes everything anew. Of two that are equal, one
    process can carry out either: its number is there for messages."""

    index: int = field(compare=False)
    model: str  # where the checkpoint is on the stage's node
    format: str
    prefill_chunk: int  # tokens
    tasks: tuple[str, ...]
    given: tuple[str, ...]  # whose value comes from the stage before
    schedule: str  # JSON, of what is carried out only
    num_blocks: int
    kernels: str
    threads: int
    cache_policy: str | None = None
    lookahead: int | None = None
    io_threads: int | None = None
    paged: bool | None = None


class StageWorker:
    def __init__(self, plan: StagePlan) -> None:
        self.plan = plan

    def load(self) -> None:
        """Brings the stage's pages here. Raises InvalidInput where this node cannot do as planned."""
        plan = self.plan
        instruction_set(plan.kernels)  # refuses what this node does not have
        torch.set_num_threads(plan.threads if plan.kernels == REFERENCE else 1)
        self._checkpoint = open_checkpoint(plan.model)
        model = Model(self._checkpoint.path, plan.format, self._checkpoint.spec, plan.prefill_chunk)
        graph = part_of(model.graph, [model.graph.task(name) for name in plan.tasks], plan.given)
        schedule = Schedule.from_dict(json.loads(plan.schedule), f"the schedule of stage {plan.index}")
        config = RuntimeConfig(
            cache_policy=plan.cache_policy, lookahead=plan.lookahead, io_threads=plan.io_threads, paged=plan.paged
        )
        self._host = LocalHost(
            model, graph, schedule, self._checkpoint, plan.num_blocks, config, plan.kernels, plan.threads
        )
        self._wall = wall_offset()
        self._number = -1  # of the last pass
        self._hidden, self._dtype = model.spec.hidden_size, self._host.executor.handed_on

    def run(self, call: bytes, hidden: bytes | None, draws: bytes | None) -> bytes:
        """One pass, a packed Call: bytes of the residual stream [tokens, hidden], in the dtype that the local executor
        holds it in, or of the last stage's logits; or, given `draws`, packed, what is drawn, packed."""
        told: Call = unpack(call)
        assert told.number > self._number, "passes are carried out in the order in which they were sent"
        batch, executor = make_batch(told.chunks), self._host.executor
        self._host.recorder.number_of_pass = self._number = told.number
        received = None
        if hidden is not None:
            flat = torch.frombuffer(bytearray(hidden), dtype=torch.uint8).view(self._dtype)
            received = flat.view(batch.num_tokens, self._hidden)
        if draws is None:
            handed = executor.step(batch, told.phase, received=received)
            data: bytes = handed.contiguous().view(torch.uint8).numpy().tobytes()
            return data
        wanted, drawn = unpack(draws), list[Drawn]()
        executor.step(batch, told.phase, lambda logits: drawn.extend(draw_all(wanted, logits)), received)
        return pack(drawn)

    def pid(self) -> int:
        return os.getpid()

    def peak_memory_bytes(self) -> dict[str, int]:
        return self._host.peak_memory_bytes()

    def clear_trace(self) -> None:
        self._host.clear_trace()

    def keep_newest(self, most: int) -> None:
        self._host.keep_newest(most)

    def recorded(self, since: int, until: int) -> StageRecord:
        """Of the passes that were sent under these numbers, with times of this node's clock (s since 1970)."""
        recorder = self._host.recorder
        numbers = recorder.passes()
        first, last = bisect_left(numbers, since), bisect_left(numbers, until)
        found = recorder.snapshot(recorder.first_step + first, recorder.first_step + last)
        begin, rows = recorder.begin + self._wall, found.rows
        rows["step"] -= found.first_step
        rows["start"] += begin
        rows["end"] += begin
        each = self._hidden * self._dtype.itemsize
        return StageRecord(
            rows, list(found.names), numbers[first:last], [begin + info.start for info in found.steps],
            [begin + info.end for info in found.steps], [each * info.tokens for info in found.steps],
            self._host.page_counts(), self._host.expert_uses(),
        )  # fmt: skip
