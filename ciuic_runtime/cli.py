"""The command `ciuic`: what people type, turned into calls of the public API.
Knows options, exit codes and streams (results on stdout, everything else on stderr); what it prints is in `show.py`."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from ciuic_runtime.devices.errors import CiuicError, InvalidInput
from ciuic_runtime.devices.files import check_can_write
from ciuic_runtime.devices.units import parse_bytes

if TYPE_CHECKING:
    from ciuic_runtime.devices.manager import DeviceManager
    from ciuic_runtime.engine.llm import LLM
    from ciuic_runtime.engine.request import RequestOutput
    from ciuic_runtime.engine.sampling import SamplingParams
    from ciuic_runtime.models.checkpoint import Checkpoint
    from ciuic_runtime.models.spec import ModelSpec
    from ciuic_runtime.schedulers.placement import Placement

log = logging.getLogger("ciuic")

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130


class _InOrder(TyperGroup):
    """Lists commands in the order in which a new user needs them."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)


app = typer.Typer(
    cls=_InOrder,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Plan, run and inspect DeepSeek models on whatever hardware there is.",
)

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="checkpoint folder, .gguf file, config.json or known name")
]
CheckpointArgument = Annotated[str, typer.Argument(metavar="MODEL", help="checkpoint folder or .gguf file")]
JsonOption = Annotated[bool, typer.Option("--json", help="one JSON object on stdout and nothing else there")]
DevicesOption = Annotated[
    Path | None, typer.Option("--devices", metavar="FILE.toml", help="hardware facts to use instead of discovery")
]
PlacementOption = Annotated[
    Path | None, typer.Option("--placement", metavar="FILE.toml", help="rules about what goes where")
]
MemoryOption = Annotated[str | None, typer.Option("--memory", metavar="cpu=16GiB,...", help="memory budget by device")]
GoalOption = Annotated[str | None, typer.Option("--goal", help="latency, throughput or first-token")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", help="new tokens per prompt")]
Temperature = Annotated[float, typer.Option("--temperature", help="0 is greedy")]
TopK = Annotated[int, typer.Option("--top-k", help="0: all tokens")]
TopP = Annotated[float, typer.Option("--top-p")]
MinP = Annotated[float, typer.Option("--min-p")]
Repetition = Annotated[float, typer.Option("--repetition-penalty")]
Seed = Annotated[int | None, typer.Option("--seed", help="default: drawn afresh and reported")]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="end before this text; may be repeated")]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="go on after an end-of-sequence token")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bf16, int8 or int4")]
ScheduleOption = Annotated[
    Path | None, typer.Option("--schedule", metavar="FILE.json", help="a saved schedule to carry out")
]
Threads = Annotated[int | None, typer.Option("--threads", help="default: the cores this process may use")]
Kernels = Annotated[str, typer.Option("--kernels", help="auto, amx, avx512, avx512vnni, avx2, portable or reference")]
CachePolicyOption = Annotated[
    str | None, typer.Option("--cache-policy", help="which routed experts stay in memory: lfu, lru, popularity or pin")
]
Lookahead = Annotated[
    int | None, typer.Option("--lookahead", help="layers ahead that experts are guessed and read from disk; 0: none")
]
IoThreads = Annotated[int | None, typer.Option("--io-threads", help="threads that read pages from disk")]
RoutingOption = Annotated[
    Path | None, typer.Option("--routing", metavar="FILE", help="a recording that says which experts are popular")
]
FormatOption = Annotated[str, typer.Option("--format", help="auto, float32, bf16, int8 or int4")]
PromptTokens = Annotated[int, typer.Option("--prompt-tokens")]
BatchOption = Annotated[int, typer.Option("--batch", help="sequences at once")]
HtmlOption = Annotated[
    Path | None, typer.Option("--html", metavar="FILE.html", help="write a report that a browser shows")
]
Executor = Annotated[str, typer.Option("--executor", help="local, or ray: each stage is a process of a cluster")]
Stages = Annotated[
    int | None, typer.Option("--stages", help="processes in a row, each with some layers; default: as the plan has it")
]
Address = Annotated[
    str | None,
    typer.Option("--address", metavar="HOST:PORT", help="of a Ray cluster; default: one of this machine's own"),
]
Insecure = Annotated[bool, typer.Option("--insecure", help="join a cluster that asks for no token")]
UseNewNodes = Annotated[
    bool, typer.Option("--use-new-nodes", help="that join the cluster meanwhile, at once; else by ciuic replan")
]
Context = Annotated[int | None, typer.Option("--context", help="positions per sequence: prompt and new tokens")]


