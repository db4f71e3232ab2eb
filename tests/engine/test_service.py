"""The engine that serves: tokens are those of a run alone, whoever comes and goes; what fails, fails alone."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from watched import Watched

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.devices.spec import Topology
from ciuic_runtime.engine.llm import LLM
from ciuic_runtime.engine.request import Update
from ciuic_runtime.engine.sampling import SamplingParams
from ciuic_runtime.engine.service import EngineService, PassInfo, QueueFull, ShuttingDown, Submission
from ciuic_runtime.models.random_checkpoint import write_random_checkpoint
from ciuic_runtime.ops.native import kernels

native = pytest.mark.skipif(kernels() is None, reason="the native kernels are not built here")
LLAMA = {
    "model_type": "llama", "vocab_size": 300, "hidden_size": 144, "intermediate_size": 200, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip
SYSTEM = [(7 * i) % 250 for i in range(150)]


def workload(seed: int) -> list[tuple[list[int], SamplingParams]]:
    r = random.Random(seed)
    asked = []
    for i in range(14):
        prompt = [*(SYSTEM if r.random() < 0.4 else []), *(r.randrange(250) for _ in range(r.choice([1, 20, 63, 90])))]
        sampled = {"temperature": 1.1, "seed": i, "top_p": 0.95} if r.random() < 0.7 else {}
        new = 130 if i < 8 else r.choice([3, 70])
        asked.append((prompt, SamplingParams(max_tokens=new, ignore_eos=True, **sampled)))  # type: ignore[arg-type]
    return asked


async def whole(service: EngineService, prompt: list[int], params: SamplingParams, **rest: Any) -> list[Update]:
    async with service.submit(prompt, params, **rest) as submission:
        return [update async for update in submission]


async def collected(submission: Submission) -> list[Update]:
    return [update async for update in submission]


def tokens(updates: list[Update]) -> list[int]:
    return [token for update in updates for token in update.token_ids]


def served(llm: LLM, act: Any, **settings: Any) -> Any:
    """What `act(service)` returns, with the service running meanwhile."""

    async def main() -> Any:
        service = EngineService(llm, **settings)
        service.start()
        try:
            return await act(service)
        finally:
            service.close()

    return asyncio.run(main())


@native
@pytest.mark.parametrize("kind", ["deepseek_v3", "llama"])
def test_the_same_bits_as_alone_under_load_with_found_prefixes_and_preempted(
    kind: str, tiny_v3: Path, here: Topology, tmp_path: Path
) -> None:
    """14 requests that come at random times, on a cache of 7 blocks for up to 5 at once, some given up half way; each
    token and the logits that it was drawn from are those of a run alone."""
    checkpoint = tiny_v3 if kind == "deepseek_v3" else write_random_checkpoint(LLAMA, tmp_path / "llama")
    settings: dict[str, Any] = {"devices": here, "dtype": "int4", "max_model_len": 384, "prefill_chunk": 96}
    asked, r = workload(1), random.Random(2)
    with Watched(checkpoint, max_num_seqs=1, threads=1, **settings) as llm:
        alone = []
        for prompt, params in asked:
            llm.seen = {}
            [output] = llm.generate(prompt, params)
            alone.append((list(output.token_ids), torch.stack(llm.seen[0])))
    delays, given_up = [0.0 if i < 8 else r.random() * 0.1 for i in range(len(asked))], {3, 8}

    async def act(service: EngineService) -> Any:
        async def one(i: int) -> list[Update]:
            await asyncio.sleep(delays[i])
            prompt, params = asked[i]
            async with service.submit(prompt, params, client=f"client {i % 3}") as submission:
                indices[submission.request.index] = i
                updates = []
                async for update in submission:
                    updates.append(update)
                    if i in given_up and len(updates) == 2:
                        break
                return updates

        indices: dict[int, int] = {}
        outputs = await asyncio.gather(*(one(i) for i in range(len(asked))))
        again = await asyncio.gather(*(whole(service, *asked[i]) for i in (0, 5)))
        return outputs, again, indices, service.stats()

    with Watched(checkpoint, max_num_seqs=5, threads=2, kv_tokens=7 * 64, serving=True, **settings) as llm:
        outputs, again, indices, stats = served(llm, act)
        for i, (updates, (expected, _)) in enumerate(zip(outputs, alone, strict=True)):
            assert tokens(updates) == expected[: 2 if i in given_up else None], f"request {i}"
        assert [tokens(one) for one in again] == [alone[0][0], alone[5][0]]
        for index, i in indices.items():
            logits = torch.stack(llm.seen[index])
            assert torch.equal(logits.view(torch.int32), alone[i][1][: len(logits)].view(torch.int32)), f"request {i}"
    assert stats.preemptions, "this load should not have fitted"
    assert stats.cached_prompt_tokens, "these prompts should have shared a prefix"
    assert (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0)


@pytest.fixture(scope="module")
def model(tiny_v3: Path, here: Topology) -> Any:
    with Watched(
        tiny_v3, devices=here, dtype="bfloat16", max_model_len=256, max_num_seqs=2, threads=1, serving=True,
        kv_tokens=384, prefill_chunk=64,
    ) as llm:  # fmt: skip
        yield llm


LONG, SHORT = (SamplingParams(max_tokens=n, ignore_eos=True) for n in (200, 100))


def test_cancelling_frees_and_the_others_go_on(model: LLM) -> None:
    async def act(service: EngineService) -> Any:
        first, second, waiting = (service.submit([i] * 9, LONG) for i in (1, 2, 3))
        updates = [update async for _, update in azip(range(3), first)]
        first.cancel()
        first.cancel()
        assert [u.finish_reason async for u in first][-1] == "interrupted"
        waiting.cancel()
        rest = [update async for update in second]
        return updates, rest, service.stats()

    updates, rest, stats = served(model, act)
    assert len(updates) == 3
    assert len(tokens(rest)) == 200
    assert (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0)


async def azip(numbers: range, things: Any) -> Any:
    iterator = things.__aiter__()
    for number in numbers:
        yield number, await anext(iterator)


def test_more_than_may_wait_are_refused_and_so_is_everybody_while_it_shuts_down(model: LLM) -> None:
    async def act(service: EngineService) -> Any:
        running = [service.submit([1], LONG) for _ in range(4)]
        with pytest.raises(QueueFull, match="4 requests are running or waiting, and 4 may be"):
            service.submit([1], LONG)
        draining = asyncio.create_task(service.drain())
        await asyncio.sleep(0)
        with pytest.raises(ShuttingDown, match="shutting down"):
            service.submit([1], LONG)
        await draining
        return [tokens([u async for u in one]) for one in running]

    outputs = served(model, act, max_waiting=2)
    assert [len(one) for one in outputs] == [200] * 4
    assert len({tuple(one) for one in outputs}) == 1


@pytest.mark.parametrize(
    ("prompt", "params", "says"),
    [
        ([], LONG, "is empty"),
        ([1] * 100, LONG, "the context holds 256"),
        ([320], LONG, "token id 320"),
        ([1.5], LONG, "whole numbers"),
    ],
)
def test_what_cannot_be_run_is_refused_before_it_is_let_in(
    model: LLM, prompt: list[Any], params: SamplingParams, says: str
) -> None:
    async def act(service: EngineService) -> None:
        with pytest.raises(InvalidInput, match=says):
            service.submit(prompt, params)
        assert len(tokens(await whole(service, [1], SamplingParams(max_tokens=3, ignore_eos=True)))) == 3

    served(model, act)


def test_a_request_whose_logits_are_no_numbers_ends_alone(model: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = model.engine.runner
    draw, bad = runner.draw, []  # type: ignore[attr-defined]

    def broken(draws: Any, logits: torch.Tensor) -> Any:
        for row, one in enumerate(draws):
            if [one.request] == bad and one.position == 3:
                logits[row] = float("nan")
        return draw(draws, logits)

    monkeypatch.setattr(runner, "draw", broken)

    async def act(service: EngineService) -> Any:
        first = service.submit([5], LONG)
        bad.append(first.request.index)
        return await asyncio.gather(collected(first), whole(service, [6], LONG)), service.stats()

    (failed, good), stats = served(model, act)
    assert (failed[-1].finish_reason, len(tokens(failed))) == ("error", 2)
    assert "NaN" in failed[-1].error
    assert len(tokens(good)) == 200
    assert stats.kv_blocks_used == 0


def test_a_pass_that_fails_ends_those_that_ran_and_the_service_goes_on(
    model: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, together = model._host.executor.step, []

    def failing(batch: Any, *arguments: Any) -> Any:
        """Once, in the third pass of both."""
        if len(batch.sequences) == 2:
            together.append(batch)
            if len(together) == 3:
                raise OSError("the disk is gone")
        return step(batch, *arguments)

    monkeypatch.setattr(model._host.executor, "step", failing)

    async def act(service: EngineService) -> Any:
        failed = await asyncio.gather(whole(service, [5], LONG), whole(service, [6], LONG))
        return failed, await whole(service, [7], SamplingParams(max_tokens=3, ignore_eos=True)), service.stats()

    failed, after, stats = served(model, act)
    assert [(one[-1].finish_reason, one[-1].error) for one in failed] == [("error", "the disk is gone")] * 2
    assert len(tokens(after)) == 3
    assert stats.kv_blocks_used == 0


def test_nothing_is_gathered_by_who_looks_until_the_service_is_closed(
    model: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the engine's thread has ended by a mistake: who looks does so in a thread of another's."""
    waited: list[bool] = []
    monkeypatch.setattr(model._host, "gather", lambda wait=False: waited.append(wait))

    async def act(service: EngineService) -> None:
        before = model.recording().first_step + len(model.recording().steps)
        await whole(service, [5], SamplingParams(max_tokens=2, ignore_eos=True))
        monkeypatch.setattr(service, "_gather", lambda: 1 / 0)
        service._wake.set()
        service._thread.join(10)
        assert not service._thread.is_alive()
        recording = model.recording()
        assert recording.first_step + len(recording.steps) == before + 2
        assert True not in waited

    served(model, act)
    model.recording()
    assert waited[-1] is True


