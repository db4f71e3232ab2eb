"""`ciuic pack`: what it writes is a model by itself, whatever happens in between nothing is lost or half there, and the
bytes are the same however they came about."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from configs import TINY_V3

from ciuic_runtime import packing
from ciuic_runtime.cli import main
from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.memory import pack_journal, page_writer
from ciuic_runtime.memory.pack_journal import PackJournal
from ciuic_runtime.memory.page_store import PageStore
from ciuic_runtime.memory.page_writer import PageWriter
from ciuic_runtime.models.checkpoint import open_checkpoint
from ciuic_runtime.models.config import load_spec
from ciuic_runtime.models.random_checkpoint import write_random_checkpoint
from ciuic_runtime.models.tokenizer import load_tokenizer
from ciuic_runtime.packing import bits_per_weight, pack

SHARD = 150_000  # bytes: the tiny model makes several files
PROCESSES = multiprocessing.get_context("forkserver")  # that have imported what takes seconds
PROCESSES.set_forkserver_preload(["ciuic_runtime.packing", "ciuic_runtime.models.random_checkpoint"])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.fixture(scope="module")
def packed(tiny_v3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed in one go, by one thread."""
    out = tmp_path_factory.mktemp("packed") / "tiny"
    pack(tiny_v3, out, "int4", threads=1, shard_bytes=SHARD)
    return out


@pytest.fixture(scope="module")
def in_one_file(tiny_v3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the command packs it."""
    out = tmp_path_factory.mktemp("packed") / "tiny"
    pack(tiny_v3, out)
    return out


@pytest.fixture
def ciuic(capfd: pytest.CaptureFixture[str], ciuic_log: None) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit:
            main([str(a) for a in arguments])
        return int(exit.value.code or 0), *capfd.readouterr()

    return call


# What is written


def test_the_folder_is_a_model_by_itself(packed: Path, tiny_v3: Path) -> None:
    names = contents(packed).keys()
    files = len(list(packed.glob("*.safetensors")))
    assert files > 2
    assert names == {
        "config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json",
        *(f"model-{i:05}-of-{files:05}.safetensors" for i in range(1, files + 1)),
    }  # fmt: skip
    config = json.loads((packed / "config.json").read_text())
    section = config.pop("ciuic")
    assert section.keys() == {"format", "layout_version", "checksum"}
    assert config == json.loads((tiny_v3 / "config.json").read_text())
    assert load_tokenizer(packed).encode("abc") == load_tokenizer(tiny_v3).encode("abc")


def test_the_bytes_do_not_depend_on_threads(packed: Path, tiny_v3: Path, tmp_path: Path) -> None:
    pack(tiny_v3, tmp_path / "tiny", "int4", threads=5, shard_bytes=SHARD)
    assert contents(tmp_path / "tiny") == contents(packed)


def test_memory_is_bounded(packed: Path, tiny_v3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages wait for their turn as long as what is in flight would exceed the limit."""
    alive = most = 0
    real_buffer, limit = packing.host_buffer, 40_000

    def counted(nbytes: int) -> Any:
        nonlocal alive, most
        alive += nbytes
        most = max(most, alive)
        return real_buffer(nbytes)

    monkeypatch.setattr(packing, "host_buffer", counted)
    monkeypatch.setattr(packing, "IN_FLIGHT", limit)
    pack(tiny_v3, tmp_path / "tiny", "int4", threads=4, shard_bytes=SHARD)
    sizes = set(PageStore(packed).pages.values())
    assert most <= limit + sum(sizes), "what is in flight, and at most one spare buffer of each size"
    assert contents(tmp_path / "tiny") == contents(packed)


def test_fp8_checkpoints_are_no_longer_fp8(tmp_path: Path) -> None:
    source = write_random_checkpoint(TINY_V3, tmp_path / "fp8", fp8=True)
    assert load_spec(source).fp8_block is not None
    pack(source, tmp_path / "out", "int4")
    spec = load_spec(tmp_path / "out")
    assert (spec.fp8_block, spec.packed, spec.dtype) == (None, "int4", "bfloat16")


def test_a_config_that_does_not_say_its_type_gets_it(tmp_path: Path) -> None:
    source = write_random_checkpoint(TINY_V3, tmp_path / "f32", dtype="float32")
    config = json.loads((source / "config.json").read_text())
    del config["dtype"]
    (source / "config.json").write_text(json.dumps(config))
    pack(source, tmp_path / "out", "int8")
    assert load_spec(tmp_path / "out").dtype == "float32"


def test_files_beside_the_weights_come_along(tiny_v3: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_v3, tmp_path / "source"))
    (source / "additional_chat_templates").mkdir()
    beside = {
        "generation_config.json": '{"eos_token_id": [257, 300]}', "chat_template.jinja": "{{ messages[0].content }}",
        "additional_chat_templates/tool_use.jinja": "{{ tools }}", "LICENSE-MODEL": "as you like",
    }  # fmt: skip
    for name, text in beside.items():
        (source / name).write_text(text)
    (source / "modeling_tiny.py").write_text("raise SystemExit")
    pack(source, tmp_path / "out", "bf16")
    assert {name: (tmp_path / "out" / name).read_text() for name in beside} == beside
    assert not (tmp_path / "out" / "modeling_tiny.py").exists()
    assert load_spec(tmp_path / "out").eos_token_ids == load_spec(source).eos_token_ids == (257, 300)


