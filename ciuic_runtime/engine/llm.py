"""`LLM`: a checkpoint opened, a schedule carried out, prompts turned into text.
The engine runs the passes; this class sets it up and turns what people give and get into requests and outputs."""

from __future__ import annotations

import itertools
import operator
import resource
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import torch

from ciuic_runtime.devices.backends import open_backend
from ciuic_runtime.devices.errors import CiuicError, InvalidInput
from ciuic_runtime.devices.manager import DeviceManager
from ciuic_runtime.devices.spec import Topology
from ciuic_runtime.engine.batching import Batching
from ciuic_runtime.engine.config import RuntimeConfig
from ciuic_runtime.engine.engine import Engine
from ciuic_runtime.engine.executor import LocalExecutor
from ciuic_runtime.engine.recorder import Recorder
from ciuic_runtime.engine.request import Request, RequestOutput
from ciuic_runtime.engine.routing import RoutingRecorder
from ciuic_runtime.engine.sampling import SamplingParams
from ciuic_runtime.engine.setup import set_up
from ciuic_runtime.engine.text import NoText, TextStream
from ciuic_runtime.memory.hierarchy import MemoryHierarchy
from ciuic_runtime.memory.kv_cache import BLOCK_TOKENS, blocks_for
from ciuic_runtime.memory.paging import PagingReport
from ciuic_runtime.model import Model
from ciuic_runtime.models.batch import Chunk, make_batch
from ciuic_runtime.models.checkpoint import Checkpoint, open_checkpoint
from ciuic_runtime.models.tokenizer import Tokenizer, load_tokenizer
from ciuic_runtime.ops.native import REFERENCE
from ciuic_runtime.schedulers.comparison import Comparison
from ciuic_runtime.schedulers.graph import PHASES, Phase
from ciuic_runtime.schedulers.memory import memory_need
from ciuic_runtime.schedulers.placement import Placement
from ciuic_runtime.schedulers.policies.mixing import Mixing, PassTimes
from ciuic_runtime.schedulers.schedule import Schedule
from ciuic_runtime.schedulers.steps import workload_steps
from ciuic_runtime.schedulers.trace import Trace
from ciuic_runtime.schedulers.workload import Workload, cache_tokens

if TYPE_CHECKING:
    from ciuic_runtime.engine.guide import Guide

