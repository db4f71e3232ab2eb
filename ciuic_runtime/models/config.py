"""Reads a `config.json` into a ModelSpec and refuses, in one line, whatever is missing, contradictory or not supported.
Knows the fields of each family and transformers' defaults for them; it opens no weights and needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.models.config_deepseek import read_deepseek, read_deepseek_v4
from ciuic_runtime.models.config_fields import Fields, read_json_object
from ciuic_runtime.models.config_rope import read_rope
from ciuic_runtime.models.layout import LAYOUT_VERSION, PACKED_FORMATS
from ciuic_runtime.models.spec import DTYPE_BYTES, ModelSpec

KNOWN_FOLDER = Path(__file__).parent / "known"


def known_names() -> list[str]:
    return sorted(path.stem for path in KNOWN_FOLDER.glob("*.json"))


def load_spec(source: str | Path) -> ModelSpec:
    """The ModelSpec of a checkpoint folder, a `config.json`, a `.gguf` file or a known name such as deepseek-v3."""
    path = Path(source)
    if _exists(path) and path.suffix == ".gguf" and path.is_file():
        from ciuic_runtime.models.gguf_checkpoint import read_gguf_spec

        return read_gguf_spec(path)
    if _exists(path):
        return read_config(path)
    known = {name: KNOWN_FOLDER / f"{name}.json" for name in known_names()}
    name = str(source).lower()
    if name in known:
        return read_config(known[name], name)
    raise InvalidInput(
        f"no model at {str(source)[:200]!r}: it is neither a folder with config.json, nor a config.json, "
        f"nor a .gguf file, nor a known name ({', '.join(known)})"
    )


def read_config(source: str | Path | Mapping[str, Any], name: str | None = None) -> ModelSpec:
    """The ModelSpec that a config says: a folder holding `config.json`, such a file, or its content.

    End-of-sequence ids in a `generation_config.json` beside the file are added to its own."""
    if isinstance(source, Mapping):
        fields = Fields(dict(source), f"config of {name}" if name else "config")
        return _spec(fields, name or str(source.get("model_type")), None)
    path = Path(source)
    if path.is_dir():
        path = path / "config.json"
    fields = Fields(read_json_object(path), str(path))
    generation = path.parent / "generation_config.json"
    beside = Fields(read_json_object(generation), str(generation)) if generation.exists() else None
    folder = path.absolute().parent.name
    return _spec(fields, name or (folder if path.name == "config.json" and folder else path.stem), beside)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name too long, a folder that may not be entered
        return False


@dataclass(frozen=True, slots=True)
class _Defaults:
    """What transformers' config classes say for fields that may be missing."""

    max_positions: int
    bos: int | None
    eos: int | None


_FAMILIES = {
    "deepseek_v2": _Defaults(2048, 1, 2),
    "deepseek_v3": _Defaults(4096, 0, 1),
    "deepseek_v32": _Defaults(163840, 0, 1),
    "deepseek_v4": _Defaults(1048576, 0, 1),
    "llama": _Defaults(2048, 1, 2),
    "qwen2": _Defaults(32768, None, None),
}


def _spec(fields: Fields, name: str, generation: Fields | None) -> ModelSpec:
    family = fields.choice("model_type", tuple(_FAMILIES), what="this runtime knows")
    readers: dict[str, Callable[[Fields, dict[str, Any]], ModelSpec]] = {
        "llama": _llama,
        "qwen2": _qwen2,
        "deepseek_v4": read_deepseek_v4,
    }
    common = _common(fields, name, generation, _FAMILIES[family])
    return readers.get(family, read_deepseek)(fields, common)


def _common(fields: Fields, name: str, generation: Fields | None, defaults: _Defaults) -> dict[str, Any]:
    """What every family has."""
    fields.choice("hidden_act", ("silu",), "silu")
    vocab_size = fields.size("vocab_size", maximum=2**24)
    bos = fields.token_ids("bos_token_id", vocab_size, defaults.bos)
    eos = fields.token_ids("eos_token_id", vocab_size, defaults.eos)
    if generation is not None:
        eos = tuple(dict.fromkeys(eos + generation.token_ids("eos_token_id", vocab_size)))
    return {
        "name": name,
        "family": fields.values["model_type"],
        "vocab_size": vocab_size,
        "hidden_size": fields.size("hidden_size"),
        "num_layers": fields.size("num_hidden_layers", maximum=4096),
        "num_heads": fields.size("num_attention_heads", maximum=2**14),
        "max_positions": fields.size("max_position_embeddings", defaults.max_positions, 2**40),
        "rms_norm_eps": fields.number("rms_norm_eps", 1e-6, 1e-20, 1.0),
        "tied_embeddings": fields.flag("tie_word_embeddings", False),
        "dtype": _dtype(fields),
        "fp8_block": _fp8_block(fields),
        "packed": _packed(fields),
        "bos_token_id": bos[0] if bos else None,
        "eos_token_ids": eos,
    }