@app.command()
def devices(
    measure: Annotated[str, typer.Option("--measure", help="cached, fresh or never")] = "cached",
    path: Annotated[Path, typer.Option("--path", help="folder whose disk is looked at")] = Path("."),
    devices: DevicesOption = None,
    address: Address = None,
    insecure: Insecure = False,
    save: Annotated[Path | None, typer.Option("--save", metavar="FILE.toml", help="write the facts as TOML")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what is here, or on a cluster's nodes, and how fast it measured."""
    from ciuic_runtime.devices.toml import topology_to_dict

    hw = _cluster(address, insecure) if address else _hardware(devices, measure, path)
    if save:
        hw.to_toml(save)
    document = topology_to_dict(hw.topology)
    _result(as_json, {"schema_version": 1, "devices": document["device"], "links": document["link"]}, lambda: str(hw))


@app.command()
def doctor(kernels: Kernels = "auto", as_json: JsonOption = False) -> None:
    """Show what is installed, which kernels are used, and what is missing."""
    from ciuic_runtime.doctor import diagnose
    from ciuic_runtime.ops.registry import registry_report
    from ciuic_runtime.show import checks_table

    checks, report = diagnose(), registry_report(kernels)
    found = report.to_dict() if report else {"kernels": None, "operators": []}  # no torch: nothing computes
    document = {"schema_version": 1, "checks": [asdict(c) for c in checks], **found}
    _result(as_json, document, lambda: f"{checks_table(checks)}\n\n{report or 'operators: none without torch'}")


@app.command()
def plan(
    model: ModelArgument,
    format: FormatOption = "auto",
    devices: DevicesOption = None,
    placement: PlacementOption = None,
    memory: MemoryOption = None,
    goal: GoalOption = None,
    prompt_tokens: PromptTokens = 512,
    max_tokens: MaxTokens = 128,
    batch: BatchOption = 1,
    threads: Threads = None,
    save: Annotated[Path | None, typer.Option("--save", metavar="FILE.json", help="write the schedule")] = None,
    trace: Annotated[
        Path | None, typer.Option("--trace", metavar="FILE.json", help="write the forecast as a Chrome trace")
    ] = None,
    html: HtmlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the schedule for a model before anything is loaded."""
    import ciuic_runtime as ciuic
    from ciuic_runtime.basis import Basis
    from ciuic_runtime.curves import load_calibration
    from ciuic_runtime.schedulers.chrome import write_recording
    from ciuic_runtime.schedulers.recording import Recording

    work = ciuic.Workload(prompt_tokens, max_tokens, batch)
    known = ciuic.Model(model, format)
    schedule = ciuic.plan(
        known, _hardware(devices), memory=_budgets(memory), goal=goal or "latency", workload=work,
        placement=_placement(placement), threads=threads,
    )  # fmt: skip
    if save:
        schedule.to_json(save)
    if trace or html:
        basis = Basis(known, schedule, load_calibration(known, schedule.topology))
        forecast = basis.forecaster.trace()
        if trace:
            write_recording(replace(Recording.of(forecast), basis=basis.to_dict()), trace)
        if html:
            schedule.to_html(html, forecast, graph=known.graph)
    _result(as_json, schedule.to_dict(), lambda: str(schedule))


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
    with _open(
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
            _print_json(report)
        else:
            print(run_summary(llm, report, comparison), file=sys.stderr)
    if interrupted:
        raise _Interrupted


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
    with _open(
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
        _print_json({"schema_version": 1, "messages": messages})


@app.command()
def serve(
    model: CheckpointArgument,
    host: Annotated[str, typer.Option("--host", help="address to listen at")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="0: any that is free")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option("--api-key", envvar="CIUIC_API_KEY", help="asked of clients; may be repeated"),
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="other machines may come in without a key")] = False,
    model_name: Annotated[str | None, typer.Option("--model-name", help="default: the folder's")] = None,
    max_num_seqs: Annotated[int | None, typer.Option("--max-num-seqs", help="requests that run at once")] = None,
    kv_tokens: Annotated[
        int | None,
        typer.Option("--kv-tokens", help="positions in the cache, all requests together; default: everybody's context"),
    ] = None,
    max_waiting: Annotated[int, typer.Option("--max-waiting", help="requests that wait for their turn")] = 256,
    max_body: Annotated[str, typer.Option("--max-body", metavar="SIZE", help="of a request")] = "8MiB",
    max_seconds: Annotated[float | None, typer.Option("--max-seconds", help="of a request; default: no limit")] = None,
    dtype: Dtype = "auto",
    schedule: ScheduleOption = None,
    placement: PlacementOption = None,
    memory: MemoryOption = None,
    goal: GoalOption = None,
    devices: DevicesOption = None,
    threads: Threads = None,
    kernels: Kernels = "auto",
    cache_policy: CachePolicyOption = None,
    lookahead: Lookahead = None,
    io_threads: IoThreads = None,
    routing: RoutingOption = None,
    context: Context = None,
    executor: Executor = "local",
    stages: Stages = None,
    address: Address = None,
    join_insecure: Annotated[
        bool, typer.Option("--join-insecure", help="join a Ray cluster that asks for no token")
    ] = False,
    use_new_nodes: UseNewNodes = False,
    as_json: JsonOption = False,
) -> None:
    """Answer many users over HTTP, as OpenAI's API has it, with a page to talk to at /."""
    from ciuic_runtime.models.checkpoint import open_checkpoint
    from ciuic_runtime.models.tokenizer import load_tokenizer
    from ciuic_runtime.server.config import ServerConfig, default_name
    from ciuic_runtime.server.serve import listening
    from ciuic_runtime.server.serve import serve as serve_model

    checkpoint = open_checkpoint(model)
    load_tokenizer(model)  # none: say so now
    name = model_name or default_name(checkpoint.path)
    config = ServerConfig(
        host, port, name, tuple(api_key or ()), insecure, parse_bytes(max_body), max_waiting, max_seconds=max_seconds
    )

    def ready(url: str) -> None:
        if as_json:
            _print_json({"schema_version": 1, "url": url, "model": name})
            sys.stdout.flush()

    with listening(config) as taken, _open(
        checkpoint, dtype=dtype, schedule=schedule, placement=placement, memory=memory, goal=goal, devices=devices,
        threads=threads, kernels=kernels, context=context, max_num_seqs=max_num_seqs, cache_policy=cache_policy,
        lookahead=lookahead, io_threads=io_threads, routing=routing, serving=True, kv_tokens=kv_tokens,
        executor=executor, stages=stages, address=address, insecure=join_insecure, use_new_nodes=use_new_nodes,
    ) as llm:  # fmt: skip
        serve_model(llm, config, taken, ready)


@app.command()
def pack(
    model: CheckpointArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="folder to write; what is unfinished is in OUT.partial")],
    format: Annotated[str, typer.Option("--format", help="int4, int8 or bf16")] = "int4",
    threads: Threads = None,
    as_json: JsonOption = False,
) -> None:
    """Write a model's weights in fewer bits, as they are computed with; an interrupted packing can be gone on with."""
    from ciuic_runtime.packing import pack as pack_model
    from ciuic_runtime.show import pack_summary, progress_bar

    try:
        with progress_bar("packing") as progress:
            report = pack_model(model, out, format, threads, progress)
    except KeyboardInterrupt:
        raise _Stopped(f"interrupted; the same command goes on with what is in {out}.partial") from None
    _result(as_json, report.to_dict(), lambda: pack_summary(report))


@app.command()
def calibrate(
    model: ModelArgument,
    format: FormatOption = "auto",
    threads: Threads = None,
    kernels: Kernels = "auto",
    fresh: Annotated[bool, typer.Option("--fresh", help="measure again what is known already")] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure how fast this machine computes a model's operators, so that plans rest on that; below a minute."""
    import ciuic_runtime as ciuic
    from ciuic_runtime.calibrate import calibrate as measure
    from ciuic_runtime.calibrate import curves_of
    from ciuic_runtime.devices.threads import with_threads
    from ciuic_runtime.show import curves_table

    known = ciuic.Model(model, format)
    topology = _hardware(None).topology
    calibration = measure(known, topology, threads, kernels, fresh, _say)
    curves = curves_of(known, with_threads(topology, threads), calibration)
    document = {
        "schema_version": 1, "model": known.spec.name, "format": known.format, "curves": [asdict(c) for c in curves],
    }  # fmt: skip
    _result(as_json, document, lambda: curves_table(curves))


@app.command()
def bench(
    model: ModelArgument,
    prompt_tokens: PromptTokens = 512,
    max_tokens: MaxTokens = 128,
    batch: BatchOption = 1,
    rounds: Annotated[int, typer.Option("--rounds", min=1, max=1000, help="repetitions; the median is shown")] = 3,
    dtype: Dtype = "auto",
    schedule: ScheduleOption = None,
    placement: PlacementOption = None,
    memory: MemoryOption = None,
    goal: GoalOption = None,
    devices: DevicesOption = None,
    threads: Threads = None,
    kernels: Kernels = "auto",
    cache_policy: CachePolicyOption = None,
    lookahead: Lookahead = None,
    io_threads: IoThreads = None,
    html: HtmlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a workload with random prompts, and show the forecast beside it. A model without weights (a config.json
    or a known name) gets random ones."""
    import ciuic_runtime as ciuic
    from ciuic_runtime.bench import bench as measure
    from ciuic_runtime.bench import weights_for
    from ciuic_runtime.history import record_of, remember
    from ciuic_runtime.report import bench_report
    from ciuic_runtime.show import bench_summary

    work = ciuic.Workload(prompt_tokens, max_tokens, batch)
    if html:
        check_can_write(html)
    with _open(
        weights_for(model), dtype=dtype, schedule=schedule, placement=placement, memory=memory, goal=goal,
        devices=devices, threads=threads, kernels=kernels, context=None, workload=work, cache_policy=cache_policy,
        lookahead=lookahead, io_threads=io_threads,
    ) as llm:  # fmt: skip
        found = measure(llm, work, rounds, progress=_say)
        for one in found.rounds:
            remember(record_of(llm, one.trace, one.comparison))
        if html:
            llm.schedule.to_html(html, llm.forecast_trace(), found.median.trace, llm.model.graph)
        document = bench_report(llm, found)
        _result(as_json, document, lambda: bench_summary(llm, found))


@app.command()
def score(as_json: JsonOption = False) -> None:
    """Show how far the planner's forecasts were off in the runs so far."""
    from ciuic_runtime.history import history_file, read_history, scores
    from ciuic_runtime.show import score_table

    records = read_history()
    found = scores(records)
    document = {
        "schema_version": 1, "file": str(history_file()), "scores": {name: asdict(s) for name, s in found.items()},
        "runs": [asdict(r) for r in records],
    }  # fmt: skip
    _result(as_json, document, lambda: score_table(found, records))


@app.command()
def replay(
    recording: Annotated[Path, typer.Argument(metavar="FILE", help="written by ciuic run --record-routing")],
    memory: Annotated[str, typer.Option("--memory", metavar="cpu=16GiB", help="memory for weights")],
    as_json: JsonOption = False,
) -> None:
    """Score every cache policy on recorded routing, beside the optimum, and say which to use."""
    from ciuic_runtime.engine.routing import read_routing
    from ciuic_runtime.schedulers.replay import replay as replay_policies
    from ciuic_runtime.show import progress_bar, replay_table

    budgets = _budgets(memory)
    if len(budgets) != 1:
        raise InvalidInput(f"--memory {memory!r}: a replay is of one device's memory; give one, such as cpu=16GiB")
    routing = read_routing(recording)
    with progress_bar("replaying") as progress:
        found = replay_policies(routing, next(iter(budgets.values())), progress)
    _result(as_json, {"schema_version": 1, **asdict(found)}, lambda: replay_table(found, str(recording)))


def _version(asked: bool) -> None:
    if asked:
        from ciuic_runtime import __version__

        print(f"ciuic {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print it")] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; turns every failure into one line (or `{"error": ...}` with --json) and its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    _set_up_streams()
    sys.exit(_exit_code(arguments))


def _exit_code(arguments: list[str]) -> int:
    as_json = "--json" in arguments
    command = typer.main.get_command(app)
    try:
        code = command.main(arguments, prog_name="ciuic", standalone_mode=False)
        sys.stdout.flush()
    except _Interrupted:
        return EXIT_INTERRUPTED
    except (KeyboardInterrupt, typer.Abort) as error:
        return _fail(as_json, error, "interrupted", EXIT_INTERRUPTED)
    except CiuicError as error:
        return _fail(as_json, error, str(error), error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads on; the last flush stays quiet
        return EXIT_FAILED
    except Exception as error:
        if explain := getattr(error, "format_message", None):  # typer's own: a wrong option or argument
            text = explain()  # empty where only the help was asked for, which is on stdout by now
            return _fail(as_json, error, text and f"{text.rstrip('.')}; see ciuic --help", EXIT_BAD_INPUT)
        if os.environ.get("CIUIC_DEBUG"):
            raise
        if isinstance(error, OSError):
            return _fail(as_json, error, str(error), EXIT_FAILED)
        text = f"{type(error).__name__}: {error} (a mistake of ours; CIUIC_DEBUG=1 shows where)"
        return _fail(as_json, error, text, EXIT_FAILED)
    return code if isinstance(code, int) else 0


class _Stopped(CiuicError):
    """Ctrl-C came before there was anything to show; the message says how to go on."""

    exit_code = EXIT_INTERRUPTED


class _Interrupted(Exception):
    """Ctrl-C came, and what there was has been shown."""


def _fail(as_json: bool, error: BaseException, message: str, code: int) -> int:
    message = " ".join(message.split())
    if as_json:
        _print_json({"error": {"type": type(error).__name__, "message": message, "exit_code": code}})
    elif message:
        print(f"ciuic: {message}", file=sys.stderr)
    return code


def _set_up_streams() -> None:
    """Text that the terminal cannot show becomes '?' there, and messages go nowhere where there is no stderr."""
    sys.stderr = sys.stderr or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("ciuic: %(message)s"))
    log.handlers[:] = [handler]
    log.propagate = False
    level = os.environ.get("CIUIC_LOG", "WARNING").upper()
    log.setLevel(level if level in logging.getLevelNamesMapping() else "WARNING")


def _result(as_json: bool, document: dict[str, Any], text: Callable[[], str]) -> None:
    if as_json:
        _print_json(document)
    else:
        print(text())


def _print_json(document: dict[str, Any]) -> None:
    print(json.dumps(document))


def _hardware(file: Path | None, measure: str = "cached", path: Path | None = None) -> DeviceManager:
    from ciuic_runtime.devices.manager import DeviceManager

    if file is not None:
        return DeviceManager.from_toml(file)
    return DeviceManager(path, measure, progress=_say)


def _cluster(address: str, insecure: bool) -> DeviceManager:
    from ciuic_runtime.devices.manager import DeviceManager

    return DeviceManager.from_ray(address, insecure=insecure, progress=_say)


def _say(what: str) -> None:
    print(f"ciuic: {what}", file=sys.stderr)


def _placement(file: Path | None) -> Placement | None:
    from ciuic_runtime.schedulers.placement import Placement

    return Placement.from_toml(file) if file else None


def _budgets(text: str | None) -> dict[str, int]:
    """ "cpu=16GiB,cuda:0=20GiB" by device."""
    budgets = {}
    for part in text.split(",") if text else []:
        name, equals, size = part.partition("=")
        if not equals or not name.strip():
            raise InvalidInput(f"--memory {text!r}: {part!r} is not DEVICE=SIZE, such as cpu=16GiB")
        budgets[name.strip()] = parse_bytes(size)
    return budgets


@contextmanager
def _open(
    model: str | Checkpoint, *, schedule: Path | None, placement: Path | None, memory: str | None, devices: Path | None,
    context: int | None, **options: Any,
) -> Iterator[LLM]:  # fmt: skip
    """The model, loaded with a progress bar on the terminal; a line says what was planned."""
    import ciuic_runtime as ciuic
    from ciuic_runtime.show import plan_line, progress_bar

    saved = ciuic.Schedule.from_json(schedule) if schedule else None
    hw: DeviceManager | None = None
    if options.get("address") and not devices:
        hw = _cluster(options["address"], options["insecure"])
    elif devices or not saved:
        hw = _hardware(devices)
    with progress_bar("loading") as progress:
        llm = ciuic.LLM(
            model, schedule=saved, placement=_placement(placement), memory=_budgets(memory), devices=hw,
            max_model_len=context, progress=progress, **options,
        )  # fmt: skip
    with llm:
        print(f"ciuic: {plan_line(llm.schedule)}", file=sys.stderr)
        yield llm


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


from ciuic_runtime import (  # noqa: E402
    cli_cluster,  # noqa: F401  its commands: launch, jobs, logs, stop, replan
    cli_dashboard,  # noqa: F401  its command: dashboard
)

if __name__ == "__main__":
    from ciuic_runtime import cli  # under its own name, whose app has all commands

    cli.main()
