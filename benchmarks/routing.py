"""Whether a random model's experts are chosen as a benchmark needs it: uniformly, and differently from token to token.
Random weights easily fail here: with small embeddings, or weights whose mean is not zero, all tokens look alike after a
few layers and choose the same experts, and then a batch of 16 reads hardly more than a batch of one.

    python benchmarks/routing.py MODEL [--tokens 64] [--batch 16]

The layers are computed with the checkpoint's own weights, in float32, independently of the engine. Every token is a
sequence of its own (attention to one position is that position's value), as in a decode step with empty contexts."""

from __future__ import annotations

import argparse
import statistics

import torch
from torch.nn.functional import linear, silu
from wall import expected_distinct

from ciuic_runtime.models.checkpoint import Checkpoint, open_checkpoint
from ciuic_runtime.models.spec import ModelSpec
from ciuic_runtime.models.tensors import tensors_by_page


class Layers:
    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.spec = checkpoint, checkpoint.spec
        self.pages = tensors_by_page(self.spec)

    def weights(self, page: str) -> dict[str, torch.Tensor]:
        return {t.role: self.checkpoint.load(t, torch.float32) for t in self.pages[page]}

    def norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.spec.rms_norm_eps) * weight

    def attention(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        mla, w = self.spec.mla, self.weights(f"layers.{layer}.attention")
        assert mla is not None, f"{self.spec.name} has no latent attention"
        x = self.norm(x, self.weights(f"layers.{layer}.attention_norm")["weight"])
        latent = linear(x, w["kv_a_proj_with_mqa"])[:, : mla.kv_rank]
        expanded = linear(self.norm(latent, w["kv_a_layernorm"]), w["kv_b_proj"])
        heads = expanded.view(len(x), self.spec.num_heads, mla.nope_dim + mla.value_dim)
        return linear(heads[:, :, mla.nope_dim :].flatten(1), w["o_proj"])

    def mlp(self, page: str, x: torch.Tensor) -> torch.Tensor:
        w = self.weights(page)
        return linear(silu(linear(x, w["gate_proj"])) * linear(x, w["up_proj"]), w["down_proj"])

    def moe(self, layer: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The output, and the experts chosen [tokens, k]; softmax scores, the best k."""
        moe = self.spec.moe
        assert moe is not None
        scores = linear(x, self.weights(f"layers.{layer}.router")["gate"]).softmax(-1)
        weights, chosen = scores.topk(moe.experts_per_token, dim=-1)
        out = self.mlp(f"layers.{layer}.shared_experts", x) if moe.num_shared else torch.zeros_like(x)
        for e in sorted(set(chosen.flatten().tolist())):
            row, k = (chosen == e).nonzero(as_tuple=True)
            out[row] += weights[row, k, None] * self.mlp(f"layers.{layer}.experts.{e}", x[row])
        return out, chosen


@torch.inference_mode()
def chosen_experts(checkpoint: Checkpoint, tokens: int, seed: int = 0) -> dict[int, torch.Tensor]:
    """By layer, the experts [tokens, k] that random tokens choose."""
    layers, spec = Layers(checkpoint), checkpoint.spec
    ids = torch.randint(0, spec.vocab_size, (tokens,), generator=torch.Generator().manual_seed(seed))
    x, found = layers.weights("embedding")["weight"][ids], {}
    for layer in range(spec.num_layers):
        x = x + layers.attention(layer, x)
        normed = layers.norm(x, layers.weights(f"layers.{layer}.mlp_norm")["weight"])
        if spec.is_moe(layer):
            out, found[layer] = layers.moe(layer, normed)
            print(layer_line(spec, layer, found[layer]), flush=True)
        else:
            out = layers.mlp(f"layers.{layer}.mlp", normed)
        x = x + out
    return found


def distinct(chosen: torch.Tensor, batch: int) -> float:
    """Mean over groups of `batch` tokens."""
    rows = chosen.tolist()
    groups = [rows[at : at + batch] for at in range(0, len(rows) - batch + 1, batch)]
    return statistics.mean(len({e for row in group for e in row}) for group in groups)


def layer_line(spec: ModelSpec, layer: int, chosen: torch.Tensor) -> str:
    assert spec.moe is not None
    counts = chosen.flatten().bincount(minlength=spec.moe.num_experts)
    share = counts.max().item() / counts.sum().item() * spec.moe.num_experts
    return f"layer {layer:2}: most popular expert {share:.1f} x its even share, {int((counts == 0).sum())} never chosen"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args()
    checkpoint = open_checkpoint(args.model)
    found = chosen_experts(checkpoint, args.tokens)
    every = [distinct(chosen, args.batch) for chosen in found.values()]
    print(
        f"{checkpoint.spec.name}: {args.batch} tokens touch {statistics.mean(every):.1f} experts per layer "
        f"({min(every):.1f} to {max(every):.1f}); chosen at random it would be "
        f"{expected_distinct(checkpoint.spec, args.batch):.1f}"
    )


if __name__ == "__main__":
    main()
