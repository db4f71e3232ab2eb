"""Text as it is shown: whole characters only, nothing that may still become a stop string, and the same text however
it came in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers

from ciuic_runtime.engine.text import NoText, TextStream
from ciuic_runtime.models.token_stream import TokenStream
from ciuic_runtime.models.tokenizer import Tokenizer, load_tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
TEXTS = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("aé你好😀👩‍👧🇫🇷 \n\0ﬁ")), max_size=30
)


class Ready:
    """Pieces of text that are certain already: id n stands for the n-th."""

    def __init__(self, pieces: Sequence[str], rest: str = "") -> None:
        self.pieces, self.rest = pieces, rest

    def push(self, token_id: int) -> str:
        return self.pieces[token_id]

    def finish(self) -> str:
        return self.rest


def shown(stream: TextStream, count: int) -> list[str]:
    pieces = [stream.push(i) for i in range(count)]
    return [*pieces, stream.finish()]


def until_stop(text: str, stop: Sequence[str]) -> str:
    """Character by character: the text before the stop string that is complete first (the longest, if several)."""
    for end in range(1, len(text) + 1):
        found = [s for s in stop if text[:end].endswith(s)]
        if found:
            return text[: end - max(map(len, found))]
    return text


@given(
    st.lists(st.text("abc", max_size=5), max_size=8), st.text("abc", max_size=3),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)  # fmt: skip
@example(["xab", "c", "d"], "", ["abcd", "c"])
@example(["aab"], "", ["ab"])
@example(["ab", "ab", "c"], "", ["abc"])
@example(["a", "b"], "c", ["abc"])
@settings(max_examples=300, deadline=None, derandomize=True)
def test_text_ends_before_the_first_stop_string(pieces: list[str], rest: str, stop: list[str]) -> None:
    stream = TextStream(Ready(pieces, rest), stop)
    came = shown(stream, len(pieces))
    text = "".join(pieces) + rest
    assert "".join(came) == stream.text == until_stop(text, stop)
    assert stream.stopped == (until_stop(text, stop) != text or any(s in text for s in stop))


def test_nothing_is_shown_that_may_become_a_stop_string() -> None:
    stream = TextStream(Ready(["one E", "N", "D", "ING"]), ["ENDING!", "NDI?"])
    assert shown(stream, 4) == ["one ", "", "", "", "ENDING"]
    stream = TextStream(Ready(["one E", "N", "x"]), ["END"])
    assert shown(stream, 3) == ["one ", "", "ENx", ""]


def test_after_a_stop_string_nothing_comes() -> None:
    stream = TextStream(Ready(["a", "STOP", "b"], "c"), ["STOP"])
    assert shown(stream, 3) == ["a", "", "", ""]
    assert stream.text == "a"


def test_without_a_tokenizer_there_is_no_text() -> None:
    assert shown(TextStream(NoText()), 3) == [""] * 4


def byte_fallback() -> Backend:
    """Letters have tokens, everything else is spelt in bytes, as sentencepiece models do."""
    vocabulary = {f"<0x{b:02X}>": b for b in range(256)} | {c: 256 + i for i, c in enumerate("▁abcdefgh")}
    vocabulary |= {"ab": 300, "▁c": 301, "<unk>": 302}
    backend = Backend(models.BPE(vocabulary, [("a", "b"), ("▁", "c")], byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return backend


@cache
def tokenizer(name: str, path: Path) -> Tokenizer:
    return Tokenizer(byte_fallback(), 303, None, ()) if name == "byte fallback" else load_tokenizer(path)


@pytest.fixture(scope="module", params=["bytes", "byte fallback", "smollm2"])
def some(request: pytest.FixtureRequest) -> Tokenizer:
    name = request.param
    path = request.getfixturevalue("smollm2" if name == "smollm2" else "tiny_v3")
    return tokenizer(name, path)


@given(text=TEXTS)
@example(text="日本語のテキスト😀 👩‍👧‍👦 mixed ünïcödé")
@settings(max_examples=120, deadline=None, derandomize=True)
def test_pieces_are_whole_characters_and_make_up_the_text(some: Tokenizer, text: str) -> None:
    ids = some.encode(text, add_special=False)
    stream, whole, so_far = some.stream(), some.decode(ids), ""
    for i in ids:
        so_far += stream.push(i)
        assert whole.startswith(so_far), "a character was split, or text was taken back"
    assert so_far + stream.finish() == whole


@pytest.mark.parametrize("text", ["日本語のテキスト😀 👩‍👧‍👦 mixed ünïcödé", "déjà vu\n\n\tتجربة 한국어", "a", " "])
def test_texts_come_back(some: Tokenizer, text: str) -> None:
    stream = some.stream()
    pieces = [stream.push(i) for i in some.encode(text, add_special=False)]
    assert "".join(pieces) + stream.finish() == text
    assert not any(REPLACEMENT in piece for piece in pieces)


@given(ids=st.lists(st.integers(0, 319), max_size=30))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_bytes_that_are_no_text(tiny_v3: Path, ids: list[int]) -> None:
    """As a random model gives them; ids without a token, and special ones, give nothing."""
    some = tokenizer("bytes", tiny_v3)
    stream = some.stream()
    assert "".join(map(stream.push, ids)) + stream.finish() == some.decode(ids)


def test_tokens_that_overlap_characters(smollm2: Path) -> None:
    """Each token ends inside a character: nothing of it is shown before its last byte, however long that goes on."""
    some = tokenizer("bytes", smollm2)
    data = "你好世界" * 20
    by_byte = [some.token_to_id(c) for c in byte_characters(data)]
    stream = TokenStream(some.backend)
    pieces = [stream.push(i) for i in by_byte if i is not None]
    assert [p for p in pieces if p] == list(data)


def byte_characters(text: str) -> list[str]:
    """The stand-ins of GPT-2's byte-level alphabet."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in plain]
    return [chr(b) if b in plain else chr(256 + others.index(b)) for b in text.encode()]


def test_an_unfinished_character_is_shown_at_the_end(tiny_v3: Path) -> None:
    stream = TextStream(load_tokenizer(tiny_v3).stream())
    some = load_tokenizer(tiny_v3)
    ids = some.encode("a😀", add_special=False)[:-1]
    assert [stream.push(i) for i in ids] == ["a", "", "", ""]
    assert stream.finish() == REPLACEMENT
    assert stream.text == "a" + REPLACEMENT
