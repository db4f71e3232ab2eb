"""Small machines and models that the tests of this folder share."""

from __future__ import annotations

import random
from typing import Any

from ciuic_runtime.devices.spec import DeviceSpec, Link, Topology
from ciuic_runtime.models.config import read_config
from ciuic_runtime.models.graph import build_graph
from ciuic_runtime.schedulers.graph import Page, Task, TaskGraph, Work

KIB, MIB, GIB = 2**10, 2**20, 2**30

DENSE: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 4096,
}  # fmt: skip
MOE: dict[str, Any] = DENSE | {
    "model_type": "deepseek_v3", "q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 12, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "moe_intermediate_size": 24, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip


def model(config: dict[str, Any] = MOE, **changes: Any) -> TaskGraph:
    return build_graph(read_config(config | changes), "bfloat16")


def device(name: str, memory: int = GIB, bandwidth: float = 1e10, rate: float = 1e11, **more: Any) -> DeviceSpec:
    kind = {"cpu": "CPU", "cuda": "GPU", "sim": "SIM"}[name.rpartition("/")[2].partition(":")[0]]
    rates = {"bfloat16": rate, "float32": rate}
    facts: dict[str, Any] = {
        "memory_bytes": memory,
        "memory_bandwidth": bandwidth,
        "matrix_rates": rates,
        "launch_overhead": 0.0,
    }
    return DeviceSpec(name, kind, **(facts | more))  # type: ignore[arg-type]


def machine(*devices: DeviceSpec, links: tuple[Link, ...] = ()) -> Topology:
    return Topology(devices, links)


# A CPU with room for everything and a GPU ten times as fast
CPU_AND_GPU = machine(device("cpu"), device("cuda:0", bandwidth=1e11, rate=1e13))
DISK = DeviceSpec("disk", "DISK")


def toy_task(name: str, kind: Any = "mlp", nbytes: int = 1000, after: tuple[str, ...] = (), **more: Any) -> Task:
    work = more.pop("work", Work(flops_per_token=10.0, bytes_fixed=nbytes, bytes_per_token=2.0))
    layer = int(name.split(".")[1]) if name.startswith("layers.") else None
    pages = more.pop("pages", (Page(name, nbytes),))
    return Task(name, kind, layer, pages, work, work, after, more.pop("output_bytes_per_token", 8.0), **more)


def toy_graph(*tasks: Task, **more: Any) -> TaskGraph:
    return TaskGraph("toy", tasks, "bfloat16", **more)


def random_model(rng: random.Random) -> TaskGraph:
    heads = rng.choice([1, 2, 4])
    sizes = {
        "num_hidden_layers": rng.randint(1, 5), "hidden_size": heads * rng.choice([16, 32]),
        "num_attention_heads": heads, "intermediate_size": rng.choice([16, 48, 200]),
        "vocab_size": rng.choice([50, 320, 2000]), "tie_word_embeddings": rng.random() < 0.5,
    }  # fmt: skip
    if rng.random() < 0.4:
        return model(DENSE | sizes)
    experts = rng.choice([4, 8, 16])
    return model(
        MOE | sizes | {
            "q_lora_rank": rng.choice([None, 24]), "n_routed_experts": experts,
            "num_experts_per_tok": rng.randint(1, experts // 2), "moe_intermediate_size": rng.choice([8, 40]),
            "first_k_dense_replace": rng.randint(0, min(2, sizes["num_hidden_layers"])),
            "n_shared_experts": rng.randint(0, 2),
        }
    )  # fmt: skip


def random_machine(rng: random.Random, nbytes: int) -> Topology:
    """1 to 4 devices that have from a tenth to thrice of `nbytes` each, with some links and sometimes a disk."""
    names = rng.sample(["cpu", "cuda:0", "cuda:1", "sim:0", "node1/cpu", "node1/cuda:0"], rng.randint(1, 4))
    devices = [
        device(
            name,
            memory=max(4096, int(nbytes * rng.uniform(0.1, 3.0))),
            bandwidth=10 ** rng.uniform(9, 12),
            rate=10 ** rng.uniform(10, 14),
            launch_overhead=rng.choice([None, 0.0, 1e-5]),
            basis=rng.choice(["measured", "estimated"]),
            memory_free_bytes=rng.choice([None, int(nbytes * rng.uniform(0.5, 2.0))]),
        )
        for name in names
    ]
    pairs = [(a, b) for a in names for b in names if a != b and rng.random() < 0.5]
    links = tuple(Link(a, b, 10 ** rng.uniform(8, 11), rng.choice([0.0, 1e-5])) for a, b in pairs)
    return Topology((*devices, *([DISK] if rng.random() < 0.3 else [])), links)
