"""The wall: how fast a model could run if every operator ran at a limit of the machine: the sum over operators of
max(bytes read / bandwidth, operations / peak), both limits measured beside the run. Knows shapes, not kernels.

    python benchmarks/wall.py [MODEL] [--format int4] [--threads 2]        the walls of the benchmarks' cases, now

What is counted as read: each weight of an operator once per pass (of routed experts those that are chosen by any row),
the latents that decode attends to, one row of the embedding per token. Activations are taken to stay in caches."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import dataclass

from limits import Limits, measure

from ciuic_runtime.models.config import load_spec
from ciuic_runtime.models.layout import Part, page_layout
from ciuic_runtime.models.spec import ModelSpec
from ciuic_runtime.models.tensors import tensors_by_page

KV_VALUE_BYTES = 2  # bfloat16
INT8_LAYOUTS = ("w4g128-t16", "w8g128-t16")  # multiplied as 8-bit numbers; all else at the bf16 peak


@dataclass(frozen=True, slots=True)
class Operator:
    name: str  # layers.3.attention.q_proj
    nbytes: float  # read
    ops: float  # a multiplication and an addition are two
    int8: bool

    def seconds(self, limits: Limits) -> float:
        peak = limits.int8_peak if self.int8 else limits.bf16_peak
        return max(self.nbytes / limits.read_bandwidth, self.ops / peak)


@dataclass(frozen=True)
class Wall:
    operators: tuple[Operator, ...]

    @property
    def nbytes(self) -> float:
        return sum(o.nbytes for o in self.operators)

    @property
    def ops(self) -> float:
        return sum(o.ops for o in self.operators)

    def seconds(self, limits: Limits) -> float:
        return sum(o.seconds(limits) for o in self.operators)


def expected_distinct(spec: ModelSpec, tokens: int) -> float:
    """Experts of a layer that some of the tokens choose, if every token chooses at random."""
    assert spec.moe is not None
    return spec.moe.num_experts * (1 - (1 - spec.moe.experts_per_token / spec.moe.num_experts) ** tokens)


def decode_wall(
    spec: ModelSpec, format: str, batch: int = 1, context: float = 0, distinct: float | None = None
) -> Wall:
    """One step: a token for each of `batch` sequences that attend to `context` positions each."""
    return Wall(tuple(_operators(spec, format, batch, batch, batch * context, False, distinct)))


def prefill_wall(spec: ModelSpec, format: str, tokens: int, distinct: float | None = None) -> Wall:
    """One sequence's prompt from its beginning, logits for its last token."""
    return Wall(tuple(_operators(spec, format, tokens, 1, tokens * (tokens + 1) / 2, True, distinct)))


def packed_nbytes(spec: ModelSpec, format: str) -> int:
    return sum(page_layout(spec, page, format).nbytes for page in tensors_by_page(spec))


def _operators(
    spec: ModelSpec, format: str, tokens: int, sampled: int, pairs: float, prefill: bool, distinct: float | None
) -> Iterator[Operator]:
    """`pairs`: of a token and a position that it attends to."""
    if distinct is None and spec.moe is not None:
        distinct = expected_distinct(spec, tokens)
    for page in tensors_by_page(spec):
        parts = page_layout(spec, page, format).parts
        if page == "embedding":
            row = parts[0].nbytes / spec.vocab_size
            yield Operator(page, tokens * row, 0, False)
            if spec.tied_embeddings:
                yield _product("head", parts[-1], sampled)
        elif page == "head":
            yield _product(page, parts[0], sampled)
        elif page.endswith(".attention"):
            yield from _attention(spec, page, parts, tokens, pairs, prefill)
        elif ".experts." in page:
            if page.endswith(".experts.0"):
                yield from _experts(spec, page, parts, tokens, distinct or 0.0)
        else:
            for part in parts:
                yield _product(f"{page}.{part.role}", part, tokens)


def _product(name: str, part: Part, rows: float, share: float = 1.0) -> Operator:
    """Rows times the transposed matrices of a part; `share`: how many times the part is read."""
    count, height, width = part.matrix
    ops = 0.0 if len(part.shape) == 1 else 2.0 * rows * count * height * width
    return Operator(name, part.nbytes * share, ops, part.layout in INT8_LAYOUTS)


def _experts(spec: ModelSpec, page: str, parts: tuple[Part, ...], tokens: int, distinct: float) -> Iterator[Operator]:
    assert spec.moe is not None
    for part in parts:
        name = f"{page.removesuffix('.0')}.{part.role}"
        yield _product(name, part, tokens * spec.moe.experts_per_token, distinct)


def _attention(
    spec: ModelSpec, page: str, parts: tuple[Part, ...], tokens: int, pairs: float, prefill: bool
) -> Iterator[Operator]:
    """MLA: prompts expand latents by k_b and v_b; generated tokens absorb k_b into the query and read the latents."""
    mla = spec.mla
    if mla is None:
        raise SystemExit(f"{spec.name} has no latent attention; its wall is not written yet")
    unused = "k_b_absorbed" if prefill else "k_b"
    for part in parts:
        if part.role != unused:
            yield _product(f"{page}.{part.role}", part, tokens)
    if prefill:
        yield Operator(f"{page}.pairs", 0, 2.0 * pairs * spec.num_heads * (mla.qk_dim + mla.value_dim), False)
    else:
        ops = 2.0 * pairs * spec.num_heads * (mla.latent_dim + mla.kv_rank)
        yield Operator(f"{page}.latents", pairs * mla.latent_dim * KV_VALUE_BYTES, ops, False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="deepseek-v2-lite")
    parser.add_argument("--format", default="int4", choices=("int4", "int8", "bfloat16"))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    spec, limits = load_spec(args.model), measure(args.threads)
    print(limits)
    print(f"{spec.name} {args.format}: {packed_nbytes(spec, args.format) / 1e9:.2f} GB")
    cases = {
        "decode, batch 1, empty context": (decode_wall(spec, args.format), 1),
        "decode, batch 1, context 1024": (decode_wall(spec, args.format, context=1024), 1),
        "decode, batch 16, empty context": (decode_wall(spec, args.format, batch=16), 16),
        "prefill, 512 tokens": (prefill_wall(spec, args.format, 512), 512),
    }
    for name, (wall, tokens) in cases.items():
        seconds = wall.seconds(limits)
        rates = f"{wall.nbytes / seconds / 1e9:.1f} GB/s, {wall.ops / seconds / 1e12:.2f} TOP/s"
        print(
            f"{name:34} {wall.nbytes / 1e9:7.3f} GB  {wall.ops / 1e9:9.1f} GOP  {seconds * 1e3:8.2f} ms  "
            f"{tokens / seconds:8.1f} tok/s   ({rates})"
        )


if __name__ == "__main__":
    main()