def _dtype(fields: Fields) -> str:
    name = "dtype" if fields.values.get("dtype") is not None else "torch_dtype"
    value = fields.values.get(name)
    if isinstance(value, str) and value.startswith("torch."):
        fields = Fields({name: value.removeprefix("torch.")}, fields.where)
    return fields.choice(name, tuple(d for d in DTYPE_BYTES if not d.startswith("float8")), "bfloat16")


def _fp8_block(fields: Fields) -> tuple[int, int] | None:
    """The block size of an FP8 checkpoint; any other quantisation is refused by its name."""
    quantisation = fields.section("quantization_config")
    if quantisation is None:
        return None
    what = "this runtime reads unquantised weights and fp8 e4m3 with a scale per block; supported"
    quantisation.choice("quant_method", ("fp8",), what=what)
    quantisation.choice("fmt", ("e4m3",), "e4m3", what=what)
    block = quantisation.values.get("weight_block_size", [128, 128])
    if not isinstance(block, list) or len(block) != 2 or any(type(b) is not int or not 1 <= b <= 2**20 for b in block):
        raise quantisation.wrong("weight_block_size", "it must be a list of two sizes, such as [128, 128]")
    return block[0], block[1]


def _packed(fields: Fields) -> str:
    """The format of a packed folder; one of a layout that this version does not know is refused."""
    packed = fields.section("ciuic")
    if packed is None:
        return ""
    known = f"this runtime reads layout version {LAYOUT_VERSION}; pack the model again, or use a newer version of it"
    if packed.values.get("layout_version") != LAYOUT_VERSION:
        raise packed.wrong("layout_version", known)
    return packed.choice("format", (*PACKED_FORMATS, "bfloat16"), what=known)


def _llama(fields: Fields, common: dict[str, Any]) -> ModelSpec:
    bias = fields.flag("attention_bias", False)
    return ModelSpec(
        **common,
        **_grouped_query(fields, common),
        intermediate_size=fields.size("intermediate_size", maximum=2**22),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=fields.flag("mlp_bias", False),
    )


def _qwen2(fields: Fields, common: dict[str, Any]) -> ModelSpec:
    _refuse_sliding_window(fields, common["num_layers"])
    return ModelSpec(
        **common,
        **_grouped_query(fields, common),
        intermediate_size=fields.size("intermediate_size", maximum=2**22),
        qkv_bias=True,
    )


def _refuse_sliding_window(fields: Fields, num_layers: int) -> None:
    """Qwen2's layers from `max_window_layers` on may look at a window only; no DeepSeek distill uses that."""
    allowed = "layers with a sliding window cannot be run; only full attention is supported"
    has_window = fields.flag("use_sliding_window", False) and fields.values.get("sliding_window", 4096) is not None
    if has_window and fields.size("max_window_layers", 28, 2**20, 0) < num_layers:
        raise fields.wrong("use_sliding_window", allowed)
    types = fields.values.get("layer_types")
    if types is not None and (not isinstance(types, list) or any(t != "full_attention" for t in types)):
        raise fields.wrong("layer_types", allowed)


def _grouped_query(fields: Fields, common: dict[str, Any]) -> dict[str, Any]:
    hidden, heads = common["hidden_size"], common["num_heads"]
    if fields.values.get("head_dim") is None and hidden % heads:
        raise fields.wrong("hidden_size", f"it must be a multiple of num_attention_heads ({heads}), or give head_dim")
    head_dim = fields.size("head_dim", hidden // heads, 2**14)
    kv_heads = fields.size("num_key_value_heads", heads, 2**14)
    if heads % kv_heads:
        raise fields.wrong("num_key_value_heads", f"num_attention_heads ({heads}) must be a multiple of it")
    rope = read_rope(fields, head_dim, False, common["max_positions"], "head_dim")
    return {"num_kv_heads": kv_heads, "head_dim": head_dim, "rope": rope}
