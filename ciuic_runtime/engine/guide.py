"""Guided decoding: which tokens may come next, so that what is generated is JSON of a given schema.
Knows schemas and tokenizers, and leaves automata to llguidance; choosing among those tokens is the sampling's part."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ciuic_runtime.devices.errors import CiuicError, InvalidInput
from ciuic_runtime.models.tokenizer import Tokenizer

if TYPE_CHECKING:
    import tokenizers
    from llguidance import LLMatcher, LLTokenizer

MAX_SCHEMA_BYTES = 1 << 17
MAX_SCHEMA_DEPTH = 64
WHITESPACE = r"[\x20\x0A\x0D\x09]{1,32}"  # in one place; a model that likes blanks would never come to an end
LIMITS: Mapping[str, Any] = {"max_lexer_states": 20_000, "verbose_errors": False}  # a state takes up to 2 kB

# A pattern can be short and take minutes or gigabytes to compile: each schema is first tried in a process that may have
# one second of a core and 2 GiB. It answers with what is wrong with the schema, if anything is.
TRIAL_SECONDS = 30  # in all, on a machine that has other things to do
TRIAL = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_CPU, (1, 1))
resource.setrlimit(resource.RLIMIT_AS, (1 << 31, 1 << 31))
from llguidance import LLMatcher, LLParserLimits
print(LLMatcher.validate_grammar(sys.stdin.read(), limits=LLParserLimits(**{LIMITS})))
"""


class GuideFailed(CiuicError):
    """The grammar became too complex on the way; the request it belongs to cannot go on, others can."""


class Guide(Protocol):
    def mask(self, logits: NDArray[np.float32]) -> None:
        """In logits [vocab], what may not come next becomes -inf. Raises GuideFailed."""

    def accept(self, token_id: int) -> None:
        """Takes the token that came; if that makes it fail, the next mask says so."""

    @property
    def finished(self) -> bool:
        """Whether nothing but the end may come."""


def make_guide(
    tokenizer: Tokenizer, eos_token_ids: Collection[int], vocab_size: int, json_schema: Mapping[str, Any] | None
) -> Guide:
    """For one generation; without a schema, of any JSON object. `vocab_size` is the model's, which may have ids that
    the tokenizer does not name. It may take a second: not to be called where others wait. Raises InvalidInput."""
    ends = tuple(sorted({i for i in eos_token_ids if 0 <= i < min(vocab_size, tokenizer.vocab_size)}))
    if not ends:
        raise InvalidInput(
            "this model names no end-of-sequence token, so that an answer of a given form would have no end; ask for "
            "plain text, or name one in its tokenizer_config.json (eos_token)"
        )
    text = '{"type": "object"}' if json_schema is None else _as_text(json_schema)
    return JsonGuide(_matcher(tokenizer.backend, tokenizer.vocab_size, ends, text).deep_copy(), tokenizer.vocab_size)


