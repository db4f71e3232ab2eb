"""Attention layers for the kernel tests: drawn weights, sequences cut into chunks over a cache with scattered blocks,
and the same in double precision with every rounding that the kernels make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from kernel_cases import PRECISE, Weight, address, as_read, guarded, linear, native, randn, rng, weight, weight_of

from ciuic_runtime.memory.kv_cache import BLOCK_TOKENS
from ciuic_runtime.models.spec import RopeSpec
from ciuic_runtime.ops.attention import attend, mla_absorbed, mla_expanded
from ciuic_runtime.ops.rope import apply_rope, rope_frequencies, rope_table

POSITIONS = 512
EPS_NORM = 1e-6


@dataclass(frozen=True)
class Text:
    """One sequence: its layer inputs, how many of its tokens are prompt, and its block table."""

    x: torch.Tensor  # [tokens, hidden]
    residual: torch.Tensor
    prompt: int
    blocks: list[int]

    def slots(self, first: int, end: int) -> list[int]:
        return [self.blocks[p // BLOCK_TOKENS] * BLOCK_TOKENS + p % BLOCK_TOKENS for p in range(first, end)]


@dataclass(frozen=True)
class Piece:
    """Tokens [first, end) of a sequence, all prompt or all generated."""

    text: int
    first: int
    end: int


class Layer(Protocol):
    hidden: int
    entry: int  # values per token in the cache
    layout: str

    def call(self, ops: Any, batch: Any, x: int, residual: int, cache: int, out: int) -> None: ...
    def reference(self, text: Text, entries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...
    def plain(self, text: Text, entries: torch.Tensor) -> torch.Tensor: ...


@dataclass
class Run:
    """A cache and what came out so far, by sequence. A cache begins as NaN, so that reading too much shows."""

    layer: Layer
    texts: Sequence[Text]
    num_blocks: int
    cache: torch.Tensor = field(init=False)
    out: list[torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.cache = torch.full((self.num_blocks * BLOCK_TOKENS, self.layer.entry), float("nan"), dtype=torch.bfloat16)
        self.out = [torch.full_like(t.x, float("nan")) for t in self.texts]

    def step(self, ops: Any, pieces: Sequence[Piece], in_place: bool = False) -> None:
        """One call with these pieces as its batch."""
        positions, slots, sequences, x, residual = [], [], [], [], []
        for piece in pieces:
            text = self.texts[piece.text]
            span = slice(piece.first, piece.end)
            blocks = text.blocks[: -(-piece.end // BLOCK_TOKENS)]
            prompt = piece.first < text.prompt
            assert not prompt or piece.end <= text.prompt
            sequences.append((len(positions), piece.end - piece.first, piece.first, blocks, prompt))
            positions += range(piece.first, piece.end)
            slots += text.slots(piece.first, piece.end)
            x.append(text.x[span])
            residual.append(text.residual[span])
        rows = len(positions)
        where, to, inputs, added = torch.tensor(positions), torch.tensor(slots), torch.cat(x), torch.cat(residual)
        batch = native.Batch(rows, address(where), address(to), sequences)
        out = guarded(rows, self.layer.hidden)
        if in_place:
            out.value.copy_(added)
            added = out.value
        self.layer.call(ops, batch, address(inputs), address(added), address(self.cache), address(out.value))
        got = out.check()
        at = 0
        for piece in pieces:
            n = piece.end - piece.first
            self.out[piece.text][piece.first : piece.end] = got[at : at + n]
            at += n

    def entries(self, text: int) -> torch.Tensor:
        t = self.texts[text]
        return self.cache[t.slots(0, len(t.x))]

    def untouched(self) -> bool:
        """Whether nothing but the sequences' own entries was written."""
        mine = torch.zeros(len(self.cache), dtype=torch.bool)
        for t in self.texts:
            mine[t.slots(0, len(t.x))] = True
        return bool(self.cache[~mine].isnan().all())


