"""The saved page: one file, small enough, that holds what the live one answered and nothing that runs by itself."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
from generated import made
from late_run import EVIL, LATE, Client

from ciuic_runtime.dashboard import save as module
from ciuic_runtime.dashboard.answers import answer
from ciuic_runtime.dashboard.pages import ADDRESSES
from ciuic_runtime.dashboard.save import MOST_BYTES, save_page
from ciuic_runtime.dashboard.source import Source

SAVED = re.compile(r'<script type="application/json" id="saved">(.*?)</script>', re.DOTALL)


def answers(page: bytes) -> dict[str, Any]:
    [found] = SAVED.findall(page.decode())
    saved = json.loads(found)["answers"]
    assert isinstance(saved, dict)
    return saved


def rounded(value: Any) -> Any:
    """As the page has it: to the nanosecond."""
    return json.loads(json.dumps(module._rounded(value)))


def test_it_answers_as_the_live_page_does(run: Source, client: Client) -> None:
    with client(run) as http:
        response = http.get("/dashboard/api/0/save?view=tokens&step=5")
        assert 'attachment; filename="run.json-dashboard.html"' in response.headers["content-disposition"]
        found = answers(response.content)
        assert {
            "summary",
            "steps?most=2000",
            "requests?most=500",
            "memory",
            "placement",
            "why",
            "whatif",
        } <= found.keys()
        assert {f"steps/{n}" for n in range(len(run.recording.steps))} <= found.keys()
        assert f"explain?name={LATE}" in found
        assert any(path.startswith("tiles/") for path in found)
        for path, saved in found.items():
            if path != "whatif":  # says how long it took
                assert saved == rounded(http.get(f"/dashboard/api/0/{path}").json()), path


@pytest.mark.parametrize("name", ["r\u00e9sum\u00e9 1.json", "\u8a18\u9332.json", 'a"b\r\n.json'])
def test_any_file_name_can_be_saved(client: Client, name: str) -> None:
    with client(Source(name, "trace", made(1))) as http:
        for path, end in (("save", "dashboard.html"), ("trace", "trace.json")):
            answer = http.get(f"/dashboard/api/0/{path}")
            assert answer.status_code == 200
            assert re.fullmatch(
                rf'attachment; filename="[\w.-]+-{end}"', answer.headers["content-disposition"], re.ASCII
            )
        assert http.get("/dashboard/api/sources").json()["sources"][0]["name"] == name


def test_it_needs_nothing_else(run: Source) -> None:
    page = save_page(run).decode()
    shell = SAVED.sub("", page)
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=[\"'](?!data:)", shell)
    assert "@import" not in shell
    assert not re.search(r"url\([\"']?(?!data:|#)", shell)
    assert len(page.encode()) <= MOST_BYTES
    assert len(re.findall("<script>", shell)) == sum(path.endswith(".js") for path in ADDRESSES)


def test_names_cannot_break_out_of_the_page() -> None:
    recording = made(2)
    names = [f"</script>{EVIL}" if name == "head" else name for name in recording.names]
    source = Source(f"</script>{EVIL}", "trace", replace(recording, names=names, notes=(EVIL,)))
    page = save_page(source)
    assert EVIL.encode() not in page
    assert answers(page)["summary"]["title"] == source.name


@pytest.mark.parametrize("most", [600_000, 1_000_000])
def test_what_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """The summary and the steps are the last to go."""
    source = Source("long", "trace", made(1, steps=300, events=60))
    whole = answers(save_page(source))
    monkeypatch.setattr(module, "MOST_BYTES", most)
    page = save_page(source, 7)
    found = answers(page)
    assert len(page) <= most
    assert {"summary", "steps?most=2000", "steps/7"} <= found.keys()
    assert len(found) < len(whole)
    assert found["steps/7"] == rounded(answer(source, "steps/7"))
