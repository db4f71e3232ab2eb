"""Which requests take part in the next pass: a small state machine without threads or clock.
First come, first served; a request is let in when the cache has blocks for all that it may become."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from ciuic_runtime.engine.request import Request
from ciuic_runtime.memory.kv_cache import BlockAllocator, blocks_for
from ciuic_runtime.models.batch import Chunk
from ciuic_runtime.schedulers.graph import Phase


@dataclass(frozen=True, slots=True)
class Decision:
    """The next pass. Chunks are in the order of the requests; those that are to be sampled say so."""

    phase: Phase
    requests: tuple[Request, ...]
    chunks: tuple[Chunk, ...]


class RequestQueue:
    def __init__(self, num_blocks: int, max_num_seqs: int, chunk_tokens: int) -> None:
        self.blocks = BlockAllocator(num_blocks)
        self.max_num_seqs, self.chunk_tokens = max_num_seqs, chunk_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    def add(self, request: Request) -> None:
        assert blocks_for(request.most_tokens) <= self.blocks.num_blocks, f"request {request.index} can never fit"
        self.waiting.append(request)

    def decide(self) -> Decision | None:
        """Prompts first, as many tokens of them as a pass takes; then one token for everybody. None: nothing to do."""
        self._admit()
        if chunks := self._prompt_chunks():
            return Decision("prefill", tuple(r for r, _ in chunks), tuple(c for _, c in chunks))
        if not self.running:
            return None
        return Decision("decode", tuple(self.running), tuple(_decode_chunk(r) for r in self.running))

    def computed(self, decision: Decision) -> None:
        """The pass is done: its tokens are in the cache."""
        for request, chunk in zip(decision.requests, decision.chunks, strict=True):
            request.computed += len(chunk.token_ids)

    def release_finished(self) -> list[Request]:
        done = [r for r in self.running if r.finish_reason]
        for request in done:
            self.blocks.free(request.blocks)
            request.blocks = []
        self.running = [r for r in self.running if not r.finish_reason]
        return done

    def clear(self) -> list[Request]:
        """Drops everything, waiting or running; returns what was unfinished."""
        dropped = [*self.running, *self.waiting]
        for request in self.running:
            self.blocks.free(request.blocks)
            request.blocks = []
        self.running, self.waiting = [], deque()
        return dropped

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.max_num_seqs:
            need = blocks_for(self.waiting[0].most_tokens)
            if not self.blocks.can_allocate(need):
                return
            request = self.waiting.popleft()
            request.blocks = self.blocks.allocate(need)
            self.running.append(request)

    def _prompt_chunks(self) -> list[tuple[Request, Chunk]]:
        room, chunks = self.chunk_tokens, []
        for request in self.running:
            take = min(room, request.prompt_left)
            if take:
                at = request.computed
                ids = request.prompt[at : at + take]
                last = at + take == len(request.prompt)
                chunks.append((request, Chunk(ids, at, tuple(request.blocks), prompt=True, sample=last)))
                room -= take
        return chunks


def _decode_chunk(request: Request) -> Chunk:
    return Chunk(request.token_ids[-1:], request.computed, tuple(request.blocks), prompt=False)
