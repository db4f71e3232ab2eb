"""A model as people name it: a checkpoint folder, a GGUF file, a config.json, or a known name.
Reads configuration only; what it gives is what a plan needs."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.models.config import load_spec
from ciuic_runtime.models.graph import PREFILL_CHUNK, build_graph
from ciuic_runtime.models.layout import PACKED_FORMATS
from ciuic_runtime.models.spec import ModelSpec
from ciuic_runtime.schedulers.graph import Layer, Page, TaskGraph
from ciuic_runtime.schedulers.replay import Routing, with_popularity

FORMATS = ("auto", "float32", "bfloat16", *PACKED_FORMATS)
ALIASES = {"bf16": "bfloat16"}


def parse_format(name: str, spec: ModelSpec) -> str:
    """What weights are held in; "auto" is the checkpoint's own, bfloat16 for float16 and quantised files."""
    format = ALIASES.get(name, name)
    if format not in FORMATS:
        raise InvalidInput(f"format {name!r} is not one of {', '.join(FORMATS)}")
    if spec.packed and format not in ("auto", spec.packed):
        raise InvalidInput(
            f"{spec.name} is packed as {spec.packed} and cannot be had in {format}; leave the format out, or pack the "
            f"checkpoint it came from as {format}"
        )
    if format == "auto":
        return spec.packed or spec.default_dtype
    return format


class Model:
    """`Model("deepseek-v3")`: `.spec`, `.graph`, `.layers`, `.pages`; nothing of the weights is read."""

    def __init__(
        self,
        source: str | Path,
        format: str = "auto",
        spec: ModelSpec | None = None,
        prefill_chunk: int = PREFILL_CHUNK,  # prompt tokens that a pass takes at most
        routing: Routing | None = None,  # how popular its experts are, by a recording
    ) -> None:
        self.source, self.prefill_chunk, self.routing = source, prefill_chunk, routing
        self.spec = spec or load_spec(source)
        self.format = parse_format(format, self.spec)

    @cached_property
    def graph(self) -> TaskGraph:
        graph = replace(build_graph(self.spec, self.format), prefill_chunk=self.prefill_chunk)
        return graph if self.routing is None else with_popularity(graph, self.routing)

    @property
    def layers(self) -> tuple[Layer, ...]:
        return self.graph.layers

    @property
    def pages(self) -> dict[str, Page]:
        return self.graph.pages

    def __repr__(self) -> str:
        size = f"{len(self.layers)} layers, {self.graph.parameters / 1e9:.2f} B parameters"
        return f"Model({self.spec.name}, {self.format}, {size})"
