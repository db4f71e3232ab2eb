"""Turns generated ids into text as they come, without ever splitting a character.
Knows decoders that are exact byte by byte; others are decoded in a window that grows until its end is certain."""

from __future__ import annotations

import codecs
import json
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tokenizers

_REPLACEMENT = "\ufffd"
_LONGEST_WINDOW = 64  # tokens; only runs of bytes that are no text get there


class TokenStream:
    """Feed ids to `push`, which returns the text that is certain by now, then take the rest from `finish`."""

    def __init__(self, backend: tokenizers.Tokenizer, skip_special: bool = True) -> None:
        self._backend, self._skip_special = backend, skip_special
        self._bytes: codecs.IncrementalDecoder | None = None
        if is_byte_level(backend):
            self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self._special = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
        self._window: list[int] = []
        self._settled = 0  # tokens at the head of the window whose text has been returned

    def push(self, token_id: int) -> str:
        if self._bytes is not None:
            return self._bytes.decode(self._token_bytes(token_id))
        self._window.append(token_id)
        before, text = self._decode(self._window[: self._settled]), self._decode(self._window)
        uncertain = text.endswith(_REPLACEMENT) and len(self._window) - self._settled < _LONGEST_WINDOW
        if len(text) <= len(before) or uncertain:
            return ""
        self._window = self._window[self._settled :]
        self._settled = len(self._window)
        return text[len(before) :]

    def finish(self) -> str:
        if self._bytes is not None:
            return self._bytes.decode(b"", final=True)
        before, text = self._decode(self._window[: self._settled]), self._decode(self._window)
        self._window, self._settled = [], 0
        return text[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=self._skip_special)

    def _token_bytes(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id)
        if token is None or (self._skip_special and token_id in self._special):
            return b""
        return token_bytes(token)


def token_bytes(token: str) -> bytes:
    """What a token of a byte-level vocabulary stands for; one with characters outside its alphabet, for itself."""
    alphabet = _byte_alphabet()
    if all(character in alphabet for character in token):
        return bytes(alphabet[character] for character in token)
    return token.encode("utf-8")


@cache
def _byte_alphabet() -> dict[str, int]:
    """The stand-ins of GPT-2's byte-level alphabet: printable bytes stand for themselves, the others follow at 256."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


def is_byte_level(backend: tokenizers.Tokenizer) -> bool:
    """Whether decoding is joining the bytes of the tokens."""
    if backend.decoder is None:
        return False
    steps = json.loads(backend.decoder.__getstate__())
    steps = steps["decoders"] if steps["type"] == "Sequence" else [steps]
    return [step["type"] for step in steps] == ["ByteLevel"]
