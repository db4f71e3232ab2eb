"""Thousands of requests, many of which go wrong: clients hang up at any moment or send nonsense. Whoever waits for an
answer gets the one that he would have got alone, and nothing is left behind."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from running import Running, opened, running

from ciuic_runtime.devices.spec import Topology
from ciuic_runtime.engine.llm import LLM
from ciuic_runtime.engine.request import Request
from ciuic_runtime.engine.sampling import SamplingParams

MOST_BODY = 16 << 10  # bytes
CLIENTS = 24  # at the same time, more than there are places and blocks for
MOST_GROWTH = 16 << 20  # bytes, of resident memory in the last four fifths of a long run


@pytest.fixture(scope="module")
def llm(tiny_chat: Path, here: Topology) -> Iterator[LLM]:
    """Few places, and a cache so small that sequences are preempted and prefixes evicted."""
    with opened(tiny_chat, here, max_num_seqs=6, kv_tokens=512, prefill_chunk=64) as x:
        yield x


@contextmanager
def served(llm: LLM) -> Iterator[Running]:
    """What is kept of passes and requests is full soon, so that it does not count as growth."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ciuic_runtime.engine.service.MOST_EVENTS", 1 << 16)
        patch.setattr("ciuic_runtime.engine.journal.MOST_ENDED", 1 << 10)
        with running(llm, model_name="tiny", max_body_bytes=MOST_BODY) as x:
            yield x


# What is asked, and what must come back


@dataclass(frozen=True)
class Question:
    path: str
    body: dict[str, Any]
    answers: tuple[str, ...]  # of each choice


def questions(llm: LLM, seed: int) -> list[Question]:
    """Of prompts with common beginnings, with stop strings that come, with several choices; the answers are those that
    the engine gives without a server, to each alone."""
    draw, found = random.Random(seed), []
    beginnings = ["".join(draw.choice("abcdefgh ") for _ in range(n)) for n in (0, 40, 100)]
    for i in range(40):
        text = draw.choice(beginnings) + "".join(draw.choice("ijklmnop ") for _ in range(draw.randint(1, 90)))
        ids = llm.tokenizer.encode(text)
        path, asked = draw.choice([
            ("/v1/completions", {"prompt": text}), ("/v1/completions", {"prompt": ids}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}),
        ])  # fmt: skip
        if "messages" in asked:
            ids = llm.tokenizer.encode(llm.tokenizer.apply_chat_template(asked["messages"]), add_special=False)
        body = asked | {
            "model": "tiny", "max_tokens": min(draw.choice((1, 4, 12, 40, 160)), llm.context - len(ids)), "seed": i,
            "n": draw.choice((1, 1, 1, 3)), "temperature": draw.choice((0, 0.7, 1)), "ignore_eos": draw.random() < 0.7,
        }  # fmt: skip
        answers = _alone(llm, ids, body)
        if draw.random() < 0.4 and (stops := [c for c in answers[0][1:] if c.isascii() and c.isprintable()]):
            body["stop"] = [draw.choice(stops), "never comes"]
            answers = _alone(llm, ids, body)
        found.append(Question(path, body, answers))
    return found


def _alone(llm: LLM, ids: list[int], body: dict[str, Any]) -> tuple[str, ...]:
    every = [
        SamplingParams(
            max_tokens=body["max_tokens"], temperature=body["temperature"], seed=body["seed"] + choice,
            stop=tuple(body.get("stop", ())), ignore_eos=body["ignore_eos"],
        )
        for choice in range(body["n"])
    ]  # fmt: skip
    return tuple(llm.generate([ids], params)[0].text for params in every)


# A client on a plain socket


@dataclass
class Answer:
    status: int
    headers: str
    body: bytes


