"""The chat page in a browser: it streams, stops, says what is wrong, keeps to its server, and shows text as text."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from chromium import CHROMIUM
from running import Running

pytestmark = [pytest.mark.browser, pytest.mark.skipif(not CHROMIUM, reason="no chromium here")]
EVIL = '<img src=x onerror="window.hit = 1"><script>window.hit = 1</script>'
Serve = Callable[..., AbstractContextManager[Running]]


@pytest.fixture
def smol_server(serve: Serve, smollm2: Path) -> Iterator[Running]:
    with serve(smollm2, llm={"max_model_len": 1024}, model_name="smol") as server:
        yield server


def opened(browser: Any, url: str, width: int = 1200, **context: Any) -> tuple[Any, list[str]]:
    """The page, and what went wrong or was asked of other hosts."""
    page = browser.new_context(viewport={"width": width, "height": 800}, **context).new_page()
    page.set_default_timeout(60_000)
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(f"{message.text} {message.location}"))
    page.on("request", lambda request: wrong.append(request.url) if not request.url.startswith(url) else None)
    page.goto(url)
    return page, wrong


def ask(page: Any, text: str, **settings: object) -> None:
    for name, value in settings.items():
        page.eval_on_selector(f"#{name}", "(field, value) => { field.value = value; }", str(value))
    page.fill("#text", text)
    page.press("#text", "Enter")


def answered(page: Any) -> str:
    page.wait_for_selector("#send:visible")
    return str(page.locator(".assistant .text").last.inner_text())


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def answers_with(page: Any, *events: object, ending: str = "data: [DONE]\n\n") -> None:
    """The page gets these instead of the server's answer."""
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + ending
    page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=body))


def delta(reason: str | None = None, **parts: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": parts, "finish_reason": reason}], "usage": None}


def test_an_answer_streams_in_and_the_conversation_survives_a_reload(browser: Any, smol_server: Running) -> None:
    page, wrong = opened(browser, smol_server.url)
    until(lambda: page.inner_text("#model") == smol_server.model)
    ask(page, "Write a story about a cat and a dog.", max_tokens=60, seed=5)
    page.wait_for_selector("#stop:visible")
    seen = set()
    while page.is_visible("#stop"):
        seen.add(page.locator(".assistant .text").inner_text())
    whole = answered(page)
    assert len(seen) > 5, "piece by piece"
    assert all(whole.startswith(text) for text in seen)
    note = page.inner_text(".note:visible")
    assert note.startswith("60 tokens · ")
    assert " tokens/s · first after " in note
    assert note.endswith("cut off at the most tokens there may be")
    ask(page, "What is it about?")
    answered(page)

    def texts() -> list[str]:
        return list(page.locator("#messages .text").all_inner_texts())

    before = texts()
    assert len(before) == 4
    assert before[1] == whole
    page.reload()
    assert texts() == before
    assert page.input_value("#seed") == "5"
    assert note in page.locator(".note").all_inner_texts()
    page.click("#new")
    page.reload()
    assert texts() == []
    assert page.is_visible("#empty")
    assert wrong == []


@pytest.mark.parametrize("how", ["button", "key"])
def test_an_answer_is_stopped_and_what_came_is_kept(browser: Any, smol_server: Running, how: str) -> None:
    page, wrong = opened(browser, smol_server.url)
    ask(page, "Tell me a long story.", max_tokens=900)
    until(lambda: len(page.locator(".assistant .text").inner_text()) > 20)
    page.click("#stop") if how == "button" else page.keyboard.press("Escape")
    text = answered(page)
    until(lambda: smol_server.idle)
    assert page.inner_text(".note:visible").endswith(" · stopped")
    ask(page, "Say no more than yes.", max_tokens=5)
    assert answered(page)
    assert page.locator(".assistant .text").first.inner_text() == text
    assert wrong == []


def test_a_new_conversation_begins_while_an_answer_comes(browser: Any, smol_server: Running) -> None:
    page, wrong = opened(browser, smol_server.url)
    ask(page, "Tell me a long story.", max_tokens=900)
    page.wait_for_selector(".assistant")
    page.click("#new")
    page.wait_for_selector("#send:visible")
    until(lambda: smol_server.idle)
    assert page.locator("#messages li").count() == 0
    assert page.input_value("#text") == ""
    assert wrong == []


def test_enter_sends_and_shift_enter_begins_a_line(browser: Any, tiny_server: Running) -> None:
    page, wrong = opened(browser, tiny_server.url)
    answers_with(page, delta(content="Good."), delta("stop"))
    page.press("#text", "Enter")
    page.fill("#text", " ")
    page.press("#text", "Enter")
    assert page.locator("#messages li").count() == 0, "nothing to send"
    page.fill("#text", "one")
    page.press("#text", "Shift+Enter")
    page.type("#text", "two")
    page.press("#text", "Enter")
    assert answered(page) == "Good."
    assert page.locator(".user .text").inner_text() == "one\ntwo"
    assert wrong == []


def test_settings_and_the_whole_conversation_are_sent(browser: Any, tiny_server: Running) -> None:
    page, wrong = opened(browser, tiny_server.url)
    answers_with(page, delta(reasoning_content="Hm."), delta(content="Good."), delta("stop"))
    sent: list[Any] = []
    page.on("request", lambda r: sent.append(r.post_data_json) if r.method == "POST" else None)
    ask(page, "first", system="Be brief.", temperature=0, max_tokens=9, seed=4)
    answered(page)
    ask(page, "second", temperature="", max_tokens="", seed="")
    answered(page)
    until(lambda: len(sent) == 2)
    common = {"model": tiny_server.model, "stream": True, "stream_options": {"include_usage": True}}
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "first"}]
    assert sent[0] == {**common, "temperature": 0, "max_tokens": 9, "seed": 4, "messages": said}
    said += [{"role": "assistant", "content": "Good."}, {"role": "user", "content": "second"}]
    assert sent[1] == {**common, "messages": said}, "what is left empty is the server's choice; thoughts are not told"
    ask(page, "third", temperature=3)
    assert page.inner_text("#error").startswith("Temperature: ")
    assert page.input_value("#text") == "third"
    assert len(sent) == 2
    assert wrong == []


