"""The tensors that a model consists of, by the names of a Hugging Face checkpoint: the one list from which parameters
are counted, pages are formed, checkpoints are checked and random models are written. Knows shapes, not values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from ciuic_runtime.models.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class TensorSpec:
    name: str  # in the checkpoint: model.layers.3.self_attn.q_proj.weight
    shape: tuple[int, ...]
    page: str  # the unit that moves between tiers and that a task reads: layers.3.attention
    role: str  # the name by which the forward pass knows it within the page: q_proj, q_proj_bias

    @property
    def num_parameters(self) -> int:
        return prod(self.shape)

    @property
    def is_matrix(self) -> bool:
        """Matrices are what FP8 and packed formats quantise; vectors stay as they are."""
        return len(self.shape) == 2


def tensors(spec: ModelSpec) -> Iterator[TensorSpec]:
    """Every tensor of the model in the order in which a forward pass first reads it."""
    yield TensorSpec("model.embed_tokens.weight", (spec.vocab_size, spec.hidden_size), "embedding", "weight")
    for layer in range(spec.num_layers):
        yield from _layer(spec, layer)
    yield TensorSpec("model.norm.weight", (spec.hidden_size,), "final_norm", "weight")
    if spec.v4 is not None:
        streams = spec.v4.hyper_streams
        yield TensorSpec("model.hc_head.hc_fn", (streams, streams * spec.hidden_size), "final_norm", "hc_fn")
        yield TensorSpec("model.hc_head.hc_base", (streams,), "final_norm", "hc_base")
        yield TensorSpec("model.hc_head.hc_scale", (1,), "final_norm", "hc_scale")
    if not spec.tied_embeddings:
        yield TensorSpec("lm_head.weight", (spec.vocab_size, spec.hidden_size), "head", "weight")


@lru_cache(maxsize=8)
def tensors_by_page(spec: ModelSpec) -> dict[str, tuple[TensorSpec, ...]]:
    pages: dict[str, list[TensorSpec]] = {}
    for tensor in tensors(spec):
        pages.setdefault(tensor.page, []).append(tensor)
    return {page: tuple(members) for page, members in pages.items()}


@dataclass(frozen=True, slots=True)
class ParameterCount:
    total: int
    active: int  # read for one token: k of E routed experts, and without the input embedding (one row of it is read)


def count_parameters(spec: ModelSpec) -> ParameterCount:
    total = active = 0.0
    for tensor in tensors(spec):
        total += tensor.num_parameters
        if tensor.page == "embedding" and not spec.tied_embeddings:
            continue
        share = 1.0
        if spec.moe is not None and ".experts." in tensor.page:
            share = spec.moe.experts_per_token / spec.moe.num_experts
        active += tensor.num_parameters * share
    return ParameterCount(int(total), round(active))


def _layer(spec: ModelSpec, layer: int) -> Iterator[TensorSpec]:
    prefix, page = f"model.layers.{layer}.", f"layers.{layer}."
    yield TensorSpec(prefix + "input_layernorm.weight", (spec.hidden_size,), page + "attention_norm", "weight")
    for role, shape in _attention(spec, layer):
        yield _named(prefix + "self_attn.", role, shape, page + "attention")
    yield TensorSpec(prefix + "post_attention_layernorm.weight", (spec.hidden_size,), page + "mlp_norm", "weight")
    if not spec.is_moe(layer):
        yield from _mlp(prefix + "mlp.", page + "mlp", spec.hidden_size, spec.intermediate_size, spec.mlp_bias)
        return
    moe = spec.moe
    assert moe is not None
    yield _named(prefix + "mlp.", "gate", (moe.num_experts, spec.hidden_size), page + "router")
    if moe.selection_bias and layer >= moe.num_hash_layers:
        bias = "e_score_correction_bias"
        yield TensorSpec(prefix + "mlp.gate." + bias, (moe.num_experts,), page + "router", bias)
    for e in range(moe.num_experts):
        yield from _mlp(
            f"{prefix}mlp.experts.{e}.", f"{page}experts.{e}", spec.hidden_size, moe.intermediate_size, False
        )
    if moe.num_shared:
        width = moe.intermediate_size * moe.num_shared
        yield from _mlp(prefix + "mlp.shared_experts.", page + "shared_experts", spec.hidden_size, width, spec.mlp_bias)


def _named(prefix: str, role: str, shape: tuple[int, ...], page: str) -> TensorSpec:
    """Roles ending in _bias are `<module>.bias` in the file, the rest `<module>.weight`."""
    name = f"{role[:-5]}.bias" if role.endswith("_bias") else f"{role}.weight"
    return TensorSpec(prefix + name, shape, page, role)


def _mlp(prefix: str, page: str, hidden: int, width: int, bias: bool) -> Iterator[TensorSpec]:
    for role, out, inp in (("gate_proj", width, hidden), ("up_proj", width, hidden), ("down_proj", hidden, width)):
        yield _named(prefix, role, (out, inp), page)
        if bias:
            yield _named(prefix, role + "_bias", (out,), page)


def _attention(spec: ModelSpec, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    if spec.v4 is not None:
        yield from _v4_attention(spec, layer)
    elif spec.mla is not None:
        yield from _mla(spec)
    else:
        yield from _grouped_query(spec)


def _grouped_query(spec: ModelSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    for role, out in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
        yield role, (out, spec.hidden_size)
        if spec.qkv_bias:
            yield role + "_bias", (out,)
    yield "o_proj", (spec.hidden_size, q)
    if spec.o_bias:
        yield "o_proj_bias", (spec.hidden_size,)


def _mla(spec: ModelSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    mla, hidden, heads = spec.mla, spec.hidden_size, spec.num_heads
    assert mla is not None
    if mla.q_rank is None:
        yield "q_proj", (heads * mla.qk_dim, hidden)
    else:
        yield "q_a_proj", (mla.q_rank, hidden)
        if spec.qkv_bias:
            yield "q_a_proj_bias", (mla.q_rank,)
        yield "q_a_layernorm", (mla.q_rank,)
        yield "q_b_proj", (heads * mla.qk_dim, mla.q_rank)
    yield "kv_a_proj_with_mqa", (mla.latent_dim, hidden)
    if spec.qkv_bias:
        yield "kv_a_proj_with_mqa_bias", (mla.latent_dim,)
    yield "kv_a_layernorm", (mla.kv_rank,)
    yield "kv_b_proj", (heads * (mla.nope_dim + mla.value_dim), mla.kv_rank)
    yield "o_proj", (hidden, heads * mla.value_dim)
    if spec.o_bias:
        yield "o_proj_bias", (hidden,)
    if spec.indexer is not None:
        index = spec.indexer
        yield "indexer.wq_b", (index.num_heads * index.head_dim, mla.q_rank or hidden)
        yield "indexer.wk", (index.head_dim, hidden)
        yield "indexer.k_norm", (index.head_dim,)
        yield "indexer.k_norm_bias", (index.head_dim,)
        yield "indexer.weights_proj", (index.num_heads, hidden)


def _v4_attention(spec: ModelSpec, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    v4, hidden, heads = spec.v4, spec.hidden_size, spec.num_heads
    assert v4 is not None
    yield "q_a_proj", (v4.q_rank, hidden)
    yield "q_a_norm", (v4.q_rank,)
    yield "q_b_proj", (heads * v4.head_dim, v4.q_rank)
    yield "kv_proj", (v4.head_dim, hidden)
    yield "kv_norm", (v4.head_dim,)
    yield "o_a_proj", (v4.o_groups * v4.o_rank, heads * v4.head_dim // v4.o_groups)
    yield "o_b_proj", (hidden, v4.o_groups * v4.o_rank)
    yield "sinks", (heads,)
    mixes = (2 + v4.hyper_streams) * v4.hyper_streams
    for block in ("attn_hc", "ffn_hc"):
        yield f"{block}.fn", (mixes, v4.hyper_streams * hidden)
        yield f"{block}.base", (mixes,)
        yield f"{block}.scale", (3,)
    ratio = v4.compress_ratios[layer]
    if not ratio:
        return
    # A ratio of 4 is the overlapping compressor with an indexer beside it (twice as wide); larger ones have neither.
    width = v4.head_dim * (2 if ratio == 4 else 1)
    yield from _compressor("compressor", hidden, width, v4.head_dim, ratio)
    if ratio == 4 and spec.indexer is not None:
        index = spec.indexer
        yield from _compressor("compressor.indexer", hidden, 2 * index.head_dim, index.head_dim, ratio)
        yield "compressor.indexer.q_b_proj", (index.num_heads * index.head_dim, v4.q_rank)
        yield "compressor.indexer.weights_proj", (index.num_heads, hidden)


def _compressor(name: str, hidden: int, width: int, norm: int, ratio: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.kv_proj", (width, hidden)
    yield f"{name}.gate_proj", (width, hidden)
    yield f"{name}.position_bias", (ratio, width)
    yield f"{name}.kv_norm", (norm,)
