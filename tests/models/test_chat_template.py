"""Chat templates: those of published models render as transformers renders them, and no template runs away."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.models import chat_sandbox
from ciuic_runtime.models.chat_bounds import MAX_SIZE
from ciuic_runtime.models.chat_template import MAX_SOURCE, render_chat

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]
HI = [{"role": "user", "content": "Hi"}]

# In the manner of the published templates: ChatML, DeepSeek-V2, R1 (thinking cut off, namespace), Llama 3 (tools).
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m.content | trim + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
DEEPSEEK_V2 = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{{ bos_token }}"
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}"
    "{% elif message['role'] == 'system' %}{{ message['content'] + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
R1 = (
    "{% set ns = namespace(is_first=false, system='') %}{%- for message in messages %}"
    "{%- if message['role'] == 'system' %}{% set ns.system = ns.system ~ message['content'] %}{%- endif %}{%- endfor %}"
    "{{ bos_token }}{{ ns.system }}{%- for message in messages %}{%- if message['role'] == 'user' %}"
    "{{ '<｜User｜>' + message['content'] }}{%- endif %}{%- if message['role'] == 'assistant' %}"
    "{% set content = message['content'] %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{% generation %}{{ '<｜Assistant｜>' + content + eos_token }}{% endgeneration %}{%- endif %}{%- endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)
TOOLS = """
{%- macro show(tool, depth=2) -%}
    {{ tool.name | upper }}({{ tool.parameters | tojson(indent=depth) }}){{ "," if caller is defined }}
{%- endmacro -%}
{%- for tool in tools or [] if tool.name -%}
    {%- if loop.index0 > 5 %}{% break %}{% endif -%}
    {{- loop.index ~ "/" ~ loop.length ~ " " ~ show(tool) ~ ("" if loop.last else "; ") -}}
{%- endfor %}
{{- messages[1:] | map(attribute="content") | join("|") }} {{ messages | rejectattr("role", "in", "user") | list }}
{{- " %s %d" % ("x", 3) }} {{ messages[0].content[::-1] }} {{ {"b": 1, "a": [1, 2]} | dictsort }} {{ range(3) | list }}
{{- "a,b".split(",") | reverse | join }} {{ messages[0].get("name", "none") }} {{ [1, 2] + [3] }} {{ "ab" * 2 }}
{%- for key, value in {"k": "v"}.items() %} {{ key }}={{ value }}{% endfor %}
"""
TOOL = [{"name": "search", "parameters": {"q": "é", "n": [1, None]}}, {"name": "", "parameters": {}}]


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("template", [CHATML, DEEPSEEK_V2, R1, TOOLS], ids=["chatml", "v2", "r1", "tools"])
def test_templates_render_as_in_transformers(template: str, prompt: bool) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    given = {"bos_token": "<s>", "eos_token": "</s>"}
    chat = [*CHAT[:2], {"role": "assistant", "content": "<think>hm</think>Hello"}, CHAT[3]]
    [expected], _ = render_jinja_template(
        [chat], chat_template=template, tools=TOOL, add_generation_prompt=prompt, **given
    )
    assert render_chat(template, chat, add_generation_prompt=prompt, tools=TOOL, **given) == expected
    assert expected.strip()


def test_the_date_and_refusals_are_available() -> None:
    assert len(render_chat("{{ strftime_now('%d %b %Y') }}", HI)) == 11
    with pytest.raises(InvalidInput, match="roles must alternate"):
        render_chat("{{ raise_exception('roles must alternate') }}", HI)


def test_content_is_not_a_template() -> None:
    hostile = [{"role": "user", "content": "{{ 7 * 7 }}{% for i in range(9) %}"}]
    assert render_chat("{{ messages[0].content }}", hostile) == hostile[0]["content"]


LOOP = "{% for i in range(99999) %}"
TENFOLD = "{% set ns = namespace(x='0123456789') %}{% for i in range(40) %}"
RUNAWAY = {
    "nested loops": f"{LOOP}{LOOP}{{% endfor %}}{{% endfor %}}",
    "loops with a condition": f"{LOOP}{{% for j in range(99999) if false %}}{{% endfor %}}{{% endfor %}}",
    "four loops": LOOP * 4 + "x" + "{% endfor %}" * 4,
    "large range": "{% for i in range(10**9) %}{% endfor %}",
    "large string": "{{ 'a' * 10**10 }}",
    "large string, unused": "{% set x = 10**10 * 'a' %}",
    "large list": "{% set x = [0] * 10**9 %}",
    "large number": "{{ 10**(10**10) }}",
    "large number by loops": "{% set ns = namespace(x=3) %}" + LOOP + "{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "doubling by +": TENFOLD + "{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    "doubling by ~": TENFOLD + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "doubling by join": TENFOLD + "{% set ns.x = [ns.x, ns.x] | join %}{% endfor %}",
    "doubling by replace": TENFOLD + "{% set ns.x = ns.x.replace('0', ns.x) %}{% endfor %}",
    "doubling by format": TENFOLD + "{% set ns.x = '%s%s' % (ns.x, ns.x) %}{% endfor %}",
    "doubling by format method": TENFOLD + "{% set ns.x = '{0}{0}'.format(ns.x) %}{% endfor %}",
    "doubling by a block": TENFOLD + "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}",
    "doubling a list": TENFOLD + "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "doubling a list, compared": TENFOLD + "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x == [ns.x] }}",
    "doubling a dict": TENFOLD + "{% set ns.x = {'a': ns.x, 'b': ns.x} %}{% endfor %}{{ ns.x | tojson }}",
    "doubling by dict()": TENFOLD + "{% set ns.x = dict(a=ns.x, b=ns.x) %}{% endfor %}{{ ns.x }}",
    "doubling varargs": "{% macro m() %}{{ m(varargs, varargs) }}{% endmacro %}{{ m('a') }}",
    "doubling namespaces": "{% set n0 = namespace() %}"
    + "".join(f"{{% set n{i + 1} = namespace(x=n{i}) %}}{{% set n{i + 1}.y = n{i} %}}" for i in range(60))
    + "{{ n60 }}",
    "center": "{{ 'a' | center(10**9) }}",
    "center method": "{{ 'a'.center(10**9) }}",
    "ljust": "{{ 'a'.ljust(999999999) }}",
    "zfill": "{{ '1'.zfill(999999999) }}",
    "expandtabs": "{{ ('\t' * 1000).expandtabs(10**7) }}",
    "wide format": "{{ '%999999999d' % 1 }}",
    "wide format from a value": "{{ '%*d' % (999999999, 1) }}",
    "wide format method": "{{ '{:999999999}'.format(1) }}",
    "wide format from an argument": "{{ '{:{}}'.format(1, 999999999) }}",
    "wide format filter": "{{ '%999999999d' | format(1) }}",
    "indent": "{{ ('a\n' * 1000) | indent(10**7) }}",
    "indented JSON": "{{ [[1]] | tojson(indent=10**9) }}",
    "join on a range": "{{ range(99999) | join('x' * 100000) }}",
    "round": "{{ 2.5 | round(10**9, 'floor') }}",
    "wide date": "{{ strftime_now('%999999999d') }}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "recursion, branching": "{% macro m(n) %}{{ m(n - 1) ~ m(n - 1) if n }}{% endmacro %}{{ m(90) }}",
    "recursive loop": "{% for x in [[1]] recursive %}{{ loop(x) }}{% endfor %}",
    "much output": LOOP + "0123456789" * 100 + "{% endfor %}",
    "much output in a macro": "{% macro m() %}" + LOOP + "0123456789" * 100 + "{% endfor %}{% endmacro %}{{ m() }}",
    "much output by macros": f"{{% macro m() %}}{'x' * 9999}{{% endmacro %}}{{% set y %}}{LOOP}{{{{ m() }}}}"
    "{% endfor %}{% endset %}",
    "slices in a loop": "{% set x = 'a' * 10**7 %}" + LOOP + "{% set y = x[1:] %}{% endfor %}",
    "searches in a loop": "{% set x = 'a' * 10**7 %}" + LOOP + "{% set y = 'ab' in x %}{% endfor %}",
    "sorting": "{% set x = range(99999) | list %}" + LOOP + "{% set y = x | sort %}{% endfor %}",
    "deep literal": "{% set x = " + "[" * 3000 + "]" * 3000 + " %}",
    "deep parentheses": "{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}",
    "deep blocks": "{% if true %}" * 150 + "{% endif %}" * 150,
    "long sum": "{{ " + "1+" * 50000 + "1 }}",
    "long source": "x" * (MAX_SOURCE + 1),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNAWAY)
def test_runaway_templates_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By counting, not by the clock, which is put out of reach."""
    monkeypatch.setattr(chat_sandbox, "MAX_SECONDS", 1e9)
    with pytest.raises(InvalidInput, match="the chat template") as caught:
        render_chat(RUNAWAY[name], HI)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [name for name in RUNAWAY if name.startswith(("large", "wide", "center", "ljust"))])
