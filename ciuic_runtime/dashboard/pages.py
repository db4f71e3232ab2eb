"""The web page's files, and at which addresses they are.
Knows the folder `page/`; its addresses are open to everybody, since they hold nothing of a model or a run."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).with_name("page")
VIEWS = ("tokens", "whatif", "placement", "memory", "why")
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}

FILES = {
    f"/dashboard/page/{file.relative_to(FOLDER).as_posix()}": file
    for file in sorted(FOLDER.rglob("*"))
    if file.suffix in TYPES and file.name != "index.html"
}
INDEX = FOLDER / "index.html"
# /dashboard and every view are the one page, which reads its address.
ADDRESSES = {**FILES, **{path: INDEX for path in ("/dashboard", *(f"/dashboard/{view}" for view in VIEWS))}}

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; style-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; "
        "form-action 'self'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
