"""Reads a page as a browser would, far enough to compare its figures."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

VOID = {"meta", "input", "br", "link", "img"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    inside: list[Element | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return " ".join("".join(x if isinstance(x, str) else x.text for x in self.inside).split())

    def all(self, tag: str, **attributes: str) -> list[Element]:
        below = [e for x in self.inside if isinstance(x, Element) for e in (x, *x.all("*"))]
        wanted = attributes.items()
        return [e for e in below if tag in ("*", e.tag) and wanted <= e.attributes.items()]

    def one(self, tag: str, **attributes: str) -> Element:
        (found,) = self.all(tag, **attributes)
        return found

    @property
    def values(self) -> list[float]:
        """The exact figures in it, which people see rounded."""
        return [float(e.attributes["value"]) for e in self.all("data")]

    @property
    def classes(self) -> list[str]:
        return self.attributes.get("class", "").split()


class Page(HTMLParser):
    """A tree; every element must be closed where it was opened."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.root = Element("page", {})
        self._open = [self.root]
        self.feed(text)
        self.close()
        assert self._open == [self.root], [e.tag for e in self._open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"<{tag}> has an attribute twice"
        element = Element(tag, {key: value or "" for key, value in attrs})
        self._open[-1].inside.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self._open[-1].tag == tag, f"</{tag}> in <{self._open[-1].tag}>"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        self._open[-1].inside.append(data)

    def id(self, name: str) -> Element:
        (found,) = [e for e in self.root.all("*") if e.attributes.get("id") == name]
        return found

    def has(self, name: str) -> bool:
        return any(e.attributes.get("id") == name for e in self.root.all("*"))

    def rows(self, table: str) -> list[Element]:
        return self.id(table).one("tbody").all("tr")

    def bars(self, label: str) -> dict[str, dict[str, float]]:
        """Bar -> part -> value, as the legends have them."""
        return {
            row.attributes[f"data-{label}"]: {
                item.text.removesuffix(item.one("data").text).strip(): item.values[0] for item in row.all("li")
            }
            for row in self.root.all("div")
            if f"data-{label}" in row.attributes
        }

    @property
    def charts(self) -> list[dict[str, Any]]:
        found = json.loads("".join(x for x in self.id("traces").inside if isinstance(x, str)))
        assert isinstance(found, list)
        return found