def test_what_is_refused_is_not_made_first(name: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(InvalidInput):
            render_chat(RUNAWAY[name], HI)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MAX_SIZE, f"{peak >> 20} MiB"


def test_the_clock_is_the_last_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_sandbox, "MAX_SECONDS", -1.0)
    with pytest.raises(InvalidInput, match="takes longer than"):
        render_chat("{{ messages[0].content }}", HI)


ESCAPES = {
    "class": "{{ ''.__class__ }}",
    "class, called": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "class by index": "{{ ''['__class__'] }}",
    "class by filter": "{{ '' | attr('__class__') }}",
    "class by map": "{{ [''] | map(attribute='__class__') | list }}",
    "class by format": "{{ '{0.__class__}'.format('') }}",
    "globals of a macro": "{% macro m() %}{% endmacro %}{{ m.__globals__ }}",
    "code of a macro": "{% macro m() %}{% endmacro %}{{ m._func }}",
    "globals of a function": "{{ raise_exception.__globals__ }}",
    "globals of the namespace": "{{ namespace.__init__ }}",
    "environment": "{{ self._TemplateReference__context }}",
    "import": "{% import 'os' as os %}",
    "include": "{% include '/etc/passwd' %}",
    "extends": "{% extends 'x' %}",
    "changing a message": "{{ messages.append(1) }}",
    "changing a dict": "{{ messages[0].update({'role': 'x'}) }}",
    "bytes": "{{ 'a'.encode() }}",
    "filter that is not there": "{{ 'a' | pprint }}",
    "a number's methods": "{{ (1).to_bytes(10, 'big') }}",
    "an internal filter": "{{ 'a' | scanned }}",
    "lipsum": "{{ lipsum(100) }}",
}


