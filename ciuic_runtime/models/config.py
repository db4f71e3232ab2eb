"""Reads a `config.json` into a ModelSpec and refuses, in one line, whatever is missing, contradictory or not supported.
Knows the fields of each family and transformers' defaults for them; it opens no weights and needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.models.config_fields import REQUIRED, Fields, read_json_object
from ciuic_runtime.models.spec import (
    DTYPE_BYTES,
    IndexerSpec,
    MlaSpec,
    ModelSpec,
    MoeSpec,
    RopeKind,
    RopeSpec,
    V4Spec,
)

KNOWN_FOLDER = Path(__file__).parent / "known"
_MAX_EXPERTS_IN_ALL = 1_000_000  # layers x experts; V4 has 11 thousand


def known_names() -> list[str]:
    return sorted(path.stem for path in KNOWN_FOLDER.glob("*.json"))


def load_spec(source: str | Path) -> ModelSpec:
    """The ModelSpec of a checkpoint folder, a `config.json`, a `.gguf` file or a known name such as deepseek-v3."""
    path = Path(source)
    if path.suffix == ".gguf" and path.is_file():
        from ciuic_runtime.models.gguf_checkpoint import read_gguf_spec

        return read_gguf_spec(path)
    if path.exists():
        return read_config(path)
    known = {name: KNOWN_FOLDER / f"{name}.json" for name in known_names()}
    name = str(source).lower()
    if name in known:
        return read_config(known[name], name)
    raise InvalidInput(
        f"no model at {str(source)!r}: it is neither a folder with config.json, nor a config.json, nor a .gguf file, "
        f"nor a known name ({', '.join(known)})"
    )


def read_config(source: str | Path | Mapping[str, Any], name: str | None = None) -> ModelSpec:
    """The ModelSpec that a config says: a folder holding `config.json`, such a file, or its content.

    End-of-sequence ids in a `generation_config.json` beside the file are added to its own."""
    if isinstance(source, Mapping):
        fields = Fields(dict(source), f"config of {name}" if name else "config")
        return _spec(fields, name or str(source.get("model_type")), None)
    path = Path(source)
    if path.is_dir():
        path = path / "config.json"
    fields = Fields(read_json_object(path), str(path))
    generation = path.parent / "generation_config.json"
    beside = Fields(read_json_object(generation), str(generation)) if generation.exists() else None
    return _spec(fields, name or path.absolute().parent.name or path.stem, beside)


@dataclass(frozen=True, slots=True)
class _Defaults:
    """What transformers' config classes say for optional fields, and which routers a family has."""

    max_positions: int
    bos: int | None
    eos: tuple[int, ...]
    first_dense: int = 0
    num_shared: int = 1
    num_groups: int = 1
    groups_per_token: int = 1
    normalise: bool = False
    scaling: float = 1.0
    scoring: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()


_V3 = _Defaults(4096, 0, (1,), 3, 1, 8, 4, True, 2.5, ("sigmoid",), ("noaux_tc",))
_FAMILIES: dict[str, _Defaults] = {
    "deepseek_v2": _Defaults(2048, 1, (2,), 0, 2, 1, 1, False, 1.0, ("softmax",), ("greedy", "group_limited_greedy")),
    "deepseek_v3": _V3,
    "deepseek_v32": _Defaults(163840, 0, (1,), 3, 1, 8, 4, True, 2.5, ("sigmoid",), ("noaux_tc",)),
    "deepseek_v4": _Defaults(1048576, 0, (1,), scaling=1.5, normalise=True),
    "llama": _Defaults(2048, 1, (2,)),
    "qwen2": _Defaults(32768, None, ()),
}


def _spec(fields: Fields, name: str, generation: Fields | None) -> ModelSpec:
    family = fields.choice("model_type", tuple(_FAMILIES), what="this runtime knows")
    readers: dict[str, Callable[[Fields, dict[str, Any]], ModelSpec]] = {
        "llama": _llama,
        "qwen2": _qwen2,
        "deepseek_v4": _deepseek_v4,
    }
    common = _common(fields, name, generation, _FAMILIES[family])
    return readers.get(family, _deepseek)(fields, common)


