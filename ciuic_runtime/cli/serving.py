"""The command `serve`: the address is taken before the model is loaded. What is answered there is in `server/`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ciuic_runtime.cli.app import app
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
    IoThreads,
    JsonOption,
    Kernels,
    Lookahead,
    MemoryOption,
    PlacementOption,
    RoutingOption,
    ScheduleOption,
    Stages,
    Threads,
    UseNewNodes,
)
from ciuic_runtime.cli.output import print_json
from ciuic_runtime.devices.units import parse_bytes


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
            print_json({"schema_version": 1, "url": url, "model": name})
            sys.stdout.flush()

    with listening(config) as taken, opened(
        checkpoint, dtype=dtype, schedule=schedule, placement=placement, memory=memory, goal=goal, devices=devices,
        threads=threads, kernels=kernels, context=context, max_num_seqs=max_num_seqs, cache_policy=cache_policy,
        lookahead=lookahead, io_threads=io_threads, routing=routing, serving=True, kv_tokens=kv_tokens,
        executor=executor, stages=stages, address=address, insecure=join_insecure, use_new_nodes=use_new_nodes,
    ) as llm:  # fmt: skip
        serve_model(llm, config, taken, ready)