def texts_of(hidden: int, sizes: Sequence[tuple[int, int]], num_blocks: int, seed: int) -> list[Text]:
    """Sequences of (prompt, generated) tokens with block tables scattered over the cache."""
    free = torch.randperm(num_blocks, generator=rng(seed)).tolist()
    texts = []
    for i, (prompt, generated) in enumerate(sizes):
        n = prompt + generated
        blocks = [free.pop() for _ in range(-(-n // BLOCK_TOKENS))]
        texts.append(Text(randn(n, hidden, seed=seed + i), randn(n, hidden, seed=seed + i + 50), prompt, blocks))
    return texts


def cuts(text: int, first: int, end: int, size: int) -> list[Piece]:
    return [Piece(text, at, min(at + size, end)) for at in range(first, end, size)]


def rope_of(dim: int, interleaved: bool) -> tuple[RopeSpec, torch.Tensor, torch.Tensor]:
    spec = RopeSpec("default", 10000.0, dim, interleaved)
    inv_freq, factor = rope_frequencies(spec)
    cos, sin = (t.squeeze(1).contiguous() for t in rope_table(inv_freq, factor, torch.arange(POSITIONS)))
    return spec, cos, sin


def normed(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return w.double() * x / (x.pow(2).mean(-1, keepdim=True) + EPS_NORM).sqrt()


def draw_weight(layout: str, rows: int, columns: int, seed: int, gain: float = 1.0, count: int = 1) -> Weight:
    return weight_of(layout, randn(count, rows, columns, seed=seed) * gain * columns**-0.5)


class Mla:
    """DeepSeek's attention. `gain` makes scores large, so that a wrong key shows."""

    def __init__(
        self, layout: str, heads: int, nope: int, rope: int, value: int, rank: int, q_rank: int | None, hidden: int,
        interleaved: bool = True, biased: bool = False, seed: int = 0,
    ) -> None:  # fmt: skip
        self.sizes, self.hidden, self.entry, self.layout = (heads, nope, rope, value, rank), hidden, rank + rope, layout
        self.results = heads * value
        precise, none = PRECISE.get(layout, layout), native.Matrix.none()
        self.q = self.q_a = self.q_b = None
        if q_rank is None:
            self.q = draw_weight(layout, heads * (nope + rope), hidden, seed, 2.0)
        else:
            self.q_a = draw_weight(layout, q_rank, hidden, seed + 1)
            self.q_b = draw_weight(layout, heads * (nope + rope), q_rank, seed + 2, 2.0)
        self.kv_a = draw_weight(precise, rank + rope, hidden, seed + 3)
        keys = randn(heads, nope, rank, seed=seed + 4) * rank**-0.5 * 2
        self.k_b, self.k_b_absorbed = weight_of(precise, keys), weight_of(precise, keys.transpose(1, 2).contiguous())
        self.v_b = draw_weight(precise, value, rank, seed + 5, count=heads)
        self.o = weight(layout, hidden, heads * value, seed + 6)
        self.q_a_norm = 1 + 0.3 * randn(q_rank or 1, seed=seed + 7)
        self.kv_a_norm = 1 + 0.3 * randn(rank, seed=seed + 8)
        self.q_a_bias = randn(q_rank, seed=seed + 9) * 0.3 if biased and q_rank else None
        self.kv_a_bias = randn(rank + rope, seed=seed + 10) * 0.3 if biased else None
        self.o_bias = randn(hidden, seed=seed + 11) if biased else None
        self.scale = (nope + rope) ** -0.5
        self.rope_spec, self.cos, self.sin = rope_of(rope, interleaved)
        self.native_rope = native.Rope(address(self.cos), address(self.sin), rope, interleaved)
        matrices = (self.q, self.q_a, self.q_b, self.kv_a, self.k_b, self.k_b_absorbed, self.v_b, self.o)
        vectors = (self.q_a_norm, self.kv_a_norm, self.q_a_bias, self.kv_a_bias, self.o_bias)
        self.native = native.MlaWeights(
            self.sizes, [none if w is None else w.matrix for w in matrices], [address(v) for v in vectors],
            EPS_NORM, self.scale,
        )  # fmt: skip

    def call(self, ops: Any, batch: Any, x: int, residual: int, cache: int, out: int) -> None:
        ops.mla(self.native, self.native_rope, batch, x, residual, cache, out)

    def queries(self, x: torch.Tensor, first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        heads, nope, rope, _, _ = self.sizes
        if self.q is not None:
            q = linear(self.q, x)
        else:
            assert self.q_a is not None
            assert self.q_b is not None
            latent = linear(self.q_a, x) + (0 if self.q_a_bias is None else self.q_a_bias)
            q = linear(self.q_b, normed(latent, self.q_a_norm))
        q = q.view(len(x), heads, nope + rope)
        return q[..., :nope], self.turned(q[..., nope:], first)

    def turned(self, x: torch.Tensor, first: int = 0) -> torch.Tensor:
        cos, sin = (t[first : first + len(x), None].double() for t in (self.cos, self.sin))
        return apply_rope(x, cos, sin, self.rope_spec.interleaved)

    def expected_entries(self, x: torch.Tensor) -> torch.Tensor:
        """What the cache is to hold, before it is rounded to bfloat16."""
        rank = self.sizes[4]
        kv = linear(self.kv_a, x) + (0 if self.kv_a_bias is None else self.kv_a_bias)
        return torch.cat([normed(kv[:, :rank], self.kv_a_norm), self.turned(kv[:, None, rank:])[:, 0]], dim=1)

    def reference(self, text: Text, entries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The outputs, given the cache's entries, and what those entries are to be."""
        heads, _, _, _, rank = self.sizes
        q_nope, q_rope = self.queries(text.x)
        kv, p = entries.double(), text.prompt
        mixed = []
        if p:
            kv_b = torch.cat([self.k_b.values, self.v_b.values], dim=1).flatten(0, 1).double()
            read = torch.cat([as_read(self.k_b.layout, kv[:p, :rank]), kv[:p, rank:]], dim=1)
            mixed.append(mla_expanded(q_nope[:p], q_rope[:p], read, kv_b, self.scale))
        if len(text.x) > p:
            latent = torch.stack([linear(self.k_b_absorbed, q_nope[p:, h], h) for h in range(heads)], dim=1)
            q = torch.cat([latent, q_rope[p:]], dim=-1)
            o = attend(q, kv[:, None], kv[:, None, :rank], self.scale)
            mixed.append(torch.stack([linear(self.v_b, o[:, h], h) for h in range(heads)], dim=1))
        out = linear(self.o, torch.cat(mixed).flatten(1)) + (0 if self.o_bias is None else self.o_bias)
        return text.residual + out, self.expected_entries(text.x)

    def plain(self, text: Text, entries: torch.Tensor) -> torch.Tensor:
        """ops/attention.py on the unpacked weights, activations unrounded; the absorbed form for generated tokens."""
        x, kv, p = text.x.double(), entries.double(), text.prompt
        heads, nope, rope, _, _ = self.sizes
        if self.q is not None:
            q = x @ self.q[0].double().T
        else:
            assert self.q_a is not None
            assert self.q_b is not None
            latent = x @ self.q_a[0].double().T + (0 if self.q_a_bias is None else self.q_a_bias)
            q = normed(latent, self.q_a_norm) @ self.q_b[0].double().T
        q = q.view(len(x), heads, nope + rope)
        q_nope, q_rope = q[..., :nope], self.turned(q[..., nope:])
        kv_b = torch.cat([self.k_b.values, self.v_b.values], dim=1).flatten(0, 1).double()
        forms = [mla_expanded(q_nope[:p], q_rope[:p], kv[:p], kv_b, self.scale)] if p else []
        if len(x) > p:
            forms.append(mla_absorbed(q_nope[p:], q_rope[p:], kv, kv_b, self.scale))
        out = torch.cat(forms).flatten(1) @ self.o[0].double().T + (0 if self.o_bias is None else self.o_bias)
        return text.residual + out


class Gqa:
    """Grouped-query attention, as in Llama and Qwen2."""

    def __init__(
        self, layout: str, heads: int, kv_heads: int, dim: int, hidden: int, interleaved: bool = False,
        biased: bool = False, seed: int = 0,
    ) -> None:  # fmt: skip
        self.sizes, self.hidden, self.entry, self.layout = (heads, kv_heads, dim), hidden, 2 * kv_heads * dim, layout
        self.results = heads * dim
        self.q = draw_weight(layout, heads * dim, hidden, seed, 2.0)
        self.k = draw_weight(layout, kv_heads * dim, hidden, seed + 1, 2.0)
        self.v = draw_weight(layout, kv_heads * dim, hidden, seed + 2)
        self.o = draw_weight(layout, hidden, heads * dim, seed + 3)
        widths = (heads * dim, kv_heads * dim, kv_heads * dim, hidden)
        self.biases = [randn(n, seed=seed + 4 + i) * 0.3 if biased else None for i, n in enumerate(widths)]
        self.scale = dim**-0.5
        self.rope_spec, self.cos, self.sin = rope_of(dim, interleaved)
        self.native_rope = native.Rope(address(self.cos), address(self.sin), dim, interleaved)
        self.native = native.GqaWeights(
            self.sizes, [w.matrix for w in (self.q, self.k, self.v, self.o)], [address(b) for b in self.biases],
            self.scale,
        )  # fmt: skip

    def call(self, ops: Any, batch: Any, x: int, residual: int, cache: int, out: int) -> None:
        ops.gqa(self.native, self.native_rope, batch, x, residual, cache, out)

    def reference(self, text: Text, entries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._computed(text, entries, lambda w, x: linear(w, x))

    def plain(self, text: Text, entries: torch.Tensor) -> torch.Tensor:
        return self._computed(text, entries, lambda w, x: x.double() @ w[0].double().T)[0]

    def _computed(self, text: Text, entries: torch.Tensor, times: Any) -> tuple[torch.Tensor, torch.Tensor]:
        (heads, kv_heads, dim), n = self.sizes, len(text.x)
        q, k, v = (
            times(w, text.x) + (0 if b is None else b)
            for w, b in zip((self.q, self.k, self.v), self.biases[:3], strict=True)
        )
        cos, sin = (t[:n, None].double() for t in (self.cos, self.sin))
        q, k = (
            apply_rope(t.view(n, h, dim), cos, sin, self.rope_spec.interleaved) for t, h in ((q, heads), (k, kv_heads))
        )
        keys, values = entries.double().view(n, 2, kv_heads, dim).unbind(1)
        out = times(self.o, attend(q, keys, values, self.scale).flatten(1))
        out = out + (0 if self.biases[3] is None else self.biases[3])
        return text.residual + out, torch.cat([k.flatten(1), v], dim=1)
