"""The tokenizer of a Hugging Face folder: tokenizer.json, with what the files beside it say of special tokens and chat.
Never unpickles and reads no sentencepiece models; it says what to do where only those are there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.models.config_fields import read_json_object, show
from ciuic_runtime.models.tokenizer import Tokenizer

_MAX_TOKENIZER_BYTES = 256_000_000
_MAX_TEMPLATE_BYTES = 1_000_000
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def load_folder(folder: Path) -> Tokenizer:
    backend = _backend(folder)
    config = _optional_json(folder / "tokenizer_config.json")
    names = {key: _content(config.get(key), folder, key) for key in _NAMED_TOKENS}
    special = {key: name for key, name in names.items() if name}
    bos, eos = (_named_id(backend, special.get(key)) for key in ("bos_token", "eos_token"))
    if bos is None:
        bos = next(iter(_listed_ids(folder, "bos_token_id")), None)
    ends = dict.fromkeys([*_listed_ids(folder, "eos_token_id"), *([] if eos is None else [eos])])
    prefix, suffix = _surroundings(backend)
    return Tokenizer(
        backend,
        max(backend.get_vocab().values(), default=-1) + 1,
        bos,
        tuple(ends),
        prefix=_with_or_without(prefix, bos, config.get("add_bos_token")),
        suffix=_with_or_without(suffix, eos, config.get("add_eos_token")),
        chat_templates=_templates(folder, config),
        special_tokens=special,
    )


def _backend(folder: Path) -> tokenizers.Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InvalidInput(_what_is_missing(folder))
    if path.stat().st_size > _MAX_TOKENIZER_BYTES:
        raise InvalidInput(f"{path} is larger than {_MAX_TOKENIZER_BYTES // 10**6} MB; that is no tokenizer")
    try:
        backend = tokenizers.Tokenizer.from_str(path.read_text("utf-8"))
    except Exception as error:  # `tokenizers` raises plain exceptions
        reason = str(error).split("\n")[0][:200]
        raise InvalidInput(f"{path} is not a tokenizer.json ({reason}); download it again") from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def _what_is_missing(folder: Path) -> str:
    for name in ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt"):
        if (folder / name).is_file():
            return (
                f"{folder} has {name} but no tokenizer.json, the only form that is read; make one where transformers "
                "is installed: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
            )
    return f"{folder} has no tokenizer (tokenizer.json is missing); copy it from where the model comes from"


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.exists() else {}


def _content(value: Any, folder: Path, key: str) -> str | None:
    """A token's text, written plainly or as an object with its properties."""
    if isinstance(value, dict):
        value = value.get("content")
    if value is None or isinstance(value, str):
        return value
    raise InvalidInput(f"{folder / 'tokenizer_config.json'}: {key} is {show(value)}; it must be a token's text")


def _named_id(backend: tokenizers.Tokenizer, token: str | None) -> int | None:
    return None if token is None else backend.token_to_id(token)


def _listed_ids(folder: Path, key: str) -> Iterator[int]:
    """From generation_config.json, which goes first, and config.json: one id or a list of them."""
    for name in ("generation_config.json", "config.json"):
        value = _optional_json(folder / name).get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        for i in ids:
            if type(i) is not int or not 0 <= i < 2**32:
                raise InvalidInput(f"{folder / name}: {key} is {show(value)}; it must be a token id or a list of them")
            yield i


def _surroundings(backend: tokenizers.Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the tokenizer itself puts before and after a text."""
    plain, full = (backend.encode("a", add_special_tokens=special).ids for special in (False, True))
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return tuple(full[:start]), tuple(full[start + len(plain) :])
    return (), ()


def _with_or_without(around: tuple[int, ...], token: int | None, stated: Any) -> tuple[int, ...]:
    """tokenizer_config.json has the last word on whether the token is added, where it says so at all."""
    if token is None or not isinstance(stated, bool) or (token in around) == stated:
        return around
    return (token,) if stated else tuple(i for i in around if i != token)


def _templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """By name: from chat_template.jinja and additional_chat_templates/, else from tokenizer_config.json."""
    stated = config.get("chat_template")
    found: dict[str, str] = {}
    if isinstance(stated, str):
        found["default"] = stated
    elif isinstance(stated, list):
        for entry in stated:
            if not isinstance(entry, dict) or not all(isinstance(entry.get(k), str) for k in ("name", "template")):
                raise InvalidInput(f"{folder / 'tokenizer_config.json'}: chat_template has an entry without a name")
            found[entry["name"]] = entry["template"]
    files = {"default": folder / "chat_template.jinja"}
    files |= {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    return found | {name: _read_template(path) for name, path in files.items() if path.is_file()}


def _read_template(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_MAX_TEMPLATE_BYTES).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path} cannot be read as a chat template: {error}") from error
