"""`LLM`: a checkpoint opened, a schedule carried out, prompts turned into text.
The engine runs the passes; this class sets it up and turns what people give and get into requests and outputs."""

from __future__ import annotations

import itertools
import operator
import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import torch

from ciuic_runtime.basis import Basis
from ciuic_runtime.devices.errors import CiuicError, InvalidInput
from ciuic_runtime.devices.manager import DeviceManager
from ciuic_runtime.devices.spec import Topology
from ciuic_runtime.engine.batching import Batching, Pass
from ciuic_runtime.engine.config import RuntimeConfig
from ciuic_runtime.engine.engine import Engine, StageLost
from ciuic_runtime.engine.host import Host, LocalHost
from ciuic_runtime.engine.recorded import Facts, put_together
from ciuic_runtime.engine.request import Request, RequestOutput, Update
from ciuic_runtime.engine.routing import RoutingRecorder
from ciuic_runtime.engine.sampling import SamplingParams
from ciuic_runtime.engine.setup import Setup, set_up
from ciuic_runtime.engine.text import NoText, TextStream
from ciuic_runtime.memory.hierarchy import MemoryHierarchy
from ciuic_runtime.memory.kv_cache import BLOCK_TOKENS, blocks_for
from ciuic_runtime.memory.paging import PagingReport
from ciuic_runtime.model import Model
from ciuic_runtime.models.batch import Chunk
from ciuic_runtime.models.checkpoint import Checkpoint, open_checkpoint
from ciuic_runtime.models.tokenizer import Tokenizer, load_tokenizer
from ciuic_runtime.ops.native import REFERENCE
from ciuic_runtime.schedulers.comparison import Comparison
from ciuic_runtime.schedulers.graph import PHASES, Phase
from ciuic_runtime.schedulers.placement import Placement
from ciuic_runtime.schedulers.policies.mixing import Mixing, PassTimes, Size
from ciuic_runtime.schedulers.recording import WEIGHTS, Recording, RequestNote
from ciuic_runtime.schedulers.schedule import Schedule
from ciuic_runtime.schedulers.trace import Trace
from ciuic_runtime.schedulers.workload import Workload, cache_tokens

if TYPE_CHECKING:
    from ciuic_runtime.engine.guide import Guide

Prompt = str | Sequence[int]


class Settings(TypedDict, total=False):
    """What `LLM` takes by name: the fields of `RuntimeConfig`."""

    dtype: str
    memory: Mapping[str, str | int]
    placement: Placement | None
    goal: str | None
    max_model_len: int | None
    max_num_seqs: int | None
    threads: int | None
    prefill_chunk: int
    workload: Workload | None
    executor: str
    cache_policy: str | None
    lookahead: int | None
    io_threads: int | None
    paged: bool | None
    routing: str | Path | None
    kernels: str
    kv_tokens: int | None
    serving: bool
    stages: int | None
    micro_batches: int | None
    address: str | None
    insecure: bool
    use_new_nodes: bool


