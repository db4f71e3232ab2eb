"""Weights in the file's own type are mapped, not copied: memory of a process that runs a model, read from outside."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ciuic_runtime.models.random_checkpoint import write_random_checkpoint

LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 8000, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6,
    "num_attention_heads": 16, "num_key_value_heads": 8, "max_position_embeddings": 4096,
}  # fmt: skip
V3: dict[str, Any] = {
    "model_type": "deepseek_v3", "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 4096,
    "moe_intermediate_size": 768, "num_hidden_layers": 11, "num_attention_heads": 16, "num_key_value_heads": 16,
    "n_routed_experts": 56, "num_experts_per_tok": 8, "n_shared_experts": 1, "n_group": 8, "topk_group": 4,
    "kv_lora_rank": 512, "q_lora_rank": 768, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "first_k_dense_replace": 1, "max_position_embeddings": 4096, "routed_scaling_factor": 2.5, "norm_topk_prob": True,
}  # fmt: skip
LARGE = {
    "llama": LLAMA | {"vocab_size": 64000, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 18},
    "deepseek_v3": V3,
}


@dataclass(frozen=True)
class Measured:
    """Bytes: of /proc/PID/status by field at each state, and what the run says that it used."""

    status: Mapping[str, Mapping[str, int]]
    used: int
    cache: int

    def growth(self, field: str) -> int:
        return self.status["done"][field] - self.status["imported"][field]

    @property
    def peak(self) -> int:
        return self.status["done"]["VmHWM"]


def status(pid: int) -> dict[str, int]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines)
    return {k: int(values[k].split()[0]) * 1024 for k in ("VmHWM", "RssAnon", "RssFile")}


def measure(folder: Path, dtype: str, prompt_tokens: int, new_tokens: int) -> Measured:
    script = Path(__file__).with_name("run_measured.py")
    command = [sys.executable, str(script), str(folder), dtype, str(prompt_tokens), str(new_tokens)]
    seen, figures = {}, {}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for line in process.stdout:
            figures = json.loads(line)
            seen[figures["state"]] = status(process.pid)
            process.stdin.write("\n")
            process.stdin.flush()
    assert process.returncode == 0
    return Measured(seen, int(figures["used"]), int(figures["cache"]))


linux_only = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc/PID/status")


@linux_only
def test_weights_are_mapped_and_not_copied(tmp_path: Path) -> None:
    """In the file's type they stay file pages; converted to float32 they are fresh memory, which must be noticed."""
    folder = write_random_checkpoint(LLAMA, tmp_path / "model")
    mapped = measure(folder, "bfloat16", 24, 3)
    assert mapped.growth("RssAnon") < mapped.used // 3
    assert mapped.growth("RssFile") > mapped.used * 0.9
    assert mapped.growth("VmHWM") < 1.5 * (mapped.used + mapped.cache)
    converted = measure(folder, "float32", 24, 3)
    assert converted.growth("RssAnon") > converted.used * 0.9, "a copy would not have been noticed"


@linux_only
@pytest.mark.slow
@pytest.mark.parametrize("family", LARGE)
def test_peak_resident_memory(family: str, tmp_path: Path) -> None:
    """At most 1.15 x (weights in use + cache), interpreter and libraries included; some 2.7 GB of weights."""
    folder = write_random_checkpoint(LARGE[family], tmp_path / "model", num_shards=2)
    measured = measure(folder, "bfloat16", 200, 6)
    assert measured.used > 2.3e9, "too small for the interpreter not to matter"
    ratio = measured.peak / (measured.used + measured.cache)
    print(f"{family}: peak {measured.peak / 1e9:.2f} GB, {ratio:.3f} x weights in use and cache")
    assert ratio <= 1.15
