"""The dashboard as one HTML file that opens anywhere: the page's files inlined, and the answers that it would ask for.
Knows how much there is room for; what is left out, the page says when it is asked."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import numpy as np

from ciuic_runtime.dashboard.answers import MOST_BARS, MOST_REQUESTS, answer
from ciuic_runtime.dashboard.pages import FILES, INDEX
from ciuic_runtime.dashboard.source import Source
from ciuic_runtime.dashboard.timeline import FINEST
from ciuic_runtime.devices.errors import CiuicError
from ciuic_runtime.schedulers.recording import NONE, WAIT
from ciuic_runtime.server.errors import ApiError

MOST_BYTES = 5_000_000
MOST_STEPS = 50  # the slowest ones, beside the one that is looked at
COARSE = 16  # tiles: levels at which the whole recording is so few are all kept
UNQUOTED = "-_.!~*'()"  # by encodeURIComponent in the page
_STYLE = re.compile(r'<link rel="stylesheet" href="([^"]+)">')
_SCRIPT = re.compile(r'<script src="([^"]+)" defer></script>')


def save_page(source: Source, step: int | None = None, at: str = "") -> bytes:
    """The whole page, which opens at the address `at` ("#/tokens?step=12"). Of what does not fit, first the finest
    tiles and the fastest steps are left out."""
    frame = _frame()
    left = MOST_BYTES - len(frame.encode()) - len(at) - 100
    answers: dict[str, str] = {}
    with source.lock:
        for path in _paths(source, step):
            text = _answer(source, path)
            if text is None:
                continue
            size = len(text.encode()) + len(json.dumps(path)) + 2
            if size <= left:
                answers[path], left = text, left - size
    body = ",".join(f"{json.dumps(path)}:{text}" for path, text in answers.items())
    saved = f'<script type="application/json" id="saved">{{"at":{_in_html(at)},"answers":{{{body}}}}}</script>'
    return frame.replace("<!--saved-->", saved, 1).encode()


def _answer(source: Source, path: str) -> str | None:
    """As JSON that may stand in HTML; None where the source has no such thing."""
    try:
        found = _whatif(source) if path == "whatif" else answer(source, path)
    except CiuicError:
        return None
    return _in_html(_rounded(found))


def _whatif(source: Source) -> dict[str, Any]:
    return source.whatif.choices()


def _in_html(value: Any) -> str:
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _rounded(value: Any) -> Any:
    """Times to the nanosecond, so that each is a few digits."""
    if isinstance(value, float):
        return round(value, 9) if abs(value) < 1e6 else value
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def _paths(source: Source, step: int | None) -> Iterator[str]:
    """What the page may ask for, the most important first."""
    yield from ("summary", f"steps?most={MOST_BARS}", f"requests?most={MOST_REQUESTS}", "why", "placement", "whatif")
    yield "memory"
    recording = source.recording
    first = recording.first_step
    known = range(first, first + len(recording.steps))
    slowest = [first + place for place in source.shown.strip.slowest(MOST_STEPS)]
    chosen = list(dict.fromkeys([*([step] if step is not None and step in known else []), *slowest]))
    yield from (f"steps/{number}" for number in chosen)
    yield from (f"explain?name={quote(page, safe=UNQUOTED)}" for page in _late_pages(source))
    end = source.shown.timeline.end
    top = max(FINEST, end.bit_length())
    coarse = [level for level in range(top, FINEST - 1, -1) if (end >> level) < COARSE]
    for level in coarse:
        yield from (f"tiles/{level}/{index}" for index in range((end >> level) + 1))
    for level in range(min(coarse, default=FINEST) - 1, FINEST - 1, -1):
        for number in chosen:
            info = recording.steps[number - first]
            span = range(int(info.start * 1e9) >> level, (min(end, int(info.end * 1e9)) >> level) + 1)
            if len(span) <= COARSE:
                yield from (f"tiles/{level}/{index}" for index in span)


def _late_pages(source: Source) -> list[str]:
    """Those that were waited for longest: people ask why they are where they are."""
    recording = source.recording
    waits = recording.rows[(recording.rows["kind"] == WAIT) & (recording.rows["cause"] != NONE)]
    longest = waits[np.argsort(waits["start"] - waits["end"], kind="stable")[:MOST_STEPS]]
    return list(dict.fromkeys(recording.names[n] for n in longest["cause"].tolist()))


def _frame() -> str:
    """index.html with its styles and scripts in it, and a place for the answers before the scripts."""
    page = INDEX.read_text(encoding="utf-8")
    styles = _STYLE.sub(lambda match: f"<style>\n{_text(match[1])}\n</style>", page)
    scripts = [match[1] for match in _SCRIPT.finditer(styles)]
    without = _SCRIPT.sub("", styles)
    inlined = "\n".join(f"<script>\n{_script(_text(path))}\n</script>" for path in scripts)
    head, closing, rest = without.rpartition("</body>")
    return f"{head}<!--saved-->\n{inlined}\n{closing}{rest}"


def _text(path: str) -> str:
    if path not in FILES:
        raise ApiError(500, f"the page wants {path}, which this installation lacks; install it again")
    return FILES[path].read_text(encoding="utf-8")


def _script(text: str) -> str:
    return text.replace("</script", "<\\/script")
