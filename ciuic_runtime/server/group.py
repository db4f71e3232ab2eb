"""The engine's requests that belong to one request of a client: begun together, read as they come, cancelled together.
Knows the limit of time; what their tokens become is for others."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType

from ciuic_runtime.engine.guide import Guide
from ciuic_runtime.engine.request import Request, Update
from ciuic_runtime.engine.sampling import SamplingParams
from ciuic_runtime.engine.service import EngineService, ShuttingDown, Submission
from ciuic_runtime.server.errors import RETRY_SECONDS, ApiError, invalid

log = logging.getLogger("ciuic")


@dataclass(frozen=True, slots=True)
class Wanted:
    """A request that is to be made of the engine."""

    prompt: Sequence[int]
    params: SamplingParams
    guide: Guide | None = None


class Group:
    """Left as a context, what has not ended is cancelled."""

    def __init__(self, service: EngineService, wanted: Sequence[Wanted], client: str, seconds: float | None) -> None:
        """From the event loop; all of them are let in, or none."""
        self.seconds = seconds
        self._submissions: list[Submission] = []
        try:
            for one in wanted:
                self._submissions.append(service.submit(one.prompt, one.params, client=client, guide=one.guide))
        except Exception:
            self.cancel()
            raise

    @property
    def requests(self) -> list[Request]:
        return [submission.request for submission in self._submissions]

    def cancel(self) -> None:
        for submission in self._submissions:
            submission.cancel()

    async def updates(self) -> AsyncGenerator[tuple[int, Update], None]:
        """(which request, what a pass did for it), until each has ended: by itself, or because its time is over.

        Raises ApiError where the time is over and none of them has begun, and ShuttingDown where the server closed."""
        came: asyncio.Queue[tuple[int, Update]] = asyncio.Queue(maxsize=1)  # what is not read waits where it comes from
        readers = [asyncio.create_task(_read(i, s, came)) for i, s in enumerate(self._submissions)]
        limit = None if self.seconds is None else asyncio.get_running_loop().time() + self.seconds
        left, late = len(readers), False
        try:
            while left:
                try:
                    async with asyncio.timeout_at(None if late else limit):
                        index, update = await came.get()
                except TimeoutError:
                    late = True
                    self._check_begun()
                    self.cancel()
                    continue
                if update.error and update.asked_too_much:
                    raise invalid(update.error, "response_format")
                if update.finish_reason == "error":
                    log.error("request %d ended with an error: %s", update.request.index, update.error)
                    raise ApiError(500, "the model could not go on with this request; the server's log says why")
                if update.finish_reason == "interrupted":
                    if not late:
                        raise ShuttingDown("the server was shut down before the answer was whole; ask again later")
                    update = replace(update, finish_reason="length")
                left -= update.finish_reason is not None
                yield index, update
        finally:
            for reader in readers:
                reader.cancel()

    def _check_begun(self) -> None:
        if not any(request.computed for request in self.requests):
            raise ApiError(
                429, f"the request waited for {self.seconds:g} s, the limit here, without its turn coming; try again "
                "later", code="time_limit", headers={"Retry-After": str(RETRY_SECONDS)},
            )  # fmt: skip

    def __enter__(self) -> Group:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()


async def _read(index: int, submission: Submission, came: asyncio.Queue[tuple[int, Update]]) -> None:
    async for update in submission:
        await came.put((index, update))
