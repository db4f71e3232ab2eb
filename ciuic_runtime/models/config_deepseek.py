"""Reads what only DeepSeek-V2 and later have: latent attention, routed experts, the indexer, V4's own parts.
Knows each family's fields, routers and transformers' defaults for them; what all families share is in `config.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ciuic_runtime.models.config_fields import Fields
from ciuic_runtime.models.config_rope import read_rope
from ciuic_runtime.models.spec import IndexerSpec, MlaSpec, ModelSpec, MoeSpec, RopeSpec, V4Spec

_MAX_EXPERTS_IN_ALL = 1_000_000  # layers x experts; V4 has 11 thousand


@dataclass(frozen=True, slots=True)
class _Router:
    """What transformers' config classes say for optional fields, and which routers a family has."""

    first_dense: int
    num_shared: int
    num_groups: int
    groups_per_token: int
    normalise: bool
    scaling: float
    scoring: str
    methods: tuple[str, ...]


_V3_ROUTER = _Router(3, 1, 8, 4, True, 2.5, "sigmoid", ("noaux_tc",))
_ROUTERS = {
    "deepseek_v2": _Router(0, 2, 1, 1, False, 1.0, "softmax", ("greedy", "group_limited_greedy")),
    "deepseek_v3": _V3_ROUTER,
    "deepseek_v32": _V3_ROUTER,
}


def read_deepseek(fields: Fields, common: dict[str, Any]) -> ModelSpec:
    """V2, V3 and V3.2: latent attention, and experts from `first_k_dense_replace` on."""
    family, heads = common["family"], common["num_heads"]
    if fields.size("num_key_value_heads", heads, 2**14) != heads:
        raise fields.wrong("num_key_value_heads", f"latent attention has as many as num_attention_heads ({heads})")
    mla = _mla(fields)
    interleaved = fields.flag("rope_interleave", True) if family == "deepseek_v3" else True
    bias = fields.flag("attention_bias", False)
    return ModelSpec(
        **common,
        intermediate_size=fields.size("intermediate_size", maximum=2**22),
        num_kv_heads=heads,
        head_dim=mla.qk_dim,
        rope=read_rope(fields, mla.rope_dim, interleaved, common["max_positions"], "qk_rope_head_dim"),
        mla=mla,
        moe=_moe(fields, common["num_layers"], _ROUTERS[family]),
        indexer=_indexer(fields) if family == "deepseek_v32" else None,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=fields.flag("mlp_bias", False) if family == "deepseek_v2" else False,
        num_mtp_layers=_num_mtp_layers(fields),
        why_not_runnable=_NOT_RUNNABLE.get(family, ""),
    )


_NOT_RUNNABLE = {
    "deepseek_v32": "DeepSeek-V3.2 can be counted and planned but not run yet: its sparse-attention indexer is not "
    "implemented here; DeepSeek-V3, V3-0324 and R1 can be run",
    "deepseek_v4": "DeepSeek-V4 can be counted and planned but not run yet: its compressed attention and "
    "hyper-connections are not implemented here; DeepSeek-V3, V3-0324 and R1 can be run",
}


def _mla(fields: Fields) -> MlaSpec:
    if "q_lora_rank" not in fields.values:
        raise fields.wrong("q_lora_rank", "it must be a whole number, or null for queries without compression")
    return MlaSpec(
        q_rank=None if fields.is_null("q_lora_rank") else fields.size("q_lora_rank"),
        kv_rank=fields.size("kv_lora_rank"),
        nope_dim=fields.size("qk_nope_head_dim", maximum=2**14),
        rope_dim=fields.size("qk_rope_head_dim", maximum=2**14),
        value_dim=fields.size("v_head_dim", maximum=2**14),
    )


def _num_mtp_layers(fields: Fields) -> int:
    name = "num_nextn_predict_layers" if "num_nextn_predict_layers" in fields.values else "num_mtp_layers"
    return fields.size(name, 0, 64, 0)


def _indexer(fields: Fields) -> IndexerSpec:
    return IndexerSpec(
        num_heads=fields.size("index_n_heads", maximum=2**14),
        head_dim=fields.size("index_head_dim", maximum=2**14),
        topk=fields.size("index_topk", maximum=2**24),
    )


def _moe(fields: Fields, num_layers: int, router: _Router) -> MoeSpec | None:
    if fields.is_null("n_routed_experts"):
        return None
    first_dense = fields.size("first_k_dense_replace", router.first_dense, 2**20, 0)
    if first_dense > num_layers:
        raise fields.wrong(
            "first_k_dense_replace", f"it is {first_dense} and must not exceed num_hidden_layers ({num_layers})"
        )
    num_experts = _num_experts(fields, num_layers)
    method: Any = fields.choice("topk_method", router.methods, router.methods[0])
    scoring: Any = fields.choice("scoring_func", (router.scoring,), router.scoring)
    num_groups, groups_per_token = _groups(fields, num_experts, method, router)
    experts_per_token = fields.size("num_experts_per_tok", maximum=num_experts)
    reachable = num_experts // num_groups * groups_per_token
    if experts_per_token > reachable:
        problem = f"the {groups_per_token} of {num_groups} groups that a token may use hold only {reachable} experts"
        raise fields.wrong("num_experts_per_tok", problem)
    return MoeSpec(
        num_experts=num_experts,
        experts_per_token=experts_per_token,
        num_shared=_num_shared(fields, router),
        intermediate_size=fields.size("moe_intermediate_size"),
        scoring=scoring,
        method=method,
        num_groups=num_groups,
        groups_per_token=groups_per_token,
        normalise=fields.flag("norm_topk_prob", router.normalise),
        scaling=fields.number("routed_scaling_factor", router.scaling, 1e-6, 1e6),
        first_dense=first_dense,
        layer_freq=fields.size("moe_layer_freq", 1, 4096),
    )


