"""The GGUF container: whatever the bytes, a file is read as it is or refused in one line, within its own size."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import gguf_writer as writer
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.models.config import read_config
from ciuic_runtime.models.gguf_checkpoint import GgufCheckpoint
from ciuic_runtime.models.gguf_file import GgufFile, StringArray
from ciuic_runtime.models.tensors import tensors
from ciuic_runtime.models.tokenizer import load_tokenizer

CONFIG = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
_SCRATCH = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "sound.gguf"
    rng = np.random.default_rng(0)
    known = {t.name: rng.standard_normal(t.shape, dtype=np.float32) for t in tensors(read_config(CONFIG))}
    writer.write_dense_gguf(path, "llama", CONFIG, known, quant=gguf.GGMLQuantizationType.Q8_0)
    return path.read_bytes()


def open_all(path: Path) -> None:
    """Everything that reads the file: header, spec, tensors, tokenizer."""
    checkpoint = GgufCheckpoint(path)
    for tensor in tensors(checkpoint.spec):
        import torch

        checkpoint.load(tensor, torch.float32)
    load_tokenizer(path).encode("some text")


def attempt(path: Path) -> str:
    """What opening says; any other exception than InvalidInput fails the test."""
    message = ""
    try:
        open_all(path)
    except InvalidInput as error:
        message = str(error)
    assert "\n" not in message
    return message


def header(num_tensors: int, num_fields: int, body: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_fields) + body


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def test_the_fields_and_tensors_are_those_that_gguf_reads(tmp_path: Path, sound: bytes) -> None:
    path = tmp_path / "sound.gguf"
    path.write_bytes(sound)
    ours, theirs = GgufFile(path), gguf.GGUFReader(path)
    names = [name for name in theirs.fields if not name.startswith("GGUF.")]
    assert list(ours.fields) == names
    for name in names:
        expected, value = theirs.fields[name].contents(), ours.fields[name]
        if isinstance(value, (StringArray, np.ndarray)):
            assert list(value) == expected, name
        else:
            assert value == pytest.approx(expected) if isinstance(value, float) else value == expected, name
    assert {t.name: (t.tensor_type, t.n_bytes, t.data_offset) for t in theirs.tensors} == {
        t.name: (t.type, t.nbytes, t.offset) for t in ours.tensors.values()
    }


def test_every_cut_is_refused(tmp_path: Path, sound: bytes) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(sound)
    assert attempt(path) == ""
    stored = GgufFile(path).tensors.values()
    start, end = min(t.offset for t in stored), max(t.offset + t.nbytes for t in stored)
    cuts = [*range(200), *range(200, start, 97), *range(start, end, 997), end - 1]
    for cut in cuts:
        path.write_bytes(sound[:cut])
        assert "cut.gguf" in attempt(path), f"{cut} of {len(sound)} bytes were accepted"


@settings(max_examples=300, deadline=None, suppress_health_check=_SCRATCH)
@given(data=st.data())
def test_changed_bytes_are_read_or_refused(tmp_path: Path, sound: bytes, data: st.DataObject) -> None:
    start = 8000  # the header, in which nearly all of the structure lies
    changed = bytearray(sound)
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, start))
        patch = data.draw(st.binary(min_size=1, max_size=8) | st.just(b"\xff" * 8) | st.just(b"\x00" * 8))
        changed[position : position + len(patch)] = patch
    path = tmp_path / "changed.gguf"
    path.write_bytes(bytes(changed))
    attempt(path)


@settings(max_examples=300, deadline=None, suppress_health_check=_SCRATCH)
@given(body=st.binary(max_size=300), counts=st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)))
def test_garbage_is_refused(tmp_path: Path, body: bytes, counts: tuple[int, int]) -> None:
    path = tmp_path / "garbage.gguf"
    path.write_bytes(body)
    assert attempt(path)
    path.write_bytes(header(*counts, body))
    assert attempt(path)
    path.write_bytes(header(counts[0] % 3, 1 + counts[1] % 3, body))
    assert attempt(path)


ABSURD = {
    "empty": (b"", "cannot be read"),
    "magic": (b"GGML" + bytes(40), "begins with"),
    "version": (header(0, 0, version=1), "of version 1"),
    "big endian": (header(0, 0, version=3 << 24), "big-endian"),
    "tensor count": (header(2**63, 0, bytes(100)), "claims 9223372036854775808 tensors"),
    "field count": (header(0, 2**63, bytes(100)), "claims 9223372036854775808 fields"),
    "key length": (header(0, 1, struct.pack("<Q", 2**62) + bytes(100)), "a key has a length"),
    "value length": (header(0, 1, text("a") + struct.pack("<IQ", 8, 2**62) + bytes(100)), "a has a length"),
    "array length": (header(0, 1, text("a") + struct.pack("<IIQ", 9, 4, 2**62) + bytes(100)), "a needs"),
    "string array length": (
        header(0, 1, text("a") + struct.pack("<IIQ", 9, 8, 2**61) + bytes(100)),
        "claims 2305843009213693952 strings",
    ),
    "string in array": (header(0, 1, text("a") + struct.pack("<IIQQ", 9, 8, 1, 2**61) + bytes(100)), "past the end"),
    "nested array": (header(0, 1, text("a") + struct.pack("<IIQ", 9, 9, 1) + bytes(100)), "unsupported type 9"),
    "value type": (header(0, 1, text("a") + struct.pack("<I", 99) + bytes(100)), "unknown type 99"),
    "not UTF-8": (header(0, 1, struct.pack("<Q", 2) + b"\xff\xfe" + bytes(100)), "not UTF-8"),
    "same key": (header(0, 2, 2 * (text("a") + struct.pack("<II", 4, 1)) + bytes(100)), "occurs twice"),
    "alignment": (
        header(0, 1, text("general.alignment") + struct.pack("<II", 4, 3) + bytes(100)),
        "not a power of two",
    ),
    "dimensions": (header(1, 0, text("a") + struct.pack("<I", 2**31) + bytes(100)), "dimensions"),
    "shape": (header(1, 0, text("a") + struct.pack("<IQQIQ", 2, 2**40, 2**40, 0, 0) + bytes(100)), "cut short"),
    "empty shape": (
        header(1, 0, text("a") + struct.pack("<IQIQ", 1, 0, 0, 0) + bytes(100)),
        "does not consist of blocks",
    ),
    "offset": (header(1, 0, text("a") + struct.pack("<IQIQ", 1, 4, 0, 2**62) + bytes(100)), "cut short"),
    "block": (
        header(1, 0, text("a") + struct.pack("<IQIQ", 1, 33, 2, 0) + bytes(100)),
        "does not consist of blocks of 32",
    ),
    "overlap": (
        header(2, 0, b"".join(text(n) + struct.pack("<IQIQ", 1, 8, 0, 0) for n in "ab") + bytes(200)),
        "a and b overlap",
    ),
}


@pytest.mark.parametrize("name", ABSURD)
def test_absurd_headers_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / "absurd.gguf"
    content, reason = ABSURD[name]
    path.write_bytes(content)
    message = attempt(path)
    assert "absurd.gguf" in message
    assert reason in message


def peak_while(path: Path) -> int:
    tracemalloc.start()
    try:
        attempt(path)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["tensor count", "field count", "array length", "string array length", "shape"])
def test_a_claimed_size_allocates_nothing(tmp_path: Path, name: str) -> None:
    path = tmp_path / "absurd.gguf"
    path.write_bytes(ABSURD[name][0])
    assert peak_while(path) < 200_000


@pytest.mark.parametrize("kind", ["strings", "bytes", "one string"])
def test_reading_allocates_less_than_the_file_has(tmp_path: Path, kind: str) -> None:
    """Millions of empty strings or single bytes would be many times the file as Python objects."""
    count, path = 200_000, tmp_path / "long.gguf"
    body = {
        "strings": struct.pack("<IIQ", 9, 8, count) + bytes(8 * count),
        "bytes": struct.pack("<IIQ", 9, 0, 8 * count) + bytes(8 * count),
        "one string": struct.pack("<IQ", 8, 8 * count) + b"x" * 8 * count,
    }[kind]
    path.write_bytes(header(0, 1, text("a") + body))
    assert peak_while(path) < 1.25 * path.stat().st_size + 100_000, "array growth may overshoot by an eighth"


def test_strings_are_read_when_asked_for(tmp_path: Path) -> None:
    words = ["", "a", "é", "日本", "x" * 1000]
    body = struct.pack("<IIQ", 9, 8, len(words)) + b"".join(
        struct.pack("<Q", len(w.encode())) + w.encode() for w in words
    )
    path = tmp_path / "words.gguf"
    path.write_bytes(header(0, 1, text("a") + body))
    value: Any = GgufFile(path).fields["a"]
    assert list(value) == words
    assert [value[i] for i in range(5)] == words
    assert value[-1] == words[-1]
    assert value[1:3] == words[1:3]
    with pytest.raises(IndexError):
        value[5]
