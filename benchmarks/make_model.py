"""Writes models with random weights for the benchmarks, fast: one pool of random blocks is laid over every tensor, each
time from another place. For us packed or as a bf16 checkpoint, for the peer (llama.cpp) as GGUF in Q4_0 or BF16.

    python benchmarks/make_model.py packed OUT [--format int4] [--shape deepseek-v2-lite] [--layers N] [--seed 0]
    python benchmarks/make_model.py bf16 OUT --layers 6
    python benchmarks/make_model.py gguf OUT.gguf [--type q4_0]

Weights have mean zero and standard deviation 0.02, norms are one, routers 0.05; embeddings are 5, so that tokens stay
different through all layers and the experts they choose are uniform: `routing.py` counts them."""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, ExpertGatingFuncType, GGMLQuantizationType, GGUFWriter, RopeScalingType

from ciuic_runtime.devices.backend import host_buffer
from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.memory.page_store import checksum_of_all
from ciuic_runtime.memory.page_writer import PageWriter
from ciuic_runtime.models.config import KNOWN_FOLDER, read_config
from ciuic_runtime.models.graph import is_table
from ciuic_runtime.models.layout import GROUP, LAYOUT_VERSION, TILE_ROWS, Part, page_layout
from ciuic_runtime.models.spec import ModelSpec
from ciuic_runtime.models.tensors import TensorSpec, tensors, tensors_by_page

Bytes = npt.NDArray[np.uint8]
STD, ROUTER_STD, EMBEDDING_STD = 0.02, 0.05, 5.0
POOL_BYTES = 64 << 20
UNIFORM_STD = {4: 4.32, 8: 73.3}  # of whole numbers from -7 to 7, and from -127 to 127


class Pool:
    """Random blocks, laid over whatever must be filled: from a place drawn for each piece, whole blocks at a time."""

    def __init__(self, blocks: Bytes, seed: int) -> None:
        self.blocks = blocks  # [num_blocks, block_nbytes]
        self._random = np.random.default_rng(seed)

    def pieces(self, num_blocks: int) -> Iterator[Bytes]:
        while num_blocks:
            start = int(self._random.integers(len(self.blocks) - 1024))
            piece = self.blocks[start : start + num_blocks]
            num_blocks -= len(piece)
            yield piece

    def array(self, num_blocks: int) -> Bytes:
        return np.concatenate(list(self.pieces(num_blocks)))


def nibbles(random: np.random.Generator, nbytes: int) -> Bytes:
    """Two numbers from 1 to 15 in each byte: symmetric around 8."""
    values = random.integers(1, 16, (2, nbytes), dtype=np.uint8)
    joined: Bytes = values[0] | values[1] << 4
    return joined


def bf16(values: npt.NDArray[np.float32]) -> Bytes:
    return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)


# Ours, packed


