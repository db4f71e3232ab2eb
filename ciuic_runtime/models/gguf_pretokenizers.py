"""How published tokenizers cut text before merging, by the name that a GGUF file gives it in `tokenizer.ggml.pre`.
Knows the patterns of the models' own tokenizer.json files; a name that is not here is refused, never guessed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tokenizers import Regex, normalizers, pre_tokenizers


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    build: Callable[[], pre_tokenizers.PreTokenizer]
    ignore_merges: bool = False  # a whole word that is a token is taken without merging
    add_bos: bool = False  # where the file does not say
    normalise: bool = False  # to Unicode NFC first


def _byte_level(*before: pre_tokenizers.PreTokenizer, use_regex: bool = False) -> pre_tokenizers.PreTokenizer:
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    return pre_tokenizers.Sequence([*before, last]) if before else last


def _splits(*patterns: str) -> list[pre_tokenizers.PreTokenizer]:
    return [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]


def _digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Digits(individual_digits=True)


# Letters that have case, as DeepSeek-LLM's tokenizer.json lists them (hexadecimal; newer Unicode has more).
_CASED_LETTERS = """
    41-5a 61-7a b5 c0-d6 d8-f6 f8-1ba 1bc-1bf 1c4-293 295-2af 370-373 376 377 37b-37d 37f 386 388-38a 38c 38e-3a1
    3a3-3f5 3f7-481 48a-52f 531-556 10a0-10c5 13a0-13f5 13f8-13fd 1c90-1cba 1cbd-1cbf 1d00-1d2b 1d6b-1d77 1d79-1d9a
    1e00-1f15 1f18-1f1d 1f20-1f45 1f48-1f4d 1f50-1f57 1f59 1f5b 1f5d 1f5f-1f7d 1f80-1fb4 1fb6-1fbc 1fbe 1fc2-1fc4
    1fc6-1fcc 1fd0-1fd3 1fd6-1fdb 1fe0-1fec 1ff2-1ff4 1ff6-1ffc 2102 2107 210a-2113 2115 2119-211d 2124 2126 2128
    212a-212d 212f-2134 2139 213c-213f 2145-2149 214e 2183 2184 2c00-2c7b 2c7e-2ce4 2ceb-2cee 2cf2 2cf3 a640-a66d
    a680-a69b a722-a76f a771-a787 a78b-a78e ab70-abbf fb00-fb06 fb13-fb17 ff21-ff3a ff41-ff5a 10400-1044f
    104b0-104d3 104d8-104fb 10c80-10cb2 10cc0-10cf2 118a0-118df 1e900-1e943
"""


def _letter_class() -> str:
    def show(code: str) -> str:
        return chr(int(code, 16))

    ranges = [token.split("-") for token in _CASED_LETTERS.split()]
    return "[" + "".join("-".join(map(show, ends)) for ends in ranges) + "]"


_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DEEPSEEK_PUNCTUATION = r"\s?[!-/:-~" + "\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)


def _deepseek_llm() -> pre_tokenizers.PreTokenizer:
    patterns = (r"[\r\n]", r"\s?" + _letter_class() + "+", _DEEPSEEK_PUNCTUATION, r"\s+$", _CJK)
    return _byte_level(*_splits(*patterns), _digits())


def _deepseek_coder() -> pre_tokenizers.PreTokenizer:
    return _byte_level(*_splits(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK), _digits())


_GPT2 = PreTokenizer(lambda: _byte_level(use_regex=True))
_LLAMA_BPE = PreTokenizer(lambda: _byte_level(*_splits(_LLAMA3)), ignore_merges=True, add_bos=True)
_QWEN = PreTokenizer(lambda: _byte_level(*_splits(_QWEN2)), normalise=True)

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "smollm": PreTokenizer(lambda: _byte_level(_digits(), use_regex=True)),
    "llama-bpe": _LLAMA_BPE,
    "llama3": _LLAMA_BPE,
    "qwen2": _QWEN,
    "deepseek-r1-qwen": _QWEN,
    "deepseek-llm": PreTokenizer(_deepseek_llm),
    "deepseek-coder": PreTokenizer(_deepseek_coder),
    "deepseek-v3": PreTokenizer(lambda: _byte_level(*_splits(*_DEEPSEEK_V3))),
}


def normaliser(pre: PreTokenizer) -> normalizers.Normalizer | None:
    return normalizers.NFC() if pre.normalise else None
