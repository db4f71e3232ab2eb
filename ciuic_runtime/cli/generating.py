"""The commands `run` and `chat`: text on stdout as it comes.
Knows prompts and Ctrl-C; what is told of a run afterwards is in `report.py` and `show.py`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ciuic_runtime.cli.app import Interrupted, app
from ciuic_runtime.cli.opening import opened
from ciuic_runtime.cli.options import (
    Address,
    CachePolicyOption,
    CheckpointArgument,
    Context,
    DevicesOption,
    Dtype,
    Executor,
    GoalOption,
    HtmlOption,
    IgnoreEos,
    Insecure,
    IoThreads,
    JsonOption,
    Kernels,
    Lookahead,
    MaxTokens,
    MemoryOption,
    MinP,
    PlacementOption,
    Repetition,
    RoutingOption,
    ScheduleOption,
    Seed,
    Stages,
    Stop,
    Temperature,
    Threads,
    TopK,
    TopP,
    UseNewNodes,
)
from ciuic_runtime.cli.output import print_json
from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.devices.files import check_can_write

if TYPE_CHECKING:
    from ciuic_runtime.engine.llm import LLM
    from ciuic_runtime.engine.request import RequestOutput
    from ciuic_runtime.engine.sampling import SamplingParams
    from ciuic_runtime.models.spec import ModelSpec


@app.command()
def run(
    model: CheckpointArgument,
    prompt: Annotated[list[str], typer.Option("--prompt", help="text to continue; '-' reads stdin; may be repeated")],
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Repetition = 1.0,
    seed: Seed = None,
    stop: Stop = None,
    ignore_eos: IgnoreEos = False,
    chat_template: Annotated[bool, typer.Option("--chat", help="put each prompt through the chat template")] = False,
    dtype: Dtype = "auto",
    schedule: ScheduleOption = None,
    placement: PlacementOption = None,
    memory: MemoryOption = None,
    goal: GoalOption = None,
    devices: DevicesOption = None,
    threads: Threads = None,
    kernels: Kernels = "auto",
    context: Context = None,
    cache_policy: CachePolicyOption = None,
    lookahead: Lookahead = None,
    io_threads: IoThreads = None,
    routing: RoutingOption = None,
    record_routing: Annotated[
        Path | None,
        typer.Option("--record-routing", metavar="FILE", help="write which experts each token used, for ciuic replay"),
    ] = None,
    executor: Executor = "local",
    stages: Stages = None,
    address: Address = None,
    insecure: Insecure = False,
    use_new_nodes: UseNewNodes = False,
    trace: Annotated[
        Path | None, typer.Option("--trace", metavar="FILE.json", help="write what happened as a Chrome trace")
    ] = None,
    html: HtmlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Continue a prompt, and show the forecast beside what happened."""
    import ciuic_runtime as ciuic
    from ciuic_runtime.engine.routing import write_routing
    from ciuic_runtime.history import record_of, remember
    from ciuic_runtime.models.checkpoint import open_checkpoint
    from ciuic_runtime.models.tokenizer import load_tokenizer
    from ciuic_runtime.report import run_report
    from ciuic_runtime.schedulers.chrome import write_recording
    from ciuic_runtime.show import run_summary

    for file in filter(None, (trace, record_routing, html)):
        check_can_write(file)
    params = ciuic.SamplingParams(
        max_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed, tuple(stop or ()), ignore_eos
    )
    texts = [_read_stdin() if text == "-" else text for text in prompt]
    checkpoint = open_checkpoint(model)
    tokenizer = load_tokenizer(model)
    if chat_template:
        texts = [tokenizer.apply_chat_template([{"role": "user", "content": text}]) for text in texts]
    ids = [tokenizer.encode(text, add_special=not chat_template) for text in texts]
    _check_lengths(ids, max_tokens, context, checkpoint.spec)
    work = ciuic.Workload(max(map(len, ids)), max_tokens, len(ids))
    with opened(
        checkpoint, dtype=dtype, schedule=schedule, placement=placement, memory=memory, goal=goal, devices=devices,
        threads=threads, kernels=kernels, executor=executor, context=context, workload=work, cache_policy=cache_policy,
        lookahead=lookahead, io_threads=io_threads, routing=routing, stages=stages, address=address, insecure=insecure,
        use_new_nodes=use_new_nodes,
    ) as llm:  # fmt: skip
        recorder = llm.record_routing() if record_routing else None
        outputs, interrupted = _generate(llm, ids, params, show=not as_json)
        comparison = llm.comparison
        report = run_report(llm, outputs, comparison)
        if not interrupted:
            remember(record_of(llm, llm.trace, comparison))
        if record_routing and recorder and recorder.anything:
            write_routing(recorder.routing(), record_routing)
        if trace:
            write_recording(llm.recording(), trace)
        if html:
            llm.schedule.to_html(html, llm.forecast_trace(), llm.trace, llm.model.graph)
        if as_json:
            print_json(report)
        else:
            print(run_summary(llm, report, comparison), file=sys.stderr)
    if interrupted:
        raise Interrupted