class Connection:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @staticmethod
    async def open(port: int) -> Connection:
        return Connection(*await asyncio.open_connection("127.0.0.1", port))

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    def hang_up(self, rudely: bool) -> None:
        """Rudely: the other end gets a reset instead of the end of what was sent."""
        if rudely:
            raw = self.writer.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.close()

    async def head(self) -> Answer:
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        return Answer(int(head.split(" ", 2)[1]), head.lower(), b"")

    async def body(self, answer: Answer) -> AsyncIterator[bytes]:
        """Its pieces as they come; raises IncompleteReadError where it is cut off."""
        if "transfer-encoding: chunked" not in answer.headers:
            length = answer.headers.split("content-length: ")[1].split("\r\n")[0]
            yield await self.reader.readexactly(int(length))
            return
        while size := int(await self.reader.readline(), 16):
            yield (await self.reader.readexactly(size + 2))[:-2]
        await self.reader.readexactly(2)

    async def answer(self) -> Answer:
        """All of it; afterwards the server has nothing more to say."""
        answer = await self.head()
        async for piece in self.body(answer):
            answer.body += piece
        assert await self.reader.read() == b"", "something came after the answer"
        self.writer.close()
        return answer


def post(body: bytes, path: str = "/v1/completions", length: str | None = None) -> bytes:
    """`length` in the place of Content-Length, which must end the line."""
    length = f"Content-Length: {len(body)}" if length is None else length
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n{length}"
    return head.encode() + b"\r\n\r\n" + body


# What clients do. Each is a whole request, from connecting to its end.


