"""Tokenizers out of GGUF files: the published ids, exact round trips, and sentencepiece's own order of merging."""

from __future__ import annotations

import unicodedata
from itertools import pairwise
from pathlib import Path

import gguf
import gguf_writer as writer
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.models.gguf_pretokenizers import PRE_TOKENIZERS
from ciuic_runtime.models.tokenizer import Tokenizer, load_tokenizer

TEXTS = [
    "",
    " ",
    "The capital of France is",
    "  two  spaces\t\ttabs\r\n\r\nand lines\n",
    "don't WON'T I'll",
    "12345 3.14159 1,000,000",
    "def f(x):\n    return x ** 2  # square\n",
    "深度求索，人工智能。ひらがな カタカナ 한국어",
    "héllo ñandú ßtraße Ωμέγα кириллица",
    "العربية ٠١٢٣ हिन्दी ไทย",
    "😀👨‍👩‍👧‍👦🇫🇷 e\u0301",
    "\u0000\u0001\ufffd\U0010ffff",
    "<|im_start|>user\nHi<|im_end|>",
]


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2: Path) -> Tokenizer:
    return load_tokenizer(smollm2)


def test_smollm2_gives_the_published_ids(smollm2_tokenizer: Tokenizer) -> None:
    assert smollm2_tokenizer.encode("The capital of France is") == [504, 3575, 282, 4649, 314]
    assert smollm2_tokenizer.vocab_size == 49152
    assert (smollm2_tokenizer.bos_token_id, smollm2_tokenizer.eos_token_ids, smollm2_tokenizer.prefix) == (1, (2,), ())
    assert smollm2_tokenizer.encode("<|im_start|>") == [1]
    assert smollm2_tokenizer.encode("2018") == [34, 32, 33, 40], "digits stand alone"
    assert smollm2_tokenizer.token_to_id("<|im_end|>") == 2
    assert smollm2_tokenizer.id_to_token(2) == "<|im_end|>"
    assert smollm2_tokenizer.token_to_id("no such token") is None
    assert smollm2_tokenizer.id_to_token(49152) is None


@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_round_trips(smollm2_tokenizer: Tokenizer, text: str) -> None:
    assert smollm2_tokenizer.decode(smollm2_tokenizer.encode(text), skip_special=False) == text


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=80))
def test_smollm2_round_trips_any_text(smollm2_tokenizer: Tokenizer, text: str) -> None:
    alphabet = writer.byte_tokens()
    assume(
        all(smollm2_tokenizer.token_to_id(alphabet[byte]) is not None for byte in text.encode())
    )  # a few control codes are not
    ids = smollm2_tokenizer.encode(text)
    assert smollm2_tokenizer.decode(ids, skip_special=False) == text
    stream = smollm2_tokenizer.stream(skip_special=False)
    assert "".join(map(stream.push, ids)) + stream.finish() == text


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 49151), max_size=40), skip=st.booleans())
def test_smollm2_streams_what_it_decodes(smollm2_tokenizer: Tokenizer, ids: list[int], skip: bool) -> None:
    stream = smollm2_tokenizer.stream(skip_special=skip)
    assert "".join(map(stream.push, ids)) + stream.finish() == smollm2_tokenizer.decode(ids, skip_special=skip)


def test_a_stream_never_splits_a_character(smollm2_tokenizer: Tokenizer) -> None:
    text = "😀 é 漢 한"
    ids = smollm2_tokenizer.encode(text)
    stream = smollm2_tokenizer.stream()
    pieces = [stream.push(i) for i in ids]
    assert len(ids) > len(text), "the text was meant to have characters of several tokens"
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_smollm2_chat_template(smollm2_tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "Hi {{ 1 + 1 }}"}, {"role": "assistant", "content": "Hello"}]
    assert smollm2_tokenizer.apply_chat_template(messages, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi {{ 1 + 1 }}<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>assistant\n"
    )
    alone = [{"role": "system", "content": "S"}]
    assert (
        smollm2_tokenizer.apply_chat_template(alone, add_generation_prompt=False) == "<|im_start|>system\nS<|im_end|>\n"
    )