def _common(fields: Fields, name: str, generation: Fields | None, defaults: _Defaults) -> dict[str, Any]:
    """What every family has."""
    fields.choice("hidden_act", ("silu",), "silu")
    vocab_size = fields.size("vocab_size", maximum=2**24)
    bos = fields.token_ids("bos_token_id", vocab_size, () if defaults.bos is None else (defaults.bos,))
    eos = fields.token_ids("eos_token_id", vocab_size, defaults.eos)
    if generation is not None:
        eos = tuple(dict.fromkeys(eos + generation.token_ids("eos_token_id", vocab_size)))
    return {
        "name": name,
        "family": fields.values["model_type"],
        "vocab_size": vocab_size,
        "hidden_size": fields.size("hidden_size"),
        "num_layers": fields.size("num_hidden_layers", maximum=4096),
        "num_heads": fields.size("num_attention_heads", maximum=2**14),
        "max_positions": fields.size("max_position_embeddings", defaults.max_positions, 2**40),
        "rms_norm_eps": fields.number("rms_norm_eps", 1e-6, 1e-20, 1.0),
        "tied_embeddings": fields.flag("tie_word_embeddings", False),
        "dtype": _dtype(fields),
        "fp8_block": _fp8_block(fields),
        "bos_token_id": bos[0] if bos else None,
        "eos_token_ids": eos,
    }


def _dtype(fields: Fields) -> str:
    name = "dtype" if fields.values.get("dtype") is not None else "torch_dtype"
    value = fields.values.get(name)
    if isinstance(value, str) and value.startswith("torch."):
        fields = Fields({name: value.removeprefix("torch.")}, fields.where)
    return fields.choice(name, tuple(d for d in DTYPE_BYTES if not d.startswith("float8")), "bfloat16")


def _fp8_block(fields: Fields) -> tuple[int, int] | None:
    """The block size of an FP8 checkpoint; any other quantisation is refused by its name."""
    quantisation = fields.section("quantization_config")
    if quantisation is None:
        return None
    what = "this runtime reads unquantised weights and fp8 e4m3 with a scale per block; supported"
    quantisation.choice("quant_method", ("fp8",), what=what)
    quantisation.choice("fmt", ("e4m3",), "e4m3", what=what)
    block = quantisation.values.get("weight_block_size", [128, 128])
    if not isinstance(block, list) or len(block) != 2 or any(type(b) is not int or not 1 <= b <= 2**20 for b in block):
        raise quantisation.wrong("weight_block_size", "it must be a list of two sizes, such as [128, 128]")
    return block[0], block[1]


def _llama(fields: Fields, common: dict[str, Any]) -> ModelSpec:
    bias = fields.flag("attention_bias", False)
    return ModelSpec(
        **common,
        **_grouped_query(fields, common),
        intermediate_size=fields.size("intermediate_size", maximum=2**22),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=fields.flag("mlp_bias", False),
    )


def _qwen2(fields: Fields, common: dict[str, Any]) -> ModelSpec:
    _refuse_sliding_window(fields, common["num_layers"])
    return ModelSpec(
        **common,
        **_grouped_query(fields, common),
        intermediate_size=fields.size("intermediate_size", maximum=2**22),
        qkv_bias=True,
    )


def _refuse_sliding_window(fields: Fields, num_layers: int) -> None:
    """Qwen2's layers from `max_window_layers` on may look at a window only; no DeepSeek distill uses that."""
    allowed = "layers with a sliding window cannot be run; only full attention is supported"
    has_window = fields.flag("use_sliding_window", False) and fields.values.get("sliding_window", 4096) is not None
    if has_window and fields.size("max_window_layers", 28, 2**20, 0) < num_layers:
        raise fields.wrong("use_sliding_window", allowed)
    types = fields.values.get("layer_types")
    if types is not None and (not isinstance(types, list) or any(t != "full_attention" for t in types)):
        raise fields.wrong("layer_types", allowed)


