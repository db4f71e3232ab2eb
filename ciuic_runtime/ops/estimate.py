"""How long each operator takes on a small typical case, by each set of kernels: measured once, with the engine's own
task functions on random weights. Knows nothing of what was chosen."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch

from ciuic_runtime.devices.backend import host_buffer
from ciuic_runtime.devices.cpu import discover_cpus
from ciuic_runtime.memory.kv_cache import KVCache, blocks_for
from ciuic_runtime.memory.tensor import CiuicTensor
from ciuic_runtime.models.batch import Chunk, make_batch
from ciuic_runtime.models.config import read_config
from ciuic_runtime.models.forward import Forward
from ciuic_runtime.models.graph import FLOAT32_ROLES, build_graph
from ciuic_runtime.models.layout import page_layout
from ciuic_runtime.models.native_forward import NativeForward
from ciuic_runtime.models.native_pages import page_of_block
from ciuic_runtime.models.pages import fill_page
from ciuic_runtime.models.spec import ModelSpec
from ciuic_runtime.models.tensors import TensorSpec, tensors_by_page
from ciuic_runtime.ops.custom import Registration
from ciuic_runtime.ops.native import REFERENCE, operators
from ciuic_runtime.schedulers.graph import Task

TOKENS, HIDDEN, WIDTH, EXPERTS, PER_TOKEN = 16, 512, 1024, 16, 4
CASE = f"{TOKENS} tokens, {HIDDEN} wide, {EXPERTS} experts, weights in 8 bits (reference: 16), all cores"
_FORMAT = "int8"
_ROUNDS, _ROUND_S, _MOST_S = 5, 0.002, 0.03  # a round is many calls of a short operator; slow ones get fewer rounds

_CONFIG: dict[str, Any] = {
    "vocab_size": 2048, "hidden_size": HIDDEN, "intermediate_size": WIDTH, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 256,
}  # fmt: skip
_DEEPSEEK = _CONFIG | {
    "model_type": "deepseek_v2", "q_lora_rank": None, "kv_lora_rank": 256, "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32, "v_head_dim": 64, "n_routed_experts": EXPERTS, "n_shared_experts": 1,
    "num_experts_per_tok": PER_TOKEN, "n_group": 1, "topk_group": 1, "topk_method": "greedy", "scoring_func": "softmax",
    "norm_topk_prob": False, "routed_scaling_factor": 1.0, "first_k_dense_replace": 1, "moe_layer_freq": 1,
    "moe_intermediate_size": WIDTH // 4,
}  # fmt: skip
_LLAMA = _CONFIG | {"model_type": "llama", "num_key_value_heads": 2}

# The task of a typical model that each operator computes.
_TASKS = {
    "embedding": "embedding", "rms_norm": "layers.0.mlp_norm", "linear": "head", "mlp": "layers.0.mlp",
    "route": "layers.1.router", "experts": "layers.1.experts", "combine": "layers.1.experts",
    "attention_mla": "layers.0.attention", "attention_gqa": "layers.0.attention",
}  # fmt: skip


@torch.inference_mode()
def seconds(operator: str, kernels: str, threads: int | None = None) -> float:
    """Of one call; measured the first time it is asked for."""
    return _measured(operator, kernels, threads or max(1, sum(d.cores for d in discover_cpus())))


@torch.inference_mode()
def own_seconds(own: Registration) -> tuple[float | None, str]:
    """What the user's operator takes on the same case, if it can be called with it, and its rates by its own count."""
    inputs = [CiuicTensor.of(i) if isinstance(i, torch.Tensor) else i for i in _inputs(own.replaces)]
    try:
        taken = _best(lambda: own.operator.forward(*inputs))
        cost = own.operator.cost(*inputs)
        rates = f"; {cost.nbytes / taken / 1e9:.3g} GB/s, {cost.flops / taken / 1e9:.3g} GFLOPS" if cost else ""
    except Exception as error:
        return None, f"; cannot be measured: {type(error).__name__}: {' '.join(str(error).split())}"
    return taken, rates


@lru_cache(maxsize=1024)
def _measured(operator: str, kernels: str, threads: int) -> float:
    spec = _spec(operator == "attention_gqa")
    bench = _Bench(spec, kernels, threads)
    task = build_graph(spec, _FORMAT).task(_TASKS[operator])
    return _best(bench.call(operator, task))


