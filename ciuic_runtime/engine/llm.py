"""`LLM`: a checkpoint opened, a schedule carried out, prompts turned into text.
The queue decides what runs next, the executor runs it, and this class only moves results between them."""

from __future__ import annotations

import logging
import resource
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from ciuic_runtime.devices.backends import open_backend
from ciuic_runtime.devices.errors import CiuicError, InvalidInput
from ciuic_runtime.devices.manager import DeviceManager
from ciuic_runtime.devices.spec import DeviceSpec, Topology
from ciuic_runtime.engine.config import RuntimeConfig, resolve
from ciuic_runtime.engine.executor import LocalExecutor
from ciuic_runtime.engine.queue import Decision, RequestQueue
from ciuic_runtime.engine.recorder import Recorder
from ciuic_runtime.engine.request import Request, RequestOutput
from ciuic_runtime.engine.sampling import SamplingParams, sample
from ciuic_runtime.engine.text import NoText, TextStream
from ciuic_runtime.memory.kv_cache import blocks_for
from ciuic_runtime.model import Model
from ciuic_runtime.models.batch import Chunk, make_batch
from ciuic_runtime.models.checkpoint import Checkpoint, open_checkpoint
from ciuic_runtime.models.tokenizer import Tokenizer, load_tokenizer
from ciuic_runtime.planning import plan
from ciuic_runtime.schedulers.placement import Placement
from ciuic_runtime.schedulers.schedule import Schedule
from ciuic_runtime.schedulers.trace import Trace
from ciuic_runtime.schedulers.workload import Workload

log = logging.getLogger("ciuic")
Prompt = str | Sequence[int]