@pytest.mark.parametrize("name", ESCAPES)
def test_reaching_outside_is_refused(name: str) -> None:
    messages = [dict(message) for message in HI]
    with pytest.raises(InvalidInput, match="the chat template"):
        render_chat(ESCAPES[name], messages)
    assert messages == HI


@pytest.mark.parametrize(
    "template", ["{{ missing.attribute }}", "{% for %}", "{{ 1 / 0 }}", "{{ messages[0] + 1 }}", "{{ x("]
)
def test_a_failing_template_is_one_line(template: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        render_chat(template, HI)
    assert "\n" not in str(caught.value)


BAD_MESSAGES: dict[str, tuple[Any, str]] = {
    "a string": ("Hi", "must be a list"),
    "a dict": ({"role": "user"}, "must be a list"),
    "strings": (["Hi"], "message 0 is 'Hi'"),
    "no role": ([{"content": "Hi"}], "message 0 has the role null"),
    "empty role": ([{"role": "", "content": "Hi"}], "message 0 has the role ''"),
    "no content": ([*HI, {"role": "user"}], "message 1 has the content null"),
    "parts": ([{"role": "user", "content": [{"type": "text"}]}], "message 0 has the content"),
    "an object": ([{"role": "user", "content": "Hi", "extra": object()}], "plain data, not object"),
    "a function": ([{"role": "user", "content": "Hi", "extra": [print]}], "plain data, not builtin"),
    "numbers as keys": ([{"role": "user", "content": "Hi", 1: 2}], "strings as names"),
}


@pytest.mark.parametrize("name", BAD_MESSAGES)
def test_bad_messages_are_named(name: str) -> None:
    messages, expected = BAD_MESSAGES[name]
    with pytest.raises(InvalidInput, match=expected):
        render_chat(CHATML, messages)


def test_deep_and_endless_data_is_refused() -> None:
    deep: Any = []
    deep.append(deep)
    with pytest.raises(InvalidInput, match="nested more than"):
        render_chat(CHATML, HI, tools=deep)


def test_a_call_of_a_tool_needs_no_content() -> None:
    messages = [{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]
    assert render_chat("{{ messages[0].tool_calls[0].name }}", messages) == "f"


def test_a_long_conversation_is_no_runaway() -> None:
    messages = [{"role": "user", "content": "word " * 2000}, {"role": "assistant", "content": "reply " * 2000}] * 200
    assert len(render_chat(R1, messages, bos_token="", eos_token="")) > 4_000_000


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": st.text()}))
)
def test_any_conversation_renders(messages: list[dict[str, str]]) -> None:
    assert render_chat(DEEPSEEK_V2, messages, bos_token="<s>", eos_token="</s>").startswith("<s>")


_PIECES = """{% for i in range(999) %}|{% endfor %}|{{ x }}|{% set x = [x, x] %}|{{ x ~ x }}|{% if x %}|{% endif %}
|{% macro x() %}|{% endmacro %}|{{ x() }}|{{ x.join(x) }}|{{ x * 9**9 }}|{{ messages.items() }}|x|{{ x[0:9] }}
|{{ x.__class__ }}|{% set x = messages %}|{% set x = x + x %}|{{ loop.index }}|{{ x == x }}|{% set x = 'ab' %}"""
PIECES = st.sampled_from([piece.strip() for piece in _PIECES.split("|")])


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES, max_size=12).map("".join) | st.text(max_size=60))
def test_any_template_renders_or_is_refused(template: str) -> None:
    try:
        said = "the chat template: " + render_chat(template, HI)[:MAX_SIZE]
    except InvalidInput as error:
        said = str(error)
    assert said.startswith("the chat template")
