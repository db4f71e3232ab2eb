"""Builds a tokenizer from the fields of a GGUF file: byte-level BPE, or a sentencepiece model from its scores.
Knows token types and merges; how text is cut before merging is `gguf_pretokenizers.py`'s business."""

from __future__ import annotations

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.models.config_fields import show
from ciuic_runtime.models.gguf_file import GgufFile, StringArray
from ciuic_runtime.models.gguf_pretokenizers import PRE_TOKENIZERS, PreTokenizer, normaliser

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # tokenizer.ggml.token_type
_MAX_PIECE = 256  # characters; longer sentencepiece tokens are not reached by merging


def build_backend(file: GgufFile) -> Tokenizer:
    """The tokenizer that the file describes, without beginning or end of text added to what it encodes."""
    model = file.fields.get("tokenizer.ggml.model")
    tokens = list(_strings(file, "tokens"))
    kinds = _token_types(file, len(tokens))
    try:
        if model == "gpt2":
            return _byte_level_bpe(file, tokens, kinds)
        if model == "llama":
            return _sentencepiece(file, tokens, kinds)
    except InvalidInput:
        raise
    except Exception as error:  # `tokenizers` raises plain exceptions, such as for a merge of unknown tokens
        raise InvalidInput(f"{file.path}: the tokenizer cannot be built ({error}); convert the model anew") from error
    raise InvalidInput(
        f"{file.path}: the tokenizer model is {show(model)}; this runtime reads 'gpt2' (byte-level BPE) and 'llama' "
        "(sentencepiece); take a folder with tokenizer.json instead"
    )


def adds_bos(file: GgufFile) -> bool:
    """Whether the beginning of text is marked: as the file says, else as its kind of tokenizer usually does."""
    stated = file.fields.get("tokenizer.ggml.add_bos_token")
    if isinstance(stated, bool):
        return stated
    if file.fields.get("tokenizer.ggml.model") == "llama":
        return True
    return _pre_tokenizer(file).add_bos


def _byte_level_bpe(file: GgufFile, tokens: list[str], kinds: list[int]) -> Tokenizer:
    pre = _pre_tokenizer(file)
    merges = [_split_merge(file, merge) for merge in _strings(file, "merges")]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre.ignore_merges))
    if (normalizer := normaliser(pre)) is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = pre.build()
    backend.decoder = decoders.ByteLevel()
    _add_special(backend, tokens, kinds)
    return backend


def _sentencepiece(file: GgufFile, tokens: list[str], kinds: list[int]) -> Tokenizer:
    """Pieces merge in the order of their scores; what no piece covers is spelt in bytes (<0x0A>)."""
    scores = file.fields.get("tokenizer.ggml.scores")
    if not isinstance(scores, np.ndarray) or len(scores) != len(tokens):
        raise InvalidInput(f"{file.path}: tokenizer.ggml.scores must hold one score for each of {len(tokens)} tokens")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    pieces = {
        t: s for t, s, kind in zip(tokens, scores.tolist(), kinds, strict=True) if kind in (_NORMAL, _USER_DEFINED)
    }
    unknown = next((t for t, kind in zip(tokens, kinds, strict=True) if kind == _UNKNOWN), None)
    model = models.BPE(vocabulary, _merges_by_score(pieces), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    backend = Tokenizer(model)
    spaces, prefix = "▁", file.fields.get("tokenizer.ggml.add_space_prefix", True) is not False
    steps: list[normalizers.Normalizer] = [normalizers.Prepend(spaces)] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", spaces)])
    end = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace(spaces, " "), decoders.ByteFallback(), decoders.Fuse(), *end])
    _add_special(backend, tokens, kinds)
    return backend


def _merges_by_score(pieces: dict[str, float]) -> list[tuple[str, str]]:
    found: list[tuple[float, int, int, str, str]] = []
    for piece, score in pieces.items():
        for cut in range(1, min(len(piece), _MAX_PIECE)):
            left, right = piece[:cut], piece[cut:]
            if left in pieces and right in pieces:
                found.append((score, len(left), len(right), left, right))
    found.sort(key=lambda merge: merge[:3], reverse=True)
    return [(left, right) for _, _, _, left, right in found]


def _add_special(backend: Tokenizer, tokens: list[str], kinds: list[int]) -> None:
    named = [
        (t, kind) for t, kind in zip(tokens, kinds, strict=True) if t and kind in (_CONTROL, _UNKNOWN, _USER_DEFINED)
    ]
    control = [AddedToken(t, special=True, normalized=False) for t, kind in named if kind != _USER_DEFINED]
    backend.add_special_tokens(control)
    backend.add_tokens([AddedToken(t, normalized=False) for t, kind in named if kind == _USER_DEFINED])


def _pre_tokenizer(file: GgufFile) -> PreTokenizer:
    name = file.fields.get("tokenizer.ggml.pre")
    if not isinstance(name, str) or name not in PRE_TOKENIZERS:
        raise InvalidInput(
            f"{file.path}: the pre-tokenizer is {show(name)}; this runtime knows {', '.join(PRE_TOKENIZERS)}; "
            "take a folder with tokenizer.json instead"
        )
    return PRE_TOKENIZERS[name]


def _strings(file: GgufFile, key: str) -> list[str]:
    value = file.fields.get(f"tokenizer.ggml.{key}")
    if not isinstance(value, StringArray) or not len(value):
        raise InvalidInput(f"{file.path} has no tokenizer (tokenizer.ggml.{key} is missing); take another file")
    try:
        return list(value)
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{file.path}: tokenizer.ggml.{key} is not UTF-8; download the file again") from error


def _token_types(file: GgufFile, count: int) -> list[int]:
    kinds = file.fields.get("tokenizer.ggml.token_type")
    if kinds is None:
        return [_NORMAL] * count
    if not isinstance(kinds, np.ndarray) or len(kinds) != count:
        raise InvalidInput(f"{file.path}: tokenizer.ggml.token_type must hold one type for each of {count} tokens")
    return [int(kind) for kind in kinds.tolist()]


def _split_merge(file: GgufFile, merge: str) -> tuple[str, str]:
    cut = merge.find(" ", 1)
    if cut < 0:
        raise InvalidInput(f"{file.path}: the merge {show(merge)} is not two tokens; convert the model anew")
    return merge[:cut], merge[cut + 1 :]