def _grouped_query(fields: Fields, common: dict[str, Any]) -> dict[str, Any]:
    hidden, heads = common["hidden_size"], common["num_heads"]
    if fields.values.get("head_dim") is None and hidden % heads:
        raise fields.wrong("hidden_size", f"it must be a multiple of num_attention_heads ({heads}), or give head_dim")
    head_dim = fields.size("head_dim", hidden // heads, 2**14)
    kv_heads = fields.size("num_key_value_heads", heads, 2**14)
    if heads % kv_heads:
        raise fields.wrong("num_key_value_heads", f"num_attention_heads ({heads}) must be a multiple of it")
    rope = _rope(fields, head_dim, False, common["max_positions"], "head_dim")
    return {"num_kv_heads": kv_heads, "head_dim": head_dim, "rope": rope}


def _deepseek(fields: Fields, common: dict[str, Any]) -> ModelSpec:
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
        rope=_rope(fields, mla.rope_dim, interleaved, common["max_positions"], "qk_rope_head_dim"),
        mla=mla,
        moe=_moe(fields, common["num_layers"], _FAMILIES[family]),
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


def _moe(fields: Fields, num_layers: int, defaults: _Defaults) -> MoeSpec | None:
    if fields.is_null("n_routed_experts"):
        return None
    first_dense = fields.size("first_k_dense_replace", defaults.first_dense, 2**20, 0)
    if first_dense > num_layers:
        raise fields.wrong("first_k_dense_replace", f"it is {first_dense} and must not exceed num_hidden_layers ({num_layers})")
    num_experts = _num_experts(fields, num_layers)
    method: Any = fields.choice("topk_method", defaults.methods, defaults.methods[0])
    scoring: Any = fields.choice("scoring_func", defaults.scoring, defaults.scoring[0])
    num_groups, groups_per_token = _groups(fields, num_experts, method, defaults)
    experts_per_token = fields.size("num_experts_per_tok", maximum=num_experts)
    reachable = num_experts // num_groups * groups_per_token
    if experts_per_token > reachable:
        problem = f"the {groups_per_token} of {num_groups} groups that a token may use hold only {reachable} experts"
        raise fields.wrong("num_experts_per_tok", problem)
    return MoeSpec(
        num_experts=num_experts,
        experts_per_token=experts_per_token,
        num_shared=_num_shared(fields, defaults),
        intermediate_size=fields.size("moe_intermediate_size"),
        scoring=scoring,
        method=method,
        num_groups=num_groups,
        groups_per_token=groups_per_token,
        normalise=fields.flag("norm_topk_prob", defaults.normalise),
        scaling=fields.number("routed_scaling_factor", defaults.scaling, 1e-6, 1e6),
        first_dense=first_dense,
        layer_freq=fields.size("moe_layer_freq", 1, 4096),
    )


def _num_shared(fields: Fields, defaults: _Defaults) -> int:
    return 0 if fields.is_null("n_shared_experts") else fields.size("n_shared_experts", defaults.num_shared, 4096, 0)


def _num_experts(fields: Fields, num_layers: int) -> int:
    num_experts = fields.size("n_routed_experts", maximum=2**16)
    if num_experts * num_layers > _MAX_EXPERTS_IN_ALL:
        problem = f"times num_hidden_layers ({num_layers}) it must not exceed {_MAX_EXPERTS_IN_ALL}"
        raise fields.wrong("n_routed_experts", problem)
    return num_experts


def _groups(fields: Fields, num_experts: int, method: str, defaults: _Defaults) -> tuple[int, int]:
    """Number of expert groups and how many of them a token may use; one group where the router knows none."""
    if method == "greedy":
        return 1, 1
    if method == "group_limited_greedy":
        for name in ("n_group", "topk_group"):
            if fields.values.get(name) is None:
                raise fields.wrong(name, "topk_method group_limited_greedy needs it")
    num_groups = 1 if fields.is_null("n_group") else fields.size("n_group", defaults.num_groups, 2**16)
    if num_experts % num_groups:
        raise fields.wrong("n_group", f"n_routed_experts ({num_experts}) must be a multiple of it, {num_groups}")
    if method == "noaux_tc" and num_experts < 2 * num_groups:
        raise fields.wrong("n_group", f"noaux_tc needs two experts or more in each group, and there are {num_experts}")
    per_token = (
        num_groups if fields.is_null("topk_group") else fields.size("topk_group", defaults.groups_per_token, 2**16)
    )
    if per_token > num_groups:
        raise fields.wrong("topk_group", f"it is {per_token}, but there are only {num_groups} groups (n_group)")
    return num_groups, per_token


def _deepseek_v4(fields: Fields, common: dict[str, Any]) -> ModelSpec:
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


_ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


def _rope(fields: Fields, dim: int, interleaved: bool, max_positions: int, dim_name: str) -> RopeSpec:
    """Rotary embedding from `rope_scaling` (older files) or `rope_parameters` (since transformers 5)."""
    if dim % 2:
        raise fields.wrong(dim_name, f"rotary embedding turns pairs, so it must be even (it is {dim})")
    rope = fields.section("rope_scaling")
    if rope is None or not rope.values:
        rope = fields.section("rope_parameters") or Fields({}, fields.where)
    _refuse_partial_rope(fields, rope)
    name = "rope_type" if rope.values.get("rope_type") is not None else "type"
    kind: Any = rope.choice(name, _ROPE_KINDS, "default")
    has_theta = rope if rope.values.get("rope_theta") is not None else fields
    theta = has_theta.number("rope_theta", 10000.0, 1.001)
    return _SCALED_ROPES[kind](fields, rope, RopeSpec(kind, theta, dim, interleaved), max_positions)


def _refuse_partial_rope(fields: Fields, rope: Fields) -> None:
    if any(isinstance(value, dict) for value in rope.values.values()):
        raise InvalidInput(f"{rope.where}: it differs by layer type; one set of rope parameters for all is supported")
    for where in (fields, rope):
        if where.number("partial_rotary_factor", 1.0) != 1.0:
            raise where.wrong("partial_rotary_factor", "only rotary embedding of whole heads (1.0) is supported")


def _default_rope(fields: Fields, rope: Fields, base: RopeSpec, max_positions: int) -> RopeSpec:
    return base


def _factor_rope(fields: Fields, rope: Fields, base: RopeSpec, max_positions: int) -> RopeSpec:
    """linear and dynamic (NTK): the latter counts from `max_position_embeddings`, as transformers does."""
    if base.kind == "dynamic" and base.dim <= 2:
        raise InvalidInput(f"{rope.where}: dynamic rope needs heads of more than 2 values; there are {base.dim}")
    return replace(base, factor=rope.number("factor", minimum=1.0, maximum=1e6), original_max_positions=max_positions)


def _original_max_positions(fields: Fields, rope: Fields, max_positions: int) -> int:
    name = "original_max_position_embeddings"
    return (fields if fields.values.get(name) is not None else rope).size(name, max_positions, 2**40)


def _llama3_rope(fields: Fields, rope: Fields, base: RopeSpec, max_positions: int) -> RopeSpec:
    low, high = rope.number("low_freq_factor", minimum=1e-6), rope.number("high_freq_factor", minimum=1e-6)
    if high <= low:
        raise rope.wrong("high_freq_factor", f"it must be greater than low_freq_factor ({low:g})")
    return replace(
        base,
        factor=rope.number("factor", minimum=1.0, maximum=1e6),
        original_max_positions=_original_max_positions(fields, rope, max_positions),
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _yarn_rope(fields: Fields, rope: Fields, base: RopeSpec, max_positions: int) -> RopeSpec:
    """YaRN (arXiv 2309.00071); a null factor is the ratio of the context lengths, and zeros mean "not given"."""
    original = _original_max_positions(fields, rope, max_positions)
    ratio = max(1.0, max_positions / original) if rope.is_null("factor") else REQUIRED
    fast = rope.number("beta_fast", 32.0) or 32.0
    slow = rope.number("beta_slow", 1.0) or 1.0
    if fast < slow:
        raise rope.wrong("beta_fast", f"it must not be less than beta_slow ({slow:g})")
    has_attention_factor = rope.values.get("attention_factor") is not None
    return replace(
        base,
        factor=rope.number("factor", ratio, 1.0, 1e6),
        original_max_positions=original,
        beta_fast=fast,
        beta_slow=slow,
        mscale=rope.number("mscale", 0.0) or None,
        mscale_all_dim=rope.number("mscale_all_dim", 0.0) or None,
        attention_factor=rope.number("attention_factor") if has_attention_factor else None,
        truncate=rope.flag("truncate", True),
    )


_SCALED_ROPES: dict[RopeKind, Callable[[Fields, Fields, RopeSpec, int], RopeSpec]] = {
    "default": _default_rope,
    "linear": _factor_rope,
    "dynamic": _factor_rope,
    "llama3": _llama3_rope,
    "yarn": _yarn_rope,
}