def test_thoughts_are_folded(browser: Any, tiny_server: Running) -> None:
    page, wrong = opened(browser, tiny_server.url)
    answers_with(page, delta(reasoning_content="It is "), delta(reasoning_content="2."), delta("stop", content="Two."))
    ask(page, "1 + 1?")
    assert answered(page) == "Two."
    thoughts = page.locator(".assistant .thoughts")
    assert not thoughts.is_visible()
    page.click(".assistant summary")
    assert thoughts.inner_text() == "It is 2."
    assert wrong == []


@pytest.mark.parametrize("where", ["question", "answer", "thoughts", "error"])
def test_nothing_that_is_said_becomes_part_of_the_page(browser: Any, tiny_server: Running, where: str) -> None:
    page, wrong = opened(browser, tiny_server.url)
    events = {
        "answer": [delta("stop", content=EVIL)],
        "thoughts": [delta("stop", reasoning_content=EVIL, content="Good.")],
        "error": [{"error": {"message": EVIL}}],
    }
    answers_with(page, *events.get(where, [delta("stop", content="Good.")]))
    ask(page, EVIL if where == "question" else "hello")
    page.wait_for_selector("#send:visible")
    place = {
        "question": ".user .text",
        "answer": ".assistant .text",
        "thoughts": ".assistant .thoughts",
        "error": "#error",
    }
    assert EVIL in page.locator(place[where]).text_content()
    page.wait_for_timeout(100)
    for _ in range(2):
        assert page.locator("img, body script").count() == 0
        assert page.evaluate("window.hit") is None
        page.reload()
    assert wrong == []


def test_its_policy_runs_no_other_script(browser: Any, tiny_server: Running) -> None:
    page, _ = opened(browser, tiny_server.url)
    page.evaluate(
        "html => document.body.append(document.createRange().createContextualFragment(html))", EVIL + "<p id=in>in</p>"
    )
    assert page.is_visible("#in")
    page.wait_for_timeout(100)
    assert page.evaluate("window.hit") is None


def test_a_key_is_asked_for_and_kept_in_the_tab_only(browser: Any, serve: Serve, tiny_chat: Path) -> None:
    with serve(api_keys=("sesame",)) as server:
        page, _ = opened(browser, server.url)
        for key in ("wrong", "sesame"):
            page.wait_for_selector("#key:visible")
            page.fill("#key-text", key)
            page.press("#key-text", "Enter")
            if key == "wrong":
                page.wait_for_selector("#error:has-text('does not know this API key')")
        until(lambda: page.inner_text("#model") == server.model)
        assert not page.is_visible("#key")
        ask(page, "hello", max_tokens=3)
        answered(page)
        assert page.inner_text(".note:visible").startswith("3 tokens")
        assert page.evaluate("sessionStorage.getItem('ciuic.key')") == "sesame"
        assert page.evaluate("localStorage.length + document.cookie.length") == 0
        assert "sesame" not in page.url