def test_a_gguf_file_becomes_a_folder(smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "smollm2"
    report = pack(smollm2, out, "int8")
    assert report.nbytes == sum(PageStore(out).pages.values())
    theirs, ours = load_spec(smollm2), load_spec(out)
    for field in theirs.__slots__:
        if field not in ("name", "packed"):
            assert getattr(ours, field) == getattr(theirs, field), field
    theirs_tokenizer, tokenizer = load_tokenizer(smollm2), load_tokenizer(out)
    for text in ("The capital of France is", "  naïve 2018\n<|im_start|>user 你好 🙂", ""):
        assert tokenizer.encode(text) == theirs_tokenizer.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == theirs_tokenizer.decode(tokenizer.encode(text))
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(messages) == theirs_tokenizer.apply_chat_template(messages)
    for field in ("vocab_size", "bos_token_id", "eos_token_ids", "prefix", "suffix", "special_tokens"):
        assert getattr(tokenizer, field) == getattr(theirs_tokenizer, field), field


@pytest.mark.parametrize("format", ["int4", "int8", "bf16"])
def test_what_was_packed_gives_text(ciuic, tiny_v3: Path, here_toml: Path, tmp_path: Path, format: str) -> None:
    code, out, _ = ciuic("pack", tiny_v3, tmp_path / "out", "--format", format, "--json")
    assert code == 0
    asked = ("--prompt", "Experts", "--max-tokens", 8, "--ignore-eos", "--devices", here_toml, "--json")
    code, out, err = ciuic("run", tmp_path / "out", *asked)
    assert code == 0, (err, out)
    report = json.loads(out)
    assert len(report["token_ids"]) == 8
    assert report["schedule"]["model"]["format"] == {"bf16": "bfloat16"}.get(format, format)
    code, out, _ = ciuic("plan", tmp_path / "out", "--devices", here_toml, "--json")
    held = {a["task"]: a["bytes"] for a in json.loads(out)["assignments"]}
    assert held["layers.2.experts.3"] > 0


# Bits


@pytest.mark.parametrize(("format", "limit"), [("int4", 4.25), ("int8", 8.25), ("bfloat16", 16.001)])
def test_bits_per_weight(format: str, limit: float) -> None:
    bits = bits_per_weight(load_spec("deepseek-v2-lite"), format)
    assert {format, "experts", "shared_experts", "mlp", "attention", "router", "embedding", "head", "norms", "all"} == {
        *bits
    }
    for kind in (format, "experts", "shared_experts", "mlp"):
        assert 4 <= bits[kind] <= limit
    assert bits["embedding"] == 16
    assert bits["router"] == bits["norms"] == 32
    assert bits["all"] < {"int4": 4.6, "int8": 8.5, "bfloat16": 16.5}[format]


def test_the_report_adds_up(ciuic, tiny_v3: Path, tmp_path: Path) -> None:
    code, out, err = ciuic("pack", tiny_v3, tmp_path / "out", "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    store, source = PageStore(tmp_path / "out"), open_checkpoint(tiny_v3)
    assert report["bytes"] == sum(store.pages.values())
    assert report["source_bytes"] == source.nbytes == sum(f.stat().st_size for f in source.files) - header(tiny_v3)
    assert (report["pages"], report["pages_kept"], report["format"]) == (len(store.pages), 0, "int4")
    assert report["written_bytes_per_s"] == pytest.approx(report["bytes"] / report["seconds"])
    assert report["source_bytes_per_s"] == pytest.approx(report["source_bytes"] / report["seconds"])
    code, out, err = ciuic("pack", tiny_v3, tmp_path / "again")
    assert (code, err) == (0, "")
    assert "46 pages" in out
    assert "bits per weight" in out


def header(folder: Path) -> int:
    return 8 + int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")


# What is refused


def test_an_existing_folder_is_left_alone(ciuic, tiny_v3: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    code, _, err = ciuic("pack", tiny_v3, tmp_path / "out")
    assert code == 2
    assert err == f"ciuic: {tmp_path / 'out'} exists already; give a folder that does not, or remove it\n"
    assert contents(tmp_path) == {"out/mine": b"x"}


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("--format", "int3"), "format 'int3' is not one of int4, int8, bf16, bfloat16"),
        (("--threads", "0"), "threads is 0; it must be at least 1"),
    ],
)
def test_bad_options_are_one_line(ciuic, tiny_v3: Path, tmp_path: Path, arguments: tuple[str, str], match: str) -> None:
    code, _, err = ciuic("pack", tiny_v3, tmp_path / "out", *arguments)
    assert (code, err.count("\n")) == (2, 1)
    assert match in err
    assert contents(tmp_path) == {}


