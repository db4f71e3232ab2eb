"""What packing costs in quality on a real model: each format's logits against the same model's in float32 (mean
Kullback-Leibler divergence, how often the likeliest token is the same), and, computed in torch, what a group of 64
would give instead of 128 and what each kind of matrix contributes.

    python benchmarks/quality.py MODEL [--out FILE]        # SmolLM2's GGUF file, for example"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rounds import Report

from ciuic_runtime.engine.llm import LLM
from ciuic_runtime.models.layout import GROUP

TEXT = """The river rises in the hills above the town and reaches the sea after two hundred miles. For most of that way it
is slow and brown, and barges carried grain and timber along it until the railway came. In computing, a schedule says which
task runs on which processor and when; a good one keeps the slowest part busy all the time, because nothing else decides
how long the whole takes. To make bread, mix flour, water, salt and a little yeast, knead the dough until it is smooth, let
it rise in a warm place for two hours, and bake it until the crust is brown and sounds hollow when you knock on it."""  # noqa: E501
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def compare(expected: torch.Tensor, got: torch.Tensor) -> tuple[float, float]:
    """Mean divergence in nats, and the share of positions with the same likeliest token."""
    log = expected.log_softmax(-1)
    divergence = (log.exp() * (log - got.log_softmax(-1))).sum(-1).mean()
    return float(divergence), float((expected.argmax(-1) == got.argmax(-1)).float().mean())


def rounded(weight: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """The values that `bits` and one scale per `group` columns leave of a matrix, rounded to nearest as `pack` does."""
    rows, columns = weight.shape
    grouped = F.pad(weight.float(), (0, -columns % group)).view(rows, -1, group)
    largest = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True))
    scale = (largest / -8 if bits == 4 else largest.abs() / 127).half().float()
    least, most = (-8, 7) if bits == 4 else (-127, 127)
    values = torch.where(scale == 0, 0.0, (grouped / scale).round().clamp(least, most) * scale)
    return values.view(rows, -1)[:, :columns].to(weight.dtype)


class Rounded:
    """A float32 model some of whose weights are rounded for the length of a `with`; activations stay as they are."""

    def __init__(self, llm: LLM, roles: tuple[str, ...], bits: int, group: int) -> None:
        pages = llm._executor._pages
        self._chosen = [p for (name, _), p in pages.items() if name.startswith("layers.")]
        self._roles, self._round = roles, lambda w: rounded(w, bits, group)
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __enter__(self) -> None:
        for page in self._chosen:
            for role in self._roles:
                if role in page:
                    self._kept.append((page[role], page[role].clone()))
                    page[role].copy_(self._round(page[role]))

    def __exit__(self, *error: object) -> None:
        for weight, before in self._kept:
            weight.copy_(before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    report = Report("Quality of packed formats", args.out)

    def opened(format: str, kernels: str = "auto") -> LLM:
        return LLM(args.model, dtype=format, kernels=kernels, max_num_seqs=1, max_model_len=1024)

    exact = opened("float32")
    ids = exact.tokenizer.encode(TEXT)
    expected = exact.logits(ids)

    def line(name: str, logits: Callable[[], torch.Tensor]) -> None:
        divergence, same = compare(expected, logits())
        report.line(f"{name:44} KL {divergence:8.5f}   same likeliest token {same:6.1%}")

    report.line(f"{args.model.name}, {len(ids)} tokens of prose, against its own float32 logits")
    for format, kernels in (("bfloat16", "reference"), ("bfloat16", "auto"), ("int8", "auto"), ("int4", "auto")):
        with opened(format, kernels) as llm:
            line(f"{format}, {'torch' if kernels == 'reference' else llm.kernels}", lambda llm=llm: llm.logits(ids))
    for bits, group in ((8, GROUP), (4, 32), (4, 64), (4, GROUP)):
        with Rounded(exact, MATRICES, bits, group):
            line(f"weights alone, {bits} bits, groups of {group}", lambda: exact.logits(ids))
    for role in MATRICES:
        with Rounded(exact, (role,), 4, GROUP):
            line(f"weights alone, only {role} in 4 bits", lambda: exact.logits(ids))
    report.save()


if __name__ == "__main__":
    main()
