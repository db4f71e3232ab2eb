"""deepseek2 GGUF files, which transformers cannot read, against the checkpoint folder that they were written from:
exactly in float32, and against the same weights dequantised where they are quantised."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from agreement import open_llm, relative_error
from hf_reference import NEW, V2, V3, Case, Reference, make, reference_of
from safetensors.torch import load_file, save_file

from ciuic_runtime.devices.spec import Topology
from ciuic_runtime.engine.sampling import SamplingParams

sys.path.append(str(Path(__file__).parents[1] / "models"))
import gguf_writer

Quant = gguf.GGMLQuantizationType
SIZES = {"v_head_dim": 32, "qk_nope_head_dim": 32, "q_lora_rank": 32, "intermediate_size": 96, "rms_norm_eps": 1e-6}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32.0, "beta_slow": 1.0}
CONFIGS: dict[str, dict[str, Any]] = {
    "v3": V3 | SIZES | {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}, "rope_theta": 10000.0},
    "v2": V2 | SIZES | {"rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}, "q_lora_rank": None},
    "v2-lite": V2 | SIZES | {"tie_word_embeddings": True, "routed_scaling_factor": 2.0},
}


def assert_agrees(path: Path, expected: Reference, here: Topology) -> None:
    with open_llm(path, here) as llm:
        assert relative_error(llm.logits(expected.prompt), expected.logits).max() <= 1e-4
        output = llm.generate(expected.prompt, SamplingParams(max_tokens=NEW, ignore_eos=True))[0]
    assert list(output.token_ids) == expected.tokens


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}


def write(path: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], **how: Any) -> None:
    arrays = {name: value.numpy() for name, value in tensors.items()}
    gguf_writer.write_deepseek2_gguf(path, config, arrays, **how)


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
@pytest.mark.parametrize("name", CONFIGS)
def test_float32_file(name: str, split: bool, here: Topology, tmp_path: Path) -> None:
    expected = make(Case(name, CONFIGS[name]), tmp_path / "folder")
    write(tmp_path / "known.gguf", CONFIGS[name], stored(expected.folder), split_kv_b=split)
    assert_agrees(tmp_path / "known.gguf", expected, here)


def through(value: torch.Tensor, quant: Quant) -> torch.Tensor:
    array = np.ascontiguousarray(value.numpy())
    return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(array, quant), quant).copy())


@pytest.mark.parametrize("quant", [Quant.Q8_0, Quant.Q4_1], ids=lambda q: q.name)
def test_quantised_file(quant: Quant, here: Topology, tmp_path: Path) -> None:
    config = CONFIGS["v3"]
    original = make(Case("v3", config), tmp_path / "folder")
    tensors = stored(original.folder)
    write(tmp_path / "known.gguf", config, tensors, split_kv_b=False, quant=quant)
    quantised = {
        name: through(value, quant) if value.dim() == 2 and not name.endswith("mlp.gate.weight") else value
        for name, value in tensors.items()
    }
    (tmp_path / "plain").mkdir()
    save_file(quantised, tmp_path / "plain" / "model.safetensors", {"format": "pt"})
    (tmp_path / "plain" / "config.json").write_bytes((original.folder / "config.json").read_bytes())
    expected = reference_of(tmp_path / "plain", original.prompt, original.case)
    assert relative_error(expected.logits, original.logits).max() > 1e-3, "quantising changes nothing here"
    assert_agrees(tmp_path / "known.gguf", expected, here)
