"""Parameters and cache sizes from the config alone, against the published figures and transformers' own modules."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
import torch

from ciuic_runtime.models.config import KNOWN_FOLDER, load_spec, read_config
from ciuic_runtime.models.tensors import count_parameters, tensors


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("deepseek-v2-lite", "15.71", "2.45"),
        ("deepseek-v2", "235.7", "20.9"),
        ("deepseek-v3", "671.0", "36.6"),
        ("deepseek-v4-flash", "284.3", "13.3"),
    ],
)
def test_published_counts(name: str, total: str, active: str) -> None:
    """Billions to the printed precision; active leaves out the input embedding, all leave out the MTP layers."""
    count = count_parameters(load_spec(name))
    assert f"{count.total / 1e9:.{len(total.split('.')[1])}f}" == total
    assert f"{count.active / 1e9:.{len(active.split('.')[1])}f}" == active


def test_v32_is_v3_with_an_indexer_in_every_layer() -> None:
    v3, v32 = (count_parameters(load_spec(name)) for name in ("deepseek-v3", "deepseek-v3.2"))
    indexer = 64 * 128 * 1536 + 128 * 7168 + 2 * 128 + 64 * 7168
    assert v32.total - v3.total == v32.active - v3.active == 61 * indexer


@pytest.mark.parametrize(("name", "kilobytes"), [("deepseek-v2-lite", 31.1), ("deepseek-v3", 70.3)])
def test_cache_per_token(name: str, kilobytes: float) -> None:
    assert round(load_spec(name).kv_bytes_per_token("bfloat16") / 1000, 1) == kilobytes


@pytest.mark.parametrize(
    ("name", "reduced"),
    [
        ("deepseek-v2-lite", {"num_hidden_layers": 2}),
        ("deepseek-v2", {"num_hidden_layers": 2}),
        ("deepseek-v3", {"num_hidden_layers": 4}),
        ("deepseek-v3.2", {"num_hidden_layers": 4}),
        # layers 0 to 4: two with a window only, two compressed by 4 (with an indexer), one by 128; three hash-routed
        ("deepseek-v4-flash", {"num_hidden_layers": 5, "compress_ratios": [0, 0, 4, 128, 4, 0]}),
    ],
)
def test_tensors_are_those_of_transformers(name: str, reduced: dict[str, Any]) -> None:
    """transformers builds no MTP layers either: in the real checkpoints they are extra (14 B in V3, left out here)."""
    config = json.loads((KNOWN_FOLDER / f"{name}.json").read_text()) | reduced
    spec = read_config(config)
    theirs = _transformers_tensors(config)
    ours = [t for t in tensors(spec) if ".mlp.experts." not in t.name]
    fused = [shape for tensor_name, shape in theirs if ".mlp.experts." in tensor_name]
    assert Counter(t.shape for t in ours) == Counter(s for n, s in theirs if ".mlp.experts." not in n)
    in_experts = sum(t.num_parameters for t in tensors(spec) if ".mlp.experts." in t.name)
    assert in_experts == sum(torch.Size(shape).numel() for shape in fused) > 0
    assert count_parameters(spec).total == sum(torch.Size(shape).numel() for _, shape in theirs)


def _transformers_tensors(config: dict[str, Any]) -> list[tuple[str, tuple[int, ...]]]:
    """Parameters and learned buffers, without V4's table from token ids to experts (integers, no parameters)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {k: v for k, v in config.items() if k not in ("model_type", "architectures", "quantization_config")}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **fields))
    return [(n, tuple(t.shape)) for n, t in model.state_dict().items() if not n.endswith("tid2eid")]