Prompt = str | Sequence[int]
DEFAULT_LOOKAHEAD = 2


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
        self._set_torch_threads()
        self._recorder = Recorder()
        used = self.schedule.devices_used()
        self._backends = {name: open_backend(self.topology.device(name), self.topology) for name in used}
        num_blocks = cache_tokens(self.context, self.max_num_seqs, config.kv_tokens) // BLOCK_TOKENS
        self._memory = self._open_memory(config)
        asked = DEFAULT_LOOKAHEAD if config.lookahead is None else config.lookahead
        lookahead = self.schedule.paging.lookahead if self.schedule.paging else asked
        self._executor = LocalExecutor(
            self.model.spec, self.model.graph, self.schedule, self._checkpoint, self._backends, num_blocks,
            self._recorder, progress, self.kernels, self.threads, self._setup.replaced, self._memory, lookahead,
        )  # fmt: skip
        self._next_index = itertools.count()
        self.engine = Engine(self._executor, self._batching(num_blocks, config))
        self._tokenizer: Tokenizer | None = None
        self._closed = False
        self._warm_up()
        self.load_s = time.perf_counter() - begin  # from opening the checkpoint until ready for prompts

    def _open_memory(self, config: RuntimeConfig) -> MemoryHierarchy | None:
        """Where pages lie in slots: with native kernels on one CPU, if the checkpoint is packed, must be paged, or the
        user asks for it."""
        used, paging = list(self._backends.values()), self.schedule.paging
        can = self.kernels != REFERENCE and len(used) == 1 and used[0].host_memory
        wanted = config.paged if config.paged is not None else bool(self.model.spec.packed)
        if paging is None and not (can and wanted):
            return None
        name = used[0].spec.name
        need = memory_need(self.schedule, self.model.graph, self.schedule.workload)[name]
        return MemoryHierarchy(
            self._checkpoint, memory={name: need.total}, format=self.model.format, graph=self.model.graph,
            cache_policy=(paging.policy if paging else config.cache_policy) or "auto", io_threads=config.io_threads,
            backend=used[0], reserved=need.total - need.weights,
        )  # fmt: skip

    @property
    def memory(self) -> MemoryHierarchy:
        """Where the model's pages are. Raises InvalidInput where they are not in slots: with torch's operators, with
        several devices, and where an unpacked checkpoint is computed with in its file."""
        if self._memory is None:
            raise InvalidInput(
                f"{self.model.spec.name} is not held in slots here; pack it, or open it with paged=True, with native "
                "kernels on one CPU"
            )
        return self._memory

    @property
    def paging(self) -> PagingReport | None:
        """What the last `generate`, `stream` or `logits` read and waited for; None where everything is in memory."""
        if self._memory is None or not (self.schedule.paging or self._memory.report.anything):
            return None
        return self._memory.report

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
        self._clear_records()
        try:
            for request in requests:
                self.engine.add(request)
            while self.engine.busy:
                for update in self.engine.step()[1]:
                    if update.error:
                        raise CiuicError(update.error)
                    yield update.text, update.request.output()
        finally:
            if unfinished := [request for request in requests if not request.finish_reason]:
                self.engine.batching.reset()
                for request in unfinished:
                    request.finish("interrupted")

    def record_routing(self) -> RoutingRecorder:
        """From now on, which experts each token uses; the recorder's `routing()` is what was recorded so far."""
        recorder = RoutingRecorder(self.model.graph)
        self._executor.on_routing = recorder.record
        return recorder

    def logits(self, token_ids: Sequence[int], chunk: int | None = None) -> torch.Tensor:
        """Logits at every position of a prompt, float32 [tokens, vocab], computed in chunks of `chunk` tokens.

        The trace is of this afterwards."""
        self._check_idle()
        self._clear_records()
        self._check_ids(token_ids, "the prompt")
        self._check_length(len(token_ids), 0, "the prompt")
        pool = self.engine.batching.blocks
        blocks = pool.allocate(blocks_for(len(token_ids)))
        size = chunk or self.model.prefill_chunk
        parts = []
        try:
            for at in range(0, len(token_ids), size):
                piece = Chunk(tuple(token_ids[at : at + size]), at, tuple(blocks), prompt=True, sample="all")
                parts.append(self._executor.step(make_batch([piece]), "prefill").clone())
        finally:
            pool.release(blocks)
        return torch.cat(parts)

    def run_pass(self, chunks: Sequence[Chunk], phase: Phase) -> None:
        """One pass as given, for measuring; the trace is of it alone afterwards, and no prefix is shared that was."""
        self._check_idle()
        self._clear_records()
        self.engine.batching.blocks.clear()
        self._executor.step(make_batch(chunks), phase)

    @property
    def tokenizer(self) -> Tokenizer:
        """Loaded at first use; a checkpoint without one can still be driven by token ids."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._checkpoint.path)
        return self._tokenizer

    @property
    def trace(self) -> Trace:
        """What happened in the last `generate`, `stream` or `logits`."""
        notes = [f"{d.name} is simulated" for d in self.topology.devices if d.simulated and d.name in self._backends]
        notes += [f"operator {r.name!r} replaces {r.replaces}" for r in self._setup.replaced.by_replaced.values()]
        return self._recorder.trace(self.schedule.devices_used(), notes)

    def forecast_trace(self) -> Trace:
        """What the schedule is forecast to do, pass by pass."""
        return self._setup.recost(self.schedule, workload_steps(self.model.graph, self.schedule.workload))

    @property
    def comparison(self) -> Comparison:
        """The trace beside the forecast, and beside the same cost model given the passes as they came."""
        trace, known = self.trace, self.schedule.predicted is not None
        passes = [step for phase in PHASES for step in trace.passes(phase)]
        return trace.against(self.schedule, self._setup.recost(self.schedule, passes) if known and passes else None)

    def peak_memory_bytes(self) -> dict[str, int]:
        """By device: for CPUs the process's peak resident memory (the system's figure), else what was allocated."""
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {n: resident if b.host_memory else b.memory().peak for n, b in self._backends.items()}

    def close(self) -> None:
        """Gives back weights, cache and files; the trace can still be read."""
        self._closed = True
        self._executor.close()
        self._checkpoint.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _warm_up(self) -> None:
        """One prompt pass and one decode pass, so that thread pools and compiled primitives exist before the first
        request; what they leave in the cache is overwritten. Not where pages would have to be read for it."""
        if self._memory is not None and not self._memory.state.whole:
            return
        self._executor.step(make_batch([Chunk((0, 0), 0, (0,), prompt=True)]), "prefill")
        self._executor.step(make_batch([Chunk((0,), 2, (0,), prompt=False)]), "decode")
        self._clear_records()

    def _batching(self, num_blocks: int, config: RuntimeConfig) -> Batching:
        """Prompts first; unless people wait for each other's, and not for the last of them: then as forecasts say."""
        balanced = config.serving and self.schedule.goal == "latency" and self.pass_times is not None
        share = Mixing(self.pass_times.seconds, self.model.prefill_chunk) if balanced and self.pass_times else None
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
        prompt, new = max(len(r.prompt) for r in requests), max(r.params.max_tokens for r in requests)
        work = Workload(prompt, new, min(len(requests), self.max_num_seqs))
        if work != self.schedule.workload:
            self.schedule = self._setup.forecast(work)

    def _clear_records(self) -> None:
        self._recorder.clear()
        if self._memory is not None:
            self._memory.report.clear()

    def _check_idle(self) -> None:
        if self._closed:
            raise InvalidInput("this LLM is closed; open another one")
        self._set_torch_threads()  # another LLM of this process may have chosen otherwise
        if self.engine.busy:
            raise InvalidInput("an earlier stream is not at its end; read it to its end or close() it first")

    @property
    def paged_memory(self) -> MemoryHierarchy | None:
        """Where pages are, if some are read from disk while the model runs."""
        return self._memory if self.schedule.paging else None

    def forget_trace(self, most: int) -> None:
        """Begins the trace anew if it has more events than that: one that goes on for days must not grow."""
        if self._recorder.num_events > most:
            self._recorder.clear()

    def use_in_this_thread(self) -> None:
        """To be called in a thread before passes run in it."""
        self._set_torch_threads()

    def _set_torch_threads(self) -> None:
        """Where native kernels compute, torch only picks rows and sorts: its threads would get in their way."""
        torch.set_num_threads(self.threads if self.kernels == REFERENCE else 1)

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


def _as_int(token: Any, index: int) -> int:
    """numpy's and torch's whole numbers as Python's."""
    if isinstance(token, (bool, float)) or not hasattr(token, "__index__"):
        raise InvalidInput(f"prompt {index} has token id {token!r}; token ids are whole numbers")
    return operator.index(token)
