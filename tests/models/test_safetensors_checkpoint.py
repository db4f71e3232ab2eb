"""Opening maps and checks, loading gives views; whatever is wrong with a folder is one line before a weight is read."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.models.checkpoint import open_checkpoint
from ciuic_runtime.models.fp8 import dequantise
from ciuic_runtime.models.random_checkpoint import write_random_checkpoint
from ciuic_runtime.models.safetensors_checkpoint import SafetensorsCheckpoint
from ciuic_runtime.models.safetensors_header import read_header
from ciuic_runtime.models.tensors import TensorSpec, tensors

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
V3: dict[str, Any] = LLAMA | {
    "model_type": "deepseek_v3",
    "hidden_size": 160,  # not a multiple of 128
    "q_lora_rank": 24,
    "kv_lora_rank": 140,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
}
Q = "model.layers.1.self_attn.q_proj.weight"


def all_tensors(checkpoint: SafetensorsCheckpoint, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {t.name: checkpoint.load(t, dtype) for t in tensors(checkpoint.spec)}


def copies(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Independent of the file, which a test may go on to change."""
    return {name: tensor.clone() for name, tensor in all_tensors(SafetensorsCheckpoint(folder), dtype).items()}


def find(checkpoint: SafetensorsCheckpoint, name: str) -> TensorSpec:
    return next(t for t in tensors(checkpoint.spec) if t.name == name)


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Writes model.safetensors again with its tensors changed."""
    stored = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    edit(stored)
    save_file(stored, folder / "model.safetensors")


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in config.items() if value != "absent"}))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("checkpoints")
    write_random_checkpoint(LLAMA, base / "llama")
    write_random_checkpoint(LLAMA, base / "sharded", num_shards=3)
    write_random_checkpoint(LLAMA | {"tie_word_embeddings": True}, base / "tied")
    write_random_checkpoint(V3, base / "v3", num_shards=2)
    write_random_checkpoint(V3, base / "fp8", fp8=True)
    return base


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(made / name, tmp_path / name))


# What opening and loading give


@pytest.mark.parametrize("name", ["llama", "sharded", "tied", "v3"])
def test_tensors_are_those_of_the_library(made: Path, name: str) -> None:
    checkpoint = open_checkpoint(made / name)
    assert isinstance(checkpoint, SafetensorsCheckpoint)
    stored: dict[str, torch.Tensor] = {}
    for file in (made / name).glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            stored |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        loaded = all_tensors(checkpoint, dtype)
        assert loaded.keys() == stored.keys()
        assert all(loaded[key].dtype == dtype for key in loaded)
        assert all(torch.equal(loaded[key], stored[key].to(dtype)) for key in loaded)
    assert (checkpoint.ignored, checkpoint.left_out) == ((), ())


@pytest.mark.parametrize("name", ["sharded", "v3"])
def test_without_an_index_all_shards_are_read(copy: Callable[[str], Path], name: str) -> None:
    folder = copy(name)
    with_index = all_tensors(SafetensorsCheckpoint(folder), torch.bfloat16)
    (folder / "model.safetensors.index.json").unlink()
    without = all_tensors(SafetensorsCheckpoint(folder), torch.bfloat16)
    assert all(torch.equal(with_index[key], without[key]) for key in with_index)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_a_matching_tensor_is_a_view_of_the_mapped_file(made: Path) -> None:
    checkpoint = SafetensorsCheckpoint(made / "llama")
    loaded = all_tensors(checkpoint, torch.bfloat16)
    maps = re.findall(r"^(\w+)-(\w+) (\S+) .*llama/model\.safetensors$", Path("/proc/self/maps").read_text(), re.M)
    assert [permissions for *_, permissions in maps] == ["r--s"]  # shared and read-only: no private copies
    (first, last), size = (int(x, 16) for x in maps[0][:2]), (made / "llama/model.safetensors").stat().st_size
    assert all(first <= t.data_ptr() < min(last, first + size) for t in loaded.values())
    spec = find(checkpoint, Q)
    assert checkpoint.is_mapped(spec, torch.bfloat16)
    assert not checkpoint.is_mapped(spec, torch.float32)
    assert not first <= checkpoint.load(spec, torch.float32).data_ptr() < last


def test_tensors_outlive_the_checkpoint(made: Path) -> None:
    checkpoint = SafetensorsCheckpoint(made / "llama")
    tensor = checkpoint.load(find(checkpoint, Q), torch.bfloat16)
    before = tensor.clone()
    checkpoint.close()
    assert torch.equal(tensor, before)
    assert torch.equal(checkpoint.load(find(checkpoint, Q), torch.bfloat16), before)  # maps the file again


def test_conversion_in_pieces(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = SafetensorsCheckpoint(made / "fp8")
    whole = all_tensors(checkpoint, torch.float32)
    monkeypatch.setattr("ciuic_runtime.models.safetensors_checkpoint._CHUNK_BYTES", 1000)
    pieces = all_tensors(checkpoint, torch.float32)
    assert all(torch.equal(whole[key], pieces[key]) for key in whole)


@pytest.mark.parametrize("padding", [1, 2, 3])
def test_unaligned_data_is_copied(copy: Callable[[str], Path], padding: int) -> None:
    folder = copy("llama")
    expected = copies(folder, torch.bfloat16)
    file = folder / "model.safetensors"
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    file.write_bytes(struct.pack("<Q", length + padding) + data[8 : 8 + length] + b" " * padding + data[8 + length :])
    checkpoint = SafetensorsCheckpoint(folder)
    for dtype in (torch.bfloat16, torch.float32):
        loaded = all_tensors(checkpoint, dtype)
        assert all(torch.equal(loaded[key], expected[key].to(dtype)) for key in expected)
    aligned = padding % 2 == 0
    assert checkpoint.is_mapped(find(checkpoint, Q), torch.bfloat16) == aligned
    assert all(t.data_ptr() % t.element_size() == 0 for t in loaded.values())


def test_fp8_blocks(made: Path) -> None:
    checkpoint = SafetensorsCheckpoint(made / "fp8")
    stored = load_file(made / "fp8/model.safetensors")
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    assert stored[name].dtype == torch.float8_e4m3fn
    assert stored[name].shape == (148, 160)
    expected = dequantise(stored[name], stored[name + "_scale_inv"], (128, 128), torch.bfloat16)
    assert torch.equal(checkpoint.load(find(checkpoint, name), torch.bfloat16), expected)
    assert not checkpoint.is_mapped(find(checkpoint, name), torch.bfloat16)
    assert (checkpoint.ignored, checkpoint.left_out) == ((), ())


def test_names_without_the_prefix(copy: Callable[[str], Path]) -> None:
    folder = copy("fp8")
    expected = copies(folder, torch.bfloat16)

    def strip(stored: dict[str, torch.Tensor]) -> None:
        for name in list(stored):
            stored[name.removeprefix("model.")] = stored.pop(name)

    change(folder, strip)
    loaded = all_tensors(SafetensorsCheckpoint(folder), torch.bfloat16)
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)


def test_extra_tensors_are_left_out_or_listed(copy: Callable[[str], Path]) -> None:
    folder = copy("fp8")
    extra = {
        "model.layers.2.eh_proj.weight": torch.zeros(2, 2),
        "model.layers.2.shared_head.head.weight": torch.zeros(2),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4),
        "model.layers.3.mlp.up_proj.weight": torch.zeros(2),
        "adapter.weight": torch.zeros(2, dtype=torch.int64),
    }
    change(folder, lambda stored: stored.update(extra))
    checkpoint = SafetensorsCheckpoint(folder)
    assert set(checkpoint.left_out) == set(list(extra)[:3])
    assert checkpoint.ignored == ("adapter.weight", "model.layers.3.mlp.up_proj.weight")


def test_tied_embeddings_with_and_without_a_head(copy: Callable[[str], Path]) -> None:
    folder = copy("tied")
    assert SafetensorsCheckpoint(folder).left_out == ()
    change(folder, lambda stored: stored.update({"lm_head.weight": stored["model.embed_tokens.weight"].clone()}))
    checkpoint = SafetensorsCheckpoint(folder)
    assert checkpoint.left_out == ("lm_head.weight",)
    assert "lm_head.weight" not in {t.name for t in tensors(checkpoint.spec)}


def test_a_config_without_dtype_has_that_of_the_file(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = write_random_checkpoint(LLAMA, tmp_path / "f32", dtype="float32")
    change_config(folder, dtype="absent")
    assert SafetensorsCheckpoint(folder).spec.dtype == "float32"
    folder = copy("llama")
    change_config(folder, dtype="float16")
    assert SafetensorsCheckpoint(folder).spec.dtype == "float16"  # what the config says is not overruled


# Resident memory, read from outside


_CHILD = """
import sys, torch
from ciuic_runtime.models.safetensors_checkpoint import SafetensorsCheckpoint
from ciuic_runtime.models.tensors import tensors
def pause(word):
    print(word, flush=True)
    sys.stdin.readline()
