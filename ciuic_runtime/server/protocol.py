"""Requests as OpenAI's API has them: fields, types and ranges.
Knows neither model nor engine; what cannot be had here is refused by name, null means absent."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema, model_validator

from ciuic_runtime.engine.sampling import MOST_LOGPROBS
from ciuic_runtime.server.errors import invalid

# Parameters of OpenAI's API that there is nothing for here, and why. Those that are declared below are accepted with
# the values declared there, which ask for nothing, and are not read; other values, and the rest of these, are refused.
FOREIGN = {
    "tools": "tool calls are not supported; describe the tools in a message and read the answer yourself",
    "tool_choice": "tool calls are not supported",
    "tool_calls": "tool calls are not supported; put them into the content as text",
    "tool_call_id": "tool calls are not supported",
    "parallel_tool_calls": "tool calls are not supported",
    "functions": "tool calls are not supported",
    "function_call": "tool calls are not supported",
    "audio": "only text is supported",
    "modalities": "only text is supported",
    "presence_penalty": "only repetition_penalty is supported; leave it out or give 0",
    "frequency_penalty": "only repetition_penalty is supported; leave it out or give 0",
    "logit_bias": "it is not supported; response_format can hold an answer to a form",
    "best_of": "answers are not ranked; ask for n and choose",
    "suffix": "text is continued at its end only",
    "prediction": "it is not supported; leave it out",
    "reasoning_effort": "how long a model thinks is its own affair here; limit max_tokens",
    "verbosity": "it is not supported; say it in a message",
    "web_search_options": "nothing is looked up in the web",
    "store": "nothing is stored",
    "metadata": "it is accepted as names and texts, and not kept",
    "service_tier": "there is one; leave it out",
    "safety_identifier": "it is accepted as a text, and not kept",
    "prompt_cache_key": "it is accepted as a text; prefixes are shared without it",
    "include_obfuscation": "streams are not padded",
}


def _nullable(schema: dict[str, Any]) -> None:
    for name, values in schema.get("properties", {}).items():
        if name not in schema.get("required", ()) and {"type": "null"} not in values.get("anyOf", ()):
            schema["properties"][name] = {"anyOf": [values, {"type": "null"}]}


class Fields(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, frozen=True, json_schema_extra=_nullable,
        protected_namespaces=(),
    )  # fmt: skip

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, values: Any) -> Any:
        return {k: v for k, v in values.items() if v is not None} if isinstance(values, dict) else values


def _must_be_false(value: bool) -> bool:
    if value:
        raise ValueError("only false is possible")
    return value


No = Annotated[bool, AfterValidator(_must_be_false), WithJsonSchema({"const": False})]
Empty = Annotated[list[Any], Field(max_length=0)]
Zero = Annotated[float, Field(ge=0, le=0)]
NotEmpty = Annotated[str, Field(min_length=1)]
Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]


class TextPart(Fields):
    type: Literal["text"]
    text: str


class Message(Fields):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1, fail_fast=True)]
    name: str | None = None
    reasoning_content: str | None = None  # what DeepSeek's API gives; not read, as it asks
    refusal: str | None = None
    tool_calls: Empty = []
    annotations: Empty = []

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class JsonSchema(Fields):
    name: str = "answer"
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool = True  # it always is


class ResponseFormat(Fields):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _with_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            says = "needs" if self.json_schema is None else "has nothing to do with"
            raise invalid(f"response_format of type {self.type!r} {says} a json_schema", "response_format")
        return self


class StreamOptions(Fields):
    include_usage: bool = False
    include_obfuscation: No = False


class GenerationRequest(Fields):
    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1, le=128)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)  # choice i of n uses seed + i
    stop: NotEmpty | Annotated[list[NotEmpty], Field(max_length=4, fail_fast=True)] = []
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    user: str | None = Field(None, max_length=512)  # turns are fair among users
    # Extensions, as vLLM has them.
    top_k: int = Field(0, ge=-1, le=2**31 - 1)  # 0, -1: all tokens
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=100)
    ignore_eos: bool = False
    # FOREIGN
    presence_penalty: Zero = 0
    frequency_penalty: Zero = 0
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] = {}
    store: No = False
    metadata: dict[str, str] = {}
    service_tier: Literal["auto", "default"] = "auto"
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options are for streams only; set stream, or leave them out", "stream_options")
        return self


class ChatRequest(GenerationRequest):
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_tokens: int | None = Field(None, ge=1)  # None: what the context leaves
    max_completion_tokens: int | None = Field(None, ge=1)  # its newer name
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    response_format: ResponseFormat | None = None
    # FOREIGN
    tools: Empty = []
    tool_choice: Literal["none"] = "none"
    parallel_tool_calls: bool = True
    modalities: list[Literal["text"]] = []

    @model_validator(mode="after")
    def _top_of_logprobs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs are given beside logprobs; set logprobs too, or leave them out", "top_logprobs")
        return self


class CompletionRequest(GenerationRequest):
    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, fail_fast=True)]
        | Ids
        | Annotated[list[Ids], Field(min_length=1, fail_fast=True)]
    )
    max_tokens: int = Field(16, ge=0)  # 0 with echo: the prompt alone
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    echo: bool = False
    # FOREIGN
    best_of: int = Field(1, ge=1)

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else list(self.prompt)

    @model_validator(mode="after")
    def _something_to_answer(self) -> Self:
        if not self.max_tokens and not self.echo:
            raise invalid("max_tokens is 0, which needs echo; set echo, or ask for at least one token", "max_tokens")
        if self.best_of > self.n:
            raise invalid(f"best_of is {self.best_of} and n is {self.n}; {FOREIGN['best_of']}", "best_of")
        return self
