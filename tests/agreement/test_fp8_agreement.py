"""FP8 checkpoints against transformers running the weights that the written-out formula gives, in float32.
(transformers' own dequantisation is wrong where a size is no multiple of the block.)"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from agreement import open_llm, relative_error
from hf_reference import NEW, V2, V3, Case, Reference, reference_of, yarn
from safetensors.torch import load_file, save_file

from ciuic_runtime.devices.spec import Topology
from ciuic_runtime.engine.sampling import SamplingParams
from ciuic_runtime.models.random_checkpoint import write_random_checkpoint

# Rows and columns below, at and above a block of 128, none of the larger ones a multiple: kv_a has 130 + 14 = 144 rows.
SIZES = {
    "hidden_size": 192, "intermediate_size": 320, "moe_intermediate_size": 136, "kv_lora_rank": 130,
    "qk_rope_head_dim": 14, "q_lora_rank": 136, "num_hidden_layers": 2, "v_head_dim": 36,
}  # fmt: skip
CONFIGS = {
    "v3": V3 | SIZES | yarn(1.0, 1.0),
    "v3-multiples": V3 | SIZES | {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128},
    "v2-small-blocks": V2 | SIZES | {"q_lora_rank": None, "quantization_config": {"weight_block_size": [64, 32]}},
}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}


def dequantised(folder: Path, out: Path) -> Path:
    """The checkpoint as float32: weight[i, j] x scale_inv[i // block rows, j // block columns]."""
    config = json.loads((folder / "config.json").read_text())
    rows, columns = config.pop("quantization_config")["weight_block_size"]
    tensors = {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}
    plain, partial = {}, 0
    for name, weight in tensors.items():
        if name.endswith("_scale_inv"):
            continue
        plain[name] = weight.float()
        if (scale := tensors.get(name + "_scale_inv")) is not None:
            assert weight.dtype == torch.float8_e4m3fn
            i, j = torch.arange(weight.shape[0]) // rows, torch.arange(weight.shape[1]) // columns
            plain[name] *= scale[i][:, j]
            partial += weight.shape[0] % rows > 0 or weight.shape[1] % columns > 0
    assert len(plain) < len(tensors), "nothing was quantised"
    assert partial or all(config[k] % rows == 0 for k in ("hidden_size", "moe_intermediate_size"))
    out.mkdir()
    save_file(plain, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    return out


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_fp8_checkpoint_agrees_with_the_formula(name: str, shards: int, here: Topology, tmp_path: Path) -> None:
    config = CONFIGS[name]
    quantisation = FP8 | config.get("quantization_config", {"weight_block_size": [128, 128]})
    config = config | {"quantization_config": quantisation}
    folder = write_random_checkpoint(config, tmp_path / "fp8", seed=shards, num_shards=shards, fp8=True)
    prompt = torch.randint(0, config["vocab_size"], (64,), generator=torch.Generator().manual_seed(1)).tolist()
    expected: Reference = reference_of(dequantised(folder, tmp_path / "plain"), prompt, Case(name, config))
    assert len(set(expected.tokens)) > 3
    with open_llm(folder, here) as llm:
        assert relative_error(llm.logits(prompt), expected.logits).max() <= 1e-4
        output = llm.generate(prompt, SamplingParams(max_tokens=NEW, ignore_eos=True))[0]
    assert list(output.token_ids) == expected.tokens
