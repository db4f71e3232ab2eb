"""What a client's request asks of the engine, and what becomes of it: one choice for each of the engine's requests.
Knows no HTTP; chats and completions differ in their choices only."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.engine.guide import Guide, make_guide
from ciuic_runtime.engine.llm import LLM
from ciuic_runtime.engine.request import Request, Update
from ciuic_runtime.engine.sampling import SamplingParams
from ciuic_runtime.server.answers import Reason, Usage
from ciuic_runtime.server.config import ServerConfig
from ciuic_runtime.server.errors import ApiError, invalid
from ciuic_runtime.server.group import Wanted
from ciuic_runtime.server.protocol import GenerationRequest, ResponseFormat
from ciuic_runtime.server.tokens import TokenTexts


class Choice(Protocol):
    def take(self, update: Update) -> Any | None:
        """The chunk that goes out for an update; None while there is nothing to show."""

    def whole(self) -> Any:
        """Everything that was taken, in the form that is not streamed."""


@dataclass(slots=True)
class Served:
    """The one model that is served, under the name that clients give."""

    llm: LLM
    config: ServerConfig
    name: str
    texts: TokenTexts
    created: int = field(default_factory=lambda: int(time.time()))

    def check_name(self, name: str) -> None:
        if name != self.name:
            raise ApiError(
                404, f"the model {name!r} is not here; this server has {self.name!r}", code="model_not_found",
                param="model",
            )  # fmt: skip

    def check_count(self, prompts: int, n: int) -> None:
        most = self.config.max_choices
        if n > most:
            raise invalid(f"n is {n}; this server gives at most {most} choices at once; ask again for more", "n")
        if prompts * n > self.config.max_waiting:
            raise invalid(
                f"{prompts} prompts with {n} choices each are {prompts * n} answers; this server takes "
                f"{self.config.max_waiting} at once (--max-waiting); send fewer at a time", "prompt",
            )  # fmt: skip

    def room(self, ids: Sequence[int], max_tokens: int | None, param: str) -> int:
        """How many new tokens there may be after a prompt; None asks for as many as fit."""
        context = self.llm.context
        asked = max(1, context - len(ids)) if max_tokens is None else max_tokens
        if len(ids) + asked > context:
            raise invalid(
                f"{param} has {len(ids)} tokens and {asked} new ones were asked for; this server's context holds "
                f"{context} (--context); shorten it, or ask for fewer", param, "context_length_exceeded",
            )  # fmt: skip
        return asked

    def guide(self, form: ResponseFormat | None) -> Guide | None:
        if form is None or form.type == "text":
            return None
        spec, tokenizer = self.llm.model.spec, self.llm.tokenizer
        ends = {*spec.eos_token_ids, *tokenizer.eos_token_ids}
        schema = form.json_schema.schema_ if form.json_schema else None
        try:
            return make_guide(tokenizer, ends, spec.vocab_size, schema)
        except InvalidInput as error:
            raise invalid(str(error), "response_format") from error


def params_of(asked: GenerationRequest, choice: int, max_tokens: int, **logprobs: int | None) -> SamplingParams:
    return SamplingParams(
        max_tokens, float(asked.temperature), max(0, asked.top_k), float(asked.top_p), float(asked.min_p),
        float(asked.repetition_penalty), None if asked.seed is None else (asked.seed + choice) % 2**63, asked.stops,
        asked.ignore_eos, **logprobs,
    )  # fmt: skip


def reason_of(update: Update) -> Reason | None:
    """The others of the engine's reasons become errors before (`group.py`)."""
    return update.finish_reason if update.finish_reason in ("stop", "length") else None


@dataclass(frozen=True, slots=True)
class Job:
    """`wanted` and `choices` belong together one by one."""

    kind: str  # "chat.completion" or "text_completion"
    asked: GenerationRequest
    wanted: Sequence[Wanted]
    choices: Sequence[Choice]
    id: str = ""
    created: int = 0

    @classmethod
    def new(cls, kind: str, asked: GenerationRequest, wanted: Sequence[Wanted], choices: Sequence[Choice]) -> Job:
        prefix = {"chat.completion": "chatcmpl", "text_completion": "cmpl"}[kind]
        return cls(kind, asked, wanted, choices, f"{prefix}-{uuid.uuid4().hex}", int(time.time()))

    def whole(self, requests: Sequence[Request]) -> dict[str, Any]:
        return self._envelope(self.kind, [c.whole() for c in self.choices]) | {"usage": usage(requests, self.asked.n)}

    def chunk(self, choice: Any) -> dict[str, Any]:
        """Of a stream. The last one may tell the usage; then the others have none of it to tell."""
        kind = "chat.completion.chunk" if self.kind == "chat.completion" else self.kind
        return self._envelope(kind, [choice]) | ({"usage": None} if self.asked.include_usage else {})

    def usage_chunk(self, requests: Sequence[Request]) -> dict[str, Any]:
        return self.chunk(None) | {"choices": [], "usage": usage(requests, self.asked.n)}

    def _envelope(self, kind: str, choices: list[Any]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.asked.model, "choices": choices}


def usage(requests: Sequence[Request], n: int) -> Usage:
    """A prompt counts once, however many choices were asked for."""
    prompts = requests[::n]
    read, written = sum(len(r.prompt) for r in prompts), sum(len(r.token_ids) for r in requests)
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": sum(r.cached for r in prompts)},
    }
