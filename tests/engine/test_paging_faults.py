"""What goes wrong between disk and memory, and in the middle of a pass: nothing gives a wrong token, leaves anybody
holding a page, or makes the next use of the same `LLM` wait for a read that nobody makes."""

from __future__ import annotations

import gc
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from configs import TINY_V3

import ciuic_runtime as ciuic
from ciuic_runtime.devices.backend import host_buffer
from ciuic_runtime.devices.errors import CiuicError, InvalidInput
from ciuic_runtime.devices.spec import Topology
from ciuic_runtime.memory.hierarchy import MemoryHierarchy
from ciuic_runtime.memory.page_store import PageStore, StoreFile
from ciuic_runtime.memory.source import PackedSource
from ciuic_runtime.models.random_checkpoint import write_random_checkpoint
from ciuic_runtime.ops.native import kernels
from ciuic_runtime.packing import pack

pytestmark = pytest.mark.skipif(kernels() is None, reason="the native kernels are not built here")

PROMPT = [5, 250, 17, 99, 3, 42, 200, 7, 31]
GREEDY = ciuic.SamplingParams(max_tokens=12, ignore_eos=True)
SHARD = 150_000  # bytes: the tiny model makes several files


@pytest.fixture(scope="module")
def packed(tiny_v3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "tiny"
    pack(tiny_v3, out, "int4", shard_bytes=SHARD)
    return out


@pytest.fixture(scope="module")
def tokens(packed: Path, here: Topology) -> tuple[int, ...]:
    with opened(packed, here, paged=False) as llm:
        return generated(llm)


@pytest.fixture
def model(packed: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(packed, tmp_path / "tiny"))


def opened(model: Path, here: Topology, **settings: Any) -> ciuic.LLM:
    return ciuic.LLM(model, devices=here, max_model_len=128, max_num_seqs=2, **settings)


def starved(llm: ciuic.LLM) -> ciuic.LLM:
    """With the least memory that it can be run with, and nothing in it."""
    llm.memory.set_budget("cpu", llm.memory.reserved + llm.memory.minimum)
    llm.memory.evict(list(llm.memory.pages))
    return llm


def generated(llm: ciuic.LLM) -> tuple[int, ...]:
    return llm.generate([PROMPT], GREEDY)[0].token_ids


def experts_of(memory: MemoryHierarchy) -> list[str]:
    return [page for page in memory.pages if ".experts." in page]


def nobody_holds_anything(memory: MemoryHierarchy) -> bool:
    return not any(memory.holders(page) for page in memory.pages)


def come_to_rest(memory: MemoryHierarchy) -> None:
    """Takes in whatever is still being read."""
    source = memory._source
    assert isinstance(source, PackedSource)
    while source.reader.in_flight:
        time.sleep(0.001)
    memory.evict([])


@contextmanager
def no_hang(seconds: float = 30) -> Iterator[None]:
    """What takes this long waits for something that will not come."""

    def hangs(number: int, frame: FrameType | None) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        [byte] = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 16]))


def place(store: PageStore, page: str) -> tuple[Path, int]:
    return store._stored[page].tensor.file, store.offset(page)


# Ctrl-C


