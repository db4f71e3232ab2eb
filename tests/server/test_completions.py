"""Completions as the official client gets them: every option, whole and streamed, as the engine says alone."""

from __future__ import annotations

import math

import openai
import pytest
from running import Running

from ciuic_runtime.engine.llm import LLM
from ciuic_runtime.engine.sampling import SamplingParams

PROMPT = "Experts are chosen"
FREE = {"ignore_eos": True}


def complete(server: Running, prompt: object = PROMPT, **options: object) -> openai.types.Completion:
    given = {"max_tokens": 8, "temperature": 0, "extra_body": FREE, **options}
    return server.client.completions.create(model=server.model, prompt=prompt, **given)  # type: ignore[call-overload]


def streamed(server: Running, prompt: object = PROMPT, **options: object) -> list[openai.types.Completion]:
    return list(complete(server, prompt, stream=True, **options))  # type: ignore[call-overload]


def texts(llm: LLM, prompt: object, params: SamplingParams) -> list[str]:
    return [output.text for output in llm.generate(prompt, params)]  # type: ignore[arg-type]


def test_a_completion_is_what_the_engine_generates(tiny_server: Running, reference: LLM) -> None:
    done = complete(tiny_server)
    assert (done.object, done.model) == ("text_completion", tiny_server.model)
    assert done.id.startswith("cmpl-")
    (choice,) = done.choices
    assert [choice.text] == texts(reference, PROMPT, SamplingParams(8, ignore_eos=True))
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    assert done.usage
    assert (done.usage.prompt_tokens, done.usage.completion_tokens, done.usage.total_tokens) == (18, 8, 26)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "seed": 5, "top_p": 0.9}, {"n": 3, "seed": 1}])
def test_a_stream_adds_up_to_the_whole(tiny_server: Running, options: dict[str, object]) -> None:
    whole = complete(tiny_server, **options)
    chunks = streamed(tiny_server, **options, stream_options={"include_usage": True})
    *parts, last = chunks
    for choice in whole.choices:
        mine = [c for part in parts for c in part.choices if c.index == choice.index]
        assert "".join(c.text for c in mine) == choice.text
        assert [c.finish_reason for c in mine] == [None] * (len(mine) - 1) + [choice.finish_reason]
    assert {c.id for c in chunks} == {last.id}
    assert last.choices == []
    assert all(part.usage is None for part in parts)
    assert last.usage is not None
    assert whole.usage is not None
    assert last.usage.completion_tokens == whole.usage.completion_tokens


def test_choice_i_uses_the_seed_plus_i(tiny_server: Running, reference: LLM) -> None:
    done = complete(tiny_server, n=4, seed=11, temperature=1.5)
    params = [SamplingParams(8, temperature=1.5, seed=11 + i, ignore_eos=True) for i in range(4)]
    assert [c.text for c in done.choices] == [texts(reference, PROMPT, p)[0] for p in params]
    assert len({c.text for c in done.choices}) > 1


def test_extensions_and_defaults_reach_the_engine(tiny_server: Running, reference: LLM) -> None:
    extra = {"ignore_eos": True, "top_k": 3, "min_p": 0.01, "repetition_penalty": 1.3}
    done = complete(tiny_server, seed=2, temperature=2, top_p=0.8, extra_body=extra)
    params = SamplingParams(8, 2.0, top_k=3, top_p=0.8, min_p=0.01, repetition_penalty=1.3, seed=2, ignore_eos=True)
    assert [c.text for c in done.choices] == texts(reference, PROMPT, params)
    plain = tiny_server.client.completions.create(model=tiny_server.model, prompt=PROMPT, seed=4, extra_body=FREE)
    params = SamplingParams(16, temperature=1.0, seed=4, ignore_eos=True)
    assert [c.text for c in plain.choices] == texts(reference, PROMPT, params)


def test_prompts_may_be_several_and_ids(tiny_server: Running, reference: LLM) -> None:
    params = SamplingParams(8, ignore_eos=True)
    two = complete(tiny_server, ["one", "two"], n=2)
    assert [c.index for c in two.choices] == [0, 1, 2, 3]
    one, other = texts(reference, ["one", "two"], params)
    assert [c.text for c in two.choices] == [one, one, other, other]
    assert two.usage
    assert two.usage.prompt_tokens == 6
    by_ids = complete(tiny_server, list(b"one"))
    assert by_ids.choices[0].text == one
    lists = complete(tiny_server, [list(b"one"), list(b"two")])
    assert [c.text for c in lists.choices] == [one, other]