def write_bpe(
    path: Path, pre: str | None, merges: tuple[str, ...] = ("! !",), vocab_size: int = 300, **ids: int
) -> Path:
    tokens = writer.byte_tokens() + ["".join(merge.split(" ")) for merge in merges]
    tokens += [f"[PAD{i}]" for i in range(len(tokens), vocab_size - 3)] + ["<tool>", "<s>", "</s>"]
    file = gguf.GGUFWriter(path, "llama")
    file.add_tokenizer_model("gpt2")
    if pre is not None:
        file.add_tokenizer_pre(pre)
    file.add_token_list(tokens)
    file.add_token_types([1] * (vocab_size - 3) + [4, 3, 3])
    file.add_token_merges(list(merges))
    for name, value in ({"bos": vocab_size - 2, "eos": vocab_size - 1} | ids).items():
        file.add_uint32(f"tokenizer.ggml.{name}_token_id", value)
    writer.finish(file, {}, None)
    return path


# What each pre-tokenizer makes of one text: the pieces inside which tokens merge.
TEXT = "I've 12345 日本x.y\n\n  Ω"
PIECES = {
    "gpt-2": ["I", "'ve", " 12345", " 日本x", ".", "y", "\n\n ", " Ω"],
    "default": ["I", "'ve", " 12345", " 日本x", ".", "y", "\n\n ", " Ω"],
    "smollm": ["I", "'ve", " ", "1", "2", "3", "4", "5", " 日本x", ".", "y", "\n\n ", " Ω"],
    "llama-bpe": ["I", "'ve", " ", "123", "45", " 日本x", ".y", "\n\n", " ", " Ω"],
    "llama3": ["I", "'ve", " ", "123", "45", " 日本x", ".y", "\n\n", " ", " Ω"],
    "qwen2": ["I", "'ve", " ", "1", "2", "3", "4", "5", " 日本x", ".y", "\n\n", " ", " Ω"],
    "deepseek-r1-qwen": ["I", "'ve", " ", "1", "2", "3", "4", "5", " 日本x", ".y", "\n\n", " ", " Ω"],
    "deepseek-llm": ["I", "'", "ve", " ", "1", "2", "3", "4", "5", " ", "日本", "x", ".", "y", "\n", "\n", " ", " Ω"],
    "deepseek-coder": ["I", "'", "ve", " ", "1", "2", "3", "4", "5", " ", "日本", "x", ".", "y", "\n", "\n", " ", " Ω"],
    "deepseek-v3": ["I", "'ve", " ", "123", "45", " ", "日本", "x", ".y", "\n\n", " ", " Ω"],
}


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_text_is_cut_as_the_pre_tokenizer_says(tmp_path: Path, pre: str) -> None:
    backend = load_tokenizer(write_bpe(tmp_path / "bpe.gguf", pre)).backend
    cut = [TEXT[start:end] for _, (start, end) in backend.pre_tokenizer.pre_tokenize_str(TEXT)]
    assert cut == PIECES[pre]


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_pre_tokenizer_round_trips(tmp_path: Path, pre: str) -> None:
    tokenizer = load_tokenizer(write_bpe(tmp_path / "bpe.gguf", pre))
    for text in TEXTS:
        expected = unicodedata.normalize("NFC", text) if PRE_TOKENIZERS[pre].normalise else text
        assert tokenizer.decode(tokenizer.encode(text)) == expected


@pytest.mark.parametrize("pre", ["unknown-pre", "deepseek", None])
def test_an_unknown_pre_tokenizer_is_refused_with_those_there_are(tmp_path: Path, pre: str | None) -> None:
    with pytest.raises(InvalidInput, match=r"pre-tokenizer is .*smollm, llama-bpe.*deepseek-v3"):
        load_tokenizer(write_bpe(tmp_path / "bpe.gguf", pre))


def test_llama_bpe_takes_whole_words_without_merging(tmp_path: Path) -> None:
    """The token abc exists, but no merge leads to it: only ignore_merges finds it, as in llama 3's tokenizer.json."""
    ids = {}
    for pre in ("llama-bpe", "qwen2"):
        path = write_unreachable(tmp_path / f"{pre}.gguf", pre)
        ids[pre] = load_tokenizer(path).encode("abc", add_special=False)
    assert ids["llama-bpe"] == [256]
    assert ids["qwen2"] == [ord("a"), ord("b"), ord("c")]


def write_unreachable(path: Path, pre: str) -> Path:
    tokens = [*writer.byte_tokens(), "abc", "!!", "<s>"]
    file = gguf.GGUFWriter(path, "llama")
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre(pre)
    file.add_token_list(tokens)
    file.add_token_types([1] * 258 + [3])
    file.add_token_merges(["! !"])
    file.add_bos_token_id(258)
    writer.finish(file, {}, None)
    return path


