"""Thinking and answer are told apart, however the text is cut into pieces, and nothing is lost or shown too early."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ciuic_runtime.server.reasoning import BEGIN, END, ReasoningParser


def split(pieces: list[str], inside: bool = False) -> tuple[str, str]:
    parser = ReasoningParser(inside)
    parts = [*map(parser.push, pieces), parser.finish()]
    return "".join(thought for thought, _ in parts), "".join(answer for _, answer in parts)


def of_the_whole(text: str, inside: bool) -> tuple[str, str]:
    """What is promised, said of the text as a whole."""
    form = r"\n*(?P<thought>.*?)(\n*</think>\n*(?P<answer>.*))?"
    found = re.fullmatch(form if inside else r"\s*<think>" + form, text, re.DOTALL)
    return (found["thought"], found["answer"] or "") if found else ("", text)


@pytest.mark.parametrize(
    ("text", "thought", "answer"),
    [
        ("<think>\nIt is 2.\n</think>\n\nTwo.", "It is 2.", "Two."),
        ("<think>a\n\nb</think>c\n", "a\n\nb", "c\n"),
        ("\n <think>a</think>", "a", ""),
        ("<think>\n\n</think>\n\nTwo.", "", "Two."),
        ("<think>a", "a", ""),
        ("<think>a\n", "a\n", ""),
        ("<think>a</thin", "a</thin", ""),
        ("<think>a <think> b</think>c</think>d", "a <think> b", "c</think>d"),
        ("Two.", "", "Two."),
        ("Two. <think>a</think>", "", "Two. <think>a</think>"),
        ("a</think>b", "", "a</think>b"),
        ("\n\n<thin", "", "\n\n<thin"),
        ("", "", ""),
    ],
)
def test_an_answer_is_split(text: str, thought: str, answer: str) -> None:
    assert split([text]) == (thought, answer)


@pytest.mark.parametrize(
    ("text", "thought", "answer"),
    [
        ("\nIt is 2.\n</think>\n\nTwo.", "It is 2.", "Two."),
        ("</think>Two.", "", "Two."),
        ("\n\n", "", ""),
        ("It is", "It is", ""),
    ],
)
def test_a_template_may_have_opened_the_thinking(text: str, thought: str, answer: str) -> None:
    assert split([text], inside=True) == (thought, answer)


parts = st.sampled_from([BEGIN, END, "\n", "\n\n", " ", "a", "Two.", "<", "</", "<think", "</think", "think>", "é"])
pieces = st.lists(st.lists(parts, max_size=4).map("".join), max_size=8)


@given(pieces, st.booleans())
@example(["<thi", "nk>", "\n", "\na\n", "\n</", "think>", "\n", "\nb"], False)
def test_any_cutting_gives_what_the_whole_gives(cut: list[str], inside: bool) -> None:
    text = "".join(cut)
    assert split(cut, inside) == split(list(text), inside) == of_the_whole(text, inside)


@given(pieces, st.booleans())
def test_what_was_shown_stays_and_what_can_be_shown_is(cut: list[str], inside: bool) -> None:
    """Nothing but what could be part of a mark, or of the whitespace around one, is held back."""
    parser, text, shown = ReasoningParser(inside), "", ["", ""]
    for piece in cut:
        text += piece
        for i, new in enumerate(parser.push(piece)):
            shown[i] += new
        for now, end in zip(shown, of_the_whole(text, inside), strict=True):
            assert end.startswith(now)
            held = end[len(now) :]
            assert re.fullmatch(r"\s*(<(t(h(i(nk?)?)?)?)?)?|\n*(<(/(t(h(i(nk?)?)?)?)?)?)?", held), repr(held)
