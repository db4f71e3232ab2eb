"""Answers as OpenAI's API has them: the shapes of whole ones, and of the chunks of a stream.
Knows names and types only; how they are filled is `chat.py`'s and `completions.py`'s business."""

from __future__ import annotations

from typing import Literal, NotRequired

from typing_extensions import TypedDict

Reason = Literal["stop", "length"]


class PromptDetails(TypedDict):
    cached_tokens: int  # whose computation was found in the prefix cache


class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


# Chat


class TopLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


class ContentLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    content: list[ContentLogprob]
    refusal: None


class AssistantMessage(TypedDict):
    role: Literal["assistant"]
    content: str
    refusal: None
    reasoning_content: NotRequired[str]  # as DeepSeek has it


class ChatChoiceAnswer(TypedDict):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Reason


class ChatAnswer(TypedDict):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoiceAnswer]
    usage: Usage


class Delta(TypedDict, total=False):
    role: Literal["assistant"]
    content: str
    reasoning_content: str


class ChatChoiceChunk(TypedDict):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: Reason | None


class ChatChunk(TypedDict):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChoiceChunk]
    usage: NotRequired[Usage | None]


# Completions


class CompletionLogprobs(TypedDict):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoiceAnswer(TypedDict):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Reason | None  # None in the chunks of a stream but the last


class CompletionAnswer(TypedDict):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoiceAnswer]
    usage: NotRequired[Usage | None]


# Models


class ModelAnswer(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int  # positions of prompt and answer, as vLLM has it


class ModelsAnswer(TypedDict):
    object: Literal["list"]
    data: list[ModelAnswer]


class Health(TypedDict):
    status: Literal["ok"]
