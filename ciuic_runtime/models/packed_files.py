"""What stands beside the pages in a packed folder, so that it is a model by itself: config, tokenizer, chat template.
A Hugging Face folder's are copied, a GGUF file's written in the same form; knows no weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.devices.files import write_whole
from ciuic_runtime.models.config_fields import read_json_object
from ciuic_runtime.models.layout import LAYOUT_VERSION
from ciuic_runtime.models.spec import ModelSpec
from ciuic_runtime.models.tokenizer import Tokenizer, load_tokenizer

_COPIED = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "additional_chat_templates/*.jinja",
    "LICENSE*",
)  # fmt: skip


def write_tokenizer(model: Path, folder: Path) -> None:
    """Tokenizer, chat template and generation defaults of the model at `model`, as files of a Hugging Face folder."""
    if not model.is_dir():
        return _written_anew(load_tokenizer(model), folder)
    for pattern in _COPIED:
        for file in sorted(model.glob(pattern)):
            to = folder / file.relative_to(model)
            to.parent.mkdir(exist_ok=True)
            try:
                shutil.copyfile(file, to)
            except OSError as error:
                raise InvalidInput(f"{file} cannot be copied to {to}: {error.strerror}") from error
    return None


def write_config(model: Path, spec: ModelSpec, folder: Path, format: str, checksum: str) -> None:
    """The model's own config with a section that says how its weights are packed; written last, as it completes the
    folder. How they were quantised before is left out: they are not any more."""
    config = read_json_object(model / "config.json") if model.is_dir() else _gguf_config(model)
    config.pop("quantization_config", None)
    if config.get("dtype") is None and config.get("torch_dtype") is None:
        config["dtype"] = spec.dtype
    config["ciuic"] = {"format": format, "layout_version": LAYOUT_VERSION, "checksum": checksum}
    _write_json(folder / "config.json", config)


def _gguf_config(path: Path) -> dict[str, Any]:
    from ciuic_runtime.models.gguf_config import gguf_config
    from ciuic_runtime.models.gguf_file import open_gguf

    return gguf_config(open_gguf(path))


def _written_anew(tokenizer: Tokenizer, folder: Path) -> None:
    write_whole(folder / "tokenizer.json", tokenizer.backend.to_str(pretty=True))
    templates: object = [{"name": name, "template": text} for name, text in tokenizer.chat_templates.items()]
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": bool(tokenizer.prefix),
        "add_eos_token": bool(tokenizer.suffix),
        **tokenizer.special_tokens,
        **({"chat_template": templates} if templates else {}),
    }
    _write_json(folder / "tokenizer_config.json", settings)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_whole(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