class LLM:
    """Runs a model by a schedule; without one, plans first.

    Raises InvalidInput or OutOfMemory before any weight is loaded, if the model cannot be run as asked."""

    def __init__(
        self,
        model: str | Path | Checkpoint,
        *,
        schedule: Schedule | None = None,
        executor: str = "local",
        dtype: str = "auto",
        memory: Mapping[str, str | int] | None = None,
        placement: Placement | None = None,
        devices: DeviceManager | Topology | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        threads: int | None = None,
        prefill_chunk: int = 512,
        goal: str = "latency",
        workload: Workload | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        if executor != "local":
            raise InvalidInput(f"executor {executor!r}: this version has only 'local'; Ray clusters are not in it yet")
        begin = time.perf_counter()
        self._checkpoint = open_checkpoint(model) if isinstance(model, (str, Path)) else model
        spec = self._checkpoint.spec
        if spec.why_not_runnable:
            raise InvalidInput(spec.why_not_runnable)
        self.model = Model(
            self._checkpoint.path, dtype if schedule is None or dtype != "auto" else schedule.model.format, spec
        )
        self.topology = _topology(devices, schedule, memory)
        config = RuntimeConfig(max_model_len, max_num_seqs)

        def planner(work: Workload) -> Schedule:
            if schedule is None:
                return plan(self.model, self.topology, memory=memory, goal=goal, workload=work, placement=placement)
            _check_given(schedule, self.model, self.topology, work)
            return schedule

        self.context, self.max_num_seqs, self.schedule = resolve(config, spec, workload, planner)
        self._chunk = prefill_chunk
        self.threads = _set_threads(threads, self.topology, self.schedule)
        self._recorder = Recorder()
        self._backends = {
            name: open_backend(self.topology.device(name), self.topology) for name in self.schedule.devices_used()
        }
        num_blocks = blocks_for(self.context) * self.max_num_seqs
        self._executor = LocalExecutor(
            spec,
            self.model.graph,
            self.schedule,
            self._checkpoint,
            self._backends,
            num_blocks,
            self._recorder,
            progress,
        )
        self._queue = RequestQueue(num_blocks, self.max_num_seqs, prefill_chunk)
        self._tokenizer: Tokenizer | None = None
        self._warm_up()
        self.load_s = time.perf_counter() - begin  # from opening the checkpoint until ready for prompts

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
        """Yields (new text, output so far) each time a prompt gets a token; left early, it frees what it held."""
        self._check_idle()
        requests = self._requests(prompts, params)
        self._recorder.clear()
        for request in requests:
            self._queue.add(request)
        try:
            while decision := self._queue.decide():
                yield from self._step(decision)
        finally:
            for request in self._queue.clear():
                request.finish("interrupted")

    def logits(self, token_ids: Sequence[int], chunk: int | None = None) -> torch.Tensor:
        """Logits at every position of a prompt, float32 [tokens, vocab], computed in chunks of `chunk` tokens."""
        self._check_idle()
        self._check_ids(token_ids, "the prompt")
        self._check_length(len(token_ids), 0, "the prompt")
        blocks = tuple(range(blocks_for(len(token_ids))))
        size = chunk or self._chunk
        parts = []
        for at in range(0, len(token_ids), size):
            piece = Chunk(tuple(token_ids[at : at + size]), at, blocks, prompt=True, sample="all")
            parts.append(self._executor.step(make_batch([piece]), "prefill"))
        return torch.cat(parts)

    @property
    def tokenizer(self) -> Tokenizer:
        """Loaded at first use; a checkpoint without one can still be driven by token ids."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._checkpoint.path)
        return self._tokenizer

    @property
    def trace(self) -> Trace:
        """What happened since the last `generate` or `stream` began."""
        notes = [f"{d.name} is simulated" for d in self.topology.devices if d.simulated and d.name in self._backends]
        return self._recorder.trace(self.schedule.devices_used(), notes)

    def peak_memory_bytes(self) -> dict[str, int]:
        """By device: for CPUs the process's peak resident memory (the system's figure), else what was allocated."""
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {n: resident if b.host_memory else b.memory().peak for n, b in self._backends.items()}

    def close(self) -> None:
        self._checkpoint.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _warm_up(self) -> None:
        """One prompt pass and one decode pass, so that thread pools and compiled primitives exist before the first
        request; what they leave in the cache is overwritten."""
        self._executor.step(make_batch([Chunk((0, 0), 0, (0,), prompt=True)]), "prefill")
        self._executor.step(make_batch([Chunk((0,), 2, (0,), prompt=False)]), "decode")
        self._recorder.clear()

    def _step(self, decision: Decision) -> Iterator[tuple[str, RequestOutput]]:
        logits = self._executor.step(make_batch(decision.chunks), decision.phase)
        self._queue.computed(decision)
        sampled = [r for r, c in zip(decision.requests, decision.chunks, strict=True) if c.sample]
        shown = [(r, self._sample(r, row)) for r, row in zip(sampled, logits, strict=True)]
        self._queue.release_finished()
        for request, text in shown:
            yield text, request.output()

    def _sample(self, request: Request, logits: torch.Tensor) -> str:
        history = request.history if request.params.repetition_penalty != 1.0 else ()
        try:
            token = sample(logits, request.params, history, request.seed, request.computed)
        except FloatingPointError as error:
            raise CiuicError(f"prompt {request.index}, position {request.computed}: {error}") from error
        return request.append(token)

    def _requests(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[Request]:
        single = isinstance(prompts, str) or (len(prompts) > 0 and not isinstance(prompts[0], (str, Sequence)))
        every: list[Any] = [prompts] if single else list(prompts)
        if not every:
            raise InvalidInput("no prompts were given")
        one = params or SamplingParams()
        chosen = [one] * len(every) if isinstance(one, SamplingParams) else list(one)
        if len(chosen) != len(every):
            raise InvalidInput(
                f"{len(every)} prompts and {len(chosen)} sampling parameters; give one for each prompt, or one for all"
            )
        return [self._request(i, prompt, p) for i, (prompt, p) in enumerate(zip(every, chosen, strict=True))]

    def _request(self, index: int, prompt: Prompt, params: SamplingParams) -> Request:
        ids = tuple(self.tokenizer.encode(prompt)) if isinstance(prompt, str) else tuple(prompt)
        self._check_ids(ids, f"prompt {index}")
        self._check_length(len(ids), params.max_tokens, f"prompt {index}")
        return Request(index, ids, params, self._text_stream(params), frozenset(self._eos()))

    def _check_idle(self) -> None:
        if self._queue.running or self._queue.waiting:
            raise InvalidInput("an earlier stream is not at its end; read it to its end or close() it first")

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
                f"{what} has {prompt} tokens and {new} new ones were asked for; the context holds {self.context} and "
                f"{self.model.spec.name} allows {self.model.spec.max_positions}; shorten it or ask for fewer"
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


def _topology(
    devices: DeviceManager | Topology | None, schedule: Schedule | None, memory: Mapping[str, str | int] | None
) -> Topology:
    """The devices to run on: those given, else this machine's together with a schedule's simulated ones."""
    if isinstance(devices, Topology):
        return devices
    if devices is not None:
        return devices.topology
    here = DeviceManager(measure="never" if schedule is not None else "cached").topology
    if schedule is None:
        return here
    known = {d.name for d in here.devices}
    declared = [d for d in schedule.topology.devices if d.name not in known and _stands_in(d)]
    links = [x for x in schedule.topology.links if {x.src, x.dst} <= known | {d.name for d in declared}]
    return Topology((*here.devices, *declared), (*here.links, *links))


def _stands_in(device: DeviceSpec) -> bool:
    """Devices that any machine can play: simulated ones, and further shares of the host (cpu:1)."""
    return device.kind in ("SIM", "CPU") and "/" not in device.name


def _check_given(schedule: Schedule, model: Model, topology: Topology, work: Workload) -> None:
    """A schedule that was made elsewhere or earlier must fit this model and what this machine has now."""
    here = schedule.with_topology(topology.only(schedule.devices_used()))
    here.validate(model.graph)
    here.check_memory(model.graph, work)


def _set_threads(threads: int | None, topology: Topology, schedule: Schedule) -> int:
    """Threads that torch computes with: as asked, else the cores of the CPU devices in use."""
    if threads is not None and not 1 <= threads <= 4096:
        raise InvalidInput(f"threads is {threads}; it must be a whole number of at least 1")
    cores = sum(topology.device(n).cores for n in schedule.devices_used() if topology.device(n).kind == "CPU")
    count = threads or max(1, cores or torch.get_num_threads())
    torch.set_num_threads(count)
    return count