class JsonGuide:
    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size  # the tokenizer's
        self._bits = np.zeros((1, -(-vocab_size // 32)), np.int32)

    def mask(self, logits: NDArray[np.float32]) -> None:
        may = _allowed(self._matcher, self._bits, min(self._vocab_size, len(logits)))
        np.putmask(logits[: len(may)], ~may, -np.inf)
        logits[len(may) :] = -np.inf

    def accept(self, token_id: int) -> None:
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token_id)

    @property
    def finished(self) -> bool:
        return self._matcher.is_stopped() and not self._matcher.is_error()


def _allowed(matcher: LLMatcher, bits: NDArray[np.int32], count: int) -> NDArray[np.bool_]:
    """Of the first `count` tokens, those that may come next; where nothing else may, the ends."""
    from llguidance.numpy import fill_next_token_bitmask

    fill_next_token_bitmask(matcher, bits)
    if matcher.is_error():
        reason = _reason(matcher.get_error())
        raise GuideFailed(f"the form of the answer became too complex to follow ({reason}); simplify its JSON schema")
    return np.unpackbits(bits.view(np.uint8)[0], count=count, bitorder="little").view(np.bool_)


def _as_text(schema: Mapping[str, Any]) -> str:
    """Raises InvalidInput for what is too large, too deep, or not JSON."""
    depth, level = 0, [schema]  # type: int, list[Any]
    while level:
        depth += 1
        if depth > MAX_SCHEMA_DEPTH:
            raise InvalidInput(f"the JSON schema is nested deeper than {MAX_SCHEMA_DEPTH} levels; use $defs and $ref")
        within = (value.values() if isinstance(value, Mapping) else value for value in level)
        level = [inner for values in within for inner in values if isinstance(inner, (Mapping, list, tuple))]
    try:
        # The order of properties is that of the answer. x-guidance would set llguidance's own options.
        text = json.dumps({k: v for k, v in schema.items() if k != "x-guidance"}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"the JSON schema is not JSON: {error}") from error
    if len(text) > MAX_SCHEMA_BYTES:
        raise InvalidInput(
            f"the JSON schema has {len(text)} bytes, and {MAX_SCHEMA_BYTES} are read; give a smaller one"
        )
    return text


@lru_cache(maxsize=32)
def _matcher(backend: tokenizers.Tokenizer, vocab_size: int, ends: tuple[int, ...], schema: str) -> LLMatcher:
    """At its beginning; to be copied."""
    words = _words(backend, vocab_size, ends)
    from llguidance import LLMatcher, LLParserLimits

    try:
        grammar = LLMatcher.grammar_from_json_schema(
            schema, overrides={"whitespace_pattern": WHITESPACE, "lenient": False}
        )
    except ValueError as error:
        raise _wrong(_reason(str(error))) from error
    if wrong := _tried(grammar):
        raise _wrong(wrong)
    matcher = LLMatcher(words, grammar, log_level=0, limits=LLParserLimits(**LIMITS))
    if matcher.is_error():
        raise _wrong(_reason(matcher.get_error()))
    try:  # what allows nothing at all is seen at the first step
        _allowed(matcher, np.zeros((1, -(-vocab_size // 32)), np.int32), vocab_size)
    except GuideFailed as error:
        raise _wrong("no JSON value fits it") from error
    return matcher


@lru_cache(maxsize=4)
def _words(backend: tokenizers.Tokenizer, vocab_size: int, ends: tuple[int, ...]) -> LLTokenizer:
    """What bytes each token stands for; 0.7 s for 129k tokens."""
    try:
        from llguidance import LLTokenizer
    except ImportError as error:
        raise InvalidInput(
            "answers of a given form (response_format) need llguidance, which is not installed; pip install llguidance"
        ) from error
    try:
        return LLTokenizer(backend.to_str(), n_vocab=vocab_size, eos_token=list(ends))
    except ValueError as error:
        kind = type(backend.decoder).__name__ if backend.decoder else "no decoder"
        raise InvalidInput(
            f"answers of a given form need a tokenizer whose tokens stand for bytes (ByteLevel or ByteFallback), and "
            f"this model's has {kind} ({_reason(str(error))}); ask for plain text"
        ) from error


def _tried(grammar: str) -> str:
    """What is wrong with a grammar; empty if nothing is."""
    command = [sys.executable, "-P", "-c", TRIAL]
    try:
        done = subprocess.run(command, input=grammar, capture_output=True, text=True, timeout=TRIAL_SECONDS)
    except subprocess.TimeoutExpired:
        return "it takes too long to compile"
    if done.returncode < 0:
        return "it takes too much time or memory to compile"
    if done.returncode:
        return f"it cannot be compiled: {_reason(done.stderr[-300:])}"
    return _reason(done.stdout)


def _wrong(reason: str) -> InvalidInput:
    return InvalidInput(
        f"the JSON schema cannot be followed: {reason}; leave out what is not supported, have fewer and simpler "
        "patterns and fewer alternatives, or ask for any JSON object"
    )


def _reason(message: str) -> str:
    """llguidance's words in one line, without the grammar's text and positions that nobody sent."""
    return " ".join(message.replace("<non-verbose/>", "").split())[:300]
