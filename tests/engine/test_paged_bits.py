"""The same bits from disk: where pages lie, in what order they come, and who asks for them meanwhile changes no logit,
in any format, for prompts below and above the length from which on a pass uses nearly all experts."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from configs import TINY_V3
from hypothesis import given, settings
from hypothesis import strategies as st
from watched import Watched

import ciuic_runtime as ciuic
from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.devices.spec import Topology
from ciuic_runtime.engine.llm import LLM
from ciuic_runtime.memory.source import Finished, PageSource
from ciuic_runtime.models.random_checkpoint import write_random_checkpoint
from ciuic_runtime.ops.native import kernels
from ciuic_runtime.packing import pack

pytestmark = pytest.mark.skipif(kernels() is None, reason="the native kernels are not built here")

# A pass of eight tokens or more may use all experts of a layer, and is a scan.
ROUTED: dict[str, Any] = TINY_V3 | {"n_routed_experts": 16, "num_experts_per_tok": 2, "num_hidden_layers": 5}
DENSE: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 300, "hidden_size": 80, "intermediate_size": 96, "num_hidden_layers": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": True,
}  # fmt: skip
FORMATS = ["int4", "int8", "bf16", "raw", "dense"]
SCAN, SHORT = [5, 250, 17, 99, 3, 3, 42, 200, 7, 31, 64] * 4, [7, 77, 1]
PROMPTS = [SCAN, SHORT, [9], SHORT * 2]
PARAMS = [
    ciuic.SamplingParams(max_tokens=6, ignore_eos=True),
    ciuic.SamplingParams(max_tokens=14, ignore_eos=True, temperature=1.2, seed=3),
    ciuic.SamplingParams(max_tokens=9, ignore_eos=True, temperature=1.0, top_p=0.9, seed=4),
    ciuic.SamplingParams(max_tokens=3, ignore_eos=True),
]


class Runner(Watched):
    def run(self, which: Sequence[int] = range(len(PROMPTS))) -> dict[int, torch.Tensor]:
        """Logits of the prompts of these numbers, as their tokens were sampled."""
        self.seen = {}
        self.generate([PROMPTS[i] for i in which], [PARAMS[i] for i in which])
        return {i: torch.stack(self.seen[at]) for at, i in enumerate(which)}

    def squeeze(self, share: float) -> None:
        """From the least memory that a pass can be made with (0) to room for everything (1)."""
        memory = self.memory
        every = sum(memory.pages.values())
        memory.set_budget("cpu", memory.reserved + memory.minimum + round(share * (every - memory.minimum)))


def opened(model: Path, here: Topology, **settings: Any) -> Runner:
    return Runner(model, devices=here, max_model_len=96, **({"threads": 1, "max_num_seqs": 2} | settings))


def same(got: dict[int, torch.Tensor], expected: dict[int, torch.Tensor]) -> bool:
    return all(torch.equal(logits.view(torch.int32), expected[i].view(torch.int32)) for i, logits in got.items())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    raw = write_random_checkpoint(ROUTED, folder / "raw")
    found = {"raw": raw, "dense": folder / "dense"}
    pack(write_random_checkpoint(DENSE, folder / "dense-raw"), found["dense"], "int8")
    for format in ("int4", "int8", "bf16"):
        found[format] = folder / format
        pack(raw, found[format], format)
    return found


@pytest.fixture(scope="module")
def bits(models: dict[str, Path], here: Topology) -> dict[str, dict[int, torch.Tensor]]:
    """Every prompt by itself, by a model that has all its weights in memory and no hierarchy."""
    found = {}
    for format, model in models.items():
        with opened(model, here, paged=False, max_num_seqs=1) as llm:
            found[format] = {i: llm.run([i])[i] for i in range(len(PROMPTS))}
            with pytest.raises(InvalidInput, match="is not held in slots here"):
                _ = llm.memory
    assert len({logits[0, 0].item() for logits in found["int4"].values()}) == len(PROMPTS)
    return found


@pytest.mark.parametrize("format", FORMATS)
def test_every_budget_cold_and_warm_alone_and_in_company(
    format: str, models: dict[str, Path], here: Topology, bits: dict[str, dict[int, torch.Tensor]]
) -> None:
    with opened(models[format], here, paged=True) as llm:
        for share in (1.0, 0.5, 0.02, 0.0):
            llm.squeeze(share)
            llm.memory.evict(list(llm.memory.pages))
            assert same(llm.run(), bits[format]), f"cold, {share} of the memory"
            assert llm.paging is not None
            assert llm.paging.phases["prefill"].bytes_read > 0
            assert same(llm.run([3, 0]), bits[format]), f"warm, {share} of the memory"
            assert (llm.paging is None) == (share == 1.0)
            assert llm.memory.pool.memory().used <= llm.memory.budget
        prompt = llm.logits(SCAN)
        llm.squeeze(1.0)
        assert torch.equal(llm.logits(SCAN, chunk=3), prompt), "in passes that are scans and in passes that are not"


@pytest.mark.parametrize("policy", ["lfu", "lru", "popularity", "pin"])
def test_a_budget_that_was_planned_for_gives_them_from_the_first_token_on(
    policy: str, models: dict[str, Path], here: Topology, bits: dict[str, dict[int, torch.Tensor]], tmp_path: Path
) -> None:
    from ciuic_runtime.engine.routing import write_routing

    with opened(models["int4"], here) as llm:
        recorder = llm.record_routing()
        llm.run()
        write_routing(recorder.routing(), tmp_path / "routing")
        reserved, minimum = llm.memory.reserved, llm.memory.minimum
        every = sum(llm.memory.pages.values())
    for budget, lookahead in ((minimum, 0), (every // 3, 1), (every - 1, 4)):
        settings = {"cache_policy": policy, "lookahead": lookahead, "memory": {"cpu": reserved + budget}}
        with opened(models["int4"], here, routing=tmp_path / "routing", **settings) as llm:
            assert llm.schedule.paging is not None
            assert (llm.memory.budget, llm.memory.policy) == (budget, policy)
            assert same(llm.run(), bits["int4"])


class Late:
    """A source whose reads arrive in another order than they ended, some of them later than others."""

    def __init__(self, source: PageSource, seed: int) -> None:
        self._source, self._draw = source, random.Random(seed)
        self._late: list[Finished] = []

    def finished(self, seconds: float) -> list[Finished]:
        self._late += self._source.finished(0 if self._late else seconds)
        self._draw.shuffle(self._late)
        least = 1 if seconds > 0 and self._late else 0
        count = self._draw.choice([least, least, self._draw.randint(least, len(self._late))])
        come, self._late = self._late[:count], self._late[count:]
        return come

    def cancel(self, ticket: int) -> bool:
        return ticket not in [late.ticket for late in self._late] and self._source.cancel(ticket)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)


@given(
    format=st.sampled_from(FORMATS), share=st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1)),
    policy=st.sampled_from(["auto", "lfu", "lru", "popularity", "pin"]), lookahead=st.integers(0, 4),
    io_threads=st.integers(1, 8), threads=st.integers(1, 3), chunk=st.sampled_from([5, 16, 512]),
    batch=st.integers(1, 4), order=st.permutations(range(len(PROMPTS))), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
@settings(max_examples=settings().max_examples // 2, deadline=None)  # each is a model opened and run twice
def test_neither_what_is_chosen_nor_what_happens_changes_a_bit(
    format: str, share: float, policy: str, lookahead: int, io_threads: int, threads: int, chunk: int, batch: int,
    order: list[int], seed: int, models: dict[str, Path], here: Topology, bits: dict[str, dict[int, torch.Tensor]],
) -> None:  # fmt: skip
    """Budget, policy, lookahead, threads of both kinds, chunks, company, and the order in which pages arrive."""
    settings = {"cache_policy": policy, "lookahead": lookahead, "io_threads": io_threads, "threads": threads}
    with opened(models[format], here, paged=True, max_num_seqs=batch, prefill_chunk=chunk, **settings) as llm:
        llm.squeeze(share)
        llm.memory._source = Late(llm.memory._source, seed)  # type: ignore[assignment, arg-type]
        llm.memory.evict(list(llm.memory.pages))
        assert same(llm.run(order), bits[format]), "cold"
        assert same(llm.run(order[::-1]), bits[format]), "warm"
        assert not any(llm.memory.holders(page) for page in llm.memory.pages)


# Meanwhile


@pytest.fixture
def long(models: dict[str, Path], here: Topology) -> Iterator[tuple[LLM, tuple[int, ...]]]:
    """A model with half of its pages in memory, and what it makes of a prompt in 80 tokens."""
    params = ciuic.SamplingParams(max_tokens=80, ignore_eos=True, temperature=1.0, seed=1)
    with opened(models["int4"], here, paged=False) as llm:
        llm.seen = {}
        expected = llm.generate([SHORT], params)[0].token_ids
    with opened(models["int4"], here) as llm:
        llm.seen = {}
        llm.squeeze(0.5)
        yield llm, expected


def generated(llm: LLM) -> tuple[int, ...]:
    params = ciuic.SamplingParams(max_tokens=80, ignore_eos=True, temperature=1.0, seed=1)
    return llm.generate([SHORT], params)[0].token_ids


def test_budgets_may_change_between_any_two_steps(long: tuple[Runner, tuple[int, ...]]) -> None:
    llm, expected = long
    draw, params = random.Random(1), ciuic.SamplingParams(max_tokens=80, ignore_eos=True, temperature=1.0, seed=1)
    for _ in range(3):
        tokens: tuple[int, ...] = ()
        for _, output in llm.stream([SHORT], params):
            tokens = output.token_ids
            llm.squeeze(draw.choice([0.0, draw.random(), 1.0]))
            used = llm.memory.pool.memory()
            assert used.used + used.free <= llm.memory.budget
        assert tokens == expected


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_pages_may_be_moved_pinned_and_evicted_by_another_thread_meanwhile(
    count: int, long: tuple[Runner, tuple[int, ...]]
) -> None:
    llm, expected = long
    memory, draw = llm.memory, random.Random(2)
    pages, failed, done = list(memory.pages), [], threading.Event()
    pinned: set[str] = set()

    def pin(some: list[str]) -> None:
        if sum(memory.pages[p] for p in {*pinned, *some}) + memory.minimum <= memory.budget:
            memory.pin(some)
            pinned.update(some)

    def unpin(some: list[str]) -> None:
        memory.unpin(some)
        pinned.difference_update(some)

    def meddle() -> None:
        try:
            for _ in range(count):
                some = draw.sample(pages, draw.randint(1, 3))
                fitting = [p for p in some if memory.pages[p] <= memory.minimum // 4]
                draw.choice([pin, unpin, memory.evict, memory.prefetch, memory.move_to_device])(fitting)
                if done.wait(0.0005):
                    return
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=meddle)
    thread.start()
    try:
        while thread.is_alive():
            assert generated(llm) == expected
    finally:
        done.set()
        thread.join()
    assert not failed, failed
    memory.unpin(pages)
    assert generated(llm) == expected
    assert not any(memory.holders(page) for page in pages)


def test_two_models_from_one_folder_do_not_meet(
    models: dict[str, Path], here: Topology, bits: dict[str, dict[int, torch.Tensor]]
) -> None:
    with opened(models["int4"], here) as one, opened(models["int4"], here, io_threads=2) as other:
        one.squeeze(0.1)
        other.squeeze(0.0)
        one.memory.pin([page for page in one.memory.pages if page.endswith("_norm")])
        found: dict[int, torch.Tensor] = {}
        thread = threading.Thread(target=lambda: found.update(other.run()))
        thread.start()
        assert same(one.run(), bits["int4"])
        thread.join()
        assert found
        assert same(found, bits["int4"])


def test_a_pass_that_found_everything_in_memory_read_nothing_and_says_so(
    models: dict[str, Path], here: Topology
) -> None:
    with opened(models["int4"], here) as llm:
        llm.run()
        assert llm.paging is None
        llm.squeeze(0.0)
        llm.run([1])
        assert llm.paging is not None
        assert llm.paging.phases["decode"].misses > 0
        llm.squeeze(1.0)
        llm.run()
        llm.run()
        assert llm.paging is None, "warm again"


@pytest.mark.parametrize("lookahead", [0, 3])
def test_a_lookahead_that_was_asked_for_counts_though_everything_fits_at_first(
    lookahead: int, models: dict[str, Path], here: Topology
) -> None:
    """Nothing is guessed with 0: then only what was needed is read, each page once for each miss."""
    with opened(models["int4"], here, lookahead=lookahead) as llm:
        assert llm._host.executor.lookahead == lookahead
        llm.squeeze(0.2)
        llm.run([1])
        guesses = [i.ahead.guesses for i in llm._host.executor._program if i.ahead is not None]
        assert any(guesses) == bool(lookahead)
