"""A packed folder of given pages, written page by page."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ciuic_runtime.memory.page_store import checksum_of_all
from ciuic_runtime.memory.page_writer import PageWriter
from ciuic_runtime.models.layout import LAYOUT_VERSION


def write_int4_folder(
    folder: Path, config: Mapping[str, Any], pages: Mapping[str, int], content: Callable[[str], torch.Tensor],
    **settings: Any,
) -> Path:  # fmt: skip
    """`config`: of the unpacked model; `pages`: bytes of each; `settings`: of PageWriter."""
    folder.mkdir(parents=True)
    writer = PageWriter(folder, "int4", pages, **settings)
    for page in pages:
        writer.write(page, content(page))
    writer.finish()
    checksum = checksum_of_all(writer.checksums[page] for page in pages)
    section = {"format": "int4", "layout_version": LAYOUT_VERSION, "checksum": checksum}
    (folder / "config.json").write_text(json.dumps({**config, "ciuic": section}))
    return folder