@dataclass
class Clients:
    port: int
    questions: list[Question]
    draw: random.Random
    ids: set[str] = field(default_factory=set)  # of all answers
    did: Counter[str] = field(default_factory=Counter)

    @property
    def deeds(self) -> dict[Callable[[], Awaitable[None]], int]:
        """And how often each is done, relatively."""
        return {
            self.asks: 4, self.asks_for_a_stream: 5, self.leaves_before_the_headers_end: 1,
            self.leaves_before_the_body_ends: 1, self.leaves_before_the_answer: 3, self.leaves_in_the_stream: 4,
            self.stops_reading_for_a_while: 1, self.sends_too_much: 1, self.sends_too_much_in_chunks: 1,
            self.sends_nonsense: 3,
        }  # fmt: skip

    async def run(self, count: int) -> None:
        """So many requests, by clients that each have one at a time."""
        deeds = self.draw.choices(list(self.deeds), list(self.deeds.values()), k=count)
        left = iter(deeds)

        async def client() -> None:
            for deed in left:
                await asyncio.wait_for(deed(), 120)
                self.did[deed.__name__] += 1

        await asyncio.gather(*(client() for _ in range(min(CLIENTS, count))))

    async def asks(self) -> None:
        question = self._question()
        self.check_whole(question, await self.exchange(question))

    async def asks_for_a_stream(self) -> None:
        question = self._question()
        self._check_stream(question, await self._exchange(self._post(question, stream=True)))

    async def leaves_before_the_headers_end(self) -> None:
        sent = self._post(self._question())
        await self._send_and_leave(sent[: self.draw.randrange(sent.index(b"\r\n\r\n") + 4)])

    async def leaves_before_the_body_ends(self) -> None:
        sent = self._post(self._question())
        await self._send_and_leave(sent[: self.draw.randrange(sent.index(b"\r\n\r\n") + 4, len(sent))])

    async def leaves_before_the_answer(self) -> None:
        await self._send_and_leave(self._post(self._question(), stream=self.draw.random() < 0.5))

    async def leaves_in_the_stream(self) -> None:
        connection = await Connection.open(self.port)
        connection.send(self._post(self._question(), stream=True))
        head, pieces = await connection.head(), self.draw.randrange(12)
        assert head.status == 200, head
        async for _ in connection.body(head):
            pieces -= 1
            if pieces < 0:
                break
        connection.hang_up(rudely=self.draw.random() < 0.5)

    async def stops_reading_for_a_while(self) -> None:
        question = self._question()
        connection = await Connection.open(self.port)
        connection.send(self._post(question, stream=True))
        await asyncio.sleep(self.draw.random() * 0.3)
        self._check_stream(question, await connection.answer())

    async def sends_too_much(self) -> None:
        """The head says so, and there the client waits."""
        answer = await self._exchange(
            post(b"", length=f"Content-Length: {MOST_BODY + 1 + self.draw.randrange(1 << 40)}")
        )
        self._check_refused(answer, 413)

    async def sends_too_much_in_chunks(self) -> None:
        chunk = b"2000\r\n" + b" " * 0x2000 + b"\r\n"
        sent = post(b"", length="Transfer-Encoding: chunked") + chunk * (MOST_BODY // 0x2000) + b"1\r\n \r\n"
        self._check_refused(await self._exchange(sent), 413)

    async def sends_nonsense(self) -> None:
        good = json.dumps({"model": "tiny", "prompt": "a"}).encode()
        bad: list[tuple[bytes, int]] = [
            (post(good[: self.draw.randrange(len(good))]), 400),
            (post(b"[" * 5000), 400),
            (post(b'{"model": "tiny", "prompt": "\xff\xfe"}'), 400),
            (post(b'{"model": "tiny", "prompt": "\\ud800"}'), 400),
            (post(b'{"model": "tiny", "prompt": "a", "temperature": NaN}'), 400),
            (post(b'{"model": "tiny", "prompt": [99999999999999999999999]}'), 400),
            (post(b'{"model": "tiny", "prompt": []}'), 400),
            (post(json.dumps({"model": "tiny", "prompt": "a" * 1000}).encode()), 400),  # the context is shorter
            (post(json.dumps({"model": "tiny", "prompt": "a", "tools": [{}]}).encode()), 400),
            (post(json.dumps({"model": "tiny", "prompt": "a", "n": 10**6}).encode()), 400),
            (post(json.dumps({"model": "another", "prompt": "a"}).encode()), 404),
            (post(good, path="/v1/nothing"), 404),
        ]
        sent, status = self.draw.choice(bad)
        self._check_refused(await self._exchange(sent), status)

    # Parts of these

    async def exchange(self, question: Question) -> Answer:
        return await self._exchange(self._post(question))

    def _question(self) -> Question:
        return self.draw.choice(self.questions)

    def _post(self, question: Question, stream: bool = False) -> bytes:
        more: dict[str, Any] = {"user": self.draw.choice("abc")}
        if stream:
            more |= {"stream": True, "stream_options": {"include_usage": True}}
        return post(json.dumps(question.body | more).encode(), question.path)

    async def _exchange(self, sent: bytes) -> Answer:
        connection = await Connection.open(self.port)
        connection.send(sent)
        return await connection.answer()

    async def _send_and_leave(self, sent: bytes) -> None:
        connection = await Connection.open(self.port)
        connection.send(sent)
        if self.draw.random() < 0.7:
            await asyncio.sleep(self.draw.random() * 0.05)
        connection.hang_up(rudely=self.draw.random() < 0.5)

    def check_whole(self, question: Question, answer: Answer) -> None:
        assert answer.status == 200, answer
        found = json.loads(answer.body)
        self._check_id(found["id"])
        texts = {choice["index"]: _text(choice) for choice in found["choices"]}
        assert len(found["choices"]) == len(question.answers), answer
        assert all(choice["finish_reason"] in ("stop", "length") for choice in found["choices"]), answer
        _check_texts(question, texts)

    def _check_stream(self, question: Question, answer: Answer) -> None:
        assert answer.status == 200, answer
        *events, done, rest = answer.body.decode().split("\n\n")
        assert (done, rest) == ("data: [DONE]", ""), answer
        found = [json.loads(event.removeprefix("data: ")) for event in events]
        [id] = {event["id"] for event in found}
        self._check_id(id)
        texts, ends = dict.fromkeys(range(len(question.answers)), ""), Counter[int]()
        for event in found:
            for choice in event["choices"]:
                assert not ends[choice["index"]], f"something came after the end of a choice: {answer}"
                texts[choice["index"]] += _text(choice)
                ends[choice["index"]] += choice["finish_reason"] is not None
        assert ends == dict.fromkeys(texts, 1), answer
        assert [event["usage"] for event in found if event.get("usage")], answer
        _check_texts(question, texts)

    def _check_refused(self, answer: Answer, status: int) -> None:
        assert answer.status == status, answer
        assert json.loads(answer.body)["error"]["message"], answer

    def _check_id(self, id: str) -> None:
        assert id not in self.ids, f"two answers have the id {id}"
        self.ids.add(id)


def _text(choice: dict[str, Any]) -> str:
    """Of a completion, a message, or a part of either."""
    part = choice.get("message") or choice.get("delta") or choice
    found: str = part.get("content") or part.get("text") or ""
    return found


def _check_texts(question: Question, texts: dict[int, str]) -> None:
    assert tuple(texts[i] for i in sorted(texts)) == question.answers, question


# What is promised


async def _wait_until(holds: Callable[[], bool], what: Callable[[], object]) -> None:
    for _ in range(600):
        if holds():
            return
        await asyncio.sleep(0.05)
    pytest.fail(f"after 30 s still {what()}")


async def _nothing_is_left(server: Running, others: list[Request]) -> None:
    """`others` were there before."""

    def left() -> list[Request]:
        return [x for x in _requests() if all(x is not other for other in others)]

    await _wait_until(lambda: server.idle, server.service.stats)
    await _wait_until(lambda: not _sockets(_port(server)), lambda: _sockets(_port(server)))
    await _wait_until(lambda: not left(), left)


def _port(server: Running) -> int:
    return int(server.url.rpartition(":")[2])


def _sockets(port: int) -> list[Any]:
    """The server's ends of connections that are not closed."""
    here = psutil.Process().net_connections("tcp")
    return [c for c in here if c.laddr and c.laddr.port == port and c.status != psutil.CONN_LISTEN]


def _requests() -> list[Request]:
    gc.collect()
    return [x for x in gc.get_objects() if type(x) is Request]


def _resident() -> int:
    gc.collect()
    found: int = psutil.Process().memory_info().rss
    return found


async def _chaos(server: Running, asked: list[Question], counts: list[int], seed: int) -> list[int]:
    """Resident memory after each part of so many requests."""
    clients, others = Clients(_port(server), asked, random.Random(seed)), _requests()
    resident = []
    for count in counts:
        await clients.run(count)
        await _nothing_is_left(server, others)
        resident.append(_resident())
    assert all(clients.did[deed.__name__] for deed in clients.deeds), clients.did
    for question in asked:  # and it still answers
        clients.check_whole(question, await clients.exchange(question))
    await _nothing_is_left(server, others)
    return resident


def _check_blocks(server: Running) -> None:
    """Of the cache, once its service is closed: every block is free or can be evicted, and evicting frees it."""
    server.service.close()
    blocks = server.service.llm.engine.batching.blocks
    assert blocks.num_used == 0
    blocks.clear()
    assert blocks.num_free == blocks.num_blocks


def test_whatever_clients_do_answers_are_whole_and_nothing_is_left(llm: LLM) -> None:
    asked = questions(llm, seed=1)
    with served(llm) as server:
        asyncio.run(_chaos(server, asked, [200], seed=1))
        assert server.service.stats().kv_blocks_used == 0
        _check_blocks(server)


@pytest.mark.slow
def test_ten_thousand_requests_leave_memory_as_it_was(llm: LLM) -> None:
    asked = questions(llm, seed=2)
    with served(llm) as server:
        early, late = asyncio.run(_chaos(server, asked, [2_000, 8_000], seed=2))
        assert late - early < MOST_GROWTH, f"{(late - early) / 1e6:.1f} MB more after 10,000 requests than after 2,000"
        assert server.service.stats().preemptions > 0
        _check_blocks(server)
