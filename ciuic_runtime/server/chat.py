"""Chats: messages through the model's template, and its tokens as the answer of an assistant.
Knows messages and where thinking ends; what runs when is not its business."""

from __future__ import annotations

from collections.abc import Sequence

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.engine.request import Update
from ciuic_runtime.engine.sampling import TokenLogprob
from ciuic_runtime.server.answers import (
    AssistantMessage,
    ChatChoiceAnswer,
    ChatChoiceChunk,
    ChatLogprobs,
    ContentLogprob,
    Delta,
    Reason,
    TopLogprob,
)
from ciuic_runtime.server.errors import invalid
from ciuic_runtime.server.group import Wanted
from ciuic_runtime.server.jobs import Job, Served, params_of, reason_of
from ciuic_runtime.server.parsing import parse
from ciuic_runtime.server.protocol import ChatRequest, Message
from ciuic_runtime.server.reasoning import ReasoningParser
from ciuic_runtime.server.tokens import TokenTexts


def chat_job(served: Served, body: bytes) -> Job:
    asked = parse(ChatRequest, body)
    served.check_name(asked.model)
    served.check_count(1, asked.n)
    text = _rendered(served, asked.messages)
    ids = served.llm.tokenizer.encode(text, add_special=False)
    new = served.room(ids, asked.max_completion_tokens or asked.max_tokens, "messages")
    logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
    wanted, choices = [], []
    for i in range(asked.n):
        guide = served.guide(asked.response_format)
        wanted.append(Wanted(ids, params_of(asked, i, new, logprobs=logprobs), guide))
        thinking = ReasoningParser(text.rstrip().endswith("<think>")) if guide is None else None
        choices.append(ChatChoice(i, served.texts if asked.logprobs else None, thinking))
    return Job.new("chat.completion", asked, wanted, choices)


def _rendered(served: Served, messages: Sequence[Message]) -> str:
    """What an assistant thought before is not told again, as DeepSeek asks."""
    roles = {"developer": "system"}
    given = [
        {"role": roles.get(m.role, m.role), "content": m.text} | ({"name": m.name} if m.name is not None else {})
        for m in messages
    ]
    try:
        return served.llm.tokenizer.apply_chat_template(given)
    except InvalidInput as error:
        raise invalid(str(error), "messages") from error


class ChatChoice:
    """`texts` where log probabilities are wanted; `thinking` None where the answer has a form given by the client."""

    def __init__(self, index: int, texts: TokenTexts | None, thinking: ReasoningParser | None) -> None:
        self.index, self._texts, self._thinking = index, texts, thinking
        self._begun = False
        self._content = self._reasoning = ""
        self._logprobs: list[ContentLogprob] = []
        self._reason: Reason = "stop"

    def take(self, update: Update) -> ChatChoiceChunk | None:
        reasoning, content = self._split(update)
        told = [content_logprob(self._texts, one) for one in update.logprobs] if self._texts else []
        if not (reasoning or content or told or update.finish_reason):
            return None
        self._content, self._reasoning = self._content + content, self._reasoning + reasoning
        self._logprobs += told
        delta: Delta = {} if self._begun else {"role": "assistant", "content": ""}
        self._begun = True
        if reasoning:
            delta["reasoning_content"] = reasoning
        if content:
            delta["content"] = content
        reason = reason_of(update)
        self._reason = reason or self._reason
        return {"index": self.index, "delta": delta, "logprobs": self._list(told), "finish_reason": reason}

    def whole(self) -> ChatChoiceAnswer:
        message: AssistantMessage = {"role": "assistant", "content": self._content, "refusal": None}
        if self._reasoning:
            message["reasoning_content"] = self._reasoning
        logprobs = self._list(self._logprobs)
        return {"index": self.index, "message": message, "logprobs": logprobs, "finish_reason": self._reason}

    def _split(self, update: Update) -> tuple[str, str]:
        if self._thinking is None:
            return "", update.text
        reasoning, content = self._thinking.push(update.text)
        if update.finish_reason:
            rest = self._thinking.finish()
            return reasoning + rest[0], content + rest[1]
        return reasoning, content

    def _list(self, told: list[ContentLogprob]) -> ChatLogprobs | None:
        return {"content": told, "refusal": None} if self._texts else None


def content_logprob(texts: TokenTexts, one: TokenLogprob) -> ContentLogprob:
    top = [_logprob(texts, token, value) for token, value in one.top]
    return {**_logprob(texts, one.token_id, one.logprob), "top_logprobs": top}


def _logprob(texts: TokenTexts, token: int, value: float) -> TopLogprob:
    return {"token": texts.text(token), "logprob": value, "bytes": list(texts.bytes(token))}
