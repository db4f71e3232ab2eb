"""What a model is, from its configuration alone: frozen sizes and switches, and how its layers are made up.
Knows neither weights nor torch; reading `config.json` into it is `config.py`, its tensors are in `tensors.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding: `dim` values of each head are turned in pairs by position x frequency."""

    kind: RopeKind
    theta: float
    dim: int
    interleaved: bool  # pairs are (0, 1), (2, 3), ... as in DeepSeek; else (0, dim/2), (1, dim/2 + 1), ...
    factor: float = 1.0
    original_max_positions: int = 0
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0


@dataclass(frozen=True, slots=True)
class MlaSpec:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

    q_rank: int | None  # None: queries are projected directly
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int

    @property
    def qk_dim(self) -> int:
        return self.nope_dim + self.rope_dim

    @property
    def latent_dim(self) -> int:
        """What the cache holds per token and layer: the compressed latent and the shared rotated key."""
        return self.kv_rank + self.rope_dim


@dataclass(frozen=True, slots=True)
class MoeSpec:
    """Routed and shared experts (DeepSeekMoE, arXiv 2401.06066; V3's router, arXiv 2412.19437, section 2.1.2)."""

    num_experts: int
    experts_per_token: int
    num_shared: int
    intermediate_size: int
    scoring: Literal["softmax", "sigmoid", "sqrtsoftplus"]
    method: Literal["greedy", "group_limited_greedy", "noaux_tc"]
    num_groups: int
    groups_per_token: int
    normalise: bool  # weights of the chosen experts are divided by their sum
    scaling: float
    first_dense: int  # layers before this one have a dense MLP
    layer_freq: int
    num_hash_layers: int = 0  # V4: these first layers pick experts by token id

    @property
    def selection_bias(self) -> bool:
        """Whether the router has a bias that takes part in choosing experts but not in weighting them."""
        return self.method == "noaux_tc"


@dataclass(frozen=True, slots=True)
class IndexerSpec:
    """The sparse-attention indexer of V3.2 and V4; counted, not run yet."""

    num_heads: int
    head_dim: int
    topk: int


@dataclass(frozen=True, slots=True)
class V4Spec:
    """What V4 has and no other family: grouped output projection, compressors, hyper-connections; counted only."""

    head_dim: int
    q_rank: int
    o_groups: int
    o_rank: int
    compress_ratios: tuple[int, ...]  # per layer; 0: sliding window only
    hyper_streams: int
    sliding_window: int


@dataclass(frozen=True, slots=True)
class ModelSpec:
    name: str
    family: str  # model_type: deepseek_v2, deepseek_v3, deepseek_v32, deepseek_v4, llama, qwen2
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int  # of keys and values where there is no MLA
    max_positions: int
    rms_norm_eps: float
    rope: RopeSpec
    mla: MlaSpec | None = None
    moe: MoeSpec | None = None
    indexer: IndexerSpec | None = None
    v4: V4Spec | None = None
    tied_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    dtype: str = "bfloat16"  # of the checkpoint's unquantised tensors
    fp8_block: tuple[int, int] | None = None  # weights are e4m3 with one scale per block of this size
    packed: str = ""  # the format that `ciuic pack` put the weights into: int4; "" for any other checkpoint
    num_mtp_layers: int = 0  # multi-token-prediction layers in the checkpoint; recognised and left out
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    why_not_runnable: str = ""  # "" when this runtime can execute the family

    def is_moe(self, layer: int) -> bool:
        moe = self.moe
        return moe is not None and layer >= moe.first_dense and layer % moe.layer_freq == 0

    @property
    def default_dtype(self) -> str:
        """What `--dtype auto` computes in: the checkpoint's own type; float16 and quantised files run in bfloat16."""
        return "float32" if self.dtype == "float32" else "bfloat16"

    @property
    def kv_values_per_token(self) -> float:
        """Cached values per token over all layers: the latent for MLA, keys and values otherwise."""
        if self.v4 is not None:  # every layer keeps a fixed window; what grows is the compressed stream
            index = self.indexer.head_dim if self.indexer else 0
            return sum((self.v4.head_dim + (index if r == 4 else 0)) / r for r in self.v4.compress_ratios if r)
        if self.mla is not None:
            index = self.indexer.head_dim if self.indexer else 0
            return self.num_layers * (self.mla.latent_dim + index)
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim

    def kv_bytes_per_token(self, dtype: str = "bfloat16") -> float:
        return self.kv_values_per_token * DTYPE_BYTES[dtype]
