"""A server under load: `ciuic serve` beside llama.cpp's `llama-server`, and beside our engine without a server.

    python benchmarks/serving.py MODEL [--llama-server PROGRAM --gguf FILE] [--rounds 3] [--out FILE]
    python benchmarks/serving.py --quick [--llama-server PROGRAM]     small models, one round: whether it all works

Prompts are random token ids, tokens are chosen greedily, and clients count: they run on the same processors, in this
process. Servers are started anew for each turn, since two models do not fit beside each other, and are warm when the
first case begins. Cases of a turn:

streams   1, 4 and 16 requests at one moment, 128 prompt tokens each, 128 new ones
long      8 streams decode; a prompt of 2,000 tokens arrives. Goal: no more than 2 x the time per token until it is done
prefix    a prompt of 1,000 + 50 tokens, then one with the same 1,000. Goal: the first token at least 5 x sooner
engine    `LLM.generate` of the prompts of 1 and 16 streams with the same settings. Goal: serving takes 3 % more at most

A time per token is what lies between two tokens of a stream as they arrive. Rates are of new tokens, over the whole
time, prompts included, and while all streams decode. Each turn's figures are appended to --lines as they come."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from limits import BUILT
from load import Server, beside_a_long_prompt, facts_of, prompts, same_prefix, together
from make_model import write_gguf, write_packed
from ours import Ours, Run
from process import cpu_seconds, memory_of
from rounds import Measured, Report, Sample, against, common_arguments, take_turns
from servers import Shape, ciuic_serve, free_port, llama_server, started, with_tokenizer

from ciuic_runtime.models.config import KNOWN_FOLDER, read_config

STREAMS = (1, 4, 16)
PROMPT, NEW = 128, 128  # tokens
DECODING, LONG, QUIET = 8, 2000, 16  # streams; tokens: of the prompt that arrives, and of each stream before it does
PREFIX, OWN = 1000, 50
UNTIL_GONE = 2.0  # s, in which a server notices who has hung up
CONTEXT = 2304  # tokens of each sequence; llama-server rounds it up to whole 256
CASES = ("streams", "long", "prefix", "engine")
Facts = dict[str, float]


# Turns


def load(server: Server, cases: list[str], vocab_size: int) -> Facts:
    """All cases on a server that has just started."""
    asyncio.run(together(server, 2, 64, 8, vocab_size))  # warm, and another prompt than any that counts
    facts: Facts = {}
    begin, client, served = time.perf_counter(), time.process_time(), cpu_seconds(server.pid)

    def add(case: str, run: Coroutine[Any, Any, Facts]) -> None:
        facts.update({f"{case}.{name}": value for name, value in asyncio.run(run).items()})

    if "streams" in cases:
        for count in STREAMS:
            streams = asyncio.run(together(server, count, PROMPT, NEW, vocab_size))
            facts |= {f"{count}.{name}": value for name, value in facts_of(streams).items()}
    if "long" in cases:
        add("long", beside_a_long_prompt(server, DECODING, PROMPT, LONG, QUIET, vocab_size))
        time.sleep(UNTIL_GONE)
    if "prefix" in cases:
        add("prefix", same_prefix(server, PREFIX, OWN, vocab_size))
    seconds = time.perf_counter() - begin
    return facts | {
        "client_cores": (time.process_time() - client) / seconds,
        "server_cores": (cpu_seconds(server.pid) - served) / seconds,
        "peak": memory_of(server.pid).peak,
    }


def engine(model: Path, shape: Shape, vocab_size: int) -> Facts:
    """The same prompts as in the case `streams`, without a server, in a process of its own."""
    facts: Facts = {}
    with Ours(
        model, max_num_seqs=shape.sequences, max_model_len=shape.context, threads=shape.threads, serving=True
    ) as ours:
        ours.run(prompts(2, 64, vocab_size, "together 2"), 8)
        for count in (min(STREAMS), max(STREAMS)):
            run = ours.run(prompts(count, PROMPT, vocab_size, f"together {count}"), NEW)
            facts |= {f"{count}.{name}": value for name, value in engine_facts(run, count).items()}
        facts["peak"] = ours.memory().peak
    return facts


def engine_facts(run: Run, count: int) -> Facts:
    """Rates as `facts_of` has them, from the start of the first pass."""
    decoding = [s for s in run.steps if s.phase == "decode" and s.sequences == count]
    return {
        "rate": sum(map(len, run.token_ids)) / (run.steps[-1].end - run.steps[0].start),
        "decode_rate": count * len(decoding) / (decoding[-1].end - decoding[0].start) if decoding else float("nan"),
    }


class Turns:
    """What a rival does in its turn: its server is started, loaded and stopped, and its figures are written down."""

    def __init__(self, args: argparse.Namespace, model: Path, vocab_size: int) -> None:
        self.args, self.model, self.vocab_size = args, model, vocab_size
        self.shape = Shape(max(STREAMS), CONTEXT, args.threads)
        self.rivals: dict[str, Callable[[], Sample]] = {"ciuic": self.ciuic}
        if args.llama_server is not None:
            self.rivals["llama-server"] = self.llama
        if {"streams", "engine"} <= set(args.cases):
            self.rivals["engine"] = self.engine

    def ciuic(self) -> Sample:
        port = free_port()
        return self._served("ciuic", ciuic_serve(self.model, self.shape, port), port)

    def llama(self) -> Sample:
        port = free_port()
        return self._served(
            "llama-server", llama_server(self.args.llama_server, self.args.gguf, self.shape, port), port
        )

    def engine(self) -> Sample:
        return self._written("engine", engine(self.model, self.shape, self.vocab_size))

    def _served(self, name: str, command: list[str], port: int) -> Sample:
        with started(command, port) as server:
            facts = load(server, self.args.cases, self.vocab_size)
        return self._written(name, facts)

    def _written(self, name: str, facts: Facts) -> Sample:
        self.args.lines.parent.mkdir(parents=True, exist_ok=True)
        with self.args.lines.open("a") as file:
            known = {fact: None if math.isnan(value) else value for fact, value in facts.items()}
            print(json.dumps({"rival": name, "time": round(time.time()), **known}), file=file)
        return Sample(facts.get(f"{max(STREAMS)}.rate", 0.0), facts)


# Output


class Table:
    """Medians over the rounds, one column for each server, and the median of their ratio within a round."""

    def __init__(self, found: Measured, report: Report) -> None:
        self.found, self.report = found, report
        self.servers = [name for name in ("ciuic", "llama-server") if name in found.rounds[0]]
        beside = ["ciuic : llama-server"] if len(self.servers) == 2 else []
        self._line("", self.servers + beside)
        self._line("---", ["---:"] * len(self.servers + beside))

    def row(self, name: str, fact: str, unit: str, scale: float = 1.0, compared: bool = True) -> None:
        cells = [f"{shown(self.found.fact(server, fact) * scale)} {unit}" for server in self.servers]
        if len(self.servers) == 2:
            cells.append(shown(ratio(self.found, "ciuic", "llama-server", fact)) if compared else "")
        self._line(name, cells)

    def _line(self, name: str, cells: list[str]) -> None:
        self.report.line(f"| {name:46} | " + " | ".join(f"{cell:>20}" for cell in cells) + " |")


def shown(value: float) -> str:
    """Three digits; none where there was nothing to measure, as where the first stream ends before the last begins."""
    return "-" if math.isnan(value) else f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def ratio(found: Measured, rival: str, other: str, fact: str) -> float:
    """Median over rounds of the ratio within a round: what disturbs both cancels."""
    return statistics.median(r[rival].sample.facts[fact] / r[other].sample.facts[fact] for r in found.rounds)


def tell(found: Measured, report: Report, cases: list[str]) -> None:
    table = Table(found, report)
    if "streams" in cases:
        for n in STREAMS:
            s = f"{n} stream{'s' if n > 1 else ''}"
            table.row(f"{s}: new tokens, prompts included", f"{n}.rate", "tok/s")
            table.row(f"{s}: new tokens, while all decode", f"{n}.decode_rate", "tok/s")
            table.row(f"{s}: first token, median", f"{n}.first_token_s", "ms", 1e3)
            if n > 1:
                table.row(f"{s}: first token, 95 %", f"{n}.first_token_p95_s", "ms", 1e3)
            table.row(f"{s}: time per token, median", f"{n}.token_s", "ms", 1e3)
            table.row(f"{s}: time per token, 95 %", f"{n}.token_p95_s", "ms", 1e3)
    if "long" in cases:
        table.row(f"{DECODING} streams alone: time per token, mean", "long.before_s", "ms", 1e3)
        table.row(f"beside a prompt of {LONG}: the same", "long.during_s", "ms", 1e3)
        table.row("    95 %", "long.during_p95_s", "ms", 1e3)
        table.row("    longest", "long.during_most_s", "ms", 1e3)
        table.row("    times that of before", "long.slowdown", "x", compared=False)
        table.row("    first token of the long prompt", "long.first_token_s", "ms", 1e3)
    if "prefix" in cases:
        table.row(f"prompt of {PREFIX} + {OWN}: first token", "prefix.first_s", "ms", 1e3)
        table.row("    the same prefix again", "prefix.again_s", "ms", 1e3)
        table.row("    sooner by", "prefix.sooner", "x", compared=False)
        table.row("    found in the cache", "prefix.cached_tokens", "tokens", compared=False)
    table.row("processors used by the server", "server_cores", "cores")
    table.row("    by the clients", "client_cores", "cores", compared=False)
    table.row("peak memory of the server", "peak", "GB", 1e-9)
    _goals(found, report, cases, table.servers)
    report.line(f"{found}; machine: {found.limits}; spread: {_spreads(found)}")


def _goals(found: Measured, report: Report, cases: list[str], servers: Sequence[str]) -> None:
    most, one = max(STREAMS), min(STREAMS)
    if "streams" in cases:
        for server in servers:
            gains = [gain(found, server, f"{most}.{rate}", f"{one}.{rate}") for rate in ("rate", "decode_rate")]
            report.line(
                f"{server}, {most} streams against {one}: {shown(gains[0])}x, while all decode {shown(gains[1])}x"
            )
    if "long" in cases:
        slowdown = against(found.fact("ciuic", "long.slowdown"), 2.0, "x", at_most=True)
        report.line(f"time per token beside a prompt of {LONG}, against before: {slowdown}")
    if "prefix" in cases:
        sooner = against(found.fact("ciuic", "prefix.sooner"), 5.0, "x")
        report.line(f"first token where a prefix of {PREFIX} is known, sooner by: {sooner}")
    if "engine" in cases and "streams" in cases:
        for n in (one, most):
            added, decode = (ratio(found, "engine", "ciuic", f"{n}.{rate}") - 1 for rate in ("rate", "decode_rate"))
            report.line(
                f"engine alone, {n} at once: {found.fact('engine', f'{n}.rate'):.2f} tok/s; serving adds "
                f"{against(added, 0.03, '%', at_most=True)}; while all decode {shown(100 * decode)} %"
            )


def gain(found: Measured, rival: str, fact: str, other: str) -> float:
    """Median over rounds of the ratio of two figures of one turn."""
    return statistics.median(r[rival].sample.facts[fact] / r[rival].sample.facts[other] for r in found.rounds)


def _spreads(found: Measured) -> str:
    return ", ".join(f"{name} {found.spread(name):.0%}" for name in found.rounds[0] if found.median(name))


# The program


def small_models(folder: Path) -> tuple[Path, Path]:
    """Packed and GGUF, of the kind that llama.cpp takes for DeepSeek-V2-Lite (it goes by the number of layers)."""
    config = json.loads((KNOWN_FOLDER / "deepseek-v2-lite.json").read_text()) | {
        "vocab_size": 4096, "bos_token_id": 4093, "eos_token_id": 4094, "hidden_size": 256, "intermediate_size": 512,
        "moe_intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 8,
        "num_experts_per_tok": 2, "kv_lora_rank": 128,
    }  # fmt: skip
    write_packed(config, folder / "packed", 0, "int4")
    write_gguf(config, folder / "small.gguf", 0, "q4_0")
    return folder / "packed", folder / "small.gguf"


def main() -> None:
    parser = common_arguments(__doc__, rounds=3)
    parser.add_argument(
        "model", type=Path, nargs="?", help="folder written by make_model.py, or any that can be served"
    )
    parser.add_argument("--llama-server", type=Path, help="the peer's program")
    parser.add_argument("--gguf", type=Path, help="the peer's model")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--quick", action="store_true", help="small models, one round")
    parser.add_argument("--lines", type=Path, default=BUILT / "serving.jsonl", help="one line of JSON for each turn")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ciuic-serving-") as name:
        folder = Path(name)
        if args.quick:
            args.rounds = 1
            args.model, args.gguf = small_models(folder)
        if args.model is None or (args.llama_server is not None and args.gguf is None):
            raise SystemExit("give a MODEL, and a --gguf for --llama-server; or --quick")
        vocab_size = read_config(args.model).vocab_size
        (folder / "served").mkdir()
        turns = Turns(args, with_tokenizer(args.model, vocab_size, folder / "served"), vocab_size)
        report = Report(f"Serving{', small models' if args.quick else ''}", args.out)
        found = take_turns(turns.rivals, args.rounds, args.threads, patience=1 if args.quick else 2)
        tell(found, report, args.cases)
        report.save()


if __name__ == "__main__":
    main()