def test_logprobs_are_those_of_the_logits_and_the_prompts_too(model: LLM) -> None:
    prompt = [(11 * i) % 300 for i in range(100)]
    params = SamplingParams(max_tokens=4, temperature=1.0, seed=1, ignore_eos=True, logprobs=3, prompt_logprobs=2)
    [output] = model.generate(prompt, params)
    expected = model.logits([*prompt, *output.token_ids[:-1]], chunk=64).log_softmax(dim=1)
    told = output.prompt_logprobs
    assert told[0] is None
    assert [one.token_id for one in told[1:] if one] == prompt[1:]
    for position, one in enumerate([*told[1:], *output.logprobs]):
        assert one is not None
        row = expected[position]
        # Generated tokens are computed in the other form: their bits differ from those of the prompt's.
        near = {"abs": 1e-6 if position < len(prompt) else 0.05}
        assert one.logprob == pytest.approx(float(row[one.token_id]), **near)
        if position < len(prompt):
            assert [i for i, _ in one.top] == row.topk(len(one.top)).indices.tolist()
    assert [len(one.top) for one in output.logprobs] == [3] * 4
    assert len(told[1].top) == 2 if told[1] else False


def test_a_prompt_alone_can_be_asked_about(model: LLM) -> None:
    async def act(service: EngineService) -> Any:
        return await whole(service, [1, 2, 3], SamplingParams(max_tokens=0, prompt_logprobs=0))

    [update] = served(model, act)
    assert (update.token_ids, update.finish_reason) == ((), "length")
    assert [one and one.token_id for one in update.prompt_logprobs] == [None, 2, 3]


