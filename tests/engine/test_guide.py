"""Guided decoding: whatever a model prefers, what comes is JSON of the schema; hostile schemas cost little."""

from __future__ import annotations

import json
import random
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.engine.guide import MAX_SCHEMA_DEPTH, Guide, GuideFailed, make_guide
from ciuic_runtime.models.tokenizer import Tokenizer, load_tokenizer

PADDING = 100  # ids that the model has and the tokenizer does not name


@pytest.fixture(scope="module")
def smol(smollm2: Path) -> Tokenizer:
    return load_tokenizer(smollm2)


@pytest.fixture(scope="module")
def tiny(tiny_v3: Path) -> Tokenizer:
    return load_tokenizer(tiny_v3)


@pytest.fixture(params=["smol", "tiny"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def guided(tokenizer: Tokenizer, schema: dict[str, Any] | None) -> Guide:
    return make_guide(tokenizer, tokenizer.eos_token_ids, tokenizer.vocab_size + PADDING, schema)


def generated(tokenizer: Tokenizer, guide: Guide, seed: int, patience: int = 400) -> str:
    """By a model that likes any token as well as another, and after some time those that bring it to an end."""
    rng, ids = np.random.default_rng(seed), []  # type: ignore[var-annotated]
    closing = [tokenizer.token_to_id(text) for text in ':]}"']
    while not guide.finished:
        logits = rng.normal(size=tokenizer.vocab_size + PADDING).astype(np.float32)
        if len(ids) > patience:
            logits[closing] = [10, 11, 12, 13]
        guide.mask(logits)
        token = int(logits.argmax())
        assert np.isfinite(logits[token])
        if token in tokenizer.eos_token_ids:
            break
        guide.accept(token)
        ids.append(token)
        assert len(ids) < patience + 200, tokenizer.decode(ids)
    return tokenizer.decode(ids)


def some_schema(draw: random.Random, depth: int = 3) -> dict[str, Any]:
    def some_object() -> dict[str, Any]:
        names = draw.sample(["name", "größe", "a b", "items", 'with "quotes"', "x"], draw.randint(0, 4))
        needed = [name for name in names if draw.random() < 0.6]
        properties = {name: some_schema(draw, depth - 1) for name in names}
        return {"type": "object", "properties": properties, "required": needed, "additionalProperties": False}

    def some_array() -> dict[str, Any]:
        low = draw.randint(0, 2)
        return {"type": "array", "items": some_schema(draw, depth - 1), "minItems": low, "maxItems": low + 2}

    simple = [
        lambda: {"type": "string", "minLength": draw.randint(0, 3), "maxLength": draw.randint(3, 9)},
        lambda: {"type": "string", "pattern": draw.choice(["^[a-z]{2,5}$", "^(yes|no)$", r"^\d{4}-\d\d$"])},
        lambda: {"type": "string", "format": "date"},
        lambda: {"type": "integer", "minimum": draw.randint(-99, 0), "maximum": draw.randint(0, 9999)},
        lambda: {"type": "number", "minimum": -1.5, "exclusiveMaximum": 7.25},
        lambda: {"type": draw.choice(["boolean", "null"])},
        lambda: {"enum": draw.sample(["red", "grün", 3, None, True, [1, 2], {"a": "b"}], 3)},
        lambda: {"const": draw.choice(["\n\t\\", -7, False])},
    ]
    nested = [some_object, some_array, lambda: {"anyOf": [some_schema(draw, depth - 1) for _ in range(2)]}]
    return draw.choice(nested if depth == 3 or (depth and draw.random() < 0.5) else simple)()


@pytest.mark.parametrize("seed", range(15))
def test_whatever_the_model_prefers_the_answer_fits_the_schema(tokenizer: Tokenizer, seed: int) -> None:
    schema = some_schema(random.Random(seed))
    text = generated(tokenizer, guided(tokenizer, schema), seed)
    jsonschema_rs.validate(schema, json.loads(text))


def test_a_schema_that_refers_to_itself_is_followed(tokenizer: Tokenizer) -> None:
    tree = {"type": "object", "properties": {"value": {"type": "integer"}, "left": {"$ref": "#/$defs/tree"}},
            "required": ["value"], "additionalProperties": False}  # fmt: skip
    schema = {"$defs": {"tree": tree}, "$ref": "#/$defs/tree"}
    for seed in range(5):
        jsonschema_rs.validate(schema, json.loads(generated(tokenizer, guided(tokenizer, schema), seed)))


def test_without_a_schema_it_is_any_object(tokenizer: Tokenizer) -> None:
    for seed in range(5):
        assert isinstance(json.loads(generated(tokenizer, guided(tokenizer, None), seed, patience=60)), dict)


def test_properties_come_in_the_order_of_the_schema(smol: Tokenizer) -> None:
    names = ["z", "a", "m"]
    schema = {"type": "object", "properties": {n: {"type": "null"} for n in names}, "required": names,
              "additionalProperties": False}  # fmt: skip
    assert list(json.loads(generated(smol, guided(smol, schema), 0))) == names


def test_at_the_end_all_that_end_an_answer_may_come_and_nothing_else(tiny: Tokenizer) -> None:
    guide = make_guide(tiny, [0, 1, 10**9], tiny.vocab_size + PADDING, {"const": 7})
    assert not guide.finished
    [seven] = tiny.encode("7", add_special=False)
    for expected in ([seven], [0, 1], [0, 1]):
        logits = np.zeros(tiny.vocab_size + PADDING, np.float32)
        guide.mask(logits)
        assert logits.tolist() == [0.0 if i in expected else -np.inf for i in range(len(logits))]
        guide.accept(expected[0])
        assert guide.finished


def test_what_could_end_or_go_on_is_not_finished(smol: Tokenizer) -> None:
    guide = guided(smol, {"type": "integer"})
    logits = np.zeros(smol.vocab_size + PADDING, np.float32)
    for token in smol.encode("12", add_special=False):
        guide.accept(token)
    guide.mask(logits)
    assert np.isfinite(logits[[*smol.eos_token_ids, *smol.encode("3", add_special=False)]]).all()
    assert not guide.finished
    guide.accept(smol.eos_token_ids[0])
    assert guide.finished


def test_a_model_that_likes_blanks_comes_to_an_end(tiny: Tokenizer) -> None:
    guide, ids = guided(tiny, {"type": "object", "maxProperties": 0}), []
    [blank] = tiny.encode(" ", add_special=False)
    while not guide.finished:
        logits = np.zeros(tiny.vocab_size + PADDING, np.float32)
        logits[blank] = 1
        guide.mask(logits)
        ids.append(int(logits.argmax()))
        guide.accept(ids[-1])
    assert tiny.decode(ids) == "{" + 32 * " " + "}"


def test_guides_of_one_schema_do_not_share_their_place(smol: Tokenizer) -> None:
    schema = {"type": "array", "items": {"type": "integer"}, "minItems": 3, "maxItems": 3}
    alone = [generated(smol, guided(smol, schema), seed) for seed in range(2)]
    first, second = guided(smol, schema), guided(smol, schema)
    for token in smol.encode("[1", add_special=False):
        first.accept(token)
    assert generated(smol, second, 1) == alone[1]


def test_a_guide_is_used_in_another_thread_than_it_was_made_in(smol: Tokenizer) -> None:
    guide, texts = guided(smol, {"const": "elsewhere"}), []  # type: ignore[var-annotated]
    thread = threading.Thread(target=lambda: texts.append(generated(smol, guide, 0)))
    thread.start()
    thread.join()
    assert json.loads(texts[0]) == "elsewhere"


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


def of_pattern(pattern: str) -> dict[str, Any]:
    return {"type": "string", "pattern": pattern}


REFUSED = {
    "of itself only": ({"$ref": "#"}, "no JSON value fits it"),
    "elsewhere": ({"$ref": "http://localhost:1/schema.json"}, "not present in a registry"),
    "no such type": ({"type": "banana"}, "Invalid type: banana"),
    "not supported": ({"not": {}}, r'Unimplemented keys: \["not"\]'),
    "not supported, said to be": ({"not": {}, "x-guidance": {"lenient": True}}, "Unimplemented keys"),
    "pattern": (of_pattern("(a"), "unclosed group"),
    "look-ahead": (of_pattern("(?=a)b"), "not supported"),
    "nothing fits": ({"type": "integer", "minimum": 3, "maximum": 2}, "Unsatisfiable"),
    "many alternatives": (
        {"allOf": [{"anyOf": [{"properties": {f"k{i}{j}": {}}} for j in range(9)]} for i in range(9)]},
        "schema too large",
    ),
    "patterns that may overlap": (
        {"type": "object", "patternProperties": {f"^(a|b)*{i}$": {} for i in range(1000)}}, "too much time or memory",
    ),
    "deep": (nested(MAX_SCHEMA_DEPTH), "nested deeper than 64"),
    "very deep": (nested(100_000), "nested deeper than 64"),
    "large": ({"enum": ["x" * 200_000]}, "200.* bytes"),
    "not JSON": ({"const": float("nan")}, "is not JSON"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_schema_that_cannot_be_followed_is_refused_and_says_why(smol: Tokenizer, case: str) -> None:
    schema, why = REFUSED[case]
    with pytest.raises(InvalidInput, match=why) as caught:
        guided(smol, schema)
    assert len(str(caught.value)) < 600


ENDLESS = {
    "repeated": of_pattern("((a|b|c){0,3000}x){0,3000}"),
    "many states": of_pattern("^([ab]*a[ab]{200}|[a-z]{3,900}x.*){50}$"),
    "long": {"type": "string", "minLength": 10**6},
    "many items": {"type": "array", "items": {"type": "object"}, "minItems": 10**6},
    "doubling": {
        "$defs": {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(24)} | {"d24": {}},
        "$ref": "#/$defs/d0",
    },
    "alternatives": {
        "anyOf": [{"type": "object", "properties": {f"k{j}": {"type": "string"} for j in range(i)}} for i in range(60)]
    },
}


@pytest.mark.parametrize("case", ENDLESS)
def test_whatever_the_schema_a_step_is_made_or_refused(smol: Tokenizer, case: str) -> None:
    guide, rng = guided(smol, ENDLESS[case]), np.random.default_rng(0)
    with suppress(GuideFailed):
        for _ in range(200):
            logits = rng.normal(size=smol.vocab_size).astype(np.float32)
            guide.mask(logits)
            guide.accept(int(logits.argmax()))


def test_what_becomes_too_complex_on_the_way_fails_and_says_so_ever_after(smol: Tokenizer) -> None:
    guide = guided(smol, {"anyOf": [of_pattern(f"^(.|b{i})*c{{3,50}}[ab]{{900}}$") for i in range(1500)]})
    guide.accept(smol.encode('"', add_special=False)[0])
    for _ in range(2):
        with pytest.raises(GuideFailed, match=r"too complex to follow .* simplify its JSON schema"):
            guide.mask(np.zeros(smol.vocab_size, np.float32))
        assert not guide.finished


def test_a_token_that_may_not_come_makes_it_fail(smol: Tokenizer) -> None:
    guide = guided(smol, {"type": "integer"})
    guide.accept(smol.encode("x", add_special=False)[0])
    with pytest.raises(GuideFailed):
        guide.mask(np.zeros(smol.vocab_size, np.float32))


def test_a_model_without_an_end_is_refused(tiny: Tokenizer) -> None:
    for ends in ([], [tiny.vocab_size + 1]):
        with pytest.raises(InvalidInput, match="no end-of-sequence token"):
            make_guide(tiny, ends, tiny.vocab_size, None)


def test_without_llguidance_it_says_what_to_install(tiny_v3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    fresh = load_tokenizer(tiny_v3)
    with pytest.raises(InvalidInput, match="pip install llguidance"):
        guided(fresh, None)


ALPHABET = list('{}[]":, 0123456789abcdefghijklmnopqrstuvwxyz▁é')


def as_tokenizer(backend: Backend) -> Tokenizer:
    return Tokenizer(backend, backend.get_vocab_size(), None, (0,))


def test_a_tokenizer_as_llama_has_it_is_guided() -> None:
    """Pieces with ▁ for blanks, bytes for everything else."""
    pieces = ["</s>", "<unk>", *(f"<0x{i:02X}>" for i in range(256)), *ALPHABET]
    backend = Backend(
        models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], byte_fallback=True, unk_token="<unk>")
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer, seen = as_tokenizer(backend), ""
    for seed in range(8):
        schema = some_schema(random.Random(seed))
        text = generated(tokenizer, guided(tokenizer, schema), seed)
        jsonschema_rs.validate(schema, json.loads(text))
        seen += text
    assert not seen.isascii()


def test_a_tokenizer_whose_tokens_are_no_bytes_is_refused_by_name() -> None:
    backend = Backend(models.Unigram([("</s>", 0.0), ("<unk>", 0.0), *((c, -1.0) for c in ALPHABET)], unk_id=1))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    with pytest.raises(InvalidInput, match=r"ByteLevel or ByteFallback.*has Metaspace"):
        guided(as_tokenizer(backend), None)
    words = Backend(models.WordLevel({"</s>": 0, "{": 1, "}": 2}, unk_token="</s>"))
    with pytest.raises(InvalidInput, match="has no decoder"):
        guided(as_tokenizer(words), None)
