"""Chats as the official client gets them: messages, answers, thinking, forms, whole and streamed."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from running import Running, with_template

from ciuic_runtime.engine.llm import LLM
from ciuic_runtime.engine.request import Update
from ciuic_runtime.engine.sampling import SamplingParams
from ciuic_runtime.server.chat import ChatChoice
from ciuic_runtime.server.reasoning import ReasoningParser

ASKED = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "two colours"}]
RENDERED = "[system]be brief\n[user]two colours\n[assistant]"
FREE = {"ignore_eos": True}


def chat(server: Running, messages: Any = ASKED, **options: Any) -> ChatCompletion:
    given = {"max_tokens": 8, "temperature": 0, "extra_body": FREE, **options}
    return server.client.chat.completions.create(model=server.model, messages=messages, **given)


def streamed(server: Running, messages: Any = ASKED, **options: Any) -> list[ChatCompletionChunk]:
    return list(chat(server, messages, stream=True, **options))  # type: ignore[call-overload]


def expected(llm: LLM, text: str, params: SamplingParams) -> str:
    return llm.generate([llm.tokenizer.encode(text, add_special=False)], params)[0].text


def test_an_answer_is_what_the_engine_generates(tiny_server: Running, reference: LLM) -> None:
    done = chat(tiny_server)
    (choice,) = done.choices
    assert choice.message.content == expected(reference, RENDERED, SamplingParams(8, ignore_eos=True))
    assert (choice.message.role, choice.finish_reason, done.object) == ("assistant", "length", "chat.completion")
    assert done.usage
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (len(RENDERED), 8)


def test_contents_may_be_parts_and_developers_are_the_system(tiny_server: Running) -> None:
    parts = [{"type": "text", "text": "two "}, {"type": "text", "text": "colours"}]
    other = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}]
    assert chat(tiny_server, other).choices[0].message == chat(tiny_server).choices[0].message


def test_an_answer_can_be_sent_back_as_it_came(tiny_server: Running) -> None:
    """With all its nulls, and without what was thought."""
    message = chat(tiny_server).choices[0].message.model_dump() | {"reasoning_content": "hmm"}
    sent = [*ASKED, message, {"role": "user", "content": "go on"}]
    text = f"[system]be brief\n[user]two colours\n[assistant]{message['content']}\n[user]go on\n[assistant]"
    usage = chat(tiny_server, sent).usage
    assert usage
    assert usage.prompt_tokens == len(text.encode())


@pytest.mark.parametrize("options", [{}, {"n": 3, "temperature": 1.2, "seed": 3}, {"logprobs": True}])
def test_a_stream_adds_up_to_the_whole(tiny_server: Running, options: dict[str, Any]) -> None:
    whole = chat(tiny_server, **options)
    *parts, last = streamed(tiny_server, **options, stream_options={"include_usage": True})
    for choice in whole.choices:
        mine = [c for part in parts for c in part.choices if c.index == choice.index]
        assert "".join(c.delta.content or "" for c in mine) == choice.message.content
        assert [c.delta.role for c in mine] == ["assistant"] + [None] * (len(mine) - 1)
        assert [c.finish_reason for c in mine] == [None] * (len(mine) - 1) + [choice.finish_reason]
        told = [one for c in mine if c.logprobs for one in c.logprobs.content or ()]
        assert told == ((choice.logprobs and choice.logprobs.content) or [])
    assert last.choices == []
    assert last.usage
    assert whole.usage
    assert last.usage.total_tokens == whole.usage.total_tokens


def test_log_probabilities_have_bytes_and_the_likeliest(tiny_server: Running, reference: LLM) -> None:
    ids = reference.tokenizer.encode(RENDERED, add_special=False)
    (truth,) = reference.generate([ids], SamplingParams(8, ignore_eos=True, logprobs=2))
    choice = chat(tiny_server, logprobs=True, top_logprobs=2).choices[0]
    assert choice.logprobs
    told = choice.logprobs.content or []
    assert [one.logprob for one in told] == pytest.approx([one.logprob for one in truth.logprobs])
    assert [len(one.top_logprobs) for one in told] == [2] * 8
    named = [(one, token) for one, token in zip(told, truth.token_ids, strict=True) if token < 256]
    assert all(one.bytes == [token] for one, token in named)
    assert all(one.token == (chr(token) if token < 128 else f"bytes:\\x{token:02x}") for one, token in named)


def test_without_a_limit_the_context_is_filled(tiny_server: Running) -> None:
    done = tiny_server.client.chat.completions.create(
        model=tiny_server.model, messages=ASKED, extra_body=FREE, temperature=0
    )  # type: ignore[call-overload]
    assert done.usage.total_tokens == 256
    assert done.choices[0].finish_reason == "length"
    assert chat(tiny_server, max_tokens=openai.omit, max_completion_tokens=5).usage.completion_tokens == 5  # type: ignore[union-attr]


def test_an_answer_can_be_held_to_a_form(tiny_server: Running) -> None:
    """Even that of a model with random weights, and in each of several choices."""
    schema = {"type": "object", "properties": {"red": {"enum": ["yes", "no"]}}, "required": ["red"]}
    schema["additionalProperties"] = False
    options = {"max_tokens": 60, "extra_body": {}, "temperature": 1, "seed": 3, "n": 2}
    options["response_format"] = {"type": "json_schema", "json_schema": {"name": "colour", "schema": schema}}
    held = chat(tiny_server, **options)
    assert all(json.loads(c.message.content or "")["red"] in ("yes", "no") for c in held.choices)
    assert {c.finish_reason for c in held.choices} == {"stop"}
    chunks = [c.choices[0] for c in streamed(tiny_server, **options)]
    for choice in held.choices:
        mine = "".join(c.delta.content or "" for c in chunks if c.index == choice.index)
        assert mine == choice.message.content
    options["response_format"] = {"type": "json_object"}
    loose = chat(tiny_server, **options)
    assert all((c.message.content or "").lstrip().startswith("{") for c in loose.choices)
    plain = chat(tiny_server, response_format={"type": "text"})
    assert plain.choices[0].message == chat(tiny_server).choices[0].message


def test_a_schema_that_cannot_be_used_is_the_clients_to_mend(tiny_server: Running) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
    with pytest.raises(openai.BadRequestError) as error:
        chat(tiny_server, response_format=form)
    assert error.value.param == "response_format"


def test_thinking_is_given_apart_when_the_template_begins_it(serve: Any, tiny_int4: Path, tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}<think>\n"
    with serve(with_template(tiny_int4, tmp_path / "thinks", template), model_name="tiny") as server:
        message = chat(server, [{"role": "user", "content": "a"}]).choices[0].message
        assert message.content == ""
        assert message.reasoning_content  # type: ignore[attr-defined]
        chunks = streamed(server, [{"role": "user", "content": "a"}])
        thought = "".join(getattr(c.choices[0].delta, "reasoning_content", "") for c in chunks)
        assert thought == message.reasoning_content  # type: ignore[attr-defined]


def test_thinking_is_given_apart_when_the_model_begins_it(reference: LLM) -> None:
    """Each chunk has what is certain by then, and the whole has it all."""
    choice = ChatChoice(0, None, ReasoningParser(False))
    request = reference.request([1], SamplingParams(4))
    pieces = ["<thi", "nk>so", "</think>", "\n\nyes"]
    updates = [Update(request, piece, (1,)) for piece in pieces[:-1]]
    chunks = [choice.take(u) for u in [*updates, Update(request, pieces[-1], (1,), finish_reason="stop")]]
    deltas = [chunk["delta"] for chunk in chunks if chunk]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "so"
    assert "".join(delta.get("content", "") for delta in deltas) == "yes"
    assert choice.whole()["message"] == {
        "role": "assistant", "content": "yes", "refusal": None, "reasoning_content": "so",
    }  # fmt: skip


def test_a_model_without_a_template_says_so(serve: Any, tiny_int4: Path) -> None:
    with (
        serve(tiny_int4, model_name="tiny") as server,
        pytest.raises(openai.BadRequestError, match="no chat template") as error,
    ):
        chat(server)
    assert error.value.param == "messages"


def test_what_a_template_refuses_is_the_clients_to_mend(serve: Any, tiny_int4: Path, tmp_path: Path) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    with (
        serve(with_template(tiny_int4, tmp_path / "refuses", template), model_name="tiny") as server,
        pytest.raises(openai.BadRequestError, match="roles must alternate"),
    ):
        chat(server)


@pytest.mark.parametrize(
    ("options", "param", "says"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "tool calls are not supported"),
        ({"tool_choice": "auto"}, "tool_choice", "tool calls are not supported"),
        ({"functions": []}, "functions", "tool calls are not supported"),
        ({"modalities": ["text", "audio"]}, "modalities[1]", "only text"),
        ({"audio": {"voice": "alloy", "format": "wav"}}, "audio", "only text"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "repetition_penalty"),
        ({"reasoning_effort": "low"}, "reasoning_effort", "max_tokens"),
        ({"store": True}, "store", "nothing is stored"),
        ({"service_tier": "flex"}, "service_tier", "there is one"),
        ({"top_logprobs": 2}, "top_logprobs", "set logprobs"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "needs a json_schema"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 1000}, "messages", "context holds 256"),
        ({"stop": ["a"] * 5}, "stop", "up to 4"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages[0].role", "tool calls"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
            "messages[0].content[0].type",
            "images",
        ),
        ({"extra_body": {"best_of": 2}}, "best_of", "not ranked"),
        ({"extra_body": {"foo": None, "bar": 1}}, "bar", "unknown parameter: 'bar'"),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(
    tiny_server: Running, options: dict[str, Any], param: str, says: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=says) as error:
        chat(tiny_server, **{"messages": ASKED, **options})
    assert error.value.param == param


def test_what_asks_for_nothing_changes_nothing(tiny_server: Running) -> None:
    idle = {
        "tools": [], "tool_choice": "none", "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {},
        "store": False, "metadata": {"a": "b"}, "service_tier": "auto", "modalities": ["text"], "top_p": None,
        "parallel_tool_calls": True, "reasoning_effort": None, "seed": None, "user": "me", "stop": None,
    }  # fmt: skip
    assert chat(tiny_server, extra_body=FREE | idle).choices[0].message == chat(tiny_server).choices[0].message


def test_many_at_once_get_what_each_would_get_alone(tiny_server: Running, reference: LLM) -> None:
    """Greedy and sampled, chats and completions, streams and wholes, more than run at once."""
    client = openai.AsyncOpenAI(base_url=f"{tiny_server.url}/v1", api_key="none", max_retries=0)

    async def one(i: int) -> str:
        options: dict[str, Any] = {"seed": i, "temperature": i % 3, "max_tokens": 6 + i, "user": f"user {i % 2}"}
        text, model = f"prompt number {i} " * (1 + i % 4), tiny_server.model
        if i % 2:
            stream = await client.completions.create(model=model, prompt=text, stream=True, extra_body=FREE, **options)
            return "".join([chunk.choices[0].text async for chunk in stream])
        asked: Any = [{"role": "user", "content": text}]
        done = await client.chat.completions.create(model=model, messages=asked, extra_body=FREE, **options)
        return done.choices[0].message.content or ""

    async def all_of_them() -> list[str]:
        return await asyncio.gather(*map(one, range(12)))

    answers = asyncio.run(all_of_them())
    for i, answer in enumerate(answers):
        text = f"prompt number {i} " * (1 + i % 4)
        params = SamplingParams(6 + i, temperature=i % 3, seed=i, ignore_eos=True)
        assert answer == expected(reference, text if i % 2 else f"[user]{text}\n[assistant]", params), i


def test_the_model_is_listed(tiny_server: Running) -> None:
    (model,) = tiny_server.client.models.list().data
    assert model.id == tiny_server.model == "tiny-chat"
    assert tiny_server.client.models.retrieve("tiny-chat") == model
    assert model.max_model_len == 256  # type: ignore[attr-defined]
    with pytest.raises(openai.NotFoundError) as error:
        tiny_server.client.models.retrieve("other/model")
    assert error.value.code == "model_not_found"