def test_a_guide_says_what_may_come(model: LLM) -> None:
    class Even:
        def __init__(self) -> None:
            self.accepted: list[int] = []
            self.finished = False

        def mask(self, logits: np.ndarray) -> None:
            logits[1::2] = -np.inf

        def accept(self, token_id: int) -> None:
            self.accepted.append(token_id)

    guide, params = Even(), SamplingParams(max_tokens=40, temperature=2.0, seed=1, ignore_eos=True, logprobs=0)

    async def act(service: EngineService) -> Any:
        return await asyncio.gather(whole(service, [9], params, guide=guide), whole(service, [9], params))

    guided, free = served(model, act)
    assert tokens(guided) == guide.accepted
    assert all(token % 2 == 0 for token in guide.accepted)
    assert any(token % 2 for token in tokens(free))
    assert all(u.logprobs[0].logprob > -100 for u in guided), "of the model's own logits"


def test_every_pass_is_told_with_its_forecast_and_the_trace_does_not_grow(
    model: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ciuic_runtime.engine.service.MOST_EVENTS", 1000)
    monkeypatch.setattr(model._host.recorder, "_chunk", 128)
    model._clear_trace()  # so that it begins with a chunk of that size
    told: list[PassInfo] = []

    async def act(service: EngineService) -> Any:
        service.on_pass = told.append
        await asyncio.gather(whole(service, [5] * 30, SHORT), whole(service, [6] * 10, SHORT))
        return service.stats()

    stats = served(model, act)
    assert len(told) == stats.passes
    assert sum(info.decode_tokens for info in told) == 2 * 99
    assert sum(info.prompt_tokens for info in told) == 40
    assert all(info.forecast_seconds and info.seconds > 0 for info in told)
    recording = model.recording()
    monkeypatch.undo()
    model._clear_trace()
    assert 0 < len(recording.rows) - 2 * len(recording.steps) - 2 <= 1000 + 128
    assert recording.first_step + len(recording.steps) == stats.passes > len(recording.steps)
    assert len(recording.passes) == len(recording.steps)
    assert (stats.prompt_tokens, stats.generated_tokens) == (40, 200)


def test_closing_cancels_what_runs(model: LLM) -> None:
    async def act(service: EngineService) -> Any:
        running = service.submit([1], LONG)
        first = await anext(running.__aiter__())
        service.close()
        return first, [u async for u in running]

    first, rest = served(model, act)
    assert first.finish_reason is None
    assert rest[-1].finish_reason == "interrupted"
    assert not model.engine.busy


@native
def test_a_model_that_is_served_is_driven_by_nobody_else(tiny_v3: Path, here: Topology) -> None:
    params = SamplingParams(max_tokens=3)
    with LLM(tiny_v3, devices=here, dtype="int4", max_model_len=128, threads=1, serving=True) as llm:
        expected = list(llm.generate([5, 6, 7], params)[0].token_ids)

        async def act(service: EngineService) -> list[Update]:
            found = await whole(service, [5, 6, 7], params)
            for begun in (lambda: llm.generate([5, 6, 7], params), lambda: llm.logits([5, 6, 7])):
                with pytest.raises(InvalidInput, match="being served, by a thread of its own; ask the server"):
                    begun()
            return found

        assert tokens(served(llm, act)) == expected
        assert list(llm.generate([5, 6, 7], params)[0].token_ids) == expected
