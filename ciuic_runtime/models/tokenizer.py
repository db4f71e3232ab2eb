"""Text to token ids and back, for a Hugging Face folder or a GGUF file, with the model's chat template.
Knows which tokens mark beginning and end; how a template is rendered safely is `chat_template.py`'s business."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.models.chat_template import render_chat
from ciuic_runtime.models.token_stream import TokenStream

if TYPE_CHECKING:
    import tokenizers

    from ciuic_runtime.models.gguf_file import GgufFile

MAX_TEXT = 64_000_000  # characters


@dataclass(frozen=True, slots=True)
class Tokenizer:
    backend: tokenizers.Tokenizer = field(repr=False)
    vocab_size: int  # ids run from 0 to below this
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]  # any of them ends a generation
    prefix: tuple[int, ...] = ()  # put before a text that is encoded with `add_special`
    suffix: tuple[int, ...] = ()
    chat_templates: Mapping[str, str] = field(default_factory=dict, repr=False)  # by name; usually only "default"
    special_tokens: Mapping[str, str] = field(default_factory=dict)  # bos_token, eos_token, ...: for the template

    @property
    def chat_template(self) -> str | None:
        return self.chat_templates.get("default")

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Ids of the text. The output of `apply_chat_template` marks its beginning itself: no `add_special` there."""
        if not isinstance(text, str) or len(text) > MAX_TEXT:
            raise InvalidInput(f"a prompt must be a string of at most {MAX_TEXT} characters, not {type(text).__name__}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InvalidInput(f"the prompt is not valid Unicode: {error.reason} at {error.start}") from error
        ids = self.backend.encode(text, add_special_tokens=False).ids
        return [*self.prefix, *ids, *self.suffix] if add_special else ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of the ids; bytes that are not UTF-8 become U+FFFD. Ids the tokenizer does not name are left out."""
        if any(i < 0 for i in ids):
            raise InvalidInput(f"token ids are not negative, but {min(ids)} was given")
        return self.backend.decode([i for i in ids if i < 2**32], skip_special_tokens=skip_special)

    def stream(self, skip_special: bool = True) -> TokenStream:
        """Turns ids into text one at a time, whole characters only."""
        return TokenStream(self.backend, skip_special)

    def token_to_id(self, token: str) -> int | None:
        return self.backend.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        return self.backend.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **kwargs: Any
    ) -> str:
        """The conversation as the text that the model was trained on."""
        name = "tool_use" if kwargs.get("tools") and "tool_use" in self.chat_templates else "default"
        template = self.chat_templates.get(name)
        if template is None:
            named = f" called default (there are {', '.join(self.chat_templates)})" if self.chat_templates else ""
            raise InvalidInput(f"this model has no chat template{named}; give the whole prompt as text instead")
        variables = {**self.special_tokens, **kwargs}
        return render_chat(template, messages, add_generation_prompt=add_generation_prompt, **variables)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint: a folder with tokenizer.json, or a .gguf file."""
    path = Path(path)
    if path.is_dir():
        from ciuic_runtime.models.hf_tokenizer import load_folder

        return load_folder(path)
    if path.suffix == ".gguf" and path.is_file():
        from ciuic_runtime.models.gguf_file import GgufFile

        return _from_gguf(GgufFile(path))
    what = "is neither a folder nor a .gguf file" if path.exists() else "does not exist"
    raise InvalidInput(
        f"no tokenizer at {path}: it {what}; give a checkpoint folder with tokenizer.json or a .gguf file"
    )


def _from_gguf(file: GgufFile) -> Tokenizer:
    from ciuic_runtime.models.gguf_config import eos_token_ids, token_id
    from ciuic_runtime.models.gguf_tokenizer import adds_bos, build_backend

    backend = build_backend(file)
    vocab_size = len(file.fields["tokenizer.ggml.tokens"])
    ids = {name: token_id(file, name) for name in ("bos", "eos", "unknown", "padding")}
    for name, value in (*ids.items(), *(("eos", i) for i in eos_token_ids(file))):
        if value is not None and not 0 <= value < vocab_size:
            raise InvalidInput(f"{file.path}: the {name} token is {value}, there are {vocab_size} tokens")
    bos, eos = ids["bos"], ids["eos"]
    if adds_bos(file) and bos is None:
        raise InvalidInput(f"{file.path}: tokenizer.ggml.add_bos_token is set, but there is no bos_token_id")
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    return Tokenizer(
        backend,
        vocab_size,
        bos,
        eos_token_ids(file),
        prefix=(bos,) if adds_bos(file) and bos is not None else (),
        suffix=(eos,) if file.fields.get("tokenizer.ggml.add_eos_token") is True and eos is not None else (),
        chat_templates=_gguf_templates(file),
        special_tokens={names[n]: backend.id_to_token(i) or "" for n, i in ids.items() if i is not None},
    )


def _gguf_templates(file: GgufFile) -> dict[str, str]:
    key = "tokenizer.chat_template"
    found = {k.removeprefix(key).lstrip(".") or "default": v for k, v in file.fields.items() if k.startswith(key)}
    return {name: value for name, value in found.items() if isinstance(value, str)}
