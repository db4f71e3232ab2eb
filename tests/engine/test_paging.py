"""Models that are larger than memory: the same bits for every budget, policy and order of arrival, and no wrong token
whatever goes wrong on the way from disk."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ciuic_runtime as ciuic
from ciuic_runtime.devices.cpu import discover_cpus
from ciuic_runtime.devices.errors import CiuicError, InvalidInput, OutOfMemory
from ciuic_runtime.devices.spec import DeviceSpec, Topology
from ciuic_runtime.engine.paged import PagedExperts
from ciuic_runtime.memory import hierarchy
from ciuic_runtime.memory.arena import HostArena
from ciuic_runtime.memory.pool import TensorPool
from ciuic_runtime.memory.source import Finished, PageSource
from ciuic_runtime.models.random_checkpoint import write_random_checkpoint
from ciuic_runtime.ops.native import kernels
from ciuic_runtime.packing import pack
from ciuic_runtime.planning import with_disk

pytestmark = pytest.mark.skipif(kernels() is None, reason="the native kernels are not built here")

PROMPT = [5, 250, 17, 99, 3, 42, 200, 7, 31]
GREEDY = ciuic.SamplingParams(max_tokens=12, ignore_eos=True)
LLAMA = {
    "model_type": "llama", "vocab_size": 300, "hidden_size": 144, "intermediate_size": 200, "num_hidden_layers": 6,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": True,
}  # fmt: skip


def packed_as(checkpoint: Path, folder: Path, format: str) -> Path:
    pack(checkpoint, folder, format)
    return folder


class Shuffled:
    """A source whose reads arrive in another order, and late."""

    def __init__(self, source: PageSource, draw: random.Random) -> None:
        self._source, self._draw = source, draw
        self._late: list[Finished] = []

    def finished(self, seconds: float) -> list[Finished]:
        self._late += self._source.finished(0 if self._late else seconds)
        self._draw.shuffle(self._late)
        count = self._draw.randint(1 if seconds > 0 else 0, len(self._late)) if self._late else 0
        come, self._late = self._late[:count], self._late[count:]
        return come

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)


def opened(model: Path, here: Topology, **settings: Any) -> ciuic.LLM:
    return ciuic.LLM(model, devices=here, max_model_len=128, max_num_seqs=2, **settings)


def squeeze(llm: ciuic.LLM, share: float) -> None:
    """From the minimum (0) to everything (1)."""
    memory = llm.memory
    every = sum(memory.pages.values())
    memory.set_budget("cpu", memory.reserved + memory.minimum + round(share * (every - memory.minimum)))


def seen(llm: ciuic.LLM) -> tuple[torch.Tensor, list[tuple[int, ...]]]:
    """Logits of a prompt, and tokens of a batch of two."""
    logits = llm.logits(PROMPT)
    outputs = llm.generate([PROMPT, PROMPT[:1]], GREEDY)
    return logits, [o.token_ids for o in outputs]


def assert_same(found: tuple[torch.Tensor, Any], expected: tuple[torch.Tensor, Any]) -> None:
    assert torch.equal(found[0], expected[0])
    assert found[1] == expected[1]


@pytest.mark.parametrize("format", ["int4", "int8", "bf16", "raw", "llama"])
def test_every_budget_gives_the_same_bits(tiny_v3: Path, here: Topology, tmp_path: Path, format: str) -> None:
    if format == "llama":
        model = packed_as(write_random_checkpoint(LLAMA, tmp_path / "llama"), tmp_path / "packed", "int8")
    else:
        model = tiny_v3 if format == "raw" else packed_as(tiny_v3, tmp_path / "packed", format)
    with opened(model, here, paged=False) as llm:
        expected = seen(llm)
    with opened(model, here, paged=True) as llm:
        assert_same(seen(llm), expected)
        assert llm.paging is None
        for share in (0.8, 0.3, 0.0, 0.5):
            squeeze(llm, share)
            assert_same(seen(llm), expected)
            assert llm.paging is not None
            memory = llm.memory.pool.memory()
            assert memory.used + memory.free <= llm.memory.budget


@given(
    share=st.floats(0, 1), policy=st.sampled_from(["lfu", "lru", "pin", "popularity"]), lookahead=st.integers(0, 4),
    io_threads=st.integers(1, 8), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_neither_budget_nor_policy_nor_order_of_arrival_changes_a_bit(
    tiny_int4: Path, here: Topology, bits: tuple[torch.Tensor, Any], share: float, policy: str, lookahead: int,
    io_threads: int, seed: int,
) -> None:  # fmt: skip
    with opened(tiny_int4, here, cache_policy=policy, lookahead=lookahead, io_threads=io_threads) as llm:
        squeeze(llm, share)
        llm.memory._source = Shuffled(llm.memory._source, random.Random(seed))  # type: ignore[assignment, arg-type]
        assert_same(seen(llm), bits)  # cold
        assert_same(seen(llm), bits)  # warm
        assert not any(llm.memory.state.held)


def test_where_everything_is_there_no_expert_is_waited_for(
    tiny_int4: Path, here: Topology, bits: tuple[torch.Tensor, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    come, came = PagedExperts.come, []
    monkeypatch.setattr(PagedExperts, "come", lambda self: came.append(self) or come(self))
    with opened(tiny_int4, here, paged=True) as llm:
        assert_same(seen(llm), bits)
        assert not came
        uses = sum(count.uses for count in llm.memory.page_counts().values())
        assert uses > len(llm.memory.pages)
        for _ in range(2):
            llm.memory.evict([page for page in llm.memory.pages if ".experts." in page])
            assert_same(seen(llm), bits)
            assert came, "some had to be read"
            llm.memory.move_to_device(list(llm.memory.pages))  # into other slots than before
            came.clear()
            assert_same(seen(llm), bits)
            assert not came


def test_memory_is_touched_ahead_once_and_again_after_a_larger_budget(
    tiny_int4: Path, here: Topology, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead, touched, looked = TensorPool.touch_ahead, [], []
    monkeypatch.setattr(TensorPool, "touch_ahead", lambda pool: touched.append(pool.budget) or ahead(pool))
    with opened(tiny_int4, here) as llm:
        every, reserved, minimum = sum(llm.memory.pages.values()), llm.memory.reserved, llm.memory.minimum
    with opened(tiny_int4, here, memory={"cpu": reserved + (every + minimum) // 2}) as llm:
        touched.clear()
        arena = llm.memory.pool._arena
        assert isinstance(arena, HostArena)
        seen(llm)
        seen(llm)
        assert touched == [llm.memory.budget]
        cpus = discover_cpus()

        def discovered() -> list[DeviceSpec]:
            looked.append(arena._toucher)
            return cpus

        monkeypatch.setattr(hierarchy, "discover_cpus", discovered)
        llm.memory.set_budget("cpu", reserved + every - 4096)
        assert looked == [None], "what was touched and is not in use counts as free"
        seen(llm)
        assert touched[1:] == [every - 4096]
        llm.memory.set_budget("cpu", reserved + minimum)
        seen(llm)
        assert len(touched) == 2


@pytest.fixture(scope="module")
def bits(tiny_int4: Path, here: Topology) -> tuple[torch.Tensor, Any]:
    with opened(tiny_int4, here, paged=False) as llm:
        return seen(llm)


def test_a_model_that_does_not_fit_is_planned_and_run_from_disk(tiny_int4: Path, here: Topology) -> None:
    with opened(tiny_int4, here) as llm:
        expected = seen(llm)
        every, reserved = sum(llm.memory.pages.values()), llm.memory.reserved
    with opened(tiny_int4, here, memory={"cpu": reserved + every // 2}) as llm:
        assert llm.schedule.paging is not None
        assert llm.schedule.paging.cache_bytes == every // 2
        assert {row.home for row in llm.schedule.assignments} == {"cpu", "disk"}
        assert_same(seen(llm), expected)
        kinds = {e.kind for e in llm.trace.events}
        assert {"read", "compute"} <= kinds
        lanes: dict[str, list[tuple[float, float]]] = {}
        for e in llm.trace.events:
            lanes.setdefault(e.lane, []).append((e.start, e.end))
        for lane, spans in lanes.items():
            spans.sort()
            assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans)), f"events overlap on {lane}"


def test_a_disk_among_the_devices_is_used_only_where_no_batch_fits_without(tiny_int4: Path, here: Topology) -> None:
    disk = with_disk(here, tiny_int4)
    with opened(tiny_int4, here) as llm:
        every, reserved = sum(llm.memory.pages.values()), llm.memory.reserved
    with ciuic.LLM(tiny_int4, devices=disk, max_model_len=128, memory={"cpu": reserved + every}) as llm:
        assert llm.schedule.paging is None
        assert llm.max_num_seqs == 2
    for topology in (here, disk):
        with pytest.raises(OutOfMemory):
            opened(tiny_int4, topology, memory={"cpu": reserved + every // 2}, paged=False)


def test_of_the_embedding_rows_are_read_until_everything_fits(
    tiny_int4: Path, here: Topology, bits: tuple[torch.Tensor, Any]
) -> None:
    with opened(tiny_int4, here) as llm:
        every, reserved = sum(llm.memory.pages.values()), llm.memory.reserved
        row, table = llm.model.pages["embedding"].row_nbytes, llm.memory.pages["embedding"]
    assert row == 2 * llm.model.spec.hidden_size
    with opened(tiny_int4, here, memory={"cpu": reserved + every - table}) as llm:
        home = {r.task: r.home for r in llm.schedule.assignments if ".experts." not in r.task}
        assert home.pop("embedding") == "disk"
        assert set(home.values()) == {"cpu"}, "all other pages that every pass needs stay in memory"
        llm.memory.move_to_device([page for page in llm.memory.pages if page != "embedding"])
        assert_same(seen(llm), bits)
        assert llm.memory.where("embedding") == "disk"
        llm.generate([[7, 7, 8]], ciuic.SamplingParams(max_tokens=5, ignore_eos=True))
        assert llm.paging is not None
        assert llm.paging.phases["prefill"].bytes_read == 2 * row, "each distinct token's row once"
        assert llm.paging.phases["decode"].bytes_read == 4 * row
        reads = {e.task for e in llm.trace.events if e.kind == "read"}
        assert reads == {"embedding"}
        assert llm.schedule.predicted is not None
        llm.memory.set_budget("cpu", reserved + every)
        assert_same(seen(llm), bits)
        assert_same(seen(llm), bits)
        assert llm.memory.where("embedding") == "cpu"


def test_a_pass_of_few_tokens_reads_the_experts_that_it_needs_and_one_of_many_reads_all(
    tiny_int4: Path, here: Topology
) -> None:
    with opened(tiny_int4, here) as llm:
        squeeze(llm, 0.9)
        every = sum(n for page, n in llm.memory.pages.items() if ".experts." in page)
        dense = sum(llm.memory.pages.values()) - every - llm.memory.pages["embedding"]
        for prompt, reads_all in (([5], False), (list(range(60)), True)):
            llm.memory.evict(list(llm.memory.pages))
            llm.logits(prompt)
            assert llm.paging is not None
            assert (llm.paging.phases["prefill"].bytes_read >= dense + every) == reads_all


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_the_budget_may_change_at_any_moment_of_a_generation(tiny_int4: Path, here: Topology, count: int) -> None:
    params = ciuic.SamplingParams(max_tokens=100, ignore_eos=True)
    with opened(tiny_int4, here) as llm:
        expected = llm.generate([PROMPT], params)[0].token_ids
        draw, changes, done = random.Random(7), [0], threading.Event()

        def change() -> None:
            while changes[0] < count and not done.is_set():
                squeeze(llm, draw.random())
                changes[0] += 1

        thread = threading.Thread(target=change)
        thread.start()
        try:
            while changes[0] < count:
                assert llm.generate([PROMPT], params)[0].token_ids == expected
        finally:
            done.set()
            thread.join()
        assert changes[0] == count


# Faults


@pytest.fixture
def copy(tiny_int4: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_int4, tmp_path / "copy")
    return tmp_path / "copy"


def files_of(model: Path) -> list[Path]:
    return sorted(model.glob("*.safetensors"))


def place_of(llm: ciuic.LLM, page: str) -> tuple[Path, int, int]:
    store = llm._checkpoint.store  # type: ignore[attr-defined]
    return store.file_of(page).path, store.offset(page), store.pages[page]


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def assert_goes_on(llm: ciuic.LLM, expected: tuple[torch.Tensor, Any]) -> None:
    assert not any(llm.memory.state.held)
    assert_same(seen(llm), expected)


def broken(llm: ciuic.LLM, match: str) -> None:
    with pytest.raises(CiuicError, match=match) as error:
        seen(llm)
    assert "\n" not in str(error.value)


def test_a_flipped_bit_is_found_also_after_the_page_was_read_before(
    copy: Path, here: Topology, bits: tuple[torch.Tensor, Any]
) -> None:
    with opened(copy, here) as llm:
        squeeze(llm, 0.0)
        assert_same(seen(llm), bits)
        path, offset, _ = place_of(llm, "layers.2.attention")
        before = path.read_bytes()[offset + 100]
        overwrite(path, offset + 100, bytes([before ^ 4]))
        broken(llm, r"layers\.2\.attention does not have the checksum")
        overwrite(path, offset + 100, bytes([before]))
        assert_goes_on(llm, bits)
    overwrite(path, offset + 100, bytes([before ^ 4]))
    with pytest.raises(InvalidInput, match="is damaged"):
        opened(copy, here)


def test_a_flipped_bit_in_a_table_that_is_read_by_rows_is_found(
    copy: Path, here: Topology, bits: tuple[torch.Tensor, Any]
) -> None:
    with opened(copy, here) as llm:
        squeeze(llm, 0.0)
        assert_same(seen(llm), bits)
        path, offset, _ = place_of(llm, "embedding")
        before = path.read_bytes()[offset + 300 * 128]
        overwrite(path, offset + 300 * 128, bytes([before ^ 4]))
        broken(llm, "embedding does not have the checksum")  # though this is not the row of any token in use
        overwrite(path, offset + 300 * 128, bytes([before]))
        assert_goes_on(llm, bits)
        os.truncate(path, offset + 4096)
        broken(llm, "has become shorter")


def test_another_pages_bytes_are_not_taken_for_a_page(
    copy: Path, here: Topology, bits: tuple[torch.Tensor, Any]
) -> None:
    with opened(copy, here) as llm:
        squeeze(llm, 0.0)
        path, offset, nbytes = place_of(llm, "layers.2.shared_experts")
        other, at, other_nbytes = place_of(llm, "layers.3.shared_experts")
        assert nbytes == other_nbytes
        mine = path.read_bytes()[offset : offset + nbytes]
        overwrite(path, offset, other.read_bytes()[at : at + nbytes])
        broken(llm, r"layers\.2\.shared_experts does not have the checksum")
        overwrite(path, offset, mine)
        assert_goes_on(llm, bits)


def test_a_file_that_becomes_shorter_is_said_and_one_that_is_replaced_is_not_noticed(
    copy: Path, here: Topology, bits: tuple[torch.Tensor, Any]
) -> None:
    with opened(copy, here) as llm:
        squeeze(llm, 0.0)
        last = files_of(copy)[-1]
        whole = last.read_bytes()
        os.truncate(last, len(whole) - 8192)
        broken(llm, "has become shorter")
        last.write_bytes(whole)
        assert_goes_on(llm, bits)
        other = copy.parent / "other"
        other.write_bytes(b"\0" * len(whole))
        os.replace(other, last)
        assert_goes_on(llm, bits)


def outcome(llm: ciuic.LLM, expected: tuple[torch.Tensor, Any]) -> str:
    try:
        found = seen(llm)
    except InvalidInput as error:
        return str(error).rpartition(": ")[2]
    assert_same(found, expected)
    return "same"


class Failing:
    """A source whose reads fail for a while."""

    def __init__(self, source: PageSource, fails: Callable[[], bool]) -> None:
        self._source, self._fails = source, fails

    def finished(self, seconds: float) -> list[Finished]:
        error = InvalidInput("disk cannot be read: Input/output error")
        return [
            Finished(d.ticket, error if self._fails() else d.error, d.start, d.end, d.cancelled)
            for d in self._source.finished(seconds)
        ]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)


def test_a_read_error_ends_the_pass_and_the_next_one_goes_on(
    tiny_int4: Path, here: Topology, bits: tuple[torch.Tensor, Any]
) -> None:
    draw = random.Random(1)
    wrong = True
    with opened(tiny_int4, here) as llm:
        squeeze(llm, 0.2)
        llm.memory._source = Failing(llm.memory._source, lambda: wrong and draw.random() < 0.05)  # type: ignore[assignment, arg-type]
        outcomes = [outcome(llm, bits) for _ in range(30)]
        assert outcomes.count("Input/output error") > 3
        assert set(outcomes) <= {"same", "Input/output error"}
        wrong = False
        assert_goes_on(llm, bits)