def test_beginning_of_text_follows_the_field_then_the_kind(tmp_path: Path) -> None:
    assert load_tokenizer(write_bpe(tmp_path / "a.gguf", "llama-bpe")).encode("a") == [298, ord("a")]
    assert load_tokenizer(write_bpe(tmp_path / "a.gguf", "llama-bpe")).encode("a", add_special=False) == [ord("a")]
    assert load_tokenizer(write_bpe(tmp_path / "b.gguf", "qwen2")).encode("a") == [ord("a")]


def test_special_and_user_defined_tokens(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_bpe(tmp_path / "a.gguf", "qwen2"))
    ids = tokenizer.encode("a<tool>b</s>")
    assert ids == [ord("a"), 297, ord("b"), 299]
    assert tokenizer.decode(ids) == "a<tool>b", "only control tokens are left out"
    assert tokenizer.decode(ids, skip_special=False) == "a<tool>b</s>"
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}


def test_ends_of_turn_and_message_end_a_generation_too(tmp_path: Path) -> None:
    assert load_tokenizer(write_bpe(tmp_path / "a.gguf", "qwen2", eot=297, eom=299)).eos_token_ids == (299, 297)


def test_a_special_token_beyond_the_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="eos token is 300, there are 300"):
        load_tokenizer(write_bpe(tmp_path / "a.gguf", "qwen2", eos=300))


def test_a_merge_of_unknown_tokens_is_refused(tmp_path: Path) -> None:
    path = write_bpe(tmp_path / "a.gguf", "qwen2", ("a b",))
    path.write_bytes(path.read_bytes().replace(b"a b", b"a\xc3\xbf"))
    with pytest.raises(InvalidInput, match="merge"):
        load_tokenizer(path)


def test_a_file_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    file = gguf.GGUFWriter(tmp_path / "none.gguf", "llama")
    file.add_name("nothing")
    writer.finish(file, {}, None)
    with pytest.raises(InvalidInput, match="has no tokenizer"):
        load_tokenizer(tmp_path / "none.gguf")


def test_another_tokenizer_model_is_named(tmp_path: Path) -> None:
    file = gguf.GGUFWriter(tmp_path / "bert.gguf", "llama")
    file.add_tokenizer_model("bert")
    file.add_token_list(["a"])
    writer.finish(file, {}, None)
    with pytest.raises(InvalidInput, match=r"'bert'.*gpt2.*llama"):
        load_tokenizer(tmp_path / "bert.gguf")


# Pieces and scores of a small sentencepiece model; a higher score merges first.
PIECES_BY_SCORE = {"▁a": -1.0, "ab": -2.0, "bc": -3.0, "abc": -4.0, "▁abc": -5.0, "▁▁": -6.0, "cc": -7.0, "éa": -8.0}
LETTERS = ["▁", "a", "b", "c", "é"]


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("spm") / "spm.gguf"
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES_BY_SCORE, *LETTERS]
    scores = [0.0] * 259 + list(PIECES_BY_SCORE.values()) + [-100.0] * len(LETTERS)
    file = gguf.GGUFWriter(path, "llama")
    file.add_tokenizer_model("llama")
    file.add_tokenizer_pre("default")
    file.add_token_list(tokens)
    file.add_token_scores(scores)
    file.add_token_types([2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259))
    file.add_bos_token_id(1)
    file.add_eos_token_id(2)
    file.add_add_eos_token(True)
    writer.finish(file, {}, None)
    return load_tokenizer(path)


def merge_by_score(text: str) -> list[str]:
    """sentencepiece's BPE: of all neighbours whose join is a piece, the best-scored, leftmost pair merges; repeat."""
    symbols = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        pairs = [a + b for a, b in pairwise(symbols)]
        joins = [(-PIECES_BY_SCORE[pair], i) for i, pair in enumerate(pairs) if pair in PIECES_BY_SCORE]
        if not joins:
            return symbols
        at = min(joins)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]


@settings(max_examples=300, deadline=None)
@given(text=st.text(alphabet="abcé ", max_size=20))
def test_pieces_merge_in_the_order_of_their_scores(sentencepiece: Tokenizer, text: str) -> None:
    ids = sentencepiece.encode(text, add_special=False)
    assert [sentencepiece.id_to_token(i) for i in ids] == merge_by_score(text)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=30).filter(lambda t: "<" not in t and "▁" not in t))
def test_sentencepiece_spells_the_rest_in_bytes(sentencepiece: Tokenizer, text: str) -> None:
    ids = sentencepiece.encode(text)
    assert (ids[0], ids[-1]) == (1, 2)
    assert sentencepiece.decode(ids) == text
    stream = sentencepiece.stream()
    assert "".join(map(stream.push, ids)) + stream.finish() == text