class PackedPages:
    """The bytes of any page of a model, as `models/layout.py` says they lie."""

    def __init__(self, spec: ModelSpec, format: str, seed: int = 0) -> None:
        self.spec, self.format = spec, format
        self.random = random = np.random.default_rng(seed)
        values = bf16(random.standard_normal(POOL_BYTES // 2, dtype=np.float32) * np.float32(STD))
        self.pools = {
            "w4g128-t16": Pool(nibbles(random, POOL_BYTES).reshape(-1, 64), seed + 1),
            "w8g128-t16": Pool(random.integers(1, 256, POOL_BYTES, dtype=np.uint8).reshape(-1, 64), seed + 2),
            "bf16-rows": Pool(values.reshape(-1, 2), seed + 3),
        }

    def page(self, name: str) -> Bytes:
        layout = page_layout(self.spec, name, self.format)
        page = np.zeros(layout.nbytes, np.uint8)
        for part in layout.parts:
            page[part.offset : part.offset + part.nbytes] = self._part(name, part)
        if "k_b_absorbed" in (p.role for p in layout.parts):
            self._turn(page, layout.part("k_b"), layout.part("k_b_absorbed"))
        return page

    def _part(self, page: str, part: Part) -> Bytes:
        if part.layout == "f32-rows":
            return self._precise(page, part).view(np.uint8).reshape(-1)
        if part.layout == "bf16-rows":
            values = self.pools[part.layout].array(part.nbytes // 2)
            factor = EMBEDDING_STD / STD if page == "embedding" and part.role == "weight" else 1.0
            return scaled_bf16(values, factor)
        count, rows, columns = part.matrix
        return np.concatenate([self._tiles(part.layout, rows, columns) for _ in range(count)])

    def _precise(self, page: str, part: Part) -> npt.NDArray[np.float32]:
        if part.role == "gate":
            return self.random.standard_normal(part.nbytes // 4, dtype=np.float32) * np.float32(ROUTER_STD)
        norm = page.endswith("_norm") or part.role.endswith("norm")
        return np.full(part.nbytes // 4, 1.0 if norm else 0.0, np.float32)

    def _tiles(self, layout: str, rows: int, columns: int) -> Bytes:
        bits = 4 if layout.startswith("w4") else 8
        groups, tiles = -(-columns // GROUP), -(-rows // TILE_ROWS)
        weight_bytes = groups * GROUP * TILE_ROWS * bits // 8
        scale_bytes = -(-groups * TILE_ROWS * 2 // 64) * 64
        tile = np.zeros((tiles, weight_bytes + scale_bytes), np.uint8)
        tile[:, :weight_bytes] = self.pools[layout].array(tiles * weight_bytes // 64).reshape(tiles, weight_bytes)
        scales = np.full(groups * TILE_ROWS, STD / UNIFORM_STD[bits], np.float16)
        tile[:, weight_bytes : weight_bytes + scales.nbytes] = scales.view(np.uint8)
        # What is only padding is zero: columns at the end of each row, rows at the end of the last tile.
        quads = tile[:, :weight_bytes].reshape(tiles, -1, TILE_ROWS, 4)  # [tile, 64 bytes, row, byte]
        zero, per_step = (0x88, 8) if bits == 4 else (0x80, 4)
        assert columns % per_step == 0, f"{columns=}: only whole steps of {per_step} columns are written here"
        quads[:, columns // per_step :] = zero
        if rows % TILE_ROWS:
            quads[-1, :, rows % TILE_ROWS :] = zero
        return tile.reshape(-1)

    def _turn(self, page: Bytes, k_b: Part, absorbed: Part) -> None:
        """`k_b_absorbed` is `k_b` turned round: all scales are equal, so the stored numbers are."""
        if k_b.layout == "bf16-rows":
            values = page[k_b.offset : k_b.offset + k_b.nbytes].view(np.uint16).reshape(k_b.shape)
            page[absorbed.offset : absorbed.offset + absorbed.nbytes] = values.swapaxes(1, 2).reshape(-1).view(np.uint8)
            return
        count, rows, columns = k_b.matrix
        assert rows % GROUP == columns % GROUP == 0, f"{rows=} {columns=}: only whole groups are turned here"
        groups, tiles = columns // GROUP, rows // TILE_ROWS
        source = page[k_b.offset : k_b.offset + k_b.nbytes].reshape(count, tiles, -1)
        stored = source[:, :, : columns * TILE_ROWS].reshape(count, tiles, groups, 32, TILE_ROWS, 4)
        matrix = stored.transpose(0, 1, 4, 2, 3, 5).reshape(count, rows, columns).swapaxes(1, 2)
        turned = matrix.reshape(count, columns // TILE_ROWS, TILE_ROWS, rows // GROUP, 32, 4).transpose(
            0, 1, 3, 4, 2, 5
        )
        target = page[absorbed.offset : absorbed.offset + absorbed.nbytes].reshape(count, columns // TILE_ROWS, -1)
        target[:, :, : rows * TILE_ROWS] = turned.transpose(0, 1, 3, 4, 2, 5).reshape(*target.shape[:2], -1)


def scaled_bf16(blocks: Bytes, factor: float) -> Bytes:
    if factor == 1.0:
        return blocks.reshape(-1)
    values = (blocks.reshape(-1).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return bf16(values * np.float32(factor))


# Ours, as a checkpoint


def write_bf16(config: dict[str, Any], out: Path, seed: int) -> None:
    """A Hugging Face folder with one bf16 file and no tokenizer: benchmarks give token ids."""
    spec = read_config(config, out.name)
    random = np.random.default_rng(seed)
    pool = Pool(bf16(random.standard_normal(POOL_BYTES // 2, dtype=np.float32) * np.float32(STD)).reshape(-1, 2), seed)
    out.mkdir(parents=True)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors(spec):
        nbytes = 2 * tensor.num_parameters
        header[tensor.name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)
    with (out / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors(spec):
            _write_bf16(file, tensor, pool, random)
    (out / "config.json").write_text(json.dumps(config, indent=1))


def _write_bf16(file: BinaryIO, tensor: TensorSpec, pool: Pool, random: np.random.Generator) -> None:
    count = tensor.num_parameters
    if not tensor.is_matrix:
        norm = tensor.page.endswith("_norm") or tensor.role.endswith("layernorm")
        file.write(bf16(np.full(count, 1.0 if norm else 0.0, np.float32)).data)
    elif tensor.role == "gate":
        file.write(bf16(random.standard_normal(count, dtype=np.float32) * np.float32(ROUTER_STD)).data)
    else:
        factor = EMBEDDING_STD / STD if tensor.page == "embedding" else 1.0
        for piece in pool.pieces(count):
            file.write(scaled_bf16(piece, factor).data)


# The peer's


def write_gguf(config: dict[str, Any], out: Path, seed: int, kind: str) -> None:
    """GGUF of a DeepSeek-V2-Lite-like model: every matrix in Q4_0 (what `llama-quantize --pure` makes) or BF16, the
    expansion split into keys and values, one entry for all experts of a layer, names as llama.cpp reads them."""
    spec = read_config(config, out.stem)
    if spec.family != "deepseek_v2" or spec.mla is None or spec.mla.q_rank is not None or spec.moe is None:
        raise InvalidInput(f"{spec.name}: only the shape of DeepSeek-V2-Lite is written as GGUF")
    random = np.random.default_rng(seed)
    stored_as, file_type = {"q4_0": (GGMLQuantizationType.Q4_0, 2), "bf16": (GGMLQuantizationType.BF16, 32)}[kind]
    block, nbytes = GGML_QUANT_SIZES[stored_as]
    pools = {std: Pool(_gguf_blocks(kind, random, std), seed) for std in (STD, EMBEDDING_STD)}
    entries = list(_gguf_tensors(spec))
    writer = GGUFWriter(out, "deepseek2")
    _gguf_fields(writer, spec, file_type)
    for name, shape, what in entries:
        if what == "matrix":
            size = int(np.prod(shape)) // block * nbytes
            stored = (*shape[:-1], shape[-1] // block * nbytes)
            writer.add_tensor_info(name, stored, np.dtype(np.uint8), size, raw_dtype=stored_as)
        else:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * int(np.prod(shape)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    file = writer.fout[0]
    file.write(bytes(-file.tell() % writer.data_alignment))
    for name, shape, what in entries:
        if what == "ones":
            file.write(np.ones(shape, np.float32).tobytes())
        elif what == "router":
            file.write((random.standard_normal(shape, dtype=np.float32) * np.float32(ROUTER_STD)).tobytes())
        else:
            pool = pools[EMBEDDING_STD if name == "token_embd.weight" else STD]
            for piece in pool.pieces(int(np.prod(shape)) // block):
                file.write(np.ascontiguousarray(piece).data)
        file.write(bytes(-file.tell() % writer.data_alignment))
    writer.close()


def _gguf_blocks(kind: str, random: np.random.Generator, std: float) -> Bytes:
    """Blocks of random weights with that standard deviation, [num_blocks, block_nbytes]."""
    if kind == "bf16":
        return bf16(random.standard_normal(POOL_BYTES // 2, dtype=np.float32) * np.float32(std)).reshape(-1, 2)
    _, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType.Q4_0]
    count = POOL_BYTES // nbytes
    blocks = np.concatenate([np.zeros((count, 2), np.uint8), nibbles(random, count * 16).reshape(count, 16)], axis=1)
    blocks[:, :2] = np.frombuffer(np.float16(std / UNIFORM_STD[4]).tobytes(), np.uint8)
    return blocks


def _gguf_tensors(spec: ModelSpec) -> Iterator[tuple[str, tuple[int, ...], str]]:
    mla, moe, hidden, heads = spec.mla, spec.moe, spec.hidden_size, spec.num_heads
    assert mla is not None, spec.name
    assert moe is not None, spec.name
    yield "token_embd.weight", (spec.vocab_size, hidden), "matrix"
    yield "output_norm.weight", (hidden,), "ones"
    yield "output.weight", (spec.vocab_size, hidden), "matrix"
    for layer in range(spec.num_layers):
        p = f"blk.{layer}."
        yield p + "attn_norm.weight", (hidden,), "ones"
        yield p + "attn_kv_a_norm.weight", (mla.kv_rank,), "ones"
        yield p + "attn_q.weight", (heads * mla.qk_dim, hidden), "matrix"
        yield p + "attn_kv_a_mqa.weight", (mla.latent_dim, hidden), "matrix"
        yield p + "attn_k_b.weight", (heads, mla.kv_rank, mla.nope_dim), "matrix"
        yield p + "attn_v_b.weight", (heads, mla.value_dim, mla.kv_rank), "matrix"
        yield p + "attn_output.weight", (hidden, heads * mla.value_dim), "matrix"
        yield p + "ffn_norm.weight", (hidden,), "ones"
        if not spec.is_moe(layer):
            yield from _gguf_mlp(p, "", (), hidden, spec.intermediate_size)
            continue
        yield p + "ffn_gate_inp.weight", (moe.num_experts, hidden), "router"
        yield from _gguf_mlp(p, "_exps", (moe.num_experts,), hidden, moe.intermediate_size)
        yield from _gguf_mlp(p, "_shexp", (), hidden, moe.num_shared * moe.intermediate_size)


def _gguf_mlp(
    prefix: str, suffix: str, stack: tuple[int, ...], hidden: int, width: int
) -> Iterator[tuple[str, tuple[int, ...], str]]:
    for role, shape in (("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width))):
        yield f"{prefix}ffn_{role}{suffix}.weight", (*stack, *shape), "matrix"


def _gguf_fields(w: GGUFWriter, spec: ModelSpec, file_type: int) -> None:
    mla, moe, rope = spec.mla, spec.moe, spec.rope
    assert mla is not None, spec.name
    assert moe is not None, spec.name
    w.add_name(spec.name)
    w.add_context_length(spec.max_positions)
    w.add_embedding_length(spec.hidden_size)
    w.add_block_count(spec.num_layers)
    w.add_feed_forward_length(spec.intermediate_size)
    w.add_head_count(spec.num_heads)
    w.add_head_count_kv(1)
    w.add_layer_norm_rms_eps(spec.rms_norm_eps)
    w.add_rope_freq_base(rope.theta)
    w.add_rope_dimension_count(rope.dim)
    if rope.kind == "yarn":
        w.add_rope_scaling_type(RopeScalingType.YARN)
        w.add_rope_scaling_factor(rope.factor)
        w.add_rope_scaling_orig_ctx_len(rope.original_max_positions)
        w.add_rope_scaling_yarn_log_mul(0.1 * (rope.mscale_all_dim or 0.0))
    w.add_leading_dense_block_count(moe.first_dense)
    w.add_expert_count(moe.num_experts)
    w.add_expert_used_count(moe.experts_per_token)
    w.add_expert_shared_count(moe.num_shared)
    w.add_expert_feed_forward_length(moe.intermediate_size)
    w.add_expert_weights_scale(moe.scaling)
    w.add_expert_gating_func(ExpertGatingFuncType.SOFTMAX)
    w.add_vocab_size(spec.vocab_size)
    w.add_kv_lora_rank(mla.kv_rank)
    w.add_key_length(mla.latent_dim)
    w.add_value_length(mla.kv_rank)
    w.add_key_length_mla(mla.qk_dim)
    w.add_value_length_mla(mla.value_dim)
    w.add_file_type(file_type)
    w.add_quantization_version(2)
    _gguf_vocabulary(w, spec.vocab_size)


def _gguf_vocabulary(w: GGUFWriter, size: int) -> None:
    """Any names do: the 256 bytes in GPT-2's alphabet, then numbers, then three special tokens."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    names = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    names += [f"token{i}" for i in range(len(names), size - 3)] + ["<bos>", "<eos>", "<pad>"]
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("deepseek-llm")
    w.add_token_list(names)
    w.add_token_types([1] * (size - 3) + [3] * 3)
    w.add_token_merges(["a b", "c d"])
    w.add_bos_token_id(size - 3)
    w.add_eos_token_id(size - 2)
    w.add_pad_token_id(size - 1)


# The program


def read_shape(source: str, layers: int | None) -> dict[str, Any]:
    """The config of a known model or of a file, cut to some layers."""
    known = KNOWN_FOLDER / f"{source}.json"
    config: dict[str, Any] = json.loads((known if known.exists() else Path(source)).read_text())
    return config | ({"num_hidden_layers": layers} if layers else {})


def write_packed(config: dict[str, Any], out: Path, seed: int, format: str) -> None:
    """What `ciuic pack` would have made of a checkpoint, without one."""
    spec = read_config(config, out.name)
    maker = PackedPages(spec, format, seed)
    out.mkdir(parents=True)
    pages = {page: page_layout(spec, page, format).nbytes for page in tensors_by_page(spec)}
    writer = PageWriter(out, format, pages, tables=[page for page in pages if is_table(spec, page)])
    for name, nbytes in pages.items():
        page = host_buffer(nbytes)
        page.numpy()[:] = maker.page(name)
        writer.write(name, page)
    writer.finish()
    packing = {
        "format": format,
        "layout_version": LAYOUT_VERSION,
        "checksum": checksum_of_all(writer.checksums[page] for page in pages),
    }
    (out / "config.json").write_text(json.dumps(config | {"ciuic": packing}, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("packed", "bf16", "gguf"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", default="deepseek-v2-lite", help="a known name or a config.json")
    parser.add_argument("--layers", type=int, help="as many layers only")
    parser.add_argument("--format", default="int4", choices=("int4", "int8", "bfloat16"), help="of packed")
    parser.add_argument("--type", default="q4_0", choices=("q4_0", "bf16"), help="of gguf")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    config = read_shape(args.shape, args.layers)
    if args.out.exists():
        raise SystemExit(f"{args.out} is there already; remove it first")
    write: dict[str, Callable[[], None]] = {
        "packed": lambda: write_packed(config, args.out, args.seed, args.format),
        "bf16": lambda: write_bf16(config, args.out, args.seed),
        "gguf": lambda: write_gguf(config, args.out, args.seed, args.type),
    }
    begin = time.perf_counter()
    try:
        write[args.kind]()
    except BaseException:
        shutil.rmtree(args.out, ignore_errors=True) if args.out.is_dir() else args.out.unlink(missing_ok=True)
        raise
    files = [args.out] if args.out.is_file() else list(args.out.iterdir())
    nbytes = sum(f.stat().st_size for f in files)
    print(f"{args.out}: {nbytes / 1e9:.2f} GB in {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
