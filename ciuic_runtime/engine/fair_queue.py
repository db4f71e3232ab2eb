"""Whose request is let in next: the client's that has been served least (virtual token counters, Sheng et al., OSDI
2024). Knows clients by name only; within a client it is first come, first served."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from ciuic_runtime.engine.request import Request

PROMPT_WEIGHT, NEW_WEIGHT = 1.0, 2.0  # what a token counts: generated ones cost more (as there)
MOST_IDLE = 1024  # clients without requests whose counters are kept


class FairQueue:
    def __init__(self) -> None:
        self._waiting: dict[str, deque[Request]] = {}
        self._served: dict[str, float] = {}  # by client, weighted tokens
        self._running: dict[str, int] = {}  # requests that were let in, by client
        self._last = 0.0  # what the client had that was the last to have no request any more

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def __iter__(self) -> Iterator[Request]:
        for requests in self._waiting.values():
            yield from requests

    def add(self, request: Request) -> None:
        """A client that comes anew is not owed for the time before: it begins with what the least served one has, or,
        where there is none, with what the last one had."""
        client = request.client
        if not self._is_active(client):
            least = min((self._served[c] for c in {*self._waiting, *self._running}), default=self._last)
            self._forget(least)
            self._served[client] = max(self._served.get(client, 0.0), least)
        self._waiting.setdefault(client, deque()).append(request)

    def put_back(self, request: Request) -> None:
        """One that was let in and had to give way is its client's next."""
        self.left(request)
        self._waiting.setdefault(request.client, deque()).appendleft(request)

    def heads(self) -> list[Request]:
        """Each client's next request, the least served client's first."""
        clients = sorted(self._waiting, key=lambda client: self._served[client])
        return [self._waiting[client][0] for client in clients]

    def let_in(self, head: Request) -> None:
        waiting = self._waiting[head.client]
        assert waiting[0] is head, f"request {head.index} is not the next of {head.client!r}"
        waiting.popleft()
        if not waiting:
            del self._waiting[head.client]
        self._running[head.client] = self._running.get(head.client, 0) + 1

    def left(self, request: Request) -> None:
        """One that was let in runs no longer."""
        self._running[request.client] -= 1
        if not self._running[request.client]:
            del self._running[request.client]
            self._last = self._served[request.client]

    def remove(self, request: Request) -> bool:
        """Takes a waiting request out; whether it was waiting."""
        waiting = self._waiting.get(request.client, deque())
        if request not in waiting:
            return False
        waiting.remove(request)
        if not waiting:
            del self._waiting[request.client]
        return True

    def served(self, client: str, prompt_tokens: int, new_tokens: int) -> None:
        self._served[client] += PROMPT_WEIGHT * prompt_tokens + NEW_WEIGHT * new_tokens

    def _is_active(self, client: str) -> bool:
        return client in self._waiting or client in self._running

    def _forget(self, least: float) -> None:
        """Of idle clients, those whose counters would be lifted anyway, when there are many."""
        if len(self._served) > MOST_IDLE:
            self._served = {c: v for c, v in self._served.items() if v > least or self._is_active(c)}
            for client in sorted(self._served, key=lambda c: self._served[c])[: len(self._served) - MOST_IDLE]:
                if not self._is_active(client):
                    del self._served[client]