torch.zeros(10).sum()
pause("ready")
checkpoint = SafetensorsCheckpoint(sys.argv[1])
pause("opened")
loaded = [checkpoint.load(t, torch.bfloat16) for t in tensors(checkpoint.spec)]
largest = max(loaded, key=lambda t: t.numel())
float(largest.view(-1)[:2048].sum())
pause("one page")
one = checkpoint.load(max(tensors(checkpoint.spec), key=lambda t: t.num_parameters), torch.float32)
pause("one converted")
"""


def test_opening_maps_and_reads_nothing(tmp_path: Path) -> None:
    """300 MB of weights: what becomes resident is what is touched, and a conversion leaves only its result behind."""
    config = LLAMA | {"vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8}
    folder = write_random_checkpoint(config, tmp_path / "big")
    size = (folder / "model.safetensors").stat().st_size
    assert size > 280e6
    command = [sys.executable, "-c", _CHILD, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        resident = {}
        for word in ("ready", "opened", "one page", "one converted"):
            assert child.stdout.readline().strip() == word
            resident[word] = psutil.Process(child.pid).memory_info().rss
            child.stdin.write("\n")
            child.stdin.flush()
    assert child.returncode == 0
    assert resident["opened"] - resident["ready"] < 4e6
    assert resident["one page"] - resident["opened"] < 4e6  # torch, and up to 16 pages around a fault
    converted = 8192 * 1024 * 4
    assert 0.9 * converted < resident["one converted"] - resident["one page"] < converted + 4e6


# Bad folders


def _remove_shard(folder: Path) -> None:
    (folder / "model-00002-of-00003.safetensors").unlink()


def _remove_shard_without_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()
    _remove_shard(folder)


def _index(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index)
    path.write_text(json.dumps(index))


def _only_pickles(folder: Path) -> None:
    os.replace(folder / "model.safetensors", folder / "pytorch_model.bin")


def _truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 10)


def _same_tensor_twice(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()
    save_file({Q: torch.zeros(32, 32)}, folder / "extra.safetensors")


INDEX = "model.safetensors.index.json"
BLOCKS_OF_64 = {"quant_method": "fp8", "weight_block_size": [64, 64]}
KV_A = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
BAD: list[tuple[str, str, Callable[[Path], object], str]] = [
    ("missing shard", "sharded", _remove_shard, r"lacks 1 of 3 shards: model-00002-of-00003.safetensors"),
    ("no index, missing shard", "sharded", _remove_shard_without_index, r"lacks 1 of 3 shards: model-00002-of-00003"),
    ("pickles only", "llama", _only_pickles, r"pickle files only \(pytorch_model.bin\).*convert them to safetensors"),
    ("no weights", "llama", lambda f: (f / "model.safetensors").unlink(), r"has no \*.safetensors files"),
    ("no config", "llama", lambda f: (f / "config.json").unlink(), "config.json does not exist"),
    ("truncated", "llama", _truncate, r"model.safetensors is damaged .* ends at byte"),
    ("empty file", "llama", lambda f: (f / "model.safetensors").write_bytes(b""), "it has 0 bytes"),
    ("tensor missing", "llama", lambda f: change(f, lambda s: s.pop(Q)), f"lacks tensors .*{re.escape(Q)}"),
    (
        "index lies",
        "v3",
        lambda f: _index(f, lambda i: i["weight_map"].update({"model.absent": "model-00001-of-00002.safetensors"})),
        r"model-00001-of-00002.safetensors lacks tensors that model.safetensors.index.json says it holds: model.absent",
    ),
    (
        "index outside",
        "sharded",
        lambda f: _index(f, lambda i: i["weight_map"].update({Q: "../x.safetensors"})),
        re.escape(Q),
    ),
    ("index to a pickle", "sharded", lambda f: _index(f, lambda i: i["weight_map"].update({Q: "x.bin"})), "'x.bin'"),
    ("index of numbers", "sharded", lambda f: _index(f, lambda i: i["weight_map"].update({Q: 3})), "'3'"),
    ("index without a map", "sharded", lambda f: _index(f, lambda i: i.pop("weight_map")), "weight_map is missing"),
    ("index is a list", "sharded", lambda f: (f / INDEX).write_text("[]"), "not a JSON object"),
    ("twice", "sharded", _same_tensor_twice, f"both hold {re.escape(Q)}"),
    (
        "wrong shape",
        "llama",
        lambda f: change(f, lambda s: s.update({Q: torch.zeros(32, 31)})),
        rf"model.safetensors: {re.escape(Q)} has shape \[32, 31\], but config.json asks for \[32, 32\]",
    ),
    (
        "flat",
        "llama",
        lambda f: change(f, lambda s: s.update({Q: torch.zeros(1024)})),
        r"has shape \[1024\]",
    ),
    (
        "integers",
        "llama",
        lambda f: change(f, lambda s: s.update({Q: torch.zeros(32, 32, dtype=torch.int32)})),
        rf"{re.escape(Q)} is I32; weights can be F32, F16, BF16, F8_E4M3",
    ),
    (
        "fp8 without config",
        "llama",
        lambda f: change(f, lambda s: s.update({Q: torch.zeros(32, 32).to(torch.float8_e4m3fn)})),
        rf"{re.escape(Q)} is F8_E4M3, but config.json has no quantization_config",
    ),
    (
        "fp8 vector",
        "fp8",
        lambda f: change(f, lambda s: s.update({"model.norm.weight": torch.zeros(160).to(torch.float8_e4m3fn)})),
        "model.norm.weight is F8_E4M3, which only matrices can be",
    ),
    ("no scale", "fp8", lambda f: change(f, lambda s: s.pop(KV_A + "_scale_inv")), r"its scales .*_inv\) are missing"),
    (
        "scale shape",
        "fp8",
        lambda f: change(f, lambda s: s.update({KV_A + "_scale_inv": torch.ones(1, 2)})),
        r"_scale_inv has shape \[1, 2\], but blocks of 128 x 128 in a weight of \[148, 160\] ask for \[2, 2\]",
    ),
    (
        "scale type",
        "fp8",
        lambda f: change(f, lambda s: s.update({KV_A + "_scale_inv": torch.ones(2, 2, dtype=torch.int32)})),
        "_scale_inv is I32; scales can be",
    ),
    ("other blocks", "fp8", lambda f: change_config(f, quantization_config=BLOCKS_OF_64), "blocks of 64 x 64"),
    ("other sizes", "llama", lambda f: change_config(f, hidden_size=64), "but config.json asks for"),
    ("more layers", "llama", lambda f: change_config(f, num_hidden_layers=3), r"layers.2.* and \d+ more"),
    ("head", "tied", lambda f: change_config(f, tie_word_embeddings=False), r"lm_head.weight; is tie_word_embeddings"),
]


@pytest.mark.parametrize(("name", "damage", "message"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_folders_get_one_line_on_opening(
    copy: Callable[[str], Path], name: str, damage: Callable[[Path], object], message: str
) -> None:
    folder = copy(name)
    damage(folder)
    with pytest.raises(InvalidInput, match=message) as failure:
        SafetensorsCheckpoint(folder)
    assert str(folder) in str(failure.value)
    assert "\n" not in str(failure.value)


def test_families_that_cannot_be_run_are_refused(copy: Callable[[str], Path]) -> None:
    folder = copy("v3")
    change_config(folder, model_type="deepseek_v32", index_n_heads=2, index_head_dim=16, index_topk=8)
    with pytest.raises(InvalidInput, match=r"DeepSeek-V3.2 can be counted"):
        SafetensorsCheckpoint(folder)


def test_a_tensor_of_another_model(made: Path) -> None:
    checkpoint = SafetensorsCheckpoint(made / "llama")
    with pytest.raises(InvalidInput, match="has no tensor 'x'"):
        checkpoint.load(TensorSpec("x", (1,), "p", "r"), torch.float32)


def test_a_file_that_became_shorter_after_opening(copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    checkpoint = SafetensorsCheckpoint(folder)
    os.truncate(folder / "model.safetensors", 4096)
    with pytest.raises(InvalidInput, match="has become shorter"):
        all_tensors(checkpoint, torch.bfloat16)


# Damaged headers


def entry(dtype: Any = "F32", shape: Any = (2, 2), offsets: Any = (0, 16), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets} | more


def write(path: Path, header: Any, nbytes: int = 16, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(nbytes))
    return path


EMPTY = b'{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
BAD_HEADERS: list[tuple[str, Any, dict[str, int], str]] = [
    ("absurd length", {}, {"length": 2**63}, "claims a header of 9223372036854775808"),
    ("length of the file", {}, {"length": 19}, "claims a header of 19"),
    ("zero length", b"", {}, "does not begin with {"),
    ("a list", [1], {}, "does not begin with {"),
    ("space first", b' {"a": 1}', {}, "does not begin with {"),
    ("not JSON", b'{"a": ', {}, "not valid JSON"),
    ("not UTF-8", b'{"\xff": 1}', {}, "not valid JSON"),
    ("deep", b'{"a":' + b"[" * 50_000, {}, "not a list of tensors"),
    ("dense", b'{"a":[' + b"{}," * 10_000 + b"{}]}", {}, "not a list of tensors"),
    ("no object", {"a": 3}, {}, "entry of 'a' is not an object"),
    ("no dtype", {"a": {"shape": [2], "data_offsets": [0, 16]}}, {}, "'a' has dtype 'None'"),
    ("dtype", {"a": entry("F7")}, {}, "'a' has dtype 'F7', which safetensors does not know"),
    ("dtype number", {"a": entry(7)}, {}, "'a' has dtype '7'"),
    ("negative shape", {"a": entry(shape=[-2, -2])}, {}, "shape of 'a' is not a list of sizes"),
    ("fraction", {"a": entry(shape=[2.0, 2])}, {}, "shape of 'a'"),
    ("bool", {"a": entry(shape=[True, 4])}, {}, "shape of 'a'"),
    ("long shape", {"a": entry(shape=[1] * 100 + [4])}, {}, "shape of 'a'"),
    ("huge shape", {"a": entry(shape=[2**62] * 60)}, {}, "'a' is F32 .* but holds 16 bytes"),
    ("one offset", {"a": entry(offsets=[16])}, {}, "data_offsets of 'a'"),
    ("backwards", {"a": entry(offsets=[16, 0])}, {}, "data_offsets of 'a'"),
    ("negative offset", {"a": entry(offsets=[-16, 0])}, {}, "data_offsets of 'a'"),
    ("too short", {"a": entry(offsets=[0, 12])}, {}, r"'a' is F32 \[2, 2\] but holds 12 bytes"),
    ("out of range", {"a": entry(), "b": entry(offsets=[16, 32])}, {}, "'b' ends at byte .* file has only"),
    ("overlap", {"a": entry(), "b": entry(offsets=[8, 24])}, {"nbytes": 24}, "'b' overlaps another tensor"),
    ("same place", {"a": entry(), "b": entry()}, {}, "'b' overlaps"),
    ("gap", {"a": entry(), "b": entry(offsets=[20, 36])}, {"nbytes": 36}, "'b' leaves a gap"),
    ("rest", {"a": entry()}, {"nbytes": 20}, "its tensors end at byte"),
    ("metadata", {"__metadata__": {"a": 1}, "a": entry()}, {}, "__metadata__ is not an object of strings"),
    ("duplicate", b'{"a":' + EMPTY + b',"a":' + EMPTY + b"}", {"nbytes": 0}, "'a' occurs twice"),
]


@pytest.mark.parametrize(
    ("header", "options", "message"), [case[1:] for case in BAD_HEADERS], ids=[case[0] for case in BAD_HEADERS]
)
def test_bad_headers_get_one_line(tmp_path: Path, header: Any, options: dict[str, int], message: str) -> None:
    path = write(tmp_path / "x.safetensors", header, **options)
    with pytest.raises(InvalidInput, match=message) as failure:
        read_header(path)
    assert str(path) in str(failure.value)
    assert "\n" not in str(failure.value)
    assert len(str(failure.value)) < 500


@pytest.mark.parametrize("length", [2**20, 2**40, 2**63, 2**64 - 1])
def test_a_claimed_length_allocates_nothing(tmp_path: Path, length: int) -> None:
    path = write(tmp_path / "x.safetensors", {"a": entry()}, length=length)
    tracemalloc.start()
    with pytest.raises(InvalidInput):
        read_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000


def test_dense_garbage_allocates_no_more_than_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", b'{"a":[' + b"{}," * 1_000_000 + b"{}]}")
    tracemalloc.start()
    with pytest.raises(InvalidInput):
        read_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < path.stat().st_size * 1.1


def _is_read(path: Path) -> bool:
    """Whether our check accepts the file; anything but success or InvalidInput fails the test."""
    try:
        read_header(path)
    except InvalidInput as error:
        assert "\n" not in str(error)  # noqa: PT017
        return False
    return True


def _library_reads(path: Path) -> bool:
    from safetensors import SafetensorError

    try:
        with safe_open(path, framework="pt"):
            return True
    except (SafetensorError, OSError):
        return False


@settings(max_examples=150, deadline=None)
@given(content=st.binary(max_size=200), framed=st.booleans())
def test_random_bytes(tmp_path_factory: pytest.TempPathFactory, content: bytes, framed: bool) -> None:
    path = tmp_path_factory.getbasetemp() / "random.safetensors"
    path.write_bytes((struct.pack("<Q", len(content)) if framed else b"") + content)
    assert not _is_read(path) or _library_reads(path)


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), cut=st.booleans(), count=st.integers(1, 6))
def test_mutated_and_truncated_files(
    tmp_path_factory: pytest.TempPathFactory, seed: int, cut: bool, count: int
) -> None:
    """Bytes of a valid header changed, or the file cut: what our check accepts, the library can map."""
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    tensors = {"a": torch.zeros(2, 3), "b.weight": torch.ones(4, dtype=torch.bfloat16), "c": torch.zeros(0, 2)}
    save_file(tensors, path, metadata={"format": "pt"})
    data, dice = bytearray(path.read_bytes()), random.Random(seed)
    header = 8 + int.from_bytes(data[:8], "little")
    for _ in range(count):
        data[dice.randrange(header)] = dice.choice(b'0123456789{}[]",: \x00\xffaF')
    path.write_bytes(data[: dice.randrange(len(data))] if cut else data)
    assert not _is_read(path) or _library_reads(path)


NUMBERS = st.integers(-2, 40) | st.sampled_from([2**31, 2**63, 2**64, 1.5, None, True, "4"])


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["a", "b", "c", "__metadata__"]),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "BF16", "U8", "F8_E4M3", "F4", "F9", 3, None]),
                "shape": st.lists(NUMBERS, max_size=3) | NUMBERS,
                "data_offsets": st.lists(NUMBERS, max_size=3) | NUMBERS,
            }
        ),
        max_size=3,
    ),
    st.integers(0, 48),
)
def test_made_up_headers(tmp_path_factory: pytest.TempPathFactory, header: dict[str, Any], nbytes: int) -> None:
    path = write(tmp_path_factory.getbasetemp() / "made.safetensors", header, nbytes)
    assert not _is_read(path) or _library_reads(path)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_a_checkpoint_with_a_damaged_file_opens_and_loads_or_is_refused(
    made: Path, tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    if not folder.exists():
        shutil.copytree(made / "fp8", folder)
    data, dice = bytearray((made / "fp8/model.safetensors").read_bytes()), random.Random(seed)
    header = 8 + int.from_bytes(data[:8], "little")
    for _ in range(dice.randrange(1, 4)):
        data[dice.randrange(8, header)] = dice.choice(b'0123456789{}[]",: aF')
    (folder / "model.safetensors").write_bytes(data)
    try:
        checkpoint = SafetensorsCheckpoint(folder)
    except InvalidInput as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        loaded = all_tensors(checkpoint, torch.float32)
        assert all(tuple(loaded[t.name].shape) == t.shape for t in tensors(checkpoint.spec))