def _best(call: Callable[[], Any]) -> float:
    """s: of the best round; the first call is not counted."""
    call()
    begin, best, count = time.perf_counter(), float("inf"), 1
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        for _ in range(count):
            call()
        end = time.perf_counter()
        best = min(best, (end - start) / count)
        count = max(count, min(1000, int(_ROUND_S / best)))
        if end - begin > _MOST_S:
            break
    return best


class _Bench:
    """One set of kernels with a cache and a batch: a prompt of TOKENS tokens."""

    def __init__(self, spec: ModelSpec, kernels: str, threads: int) -> None:
        self.spec, self.native = spec, kernels != REFERENCE
        values = round(spec.kv_values_per_token / spec.num_layers)
        blocks = blocks_for(TOKENS)
        cache = KVCache({0: values, 1: values}, blocks, torch.bfloat16, lambda layer, nbytes: host_buffer(nbytes))
        native = operators(kernels, threads) if self.native else None
        self.forward: Any = NativeForward(spec, cache, native) if native else Forward(spec, cache)
        batch = make_batch([Chunk(range(TOKENS), 0, tuple(range(blocks)), prompt=True, sample="all")])
        self.run = self.forward.start(batch)
        self.dtype = torch.float32 if self.native else torch.bfloat16

    def call(self, operator: str, task: Task) -> Callable[[], Any]:
        x = _random((TOKENS, HIDDEN)).to(self.dtype)
        if operator == "embedding":
            function = self.forward.function(task, self._page(task.pages[0].name))
            return lambda: function(self.run)
        if operator == "combine":
            function, rows = self.forward.combine(task), _random((TOKENS * PER_TOKEN, HIDDEN)).to(self.dtype)
            weights = _random((TOKENS, PER_TOKEN)).abs()
            return lambda: function(self.run, rows, weights, [x])
        if operator == "experts":
            pages = {e: self._page(page.name) for e, page in enumerate(task.pages)}
            function = self.forward.experts(task, pages)
            ids = torch.stack([torch.arange(i, i + PER_TOKEN) % EXPERTS for i in range(TOKENS)])
            return lambda: function(self.run, x, ids)
        function = self.forward.function(task, self._page(task.pages[0].name))
        inputs = (x, x.clone()) if operator in ("mlp", "attention_mla", "attention_gqa") else (x,)
        return lambda: function(self.run, *inputs)

    def _page(self, page: str) -> Any:
        if self.native:
            return page_of_block(page_layout(self.spec, page, _FORMAT), _packed(self.spec, page))
        return {
            t.role: _random(t.shape).to(torch.float32 if t.role in FLOAT32_ROLES else torch.bfloat16)
            for t in tensors_by_page(self.spec)[page]
        }


@lru_cache(maxsize=2)
def _spec(gqa: bool) -> ModelSpec:
    return read_config(_LLAMA if gqa else _DEEPSEEK, "typical")


@lru_cache(maxsize=64)
def _packed(spec: ModelSpec, page: str) -> torch.Tensor:
    """The page in 8 bits."""
    block = host_buffer(page_layout(spec, page, _FORMAT).nbytes)
    fill_page(cast(Any, _RandomWeights(spec)), page, _FORMAT, block)
    return block


class _RandomWeights:
    """As much of a checkpoint as it takes to pack a page."""

    path = Path("random weights")

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec

    def load(self, tensor: TensorSpec, dtype: torch.dtype) -> torch.Tensor:
        return _random(tensor.shape).to(dtype)

    def is_mapped(self, tensor: TensorSpec, dtype: torch.dtype) -> bool:
        return False

    def release(self, tensor: TensorSpec) -> None: ...


def _random(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.05


def _inputs(replaced: str) -> tuple[Any, ...]:
    """What an operator that a user may replace is called with."""
    logits, moe = _random((TOKENS, EXPERTS)), _spec(False).moe
    given: dict[str, tuple[Any, ...]] = {
        "softmax": (logits,),
        "sigmoid": (logits,),
        "route": (logits, None, moe),
        "rms_norm": (_random((TOKENS, HIDDEN)), torch.ones(HIDDEN), 1e-6),
        "silu": (_random((TOKENS, WIDTH)),),
        "combine": (_random((TOKENS, PER_TOKEN, HIDDEN)), _random((TOKENS, PER_TOKEN)).abs()),
    }
    return given[replaced]
