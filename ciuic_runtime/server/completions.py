"""Completions: prompts as texts or token ids, continued.
Knows how a prompt is echoed, with the log probabilities of its own tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ciuic_runtime.engine.request import Update
from ciuic_runtime.engine.sampling import TokenLogprob
from ciuic_runtime.server.answers import CompletionChoiceAnswer, CompletionLogprobs, Reason
from ciuic_runtime.server.errors import invalid
from ciuic_runtime.server.group import Wanted
from ciuic_runtime.server.jobs import Job, Served, params_of, reason_of
from ciuic_runtime.server.parsing import parse
from ciuic_runtime.server.protocol import CompletionRequest
from ciuic_runtime.server.tokens import Offsets, TokenTexts


def completion_job(served: Served, body: bytes) -> Job:
    asked = parse(CompletionRequest, body)
    served.check_name(asked.model)
    served.check_count(len(asked.prompts), asked.n)
    told = {"logprobs": asked.logprobs}
    if asked.echo and (asked.logprobs is not None or not asked.max_tokens):
        told["prompt_logprobs"] = asked.logprobs or 0
    wanted: list[Wanted] = []
    choices: list[CompletionChoice] = []
    for prompt in asked.prompts:
        ids, text = _both(served, prompt)
        new = served.room(ids, asked.max_tokens, "prompt")
        for i in range(asked.n):
            wanted.append(Wanted(ids, params_of(asked, i, new, **told)))
            log = LogprobLog(served.texts) if asked.logprobs is not None else None
            choices.append(CompletionChoice(len(choices), text if asked.echo else "", ids if asked.echo else (), log))
    return Job.new("text_completion", asked, wanted, choices)


def _both(served: Served, prompt: str | list[int]) -> tuple[list[int], str]:
    """A prompt as token ids and as text."""
    tokenizer, size = served.llm.tokenizer, served.llm.model.spec.vocab_size
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    if not ids:
        raise invalid("the prompt is empty; give at least one token", "prompt")
    if (bad := next((i for i in ids if not 0 <= i < size), None)) is not None:
        raise invalid(f"the prompt has the token id {bad}; {served.name} has 0 to {size - 1}", "prompt")
    return ids, prompt if isinstance(prompt, str) else tokenizer.decode(prompt)


class LogprobLog:
    """Log probabilities of a text's tokens, with where in it they stand."""

    def __init__(self, texts: TokenTexts) -> None:
        self._texts, self._offsets = texts, Offsets(texts)
        self.all: CompletionLogprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}

    def push(self, token_ids: Sequence[int], told: Iterable[TokenLogprob | None]) -> CompletionLogprobs:
        told = list(told)
        new: CompletionLogprobs = {
            "tokens": [self._texts.text(token) for token in token_ids],
            "token_logprobs": [None if one is None else one.logprob for one in told],
            "top_logprobs": [None if one is None else self._likeliest(one) for one in told],
            "text_offset": self._offsets.push(token_ids),
        }
        self.all["tokens"] += new["tokens"]
        self.all["token_logprobs"] += new["token_logprobs"]
        self.all["top_logprobs"] += new["top_logprobs"]
        self.all["text_offset"] += new["text_offset"]
        return new

    def _likeliest(self, one: TokenLogprob) -> dict[str, float]:
        """The token itself is among them, as OpenAI has it."""
        found = {self._texts.text(token): value for token, value in reversed(one.top)}
        return found | {self._texts.text(one.token_id): one.logprob}


class CompletionChoice:
    """`echoed` text and ids come before what is new; `log` where log probabilities are wanted."""

    def __init__(self, index: int, echoed: str, echoed_ids: Sequence[int], log: LogprobLog | None) -> None:
        self.index, self._log = index, log
        self._echoed, self._echoed_ids = echoed, echoed_ids
        self._text = ""
        self._reason: Reason | None = None

    def take(self, update: Update) -> CompletionChoiceAnswer | None:
        text = self._echoed + update.text
        token_ids = [*self._echoed_ids, *update.token_ids]
        told = [*(update.prompt_logprobs or [None] * len(self._echoed_ids)), *update.logprobs]
        self._echoed, self._echoed_ids = "", ()
        if not (text or (self._log and token_ids) or update.finish_reason):
            return None
        self._text += text
        self._reason = reason_of(update)
        logprobs = self._log.push(token_ids, told) if self._log else None
        return {"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": self._reason}

    def whole(self) -> CompletionChoiceAnswer:
        logprobs = self._log.all if self._log else None
        return {"index": self.index, "text": self._text, "logprobs": logprobs, "finish_reason": self._reason}
