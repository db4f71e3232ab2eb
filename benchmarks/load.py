"""Load on a server that speaks OpenAI's completions: prompts of token ids go in, and when text comes back is kept.
Plain sockets and one thread, since client and server share the processors; who serves, it does not know."""

from __future__ import annotations

import asyncio
import json
import math
import random
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

Until = Callable[[Callable[[], bool]], Awaitable[None]]

HOST = "127.0.0.1"
MODEL = "served"  # the name that servers answer to


@dataclass(frozen=True, slots=True)
class Server:
    port: int
    pid: int


@dataclass(eq=False)
class Stream:
    """One request and what has come back of it. Times are the client's, in seconds."""

    prompt: Sequence[int]
    new: int
    sent: float = 0.0
    arrivals: list[float] = field(default_factory=list)  # of each event with text: one per token
    num_tokens: int = 0  # new ones, as the server counts them
    cached: int = 0  # of the prompt's tokens, those that it had computed before

    @property
    def first_token_s(self) -> float:
        return self.arrivals[0] - self.sent

    def gaps(self, begin: float = 0.0, end: float = float("inf")) -> list[float]:
        """Seconds from token to token, of the gaps whose middle lies in a span of time."""
        pairs = zip(self.arrivals, self.arrivals[1:], strict=False)
        return [after - before for before, after in pairs if begin < (before + after) / 2 < end]

    async def run(self, server: Server) -> Stream:
        """Reads the answer to its end."""
        body = json.dumps({
            "model": MODEL, "prompt": list(self.prompt), "max_tokens": self.new, "temperature": 0, "top_k": 1,
            "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
        }).encode()  # fmt: skip
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {HOST}:{server.port}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        self.sent = time.perf_counter()
        reader, writer = await asyncio.open_connection(HOST, server.port)
        try:
            writer.write(head.encode() + body)
            await _check_head(reader)
            async for event in _events(reader):
                self._take(json.loads(event))
        finally:
            writer.close()
        if self.num_tokens != self.new:
            raise SystemExit(f"{self.new} tokens were asked for, {self.num_tokens} came")
        return self

    def _take(self, event: dict[str, Any]) -> None:
        if "error" in event:
            raise SystemExit(f"the server broke off: {event['error']}")
        for choice in event.get("choices") or ():
            if choice["text"]:
                self.arrivals.append(time.perf_counter())
        if usage := event.get("usage"):
            self.num_tokens = usage["completion_tokens"]
            self.cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


async def _check_head(reader: asyncio.StreamReader) -> None:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    if head.split(" ", 2)[1] != "200":
        raise SystemExit(f"the server refused: {head.splitlines()[0]}\n{(await reader.read(2000)).decode()}")
    if "transfer-encoding: chunked" not in head.lower():
        raise SystemExit(f"a stream comes in chunks (HTTP/1.1), but the server answered\n{head}")


async def _events(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The data of server-sent events, out of the chunks of the body, up to [DONE]."""
    rest = b""
    while size := int(await reader.readline(), 16):
        rest += (await reader.readexactly(size + 2))[:-2]
        *events, rest = rest.split(b"\n\n")
        for event in events:
            if event == b"data: [DONE]":
                return
            if event.startswith(b"data: "):
                yield event[6:]
    raise SystemExit("the server closed a stream before its end")


@asynccontextmanager
async def running(server: Server, streams: Sequence[Stream]) -> AsyncIterator[Until]:
    """The streams are read meanwhile, and hung up on at the end. Gives a function that waits until something holds."""
    tasks = [asyncio.create_task(stream.run(server)) for stream in streams]

    async def until(holds: Callable[[], bool]) -> None:
        while not holds():
            if ended := [task for task in tasks if task.done()]:
                raise SystemExit(f"a stream ended while others were measured beside it: {ended[0].result()}")
            await asyncio.sleep(0.01)

    try:
        yield until
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# What is measured


def prompts(count: int, tokens: int, vocab_size: int, seed: str) -> list[list[int]]:
    """Random token ids, none of them a single byte or special."""
    draw = random.Random(seed)
    return [[draw.randrange(256, vocab_size - 8) for _ in range(tokens)] for _ in range(count)]


async def together(server: Server, count: int, tokens: int, new: int, vocab_size: int) -> list[Stream]:
    """As many requests at the same moment, read to their ends."""
    streams = [Stream(prompt, new) for prompt in prompts(count, tokens, vocab_size, f"together {count}")]
    return list(await asyncio.gather(*(stream.run(server) for stream in streams)))


def facts_of(streams: Sequence[Stream]) -> dict[str, float]:
    """Rates in tokens/s: of all new tokens over the whole time, prompts included, and while all of them decode."""
    everything = sum(s.num_tokens for s in streams) / (
        max(s.arrivals[-1] for s in streams) - min(s.sent for s in streams)
    )
    begin, end = max(s.arrivals[0] for s in streams), min(s.arrivals[-1] for s in streams)
    decoded = sum(begin < at <= end for s in streams for at in s.arrivals)
    first, gaps = [s.first_token_s for s in streams], [g for s in streams for g in s.gaps()]
    return {
        "rate": everything, "decode_rate": decoded / (end - begin) if end > begin else float("nan"),
        "first_token_s": statistics.median(first), "first_token_p95_s": percentile(first, 0.95),
        "token_s": statistics.median(gaps), "token_p95_s": percentile(gaps, 0.95),
    }  # fmt: skip


async def beside_a_long_prompt(
    server: Server, count: int, tokens: int, long: int, quiet: int, vocab_size: int
) -> dict[str, float]:
    """Streams decode; when each has got `quiet` tokens beside the others alone, a long prompt arrives."""
    streams = [Stream(prompt, 1024) for prompt in prompts(count, tokens, vocab_size, "decoding")]
    [newcomer] = [Stream(prompt, 4) for prompt in prompts(1, long, vocab_size, "long")]
    async with running(server, streams) as until:
        await until(lambda: all(s.arrivals for s in streams))
        begin, had = time.perf_counter(), [len(s.arrivals) for s in streams]
        await until(lambda: all(len(s.arrivals) >= n + quiet for s, n in zip(streams, had, strict=True)))
        await newcomer.run(server)
        done = newcomer.arrivals[0]
        await until(lambda: all(s.arrivals[-1] > done for s in streams))
    before = [g for s in streams for g in s.gaps(begin, newcomer.sent)]
    during = [g for s in streams for g in s.gaps(newcomer.sent, done)]
    return {
        "before_s": statistics.mean(before), "before_p95_s": percentile(before, 0.95),
        "during_s": statistics.mean(during), "during_p95_s": percentile(during, 0.95), "during_most_s": max(during),
        "slowdown": statistics.mean(during) / statistics.mean(before), "first_token_s": newcomer.first_token_s,
    }  # fmt: skip


async def same_prefix(server: Server, prefix: int, own: int, vocab_size: int) -> dict[str, float]:
    """Two prompts one after the other, equal up to their own last tokens."""
    [shared] = prompts(1, prefix, vocab_size, "prefix")
    first, again = [
        await Stream([*shared, *suffix], 4).run(server) for suffix in prompts(2, own, vocab_size, "suffixes")
    ]
    return {
        "first_s": first.first_token_s, "again_s": again.first_token_s,
        "sooner": first.first_token_s / again.first_token_s, "cached_tokens": again.cached,
    }  # fmt: skip


def percentile(values: Iterable[float], share: float) -> float:
    """The smallest value that such a share of them does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * share) - 1)]