@contextmanager
def interrupted_after(seconds: float) -> Iterator[list[bool]]:
    """Ctrl-C, as the terminal sends it; the list says whether it came while the block ran."""
    main, came, begun = threading.main_thread().ident, [False], threading.Event()
    assert main is not None

    def press() -> None:
        begun.wait()
        time.sleep(seconds + 0.002)  # until the block has been entered
        signal.pthread_kill(main, signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=press)
    thread.start()
    try:
        try:
            begun.set()
            yield came
        except KeyboardInterrupt:
            came[0] = True
        with suppress(KeyboardInterrupt):
            thread.join()
            time.sleep(0)
    finally:
        thread.join()
        signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One page of this model takes some 20 ms to be read, long enough for Ctrl-C to come meanwhile."""
    config = {
        "model_type": "llama", "vocab_size": 300_000, "hidden_size": 64, "intermediate_size": 64,
        "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("wide")
    pack(write_random_checkpoint(config, folder / "raw"), folder / "packed", "bf16")
    return folder / "packed"


def test_ctrl_c_while_a_page_is_waited_for_loses_no_page(wide: Path) -> None:
    memory = MemoryHierarchy(wide, io_threads=1)
    for i in range(5):
        memory.evict("embedding")
        with interrupted_after(0.002 * (i + 1)):
            memory.move_to_device("embedding")
        with no_hang():
            memory.move_to_device("embedding")
        assert memory.is_in_device_memory("embedding")
        assert memory.holders("embedding") == 0
        assert memory.pool.memory().used == memory.pages["embedding"]
    memory.close()


@pytest.mark.slow
def test_ctrl_c_at_any_moment_of_a_generation_and_the_next_one_is_as_if_nothing_had_been(
    packed: Path, here: Topology, tokens: tuple[int, ...]
) -> None:
    draw, times = random.Random(2), 0
    with opened(packed, here, io_threads=1) as llm:
        starved(llm)
        for _ in range(200):
            with interrupted_after(draw.uniform(0, 0.03)) as came, no_hang():
                generated(llm)
            times += came[0]
            assert nobody_holds_anything(llm.memory)
            with no_hang():
                assert generated(llm) == tokens
        llm.memory.evict(list(llm.memory.pages))
        assert llm.memory.pool.memory().used == 0
    assert times > 20


def test_a_pass_that_is_left_at_any_read_leaves_nobody_holding(
    packed: Path, here: Topology, tokens: tuple[int, ...]
) -> None:
    """As Ctrl-C does it, before the first read, the second and so on."""
    with opened(packed, here) as llm:
        starved(llm)
        source = llm.memory._source
        assert source is not None
        real, left = source.finished, 0

        def finished(seconds: float) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
            return real(seconds)

        source.finished = finished  # type: ignore[method-assign]
        for count in (1, 2, 3, 7, 20, 50, 51, 52, 90):
            left = count
            with pytest.raises(KeyboardInterrupt):
                generated(llm)
            assert nobody_holds_anything(llm.memory)
            with no_hang():
                assert generated(llm) == tokens


# Errors of the system


def test_the_systems_own_error_is_said_with_page_and_file_and_goes_away_with_its_cause(
    model: Path, here: Topology, tokens: tuple[int, ...]
) -> None:
    with opened(model, here) as llm:
        starved(llm)
        assert generated(llm) == tokens
        files: list[StoreFile] = list(llm._checkpoint.store._files.values())  # type: ignore[attr-defined]
        handles = [h for file in files for h in (file.direct, file.plain) if h >= 0]
        kept, folder = [os.dup(h) for h in handles], os.open(model, os.O_RDONLY)
        try:
            for h in handles:
                os.dup2(folder, h)
            for _ in range(3):
                with pytest.raises(CiuicError, match=r"safetensors cannot be read at page \S+: Is a directory$"):
                    generated(llm)
                assert nobody_holds_anything(llm.memory)
        finally:
            for h, was in zip(handles, kept, strict=True):
                os.dup2(was, h)
            for h in (*kept, folder):
                os.close(h)
        assert generated(llm) == tokens


def test_a_file_that_cannot_be_opened_yet_is_said_and_its_pages_come_when_it_can(model: Path) -> None:
    memory = MemoryHierarchy(model, memory={"cpu": "200KiB"})
    store = PageStore(model)
    page = experts_of(memory)[0]
    file, _ = place(store, page)
    away = file.with_suffix(".away")
    file.rename(away)
    for _ in range(2):
        with pytest.raises(InvalidInput, match="cannot be opened: No such file or directory"):
            memory.move_to_device([page, "embedding"])
    away.rename(file)
    with no_hang():
        memory.move_to_device([page, "embedding"])
        memory.move_to_device(page)
    assert memory.is_in_device_memory(page)
    assert nobody_holds_anything(memory)
    assert memory.pool.memory().used == memory.state.used
    memory.close()


def test_a_model_whose_pages_are_damaged_is_not_opened_and_leaves_no_thread_behind(model: Path, here: Topology) -> None:
    file, offset = place(PageStore(model), "layers.2.attention")
    flip(file, offset + 1000)

    def threads() -> int:
        return len(os.listdir("/proc/self/task")) if os.path.exists("/proc/self/task") else threading.active_count()

    def refused() -> int:
        with pytest.raises(InvalidInput, match=r"is damaged: page layers\.2\.attention"):
            opened(model, here)
        gc.collect()
        return threads()

    first = refused()
    assert max(refused() for _ in range(3)) <= first


# By hand


@pytest.mark.parametrize("io_threads", [1, 8])
def test_a_move_that_fails_leaves_nobody_holding(io_threads: int, model: Path) -> None:
    memory = MemoryHierarchy(model, io_threads=io_threads)
    pages = experts_of(memory)[:8]
    file, offset = place(PageStore(model), pages[3])
    flip(file, offset)
    with pytest.raises(InvalidInput, match="is damaged"):
        memory.move_to_device(pages)
    come_to_rest(memory)
    assert nobody_holds_anything(memory)
    flip(file, offset)
    with no_hang():
        memory.move_to_device(pages)
    assert memory.is_in_device_memory(pages)
    assert nobody_holds_anything(memory)
    memory.evict(pages)
    assert not any(memory.is_in_device_memory(page) for page in pages)
    memory.close()


def test_a_pin_that_fails_can_be_taken_back(model: Path) -> None:
    memory = MemoryHierarchy(model)
    pages = experts_of(memory)[:4]
    file, offset = place(PageStore(model), pages[2])
    flip(file, offset)
    with pytest.raises(InvalidInput, match="is damaged"):
        memory.pin(pages)
    come_to_rest(memory)
    memory.unpin(pages)
    memory.evict(pages)
    assert memory.pool.memory().used == 0
    memory.close()


def test_what_is_closed_says_so_and_has_given_its_memory_back(packed: Path) -> None:
    memory = MemoryHierarchy(packed)
    some = experts_of(memory)[:5]
    memory.move_to_device(some)
    memory.prefetch("embedding")
    memory.close()
    memory.close()
    assert (memory.pool.memory().used, memory.pool.memory().free) == (0, 0)
    assert not memory.is_in_device_memory(some[0])
    with no_hang(), pytest.raises(InvalidInput, match="closed"):
        memory.move_to_device("embedding")


# Memory that is too small


def test_pinned_pages_leave_room_for_all_others_or_are_refused(
    packed: Path, here: Topology, tokens: tuple[int, ...]
) -> None:
    with opened(packed, here) as llm:
        memory = llm.memory
        experts = experts_of(memory)
        memory.set_budget("cpu", memory.reserved + memory.minimum + 12 * memory.pages[experts[0]])
        memory.pin(experts[:12])
        assert generated(llm) == tokens
        with pytest.raises(InvalidInput):
            memory.pin(experts[12:16])
        assert generated(llm) == tokens, "what cannot be pinned is not"
        memory.unpin(experts)
        assert generated(llm) == tokens


def test_with_much_pinned_a_pass_asks_for_no_more_at_once_than_the_rest_holds(
    packed: Path, here: Topology, tokens: tuple[int, ...]
) -> None:
    with opened(packed, here) as llm:
        memory = llm.memory
        experts = experts_of(memory)
        for count in range(2, 24, 3):
            pinned = experts[:count]
            memory.set_budget("cpu", memory.reserved + memory.minimum + count * memory.pages[experts[0]])
            memory.pin(pinned)
            assert generated(llm) == tokens, f"{count} pinned"
            assert memory.is_in_device_memory(pinned)
            memory.unpin(pinned)


# Everything at once


def test_whatever_fails_in_whatever_order_a_token_is_right_or_there_is_none(
    model: Path, here: Topology, tokens: tuple[int, ...]
) -> None:
    """Bits flip, files are cut short, lose their pages to one another, and come back; two thirds of the passes are made
    with some damage somewhere."""
    draw = random.Random(5)
    store = PageStore(model)
    whole = {file: file.read_bytes() for file in sorted(store.files)}
    names = list(store.pages)

    def flipped() -> None:
        file, offset = place(store, draw.choice(names))
        flip(file, offset + draw.randrange(4096))

    def cut() -> None:
        file, offset = place(store, draw.choice(names))
        os.truncate(file, min(offset + draw.choice([0, 100, 4096]), file.stat().st_size))

    def swapped() -> None:
        a, b = draw.sample([n for n in names if ".experts." in n], 2)
        (to, at), (file, begin) = place(store, a), place(store, b)
        with to.open("r+b") as out:
            out.seek(at)
            out.write(whole[file][begin : begin + store.pages[b]])

    outcomes: list[str] = []
    with opened(model, here) as llm:
        starved(llm)
        for _ in range(40):
            damage: Callable[[], None] | None = draw.choice([None, flipped, cut, swapped])
            if damage is not None:
                damage()
            try:
                with no_hang():
                    assert generated(llm) == tokens
                outcomes.append("right")
            except CiuicError as error:
                outcomes.append("damaged" if "is damaged" in str(error) else "shorter")
            assert nobody_holds_anything(llm.memory)
            if draw.random() < 0.5:
                for file, content in whole.items():
                    if file.read_bytes() != content:
                        file.write_bytes(content)
        for file, content in whole.items():
            file.write_bytes(content)
        assert generated(llm) == tokens
    assert {"right", "damaged", "shorter"} == set(outcomes)


def test_a_file_that_another_takes_the_place_of_is_read_on(
    model: Path, here: Topology, tokens: tuple[int, ...], tmp_path: Path
) -> None:
    """Nothing but files that were opened already: those of pages that nobody has needed yet are the new ones, whose
    pages have other checksums."""
    other = tmp_path / "other"
    pack(write_random_checkpoint(TINY_V3, tmp_path / "raw", seed=1), other, "int4", shard_bytes=SHARD)
    with opened(model, here) as llm:
        starved(llm)
        assert generated(llm) == tokens
        for file in sorted(other.glob("*.safetensors")):
            os.replace(file, model / file.name)
        assert generated(llm) == tokens
    with pytest.raises(InvalidInput, match="come from different packings"):
        opened(model, here)


# Processes


@contextmanager
def running(*arguments: object) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "ciuic_runtime.cli", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


@pytest.mark.slow
def test_ctrl_c_of_a_run_from_disk_keeps_what_was_generated(packed: Path, here_toml: Path) -> None:
    options = ("--max-tokens", 400, "--ignore-eos", "--devices", here_toml, "--memory", "cpu=600KiB")
    with running("run", packed, "--prompt", "Once upon a time", *options) as process:
        assert process.stdout is not None
        begun = b""
        while len(begun) < 20 and (piece := os.read(process.stdout.fileno(), 100)):
            begun += piece
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert rest.endswith(b"\n")
    assert b"interrupted" in err
    assert b"paging: " in err
    assert b"Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_killed_at_any_moment_leaves_the_folder_as_it_was(
    number: signal.Signals, model: Path, here_toml: Path
) -> None:
    before = {f.name: (f.read_bytes(), f.stat().st_mtime_ns) for f in sorted(model.iterdir())}
    options = ("--max-tokens", 400, "--ignore-eos", "--devices", here_toml, "--memory", "cpu=600KiB")
    draw = random.Random(int(number))
    with running("run", model, "--prompt", "Once upon a time", *options) as process:
        text, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert b"paged from disk" in err
    assert b"paging: prefill read" in err
    for _ in range(10):
        with running("run", model, "--prompt", "Once upon a time", *options) as process:
            time.sleep(draw.uniform(0.3, 3.5))
            process.send_signal(number)
            process.wait(timeout=60)
    assert {f.name: (f.read_bytes(), f.stat().st_mtime_ns) for f in sorted(model.iterdir())} == before
    page = next(iter(PageStore(model).pages))
    PageStore(model).read_page(page, host_buffer(PageStore(model).pages[page]))
    with running("run", model, "--prompt", "Once upon a time", *options) as process:
        assert process.communicate(timeout=120)[0] == text