class LLM:
    """Runs a model by a schedule; without one, plans first.

    Raises InvalidInput or OutOfMemory before any weight is loaded, if the model cannot be run as asked."""

    def __init__(
        self,
        model: str | Path | Checkpoint,
        *,
        schedule: Schedule | None = None,
        devices: DeviceManager | Topology | None = None,
        progress: Callable[[int, int], None] | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        """`schedule` is carried out to the letter; `devices` are those to run on (None: this machine's); `progress` is
        called with bytes loaded and bytes in all; `settings` are the fields of `RuntimeConfig`."""
        begin = time.perf_counter()
        config = RuntimeConfig(**settings)
        self._checkpoint = open_checkpoint(model) if isinstance(model, (str, Path)) else model
        self._setup = set_up(self._checkpoint, config, schedule, devices)
        self.schedule = self._setup.schedule
        self.set_torch_threads()
        num_blocks = cache_tokens(self.context, self.max_num_seqs, config.kv_tokens) // BLOCK_TOKENS
        self._host = _open_host(self._setup, self._checkpoint, num_blocks, config, progress)
        self._next_index = itertools.count()
        self.engine = Engine(self._host.runner, self._batching(num_blocks, config))
        self._tokenizer: Tokenizer | None = None
        self._closed = False
        self._thread: threading.Thread | None = None  # in which passes run, where that is no matter of whoever asks
        self._facts: Facts | None = None  # of the schedule that is carried out
        self.on_look: Callable[[], None] | None = None  # where passes run in another thread, which is told
        self._host.warm_up()
        self.load_s = time.perf_counter() - begin  # from opening the checkpoint until ready for prompts

    @property
    def memory(self) -> MemoryHierarchy:
        """Where the model's pages are. Raises InvalidInput where they are not in slots: with torch's operators, with
        several devices, and where an unpacked checkpoint is computed with in its file."""
        if self._host.memory is None:
            raise InvalidInput(
                f"{self.model.spec.name} is not held in slots here; pack it, or open it with paged=True, with native "
                "kernels on one CPU"
            )
        return self._host.memory

    @property
    def paging(self) -> PagingReport | None:
        """What the last `generate`, `stream` or `logits` read and waited for; None where everything is in memory."""
        if self._host.memory is None or not (self.schedule.paging or self._host.memory.report.anything):
            return None
        return self._host.memory.report

    @property
    def model(self) -> Model:
        return self._setup.model

    @property
    def topology(self) -> Topology:
        return self._setup.topology

    @cached_property
    def pass_times(self) -> PassTimes | None:
        """What passes are forecast to take; None where a device's speed is not known."""
        return self._setup.pass_times()

    @property
    def context(self) -> int:
        """Positions per sequence, prompt and output, that fit."""
        return self._setup.context

    @property
    def max_num_seqs(self) -> int:
        return self._setup.max_num_seqs

    @property
    def ended(self) -> bool:
        """Whether no pass can run any more: a cluster's stages were lost, and nothing is left to go on with."""
        return self._host.ended

    def check(self) -> None:
        """While nothing runs: raises CiuicError where nothing can any more."""
        self._host.check()

    @property
    def threads(self) -> int:
        return self._setup.threads

    @property
    def kernels(self) -> str:
        """The instruction set of the native operators in use, or "reference"."""
        return self._setup.kernels

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Completes one prompt or a batch (text, or token ids), in the order given."""
        outputs: dict[int, RequestOutput] = {}
        for _, output in self.stream(prompts, params):
            outputs[output.index] = output
        return [outputs[i] for i in sorted(outputs)]

    def stream(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Generator[tuple[str, RequestOutput], None, None]:
        """Yields (new text, output so far) each time a prompt gets a token; left early, it frees what it held.

        Beforehand the schedule's forecast is made anew for these prompts, so that the trace has something to meet."""
        requests = self._requests(prompts, params)
        self._check_idle()
        self._forecast(requests)
        self._clear_trace()
        try:
            for request in requests:
                self.engine.add(request)
            while self.engine.busy:
                for update in self.step()[1]:
                    if update.error:
                        raise CiuicError(update.error)
                    yield update.text, update.request.output()
        finally:
            if unfinished := [request for request in requests if not request.finish_reason]:
                self.engine.reset()
                for request in unfinished:
                    request.finish("interrupted")

    def step(self) -> tuple[Pass | None, list[Update]]:
        """The engine's next pass. Where a stage of a cluster is lost, what is left goes on from the tokens so far, and
        so do all of them where nodes joined that are used from now on."""
        journal = self.engine.journal
        try:
            if (setup := self._host.replanned()) is not None:
                if setup.schedule is not self._setup.schedule:  # else it was tried in vain
                    journal.mark("joined", self._host.notes[-1])
                self._go_on_with(setup)
                return None, []
            done = self.engine.step()
        except StageLost as lost:
            journal.mark("lost", str(lost))
            self._go_on_with(self._host.recover(lost))
            journal.mark("recovered", self._host.notes[-1])
            return None, []
        journal.forget_passes(self._host.recorder.first_step)
        return done

    def _go_on_with(self, setup: Setup) -> None:
        if setup.schedule is not self._setup.schedule:
            self.engine.journal.mark("replanned", f"goes on with {', '.join(setup.schedule.devices_used())}")
        self._setup = setup
        self.schedule = setup.schedule
        self.__dict__.pop("pass_times", None)  # of the plan before
        self.engine.restart()

    def record_routing(self) -> RoutingRecorder:
        """From now on, which experts each token uses; the recorder's `routing()` is what was recorded so far."""
        if not isinstance(self._host, LocalHost):
            raise InvalidInput("routing is recorded in one process; run without a cluster for that")
        recorder = RoutingRecorder(self.model.graph)
        self._host.executor.on_routing = recorder.record
        return recorder

    def logits(self, token_ids: Sequence[int], chunk: int | None = None) -> torch.Tensor:
        """Logits at every position of a prompt, float32 [tokens, vocab], computed in chunks of `chunk` tokens.

        The trace is of this afterwards."""
        self._check_idle()
        self._clear_trace()
        self._check_ids(token_ids, "the prompt")
        self._check_length(len(token_ids), 0, "the prompt")
        pool = self.engine.batching.blocks
        blocks = pool.allocate(blocks_for(len(token_ids)))
        size = chunk or self.model.prefill_chunk
        parts = []
        try:
            for at in range(0, len(token_ids), size):
                piece = Chunk(tuple(token_ids[at : at + size]), at, tuple(blocks), prompt=True, sample="all")
                parts.append(self._host.logits([piece], "prefill"))
        finally:
            pool.release(blocks)
        return torch.cat(parts)

    def run_pass(self, chunks: Sequence[Chunk], phase: Phase) -> float:
        """One pass as given, for measuring: seconds until its logits were there. The trace is of it alone afterwards,
        and no prefix is shared that was."""
        self._check_idle()
        self._clear_trace()
        self.engine.batching.blocks.clear()
        begin = time.perf_counter()
        self._host.logits(chunks, phase)
        return time.perf_counter() - begin

    @property
    def tokenizer(self) -> Tokenizer:
        """Loaded at first use; a checkpoint without one can still be driven by token ids."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._checkpoint.path)
        return self._tokenizer

    @property
    def trace(self) -> Trace:
        """What happened in the last `generate`, `stream` or `logits`."""
        return self._recorded(0, self._known_facts()).trace()

    def recording(self, since_step: int = 0, counts: bool = True) -> Recording:
        """All that was recorded of that, or of passes that go on, from a step on: what the dashboard shows, and what
        `write_recording` writes. May be called in any thread where passes run in one of their own (`EngineService`);
        what a cluster's stages recorded is then half a second old at least. `counts`: with requests, pages and uses of
        experts, and what forecasts are made with, which takes milliseconds where there are thousands of them."""
        facts = self._known_facts()
        recorded = self._recorded(since_step, facts, counts)
        if not counts:
            return recorded
        return self.counted(replace(recorded, basis=facts.basis))

    def request_notes(self, newest: int) -> list[RequestNote]:
        """The newest requests of the recording, in the order in which they arrived; in any thread."""
        return self.engine.journal.requests(self._host.recorder.begin, newest)

    def request_notes_of(self, indices: Iterable[int]) -> list[RequestNote]:
        """Of these requests, as far as they are known still; in any thread."""
        return self.engine.journal.requests_of(indices, self._host.recorder.begin)

    def counted(self, recording: Recording) -> Recording:
        """With counts of pages and uses of experts as they are now; in any thread."""
        return replace(recording, pages=self._host.page_counts(), expert_uses=self._host.expert_uses())

    @property
    def ray_dashboard(self) -> str | None:
        """The address of Ray's own dashboard, of a cluster that has one."""
        return self._host.ray_dashboard()

    @property
    def basis(self) -> Basis:
        """What its forecasts are made with."""
        return self._setup.basis(self.schedule)

    def forecast_trace(self) -> Trace:
        """What the schedule is forecast to do, pass by pass."""
        return self._setup.forecast_trace(self.schedule)

    @property
    def comparison(self) -> Comparison:
        """The trace beside the forecast, and beside the same cost model given the passes as they came."""
        trace, known = self.trace, self.schedule.predicted is not None
        passes = [step for phase in PHASES for step in trace.passes(phase)]
        return trace.against(self.schedule, self._setup.recost(self.schedule, passes) if known and passes else None)

    def peak_memory_bytes(self) -> dict[str, int]:
        """By device: for CPUs the peak resident memory of the process that computes there, else what was allocated."""
        return self._host.peak_memory_bytes()

    def close(self) -> None:
        """Gives back weights, cache and files; the trace can still be read."""
        self._closed = True
        self._host.close()
        self._checkpoint.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _pass_seconds(self, size: Size) -> float:
        assert self.pass_times is not None, "asked for where forecasts are known"
        return self.pass_times.seconds(size)

    def _batching(self, num_blocks: int, config: RuntimeConfig) -> Batching:
        """Prompts first; unless people wait for each other's, and not for the last of them: then as forecasts say."""
        balanced = config.serving and self.schedule.goal == "latency" and self.pass_times is not None
        share = Mixing(self._pass_seconds, self.model.prefill_chunk) if balanced else None
        return Batching(
            num_blocks, self.max_num_seqs, self.model.prefill_chunk, share, shared_prefixes=config.serving,
            two_forms=self.model.spec.mla is not None,
        )  # fmt: skip

    def _requests(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[Request]:
        if isinstance(prompts, bytes) or not isinstance(prompts, (str, Iterable)):
            raise InvalidInput(f"prompts are text, token ids, or a list of these; not {type(prompts).__name__}")
        given: list[Any] = [prompts] if isinstance(prompts, str) else list(prompts)
        if not given:
            raise InvalidInput("no prompts were given")
        every = given if isinstance(given[0], (str, Iterable)) else [given]
        one = params or SamplingParams()
        chosen = [one] * len(every) if isinstance(one, SamplingParams) else list(one)
        if len(chosen) != len(every):
            raise InvalidInput(
                f"{len(every)} prompts and {len(chosen)} sampling parameters; give one for each prompt, or one for all"
            )
        return [self._request(i, prompt, p) for i, (prompt, p) in enumerate(zip(every, chosen, strict=True))]

    def request(
        self, prompt: Sequence[int], params: SamplingParams, client: str = "", guide: Guide | None = None
    ) -> Request:
        """For an engine that serves: checked, with a number of its own. Raises InvalidInput for what cannot be run."""
        request = self._request(next(self._next_index), prompt, params)
        request.client, request.guide = client, guide
        return request

    def _request(self, index: int, prompt: Prompt, params: SamplingParams) -> Request:
        if isinstance(prompt, bytes) or not isinstance(prompt, (str, Iterable)):
            raise InvalidInput(f"prompt {index} is {prompt!r}; give text or token ids")
        ids = (
            tuple(self.tokenizer.encode(prompt))
            if isinstance(prompt, str)
            else tuple(_as_int(token, index) for token in prompt)
        )
        self._check_ids(ids, f"prompt {index}")
        self._check_length(len(ids), params.max_tokens, f"prompt {index}")
        return Request(index, ids, params, self._text_stream(params), frozenset(self._eos()))

    def _forecast(self, requests: Sequence[Request]) -> None:
        """As many of the requests as run at once, all as long as the longest."""
        prompt, new = max(len(r.prompt) for r in requests), max(1, *(r.params.max_tokens for r in requests))
        work = Workload(prompt, new, min(len(requests), self.max_num_seqs))
        if work != self.schedule.workload:
            self.schedule = self._setup.forecast(work)

    def _check_idle(self) -> None:
        if self._closed:
            raise InvalidInput("this LLM is closed; open another one")
        if self._thread not in (None, threading.current_thread()):
            raise InvalidInput("this LLM is being served, by a thread of its own; ask the server, or close it first")
        self.set_torch_threads()  # another LLM of this process may have chosen otherwise
        if self.engine.busy:
            raise InvalidInput("an earlier stream is not at its end; read it to its end or close() it first")

    @property
    def paged_memory(self) -> MemoryHierarchy | None:
        """Where pages are, if some are read from disk while the model runs."""
        return self._host.memory if self.schedule.paging else None

    def keep_newest(self, most: int) -> None:
        """So many events are kept from now on: a recording that goes on for days must not grow."""
        self._host.keep_newest(most)

    def gather(self) -> None:
        """Between passes, in their thread: brings what other processes recorded up to the last time."""
        self._host.gather()

    def _known_facts(self) -> Facts:
        schedule, setup = self.schedule, self._setup
        if (facts := self._facts) is None or facts.schedule is not schedule:
            self._facts = facts = Facts(setup.basis(schedule), setup.room, self.engine.batching.num_blocks)
        return facts

    def _recorded(self, since_step: int, facts: Facts, requests: bool = True) -> Recording:
        if self.on_look is None:
            self._host.gather(wait=True)
        else:
            self.on_look()
        recorder, journal = self._host.recorder, self.engine.journal
        passes = recorder.snapshot(since_step, journal.num_passes)  # not one that ended and is not noted yet
        devices = self.topology.devices
        notes = [f"{d.name} is simulated" for d in devices if d.simulated and d.name in facts.schedule.devices_used()]
        notes += [f"operator {r.name!r} replaces {r.replaces}" for r in self._setup.replaced.by_replaced.values()]
        found = put_together(passes, journal, facts, recorder.begin, requests)
        if (memory := self._host.memory) is not None:  # whose budget may change
            found = replace(found, capacity={**found.capacity, (memory.device, WEIGHTS): memory.budget})
        return replace(found, notes=(*notes, *self._host.notes))

    def _clear_trace(self) -> None:
        self._host.clear_trace()
        self.engine.journal.clear()

    def use_in(self, thread: threading.Thread) -> None:
        """From now on passes run in that thread, which may not have begun yet; until `use_anywhere`, other threads are
        refused."""
        self._thread = thread

    def set_torch_threads(self) -> None:
        """To be called in each thread that passes run in. Where native kernels compute, torch only picks rows and
        sorts: its threads would get in their way."""
        torch.set_num_threads(self.threads if self.kernels == REFERENCE else 1)

    def use_anywhere(self) -> None:
        self._thread = None

    def _check_ids(self, ids: Sequence[int], what: str) -> None:
        spec = self.model.spec
        if not len(ids):
            raise InvalidInput(f"{what} is empty; give at least one token")
        if bad := [t for t in ids if type(t) is not int or not 0 <= t < spec.vocab_size]:
            raise InvalidInput(
                f"{what} has token id {bad[0]!r}; {spec.name} has whole numbers 0 to {spec.vocab_size - 1}"
            )

    def _check_length(self, prompt: int, new: int, what: str) -> None:
        if prompt + new > self.context:
            raise InvalidInput(
                f"{what} has {prompt} tokens and {new} new ones were asked for; the context holds {self.context} "
                f"(max_model_len, --context) and {self.model.spec.name} allows {self.model.spec.max_positions}; "
                "shorten it, ask for fewer, or give it a longer context"
            )

    def _text_stream(self, params: SamplingParams) -> TextStream:
        try:
            return TextStream(self.tokenizer.stream(), params.stop)
        except InvalidInput:
            if params.stop:
                raise
            return TextStream(NoText())

    def _eos(self) -> set[int]:
        found = set(self.model.spec.eos_token_ids)
        return found | set(self._tokenizer.eos_token_ids) if self._tokenizer else found


def _open_host(
    setup: Setup, checkpoint: Checkpoint, num_blocks: int, config: RuntimeConfig,
    progress: Callable[[int, int], None] | None,
) -> Host:  # fmt: skip
    """Where passes run, by the name of the executor."""
    if config.executor == "ray":
        from ciuic_runtime.cluster.host import ClusterHost

        return ClusterHost(setup, num_blocks, config, progress)
    return LocalHost(
        setup.model, setup.model.graph, setup.schedule, checkpoint, num_blocks, config, setup.kernels, setup.threads,
        setup.replaced, progress,
    )  # fmt: skip


def _as_int(token: Any, index: int) -> int:
    """numpy's and torch's whole numbers as Python's."""
    if isinstance(token, (bool, float)) or not hasattr(token, "__index__"):
        raise InvalidInput(f"prompt {index} has token id {token!r}; token ids are whole numbers")
    return operator.index(token)