def _num_shared(fields: Fields, router: _Router) -> int:
    return 0 if fields.is_null("n_shared_experts") else fields.size("n_shared_experts", router.num_shared, 4096, 0)


def _num_experts(fields: Fields, num_layers: int) -> int:
    num_experts = fields.size("n_routed_experts", maximum=2**16)
    if num_experts * num_layers > _MAX_EXPERTS_IN_ALL:
        problem = f"times num_hidden_layers ({num_layers}) it must not exceed {_MAX_EXPERTS_IN_ALL}"
        raise fields.wrong("n_routed_experts", problem)
    return num_experts


def _groups(fields: Fields, num_experts: int, method: str, router: _Router) -> tuple[int, int]:
    """Number of expert groups and how many of them a token may use; one group where the router knows none."""
    if method == "greedy":
        return 1, 1
    if method == "group_limited_greedy":
        for name in ("n_group", "topk_group"):
            if fields.values.get(name) is None:
                raise fields.wrong(name, "topk_method group_limited_greedy needs it")
    num_groups = 1 if fields.is_null("n_group") else fields.size("n_group", router.num_groups, 2**16)
    if num_experts % num_groups:
        raise fields.wrong("n_group", f"n_routed_experts ({num_experts}) must be a multiple of it, {num_groups}")
    if method == "noaux_tc" and num_experts < 2 * num_groups:
        raise fields.wrong("n_group", f"noaux_tc needs two experts or more in each group, and there are {num_experts}")
    per_token = (
        num_groups if fields.is_null("topk_group") else fields.size("topk_group", router.groups_per_token, 2**16)
    )
    if per_token > num_groups:
        raise fields.wrong("topk_group", f"it is {per_token}, but there are only {num_groups} groups (n_group)")
    return num_groups, per_token


def read_deepseek_v4(fields: Fields, common: dict[str, Any]) -> ModelSpec:
    """Counted only. Every layer has experts; keys and values are one shared head of `head_dim` values."""
    num_layers, heads = common["num_layers"], common["num_heads"]
    head_dim = fields.size("head_dim", maximum=2**14)
    o_groups = fields.size("o_groups", maximum=2**14)
    if heads * head_dim % o_groups:
        raise fields.wrong("o_groups", f"num_attention_heads x head_dim ({heads * head_dim}) must be a multiple of it")
    width = fields.size("moe_intermediate_size")
    rope_dim = fields.size("qk_rope_head_dim", 64, 2**14)
    return ModelSpec(
        **common,
        intermediate_size=width,
        num_kv_heads=fields.size("num_key_value_heads", 1, 1),
        head_dim=head_dim,
        rope=RopeSpec("default", fields.number("rope_theta", 10000.0, 1.001), rope_dim, interleaved=True),
        moe=_v4_moe(fields, num_layers, width),
        indexer=_indexer(fields),
        v4=V4Spec(
            head_dim=head_dim,
            q_rank=fields.size("q_lora_rank"),
            o_groups=o_groups,
            o_rank=fields.size("o_lora_rank"),
            compress_ratios=_compress_ratios(fields, num_layers),
            hyper_streams=fields.size("hc_mult", 4, 64),
            sliding_window=fields.size("sliding_window", 128),
        ),
        num_mtp_layers=_num_mtp_layers(fields),
        why_not_runnable=_NOT_RUNNABLE["deepseek_v4"],
    )


def _v4_moe(fields: Fields, num_layers: int, width: int) -> MoeSpec:
    num_experts = _num_experts(fields, num_layers)
    scoring: Any = fields.choice("scoring_func", ("sqrtsoftplus", "sigmoid", "softmax"), "sqrtsoftplus")
    fields.choice("topk_method", ("noaux_tc",), "noaux_tc")
    return MoeSpec(
        num_experts=num_experts,
        experts_per_token=fields.size("num_experts_per_tok", maximum=num_experts),
        num_shared=fields.size("n_shared_experts", 1, 4096, 0),
        intermediate_size=width,
        scoring=scoring,
        method="noaux_tc",
        num_groups=1,
        groups_per_token=1,
        normalise=fields.flag("norm_topk_prob", True),
        scaling=fields.number("routed_scaling_factor", 1.5, 1e-6, 1e6),
        first_dense=0,
        layer_freq=1,
        num_hash_layers=_num_hash_layers(fields, num_layers),
    )


def _num_hash_layers(fields: Fields, num_layers: int) -> int:
    types = fields.values.get("mlp_layer_types")
    if isinstance(types, list):
        return types[:num_layers].count("hash_moe")
    return min(num_layers, fields.size("num_hash_layers", 3, 4096, 0))


def _compress_ratios(fields: Fields, num_layers: int) -> tuple[int, ...]:
    """Tokens per compressed entry, layer by layer; the list may go on for the MTP layers, which are left out."""
    name = "compress_ratios" if fields.values.get("compress_ratios") is not None else "layer_types"
    ratios = {"sliding_attention": 0, "compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
    values = fields.values.get(name)
    if not isinstance(values, list) or not num_layers <= len(values) <= num_layers + 64:
        raise fields.wrong(name, f"it must be a list with an entry for each of the {num_layers} layers")
    by_layer = [ratios.get(v, -1) if isinstance(v, str) else v for v in values[:num_layers]]
    if any(type(r) is not int or r not in (0, 4, 128) for r in by_layer):
        raise fields.wrong(name, "its entries must be 0, 4 or 128")
    return tuple(by_layer)
