"""Which requests take part in the next pass, and with how many tokens: continuous batching, without threads or clock.
Events come in (a request, a cancellation, a pass that is done), passes go out; who computes them it does not know."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ciuic_runtime.engine.fair_queue import FairQueue
from ciuic_runtime.engine.request import Request
from ciuic_runtime.memory.kv_cache import BLOCK_TOKENS, blocks_for
from ciuic_runtime.memory.prefix_cache import BlockKey, PrefixCache
from ciuic_runtime.models.batch import Chunk
from ciuic_runtime.schedulers.graph import Phase

MOST_TOLD = BLOCK_TOKENS  # prompt tokens of one request in a pass whose logits are all wanted: each is a row of logits


@dataclass(frozen=True, slots=True)
class Pass:
    """Chunks are in the order of the requests; those that are to be sampled say so."""

    phase: Phase
    requests: tuple[Request, ...]
    chunks: tuple[Chunk, ...]

    @property
    def decoding(self) -> list[Request]:
        return [r for r, c in zip(self.requests, self.chunks, strict=True) if not c.prompt and len(c.token_ids) == 1]


# How many tokens those that catch up get in a pass that others decode in: from the contexts of these, (tokens in the
# cache, tokens to be computed) of each of those, and the number of passes since they got any.
Share = Callable[[Sequence[int], Sequence[tuple[int, int]], int], int]


class Batching:
    """Requests wait, run, may be preempted (they give their blocks back and catch up later), and end. One that catches
    up may be in several passes on their way: they are carried out in the order in which they were sent, so each chunk
    finds the entries of the one before. After the chunk that is sampled nothing of it is sent until that is back.

    `share` None: prompts first, and nobody decodes meanwhile. `shared_prefixes`: blocks of equal tokens are computed
    once. `two_forms`: generated tokens are computed in another form than prompts (MLA), so that their entries have
    other bits, and a prompt that repeats them does not find them."""

    def __init__(
        self, num_blocks: int, max_num_seqs: int, chunk_tokens: int, share: Share | None = None,
        shared_prefixes: bool = False, two_forms: bool = True,
    ) -> None:  # fmt: skip
        self.num_blocks, self.max_num_seqs, self.chunk_tokens = num_blocks, max_num_seqs, chunk_tokens
        self.depth = 1  # passes that may be on their way at once; whoever decodes is in one of them at most
        self.share, self.shared_prefixes, self.two_forms = share, shared_prefixes, two_forms
        self.preemptions = 0
        self.reset()

    def reset(self) -> None:
        """As at the beginning, wherever an exception may have struck."""
        self.blocks = PrefixCache(self.num_blocks)
        self.waiting = FairQueue()
        self.running: list[Request] = []  # in the order in which they were let in
        self._flying: Counter[int] = Counter()  # of these, by index: in how many passes on their way each is
        self._since = 0  # passes in which those that catch up got nothing

    # Events

    def add(self, request: Request) -> None:
        need = blocks_for(request.most_tokens)
        assert need <= self.num_blocks, f"request {request.index} can never fit"
        self.waiting.add(request)

    def cancel(self, request: Request) -> bool:
        """Waiting or running, it is gone, and what it held is free, at once or when its passes are done; whether it
        was there. Its caller gives it a reason for its end."""
        if request.index in self._flying:
            return True
        if request in self.running:
            self._leave(request)
            return True
        return self.waiting.remove(request)

    def restart(self) -> None:
        """What was computed is lost, and passes on their way too."""
        running, waiting = list(self.running), list(self.waiting)
        self._flying.clear()
        for request in reversed(running):
            if request.finish_reason:
                self._leave(request)
            else:
                self._preempt(request)
        self.blocks = PrefixCache(self.num_blocks)
        assert all(not r.blocks for r in (*running, *waiting)), "somebody still holds what is lost"

    def computed(self, done: Pass) -> None:
        """The pass is done: its tokens are in the cache."""
        for request, chunk in zip(done.requests, done.chunks, strict=True):
            self._flying[request.index] -= 1
            if not self._flying[request.index]:
                del self._flying[request.index]
            if request.finish_reason:
                continue  # cancelled meanwhile
            before = request.computed
            request.computed += len(chunk.token_ids)
            new = not chunk.prompt and bool(chunk.sample)  # what is computed again is not the client's doing
            self.waiting.served(request.client, len(chunk.token_ids) if chunk.prompt else 0, int(new))
            if self.shared_prefixes:
                for index in range(before // BLOCK_TOKENS, request.computed // BLOCK_TOKENS):
                    self.blocks.publish(self._key(request, index), request.blocks, index)

    def abandon(self) -> None:
        """Passes on their way do not come back; who was in them is where it was before."""
        self._flying.clear()
        for request in self.running:
            request.sent = request.computed
        self.release_finished()

    def release_finished(self) -> list[Request]:
        done = [r for r in self.running if r.finish_reason and r.index not in self._flying]
        for request in done:
            self._leave(request)
        return done

    # Decisions

    def next_pass(self) -> Pass | None:
        """None: nothing to do."""
        self._admit()
        most = -(-len(self.running) // self.depth)  # sequences, so that there is something for the other passes
        behind = self._behind()
        if behind and self.share is None:
            return self._pass([], self._catch_up(behind[:most], self.chunk_tokens))
        decoding = self._grow()[:most]
        behind = self._behind()  # growing may have cost some their place
        chunks = self._catch_up(behind, self._room(decoding, behind))
        if decoding or chunks:
            self._since = 0 if chunks else self._since + 1
        return self._pass(decoding, chunks)

    def _pass(self, decoding: Iterable[Request], catching_up: Iterable[tuple[Request, Chunk]]) -> Pass | None:
        parts = [*((r, _next_token(r)) for r in decoding), *catching_up]
        if not parts:
            return None
        phase: Phase = "prefill" if any(r.catching_up for r, _ in parts) else "decode"
        for request, chunk in parts:
            self._flying[request.index] += 1
            request.sent = chunk.position + len(chunk.token_ids)
        return Pass(phase, tuple(r for r, _ in parts), tuple(c for _, c in parts))

    def _admit(self) -> None:
        """The least served client's next request, as long as there is room for what it has to compute at once. One
        whose prefix is just being computed for somebody else lets others go first until that is done."""
        while len(self.running) < self.max_num_seqs:
            head = next((r for r in self.waiting.heads() if not self._comes_soon(r)), None)
            if head is None or not self._let_in(head):
                return

    def _let_in(self, request: Request) -> bool:
        keys = self._prefix(request)
        found = self.blocks.hold(keys[: self.blocks.match(keys)])
        need = blocks_for(request.num_tokens) - len(found)
        if not self.blocks.can_allocate(need + len(self.running)):  # each may need a block soon
            self.blocks.release(found)
            return False
        request.blocks = [*found, *self.blocks.allocate(need)]
        request.computed = request.sent = len(found) * BLOCK_TOKENS
        if not request.token_ids:
            request.cached = request.computed
        self.waiting.let_in(request)
        self.running.append(request)
        return True

    def _idle(self) -> list[Request]:
        """Those that run and are in no pass on its way."""
        return [r for r in self.running if r.index not in self._flying]

    def _behind(self) -> list[Request]:
        """Those that have a chunk to be sent; who is in fewer passes than others comes first."""
        behind = [r for r in self.running if r.unsent and not r.finish_reason]
        return sorted(behind, key=lambda r: self._flying[r.index])

    def _grow(self) -> list[Request]:
        """Those that can get their next token: a block for each that needs one; where there is none, the last one that
        was let in gives its own back and waits."""
        grown = []
        for request in self._idle():
            if request.catching_up or request not in self.running:
                continue
            if blocks_for(request.computed + 1) > len(request.blocks):
                while request in self.running and not self.blocks.can_allocate(1):
                    self._preempt(self._idle()[-1])
                if request not in self.running:
                    continue
                request.blocks += self.blocks.allocate(1)
            grown.append(request)
        return [r for r in grown if r in self.running]

    def _preempt(self, request: Request) -> None:
        self.preemptions += 1
        request.preemptions += 1
        self.running.remove(request)
        self.blocks.release(request.blocks)
        request.blocks, request.computed, request.sent = [], 0, 0
        self.waiting.put_back(request)

    def _leave(self, request: Request) -> None:
        self.running.remove(request)
        self.waiting.left(request)
        self.blocks.release(request.blocks)
        request.blocks = []

    def _room(self, decoding: Sequence[Request], behind: Sequence[Request]) -> int:
        """For chunks, in tokens. A pass without decodes holds up those that decode in the other ones as much."""
        others = decoding or [r for r in self.running if not r.catching_up and not r.finish_reason]
        if not others or not behind or self.share is None:
            return self.chunk_tokens
        left = [(r.sent, r.num_tokens - r.sent) for r in behind]
        return min(self.chunk_tokens, self.share([r.computed + 1 for r in others], left, self._since))

    def _catch_up(self, behind: Iterable[Request], room: int) -> list[tuple[Request, Chunk]]:
        chunks = []
        for request in behind:
            at, prompt = request.sent, request.sent < len(request.prompt)
            end = len(request.prompt) if prompt else request.num_tokens
            told = prompt and request.params.prompt_logprobs is not None and not request.token_ids
            take = min(room, end - at, MOST_TOLD if told else room)
            if take:
                last = at + take == request.num_tokens
                ids, blocks = request.tokens(at, at + take), tuple(request.blocks)
                chunks.append((request, Chunk(ids, at, blocks, prompt, sample="all" if told else last)))
                room -= take
        return chunks

    # Shared prefixes

    def _prefix(self, request: Request) -> list[BlockKey]:
        """The blocks that it could find in the cache: the last token that is known is computed in any case."""
        told = request.params.prompt_logprobs is not None and not request.token_ids
        if not self.shared_prefixes or told:
            return []
        return [self._key(request, i) for i in range((request.num_tokens - 1) // BLOCK_TOKENS)]

    def _key(self, request: Request, index: int) -> BlockKey:
        """Token ids; -1 - id for what was generated, where that makes a difference."""
        start, end = index * BLOCK_TOKENS, (index + 1) * BLOCK_TOKENS
        ids, prompt = request.tokens(start, end), max(0, len(request.prompt) - start)
        if not self.two_forms or prompt >= BLOCK_TOKENS:
            return ids
        return (*ids[:prompt], *(-1 - i for i in ids[prompt:]))

    def _comes_soon(self, request: Request) -> bool:
        """Whether somebody is just computing the next block that it could share."""
        if not self.shared_prefixes or not any(r.catching_up for r in self.running):
            return False
        keys = self._prefix(request)
        found = self.blocks.match(keys)
        end = (found + 1) * BLOCK_TOKENS
        if found == len(keys) or end > len(request.prompt):
            return False
        wanted = request.prompt[:end]
        return any(r.computed < end and r.prompt[:end] == wanted for r in self.running)


def _next_token(request: Request) -> Chunk:
    at = request.computed
    return Chunk(request.tokens(at, at + 1), at, tuple(request.blocks), prompt=False)