def test_a_question_that_needed_a_key_is_sent_when_it_is_there(browser: Any, serve: Serve) -> None:
    with serve(api_keys=("sesame",)) as server:
        page, _ = opened(browser, server.url)
        page.wait_for_selector("#key:visible")
        ask(page, "hello", max_tokens=3)
        page.fill("#key-text", "sesame")
        page.press("#key-text", "Enter")
        page.wait_for_selector(".assistant .note:visible")
        assert page.locator(".user .text").all_inner_texts() == ["hello"]


def test_a_model_without_a_template_is_told_of(browser: Any, serve: Serve, tiny_int4: Path) -> None:
    with serve(tiny_int4) as server:
        page, _ = opened(browser, server.url)
        ask(page, "hello", max_tokens=3)
        page.wait_for_selector("#error:visible")
        assert page.inner_text("#error").startswith("This model cannot chat: it has no chat template")
        assert page.input_value("#text") == "hello"
        assert page.locator("#messages li").count() == 0


def test_a_server_that_goes_away_is_told_of(browser: Any, serve: Serve, smollm2: Path) -> None:
    with serve(smollm2, llm={"max_model_len": 1024}) as server:
        page, _ = opened(browser, server.url)
        ask(page, "Tell me a long story.", max_tokens=900)
        until(lambda: len(page.locator(".assistant .text").inner_text()) > 20)
    page.wait_for_selector("#error:visible")
    assert "shut down" in page.inner_text("#error")
    assert page.inner_text(".note:visible").endswith(" · broken off")
    assert len(page.locator(".assistant .text").inner_text()) > 20
    ask(page, "Still there?")
    page.wait_for_selector("#error:has-text('The server cannot be reached')")
    assert page.input_value("#text") == "Still there?"


@pytest.mark.parametrize(
    ("status", "headers", "says"),
    [
        (429, {"retry-after": "7"}, "The server is busy. Try again in 7 seconds. (It is so.)"),
        (503, {}, "The server is shutting down and takes nothing new. (It is so.)"),
        (400, {}, "It is so."),
    ],
)
def test_refusals_are_told_in_plain_words(
    browser: Any, tiny_server: Running, status: int, headers: dict[str, str], says: str
) -> None:
    page, _ = opened(browser, tiny_server.url)
    body = {"error": {"message": "it is so"}}
    page.route(
        "**/v1/chat/completions", lambda route: route.fulfill(status=status, headers=headers, body=json.dumps(body))
    )
    ask(page, "hello")
    page.wait_for_selector("#error:visible")
    assert page.inner_text("#error") == says
    assert page.input_value("#text") == "hello"


def test_a_stream_without_its_end_is_told_of(browser: Any, tiny_server: Running) -> None:
    page, _ = opened(browser, tiny_server.url)
    answers_with(page, delta(content="So far"), ending="")
    ask(page, "hello")
    assert answered(page) == "So far"
    assert page.inner_text("#error").startswith("The connection broke before the answer was whole")


@pytest.mark.parametrize("width", [320, 390, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_phones_and_both_colour_schemes(browser: Any, tiny_server: Running, width: int, scheme: str) -> None:
    page, wrong = opened(browser, tiny_server.url, width, color_scheme=scheme)
    answers_with(page, delta("stop", content="x" * 500))
    page.click("#settings summary")
    ask(page, "y" * 500)
    answered(page)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate("document.getElementById('scroll').scrollWidth") <= width
    for name in ("header button", "#send", "#text", "#seed"):
        box = page.locator(name).bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
        assert box["y"] + box["height"] <= 800
    light = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert light == (scheme == "light")
    assert wrong == []


def test_fields_have_names_and_the_answer_is_read_out_when_it_is_whole(browser: Any, tiny_server: Running) -> None:
    page, wrong = opened(browser, tiny_server.url)
    page.click("#settings summary")
    for name in ("System message", "Temperature", "Most new tokens", "Seed", "Your message"):
        assert page.get_by_label(name).is_visible()
    unnamed = "[...document.querySelectorAll('input, textarea')].filter(field => !field.labels.length).length"
    assert page.evaluate(unnamed) == 0
    answers_with(page, delta("stop", content="Good."))
    ask(page, "hello")
    answered(page)
    log = page.get_by_role("log", name="Conversation")
    assert log.get_attribute("aria-live") == "polite"
    assert log.get_attribute("aria-busy") == "false"
    assert page.evaluate("document.activeElement.id") == "text"
    assert wrong == []


def test_without_scripts_it_says_what_there_is(browser: Any, tiny_server: Running) -> None:
    page, wrong = opened(browser, tiny_server.url, java_script_enabled=False)
    assert "needs JavaScript" in page.inner_text("noscript")
    assert wrong == []
