"""One prompt, however it is cut and whoever it is computed with: chunks, one token at a time, and batches of unequal
prompts all agree with one prefill in float32, and greedy tokens are the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from agreement import open_llm, relative_error
from hf_reference import CASES, NEW, Case, Reference

from ciuic_runtime.devices.spec import Topology
from ciuic_runtime.engine.llm import LLM
from ciuic_runtime.engine.sampling import SamplingParams
from ciuic_runtime.models import forward
from ciuic_runtime.models.batch import Chunk, make_batch

Reader = Callable[[Case], Reference]
SHOWN = [c for c in CASES if c.name in ("v3", "v2-direct-queries", "llama-yarn", "qwen2")]
PARAMS = SamplingParams(max_tokens=NEW, ignore_eos=True)


@pytest.fixture(params=SHOWN, ids=lambda c: c.name)
def made(request: pytest.FixtureRequest, reference: Reader) -> Reference:
    return reference(request.param)


@pytest.mark.parametrize("size", [1, 7, 64, 65])
def test_prefill_in_chunks(made: Reference, here: Topology, size: int) -> None:
    with open_llm(made.folder, here, prefill_chunk=size) as llm:
        assert relative_error(llm.logits(made.prompt), made.logits).max() <= 1e-4
        assert list(llm.generate(made.prompt, PARAMS)[0].token_ids) == made.tokens


def test_long_context_over_several_blocks_and_chunks(made: Reference, here: Topology) -> None:
    """Chunks that begin and end inside cache blocks, over 180 positions: more than the reference's prompt."""
    ids = made.prompt + made.tokens + made.prompt[:52]
    with open_llm(made.folder, here) as llm:
        whole = llm.logits(ids)
        for size in (50, 64, 63, 179):
            assert relative_error(llm.logits(ids, chunk=size), whole).max() <= 1e-4, size


def test_generated_form_agrees_with_the_prompt_form(made: Reference, here: Topology) -> None:
    """One token at a time as generation computes it: for MLA that is the absorbed form, for prompts the expanded."""
    with open_llm(made.folder, here) as llm:
        got = [
            llm._host.executor.step(make_batch([Chunk((t,), at, (3, 1), prompt=False)]), "decode")
            for at, t in enumerate(made.prompt)
        ]
    assert relative_error(torch.cat(got), made.logits).max() <= 1e-4


def test_several_generated_tokens_in_one_pass(made: Reference, here: Topology) -> None:
    """As when a sequence is replayed: many tokens of the generated form, after a prompt."""
    with open_llm(made.folder, here) as llm:
        step = llm._host.executor.step
        head = step(make_batch([Chunk(made.prompt[:20], 0, (2,), prompt=True, sample="all")]), "prefill")
        tail = step(make_batch([Chunk(made.prompt[20:], 20, (2,), prompt=False, sample="all")]), "decode")
    assert relative_error(torch.cat([head, tail]), made.logits).max() <= 1e-4


def cut(reference: Reference) -> list[list[int]]:
    """Prompts of unequal length, the whole one among them."""
    return [reference.prompt[:n] for n in (1, 3, 17, 64, 63, 40)]


@pytest.mark.parametrize("chunk", [512, 64, 10, 1])
def test_batch_of_unequal_prompts(made: Reference, here: Topology, chunk: int) -> None:
    """Six prompts for four places, together and in chunks that mix several of them: the tokens of each alone."""
    few = SamplingParams(max_tokens=24, ignore_eos=True)
    with open_llm(made.folder, here, prefill_chunk=chunk) as llm:
        together = [list(o.token_ids) for o in llm.generate(cut(made), few)]
        assert all_finished_and_freed(llm)
    with open_llm(made.folder, here, max_num_seqs=1) as llm:
        alone = [list(llm.generate(p, few)[0].token_ids) for p in cut(made)]
    assert together == alone
    assert together[3] == made.tokens[:24]


def test_logits_of_a_mixed_pass(made: Reference, here: Topology) -> None:
    """A pass with a prompt, the rest of another and a generated token: each row as if it were alone."""
    p = made.prompt
    with open_llm(made.folder, here) as llm:
        step = llm._host.executor.step
        step(make_batch([Chunk(p[:30], 0, (0,), True), Chunk(p[:9], 0, (5,), True)]), "prefill")
        chunks = [
            Chunk(p[30:], 30, (0,), prompt=True, sample="all"),
            Chunk(p[9:10], 9, (5,), prompt=False),
            Chunk(p[:5], 0, (7,), prompt=True, sample=False),
            Chunk(p[:64], 0, (2,), prompt=True, sample="all"),
        ]
        got = step(make_batch(chunks), "prefill")
    expected = torch.cat([made.logits[30:], made.logits[9:10], made.logits])
    assert relative_error(got, expected).max() <= 1e-4


def all_finished_and_freed(llm: LLM) -> bool:
    batching = llm.engine.batching
    return not llm.engine.busy and batching.blocks.num_free == batching.blocks.num_blocks


def test_prompts_are_expanded_and_generated_tokens_absorbed(
    reference: Reader, here: Topology, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The forms differ in their bits, so which one computes a token is part of what is promised."""
    made, calls = reference(SHOWN[0]), []
    for form in ("mla_expanded", "mla_absorbed"):
        original = getattr(forward, form)

        def counted(q: torch.Tensor, *rest: torch.Tensor, form: str = form, original: Any = original) -> torch.Tensor:
            calls.append((form, len(q)))
            return original(q, *rest)

        monkeypatch.setattr(forward, form, counted)
    with open_llm(made.folder, here, prefill_chunk=40) as llm:
        calls.clear()
        llm.generate(made.prompt, SamplingParams(max_tokens=4, ignore_eos=True))
    layers = made.case.config["num_hidden_layers"]
    expected = [("mla_expanded", 40), ("mla_expanded", 24), *[("mla_absorbed", 1)] * 3]
    assert calls == [call for call in expected for _ in range(layers)]