@app.command()
def chat(
    model: CheckpointArgument,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Repetition = 1.0,
    seed: Seed = None,
    system: Annotated[str | None, typer.Option("--system", help="system message")] = None,
    dtype: Dtype = "auto",
    schedule: ScheduleOption = None,
    placement: PlacementOption = None,
    memory: MemoryOption = None,
    devices: DevicesOption = None,
    threads: Threads = None,
    kernels: Kernels = "auto",
    cache_policy: CachePolicyOption = None,
    lookahead: Lookahead = None,
    io_threads: IoThreads = None,
    routing: RoutingOption = None,
    context: Context = None,
    as_json: JsonOption = False,
) -> None:
    """Talk to a model; an empty line or end of input leaves, Ctrl-C stops an answer."""
    import ciuic_runtime as ciuic
    from ciuic_runtime.models.checkpoint import open_checkpoint
    from ciuic_runtime.models.tokenizer import load_tokenizer

    params = ciuic.SamplingParams(max_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed)
    checkpoint = open_checkpoint(model)
    tokenizer = load_tokenizer(model)
    messages = [{"role": "system", "content": system}] if system else []
    tokenizer.apply_chat_template(
        [*messages, {"role": "user", "content": "?"}]
    )  # none, or one that refuses: say so now
    with opened(
        checkpoint, dtype=dtype, schedule=schedule, placement=placement, memory=memory, devices=devices,
        threads=threads, kernels=kernels, context=context, max_num_seqs=1, cache_policy=cache_policy,
        lookahead=lookahead, io_threads=io_threads, routing=routing,
    ) as llm:  # fmt: skip
        while question := _ask():
            asked = [*messages, {"role": "user", "content": question}]
            ids = tokenizer.encode(tokenizer.apply_chat_template(asked), add_special=False)
            if len(ids) + max_tokens > llm.context:
                print(f"ciuic: the conversation fills the context of {llm.context}; begin anew", file=sys.stderr)
                messages = messages[: bool(system)]
                continue
            outputs, _ = _generate(llm, [ids], params, show=not as_json)
            if outputs[0].text:  # an answer stopped before its first word is as if not asked
                messages = [*asked, {"role": "assistant", "content": outputs[0].text}]
    if as_json:
        print_json({"schema_version": 1, "messages": messages})


def _generate(
    llm: LLM, prompts: Sequence[Sequence[int]], params: SamplingParams, show: bool
) -> tuple[list[RequestOutput], bool]:
    """Runs the prompts; text streams to stdout as it comes (a batch's texts one after the other, when they end).

    Ctrl-C ends the generation and keeps what there is: (an output for every prompt, whether it was interrupted)."""
    from ciuic_runtime.engine.request import not_begun

    latest: dict[int, RequestOutput] = {}
    single, interrupted = len(prompts) == 1, False
    stream = llm.stream(list(prompts), params)
    try:
        for text, output in stream:
            latest[output.index] = output
            if show and single:
                print(text, end="", flush=True)
            elif show and output.finish_reason:
                _print_one(output)
    except KeyboardInterrupt:
        interrupted = True
        stream.close()
    outputs = [latest.get(i) or not_begun(i, ids) for i, ids in enumerate(prompts)]
    outputs = [o if o.finish_reason else replace(o, finish_reason="interrupted") for o in outputs]
    if show and single:
        print(flush=True)
    elif show:
        for output in outputs:
            if output.finish_reason == "interrupted":
                _print_one(output)
    return outputs, interrupted


def _print_one(output: RequestOutput) -> None:
    print(f"--- prompt {output.index}\n{output.text}", flush=True)


def _read_stdin() -> str:
    """All of standard input, without the line end that `echo` and editors add."""
    if sys.stdin is None:
        raise InvalidInput("--prompt - reads standard input, which is closed; give the prompt as text")
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InvalidInput(f"standard input is not UTF-8 text ({error}); convert it first") from error


def _check_lengths(prompts: Sequence[Sequence[int]], new: int, context: int | None, spec: ModelSpec) -> None:
    """What the engine would refuse anyway, before the model is loaded."""
    limit = min(context or spec.max_positions, spec.max_positions)
    for i, ids in enumerate(prompts):
        if not ids:
            raise InvalidInput(f"prompt {i} is empty; give at least one token")
        if len(ids) + new > limit:
            raise InvalidInput(
                f"prompt {i} has {len(ids)} tokens and {new} new ones were asked for; the context holds {limit} "
                f"({spec.name} allows {spec.max_positions}); shorten it, or ask for fewer with --max-tokens"
            )


def _ask() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""
