"""Single tokens as clients see them beside log probabilities: text, bytes, and where they stand in the whole text.
Knows a tokenizer, and nothing of what was asked."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from functools import lru_cache

from ciuic_runtime.models.token_stream import is_byte_level, token_bytes
from ciuic_runtime.models.tokenizer import Tokenizer


class TokenTexts:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._byte_level = is_byte_level(tokenizer.backend)
        self._special = {i for i, t in tokenizer.backend.get_added_tokens_decoder().items() if t.special}
        self.bytes = lru_cache(maxsize=1 << 16)(self._bytes)

    def text(self, token_id: int) -> str:
        """As OpenAI writes it: bytes that are no text by themselves as numbers. What pads the vocabulary has none."""
        if self.tokenizer.id_to_token(token_id) is None:
            return f"token_id:{token_id}"
        raw = self.bytes(token_id)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def shown(self, token_id: int) -> bytes:
        """What it adds to a text; special tokens nothing."""
        return b"" if token_id in self._special else self.bytes(token_id)

    def _bytes(self, token_id: int) -> bytes:
        token = self.tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_level:
            return token_bytes(token)
        if token.startswith("<0x") and token.endswith(">") and len(token) == 6:  # SentencePiece's single bytes
            return bytes.fromhex(token[3:5])
        if token_id in self._special:
            return token.encode()
        return token.replace("▁", " ").encode()


class Offsets:
    """Where in a growing text each token begins, in characters."""

    def __init__(self, texts: TokenTexts) -> None:
        self._texts, self._at = texts, 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Iterable[int]) -> list[int]:
        begins = []
        for token_id in token_ids:
            begins.append(self._at)
            self._at += len(self._decoder.decode(self._texts.shown(token_id)))
        return begins