def test_stop_ends_before_the_text(tiny_server: Running) -> None:
    full = complete(tiny_server, max_tokens=24).choices[0].text
    stop = full[6:8]
    cut = complete(tiny_server, max_tokens=24, stop=stop).choices[0]
    assert (cut.text, cut.finish_reason) == (full[: full.index(stop)], "stop")
    assert complete(tiny_server, max_tokens=24, stop=["\0never", stop]).choices[0].text == cut.text
    chunks = streamed(tiny_server, max_tokens=24, stop=stop)
    assert "".join(c.choices[0].text for c in chunks) == cut.text
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_log_probabilities_of_new_tokens(tiny_server: Running, reference: LLM) -> None:
    done = complete(tiny_server, logprobs=3)
    told = done.choices[0].logprobs
    (expected,) = reference.generate(PROMPT, SamplingParams(8, ignore_eos=True, logprobs=3))
    assert told
    assert told.token_logprobs == pytest.approx([one.logprob for one in expected.logprobs])
    assert told.tokens
    assert told.top_logprobs
    assert len(told.tokens) == len(told.top_logprobs) == 8
    assert all(
        token in top and 3 <= len(top) <= 4 and max(top.values()) <= 0
        for token, top in zip(told.tokens, told.top_logprobs, strict=True)
    )
    chunks = [c.choices[0].logprobs for c in streamed(tiny_server, logprobs=3)]
    assert [t for c in chunks if c for t in c.tokens or ()] == told.tokens
    assert [t for c in chunks if c for t in c.text_offset or ()] == told.text_offset


def test_echo_gives_the_prompt_with_its_log_probabilities(tiny_server: Running, reference: LLM) -> None:
    done = complete(tiny_server, echo=True, logprobs=0, max_tokens=4)
    choice = done.choices[0]
    assert choice.text.startswith(PROMPT)
    assert choice.logprobs
    assert choice.logprobs.tokens
    assert choice.logprobs.token_logprobs
    assert choice.logprobs.tokens[: len(PROMPT)] == list(PROMPT)
    assert choice.logprobs.text_offset == [*range(len(PROMPT)), *(choice.logprobs.text_offset or ())[len(PROMPT) :]]
    assert len(choice.logprobs.tokens) == len(PROMPT) + 4
    assert choice.logprobs.token_logprobs[0] is None
    # the same, from all logits of the prompt
    ids = reference.tokenizer.encode(PROMPT)
    every = reference.logits(ids).log_softmax(dim=1)
    truth = [float(every[i, token]) for i, token in enumerate(ids[1:])]
    assert choice.logprobs.token_logprobs[1 : len(ids)] == pytest.approx(truth, abs=1e-4)


def test_echo_of_a_prompt_alone(tiny_server: Running) -> None:
    done = complete(tiny_server, echo=True, logprobs=1, max_tokens=0)
    choice = done.choices[0]
    assert (choice.text, choice.finish_reason) == (PROMPT, "length")
    assert choice.logprobs
    assert len(choice.logprobs.token_logprobs or ()) == len(PROMPT)
    assert done.usage
    assert done.usage.completion_tokens == 0
    assert complete(tiny_server, list(b"abc"), echo=True, max_tokens=0).choices[0].text == "abc"
    assert [c.choices[0].text for c in streamed(tiny_server, echo=True, max_tokens=0)] == [PROMPT]


def test_echo_without_log_probabilities(tiny_server: Running) -> None:
    plain = complete(tiny_server).choices[0].text
    assert complete(tiny_server, echo=True).choices[0].text == PROMPT + plain
    assert "".join(c.choices[0].text for c in streamed(tiny_server, echo=True)) == PROMPT + plain


def test_a_prompt_that_was_there_before_is_found_again(tiny_server: Running) -> None:
    long = "A prefix that fills more than one block of the cache, and then some more of it. " * 2
    complete(tiny_server, long)
    usage = complete(tiny_server, long).usage
    assert usage
    assert usage.prompt_tokens_details
    assert usage.prompt_tokens_details.cached_tokens == 128
    assert math.isclose(usage.prompt_tokens, len(long))


@pytest.mark.parametrize(
    ("options", "param", "says"),
    [
        ({"max_tokens": 0}, "max_tokens", "needs echo"),
        ({"max_tokens": 500}, "prompt", "context holds 256"),
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": [400]}, "prompt", "has 0 to 319"),
        ({"prompt": [-1]}, "prompt", "a list of token ids"),
        ({"prompt": ["a"] * 300}, "prompt", "takes 256 at once"),
        ({"n": 17}, "n", "at most 16"),
        ({"suffix": "x"}, "suffix", "at its end only"),
        ({"best_of": 2}, "best_of", "choose"),
        ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"presence_penalty": 1}, "presence_penalty", "repetition_penalty"),
        ({"logit_bias": {"5": 10}}, "logit_bias", "not supported"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "streams only"),
        ({"extra_body": {"foo": 1}}, "foo", "unknown parameter: 'foo'"),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(
    tiny_server: Running, options: dict[str, object], param: str, says: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=says) as error:
        complete(tiny_server, **{"prompt": PROMPT, **options})
    assert error.value.param == param
    assert error.value.type == "invalid_request_error"


def test_another_model_is_not_found(tiny_server: Running) -> None:
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny-chat'") as error:
        tiny_server.client.completions.create(model="gpt-4", prompt="a")
    assert error.value.code == "model_not_found"
