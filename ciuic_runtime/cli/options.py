"""Options and arguments that several commands have, each with the help that all of them show.
Knows no command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