def test_no_folder_to_write_to(ciuic, tiny_v3: Path, tmp_path: Path) -> None:
    code, _, err = ciuic("pack", tiny_v3, tmp_path / "no" / "out")
    assert code == 2
    assert "is missing or not writable" in err


def test_too_little_room_is_said_before_anything_is_written(
    ciuic, tiny_v3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = type(shutil.disk_usage(tmp_path))(1 << 40, 1 << 40, 100_000)
    monkeypatch.setattr(packing, "disk_usage", lambda path: full)
    code, _, err = ciuic("pack", tiny_v3, tmp_path / "out")
    assert code == 2
    assert "more and 97.7 KiB are free there; choose another disk, or a smaller format" in err
    assert contents(tmp_path) == {}


def test_a_gguf_file_without_a_tokenizer_is_refused_first(tmp_path: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parent / "models"))
    import gguf_writer
    import torch

    from ciuic_runtime.models.config import read_config
    from ciuic_runtime.models.tensors import tensors

    config = TINY_V3 | {"bos_token_id": 1, "eos_token_id": [2]}
    values = {t.name: torch.zeros(t.shape).numpy() for t in tensors(read_config(config))}
    gguf_writer.write_deepseek2_gguf(tmp_path / "m.gguf", config, values, split_kv_b=False, with_tokenizer=False)
    with pytest.raises(InvalidInput, match=r"m\.gguf has no tokenizer"):
        pack(tmp_path / "m.gguf", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


# Interruptions


def pack_and_die(model: Path, out: Path, where: str, count: int) -> None:
    """Packs, and is killed the `count`th time that it comes to the point `where`; for a process of its own."""
    left = count

    def dies(point: str) -> bool:
        nonlocal left
        left -= point == where
        return left == 0

    def around(point: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            if dies(f"before {point}"):
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*arguments)
            if dies(f"after {point}"):
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapped

    def write(handle: int, offset: int, view: memoryview) -> None:
        if dies("within a page"):
            whole(handle, offset, view[: len(view) // 2 // 4096 * 4096])
            os.kill(os.getpid(), signal.SIGKILL)
        whole(handle, offset, view)

    def add(journal: PackJournal, page: str, checksum: str) -> None:
        if dies("within a line"):
            journal._file.write('{"page": "layers.1.at')
            journal._file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        plain_add(journal, page, checksum)

    whole, page_writer._write = page_writer._write, write
    plain_add = around("a line", PackJournal.add)
    PackJournal.add = add  # type: ignore[method-assign]
    PageWriter.finish = around("headers", PageWriter.finish)  # type: ignore[method-assign]
    os.rename = around("renaming", os.rename)
    pack(model, out, "int4", threads=2, shard_bytes=SHARD)


def killed(model: Path, out: Path, where: str, count: int) -> None:
    process = PROCESSES.Process(target=pack_and_die, args=(model, out, where, count))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("where", "count", "kept"),
    [
        ("before a line", 1, 0), ("within a page", 9, 8), ("before a line", 20, 19), ("within a line", 30, 29),
        ("after a line", 46, 46), ("before headers", 1, 46), ("after headers", 1, 46), ("before renaming", 1, 46),
    ],
)  # fmt: skip
def test_a_killed_packing_goes_on_to_the_same_bytes(
    where: str, count: int, kept: int, packed: Path, tiny_v3: Path, tmp_path: Path
) -> None:
    out = tmp_path / "tiny"
    killed(tiny_v3, out, where, count)
    assert not out.exists()
    report = pack(tiny_v3, out, "int4", shard_bytes=SHARD)
    assert report.pages_kept == kept
    assert contents(out) == contents(packed)
    assert [p.name for p in tmp_path.iterdir()] == ["tiny"]


def test_killed_again_and_again(packed: Path, tiny_v3: Path, tmp_path: Path) -> None:
    out = tmp_path / "tiny"
    for where, count in (("within a page", 12), ("within a line", 4), ("before a line", 3)):
        killed(tiny_v3, out, where, count)
    assert pack(tiny_v3, out, "int4", shard_bytes=SHARD).pages_kept > 14
    assert contents(out) == contents(packed)


def test_killed_after_the_folder_appeared_it_is_whole(packed: Path, tiny_v3: Path, tmp_path: Path) -> None:
    out = tmp_path / "tiny"
    killed(tiny_v3, out, "after renaming", 1)
    (out / pack_journal.NAME).unlink()
    assert contents(out) == contents(packed)


def test_pages_that_were_damaged_meanwhile_are_packed_again(packed: Path, tiny_v3: Path, tmp_path: Path) -> None:
    out, partial = tmp_path / "tiny", tmp_path / "tiny.partial"
    killed(tiny_v3, out, "before headers", 1)
    first, second, *_ = sorted(partial.glob("*.safetensors"))
    os.truncate(second, second.stat().st_size - 5000)
    with first.open("r+b") as file:
        file.seek(first.stat().st_size - 1)
        file.write(b"\xa5")
    assert pack(tiny_v3, out, "int4", shard_bytes=SHARD).pages_kept < 46 - 1
    assert contents(out) == contents(packed)


def test_going_on_with_something_else_is_refused(ciuic, tiny_v3: Path, tmp_path: Path) -> None:
    out = tmp_path / "tiny"
    killed(tiny_v3, out, "within a page", 5)
    before = contents(tmp_path)
    other = write_random_checkpoint(TINY_V3, tmp_path.parent / "other", seed=1)
    for arguments in ((tiny_v3, out, "--format", "int8"), (other, out)):
        code, _, err = ciuic("pack", *arguments)
        assert (code, err.count("\n")) == (2, 1)
        assert "tiny.partial is left from packing another checkpoint or in another format; remove it" in err
    with pytest.raises(InvalidInput, match="is left from packing another"):
        pack(tiny_v3, out, "int4", shard_bytes=SHARD + 1)
    assert contents(tmp_path) == before


def test_ctrl_c_says_how_to_go_on(in_one_file: Path, tiny_v3: Path, tmp_path: Path) -> None:
    script = (
        "import sys, time; from ciuic_runtime.cli import main\n"
        "from ciuic_runtime.memory.pack_journal import PackJournal; add = PackJournal.add\n"
        "PackJournal.add = lambda *a: (add(*a), time.sleep(0.05)); main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", script, "pack", str(tiny_v3), str(tmp_path / "tiny"), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    journal = tmp_path / "tiny.partial" / pack_journal.NAME
    while not (journal.exists() and journal.read_text().count("\n") > 5):
        assert process.poll() is None, process.stderr
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "")
    error = json.loads(out)["error"]
    assert error["exit_code"] == 130
    assert error["message"] == f"interrupted; the same command goes on with what is in {tmp_path / 'tiny'}.partial"
    assert pack(tiny_v3, tmp_path / "tiny").pages_kept >= 4
    assert contents(tmp_path / "tiny") == contents(in_one_file)


def test_two_at_once_do_not_meet(tiny_v3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def second(*_: object) -> None:
        monkeypatch.undo()
        with pytest.raises(InvalidInput, match=r"another process is writing .*tiny\.partial; wait for it"):
            pack(tiny_v3, tmp_path / "tiny")

    monkeypatch.setattr(packing, "write_tokenizer", second)
    pack(tiny_v3, tmp_path / "tiny")


@pytest.mark.parametrize(("number", "said"), [(errno.ENOSPC, "the disk is full; make room"), (errno.EIO, "error")])
def test_a_disk_that_fails_is_said_and_nothing_lost(
    ciuic, number: int, said: str, in_one_file: Path, tiny_v3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, real = 17, os.pwrite

    def failing(handle: int, data: Any, offset: int) -> int:
        nonlocal left
        left -= 1
        if left <= 0:
            raise OSError(number, os.strerror(number))
        return real(handle, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing)
        code, _, err = ciuic("pack", tiny_v3, tmp_path / "tiny")
    assert (code, err.count("\n")) == (1, 1)
    assert err.startswith(f"ciuic: cannot write to {tmp_path / 'tiny'}.partial: ")
    assert said in err
    assert err.endswith("and give the same command to go on\n")
    assert not (tmp_path / "tiny").exists()
    assert pack(tiny_v3, tmp_path / "tiny").pages_kept == 16
    assert contents(tmp_path / "tiny") == contents(in_one_file)
