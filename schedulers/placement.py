"""The user's rules about what goes where: ordered patterns over task names, a later rule overriding an earlier one.
Knows how rules turn into exact placements; what they leave open is for the planner."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from ciuic_runtime.devices.errors import InvalidInput, OutOfMemory
from ciuic_runtime.devices.spec import Topology
from ciuic_runtime.devices.units import format_bytes
from ciuic_runtime.schedulers.graph import Page, TaskGraph
from ciuic_runtime.schedulers.schedule import rows_of

By = Literal["order", "popularity", "share"]


@dataclass(frozen=True, slots=True)
class Rule:
    """Tasks whose name matches `pattern` go on the devices that match `on`.

    In a pattern, `*` stands for one part of a name, `30-60` for a range of numbers, and a pattern also covers
    everything below what it names: `layers.3` is the whole layer, `layers.*.experts` all routed experts.
    With several devices, `by` says how they share: "order" fills them one after the other as far as there is room,
    "popularity" does so with the most used experts first, "share" splits by `shares` of the bytes."""

    pattern: str
    on: tuple[str, ...]
    by: By = "order"
    shares: tuple[float, ...] = ()

    def __str__(self) -> str:
        return f"{self.pattern} on {', '.join(self.on)}"

    def matches(self, name: str) -> bool:
        return _regex(self.pattern).match(name) is not None


@dataclass(frozen=True, slots=True)
class Placement:
    rules: tuple[Rule, ...] = ()

    def put(
        self, pattern: str, on: str | Sequence[str], by: By | None = None, shares: Sequence[float] = ()
    ) -> Placement:
        """This placement with one more rule, which overrides the earlier ones where they meet."""
        devices = (on,) if isinstance(on, str) else tuple(on)
        rule = Rule(pattern, devices, by or ("share" if shares else "order"), tuple(shares))
        _check(rule)
        return Placement((*self.rules, rule))

    @staticmethod
    def from_toml(path: str | Path) -> Placement:
        """Reads `[[put]]` tables with `pattern`, `on` and optionally `by` and `shares`."""
        try:
            data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise InvalidInput(f"cannot read placement {path}: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InvalidInput(f"placement {path} is not TOML: {error}") from error
        if unknown := set(data) - {"put"}:
            raise InvalidInput(f"placement {path}: unknown key {min(unknown)}; rules are [[put]] tables")
        placement = Placement()
        for i, table in enumerate(data.get("put", [])):
            placement = placement._put_table(table, f"placement {path}, rule {i + 1}")
        return placement

    def _put_table(self, table: Any, where: str) -> Placement:
        if (
            not isinstance(table, dict)
            or (set(table) - {"pattern", "on", "by", "shares"})
            or not {"pattern", "on"} <= set(table)
        ):
            raise InvalidInput(f"{where}: a rule has pattern, on, and optionally by and shares; this one has {table!r}")
        try:
            return self.put(**table)
        except TypeError as error:
            raise InvalidInput(f"{where}: {error}") from error

    def resolve(self, graph: TaskGraph, topology: Topology) -> dict[str, str]:
        """Row name -> device for everything that the rules decide.

        Raises InvalidInput for a rule that matches nothing, is wholly overridden or names no device, and OutOfMemory
        for one that cannot fit; each names the rule."""
        last: dict[str, int] = {}
        pages = {name: page for task in graph for name, page in rows_of(task)}
        for i, rule in enumerate(self.rules):
            hits = [name for name in pages if rule.matches(name)]
            if not hits:
                raise InvalidInput(
                    f"placement rule '{rule}' matches nothing in {graph.name}; names are like {_examples(pages)}"
                )
            last.update(dict.fromkeys(hits, i))
        for i, rule in enumerate(self.rules):
            if i not in last.values():
                others = " and ".join(
                    f"'{r}'" for r in self.rules[i + 1 :] if any(r.matches(n) for n in pages if rule.matches(n))
                )
                raise InvalidInput(
                    f"placement rule '{rule}' is wholly overridden by {others}; remove it or reorder them"
                )
        popularity = _popularity(graph)
        room = {d.name: float(d.memory_bytes) for d in topology.compute_devices}
        placed: dict[str, str] = {}
        for i, rule in enumerate(self.rules):
            names = [name for name in pages if last.get(name) == i]
            if rule.by == "popularity":
                names.sort(key=lambda n: -popularity.get(n, 0.0))
            placed.update(_spread(rule, [(n, pages[n]) for n in names], topology, room))
        return placed


def _check(rule: Rule) -> None:
    if not rule.pattern or not all(rule.pattern.split(".")):
        raise InvalidInput(
            f"placement pattern {rule.pattern!r} is empty or has an empty part; write e.g. layers.*.experts"
        )
    if not rule.on or not all(isinstance(d, str) and d for d in rule.on):
        raise InvalidInput(f"placement rule for {rule.pattern}: 'on' must name at least one device")
    if rule.by not in ("order", "popularity", "share"):
        raise InvalidInput(f"placement rule for {rule.pattern}: by {rule.by!r} is not one of order, popularity, share")
    if (rule.by == "share") != bool(rule.shares):
        raise InvalidInput(
            f"placement rule for {rule.pattern}: 'shares' goes with by = \"share\"; give both or neither"
        )
    if rule.shares and (len(rule.shares) != len(rule.on) or min(rule.shares) < 0 or sum(rule.shares) <= 0):
        raise InvalidInput(
            f"placement rule for {rule.pattern}: shares {list(rule.shares)} must be one number >= 0 for each of {', '.join(rule.on)}"
        )


def _spread(rule: Rule, rows: list[tuple[str, Page]], topology: Topology, room: dict[str, float]) -> dict[str, str]:
    devices = _devices(rule, topology)
    if rule.by == "share":
        return _by_share(rule, rows, devices, room)
    placed: dict[str, str] = {}
    for name, page in rows:
        device = next((d for d in devices if page.nbytes <= room[d]), None)
        if device is None:
            left = ", ".join(f"{format_bytes(max(room[d], 0))} on {d}" for d in devices)
            raise OutOfMemory(
                f"placement rule '{rule}' cannot fit: {name} needs {format_bytes(page.nbytes)} and {left} is left; "
                "name more devices or fewer tasks"
            )
        room[device] -= page.nbytes
        placed[name] = device
    return placed


def _by_share(rule: Rule, rows: list[tuple[str, Page]], devices: list[str], room: dict[str, float]) -> dict[str, str]:
    """Contiguous runs whose bytes are as near to the shares as whole pages allow."""
    total, whole = sum(page.nbytes for _, page in rows), sum(rule.shares)
    ends, run = [], 0.0
    for share in rule.shares:
        run += share / whole * total
        ends.append(run)
    placed, done = {}, 0.0
    for name, page in rows:
        middle = done + page.nbytes / 2
        device = devices[next((i for i, end in enumerate(ends) if middle <= end), len(ends) - 1)]
        placed[name], done = device, done + page.nbytes
        room[device] -= page.nbytes
        if room[device] < 0:
            raise OutOfMemory(
                f"placement rule '{rule}' cannot fit: its share on {device} is {format_bytes(-room[device])} too large"
            )
    return placed


def _devices(rule: Rule, topology: Topology) -> list[str]:
    names = [d.name for d in topology.compute_devices]
    found: list[str] = []
    for pattern in rule.on:
        hits = [name for name in names if fnmatchcase(name, pattern)]
        if not hits:
            raise InvalidInput(
                f"placement rule '{rule}' names device {pattern}; devices that can compute are {', '.join(names)}"
            )
        if rule.by == "share" and len(hits) > 1:
            raise InvalidInput(
                f"placement rule '{rule}': with shares, {pattern} must name one device, not {', '.join(hits)}"
            )
        found += hits
    return list(dict.fromkeys(found))


def _popularity(graph: TaskGraph) -> dict[str, float]:
    return {
        page.name: share
        for task in graph
        if task.popularity
        for page, share in zip(task.pages, task.popularity, strict=True)
    }


@lru_cache(maxsize=1024)
def _regex(pattern: str) -> re.Pattern[str]:
    parts = []
    for part in pattern.split("."):
        if span := re.fullmatch(r"(\d+)-(\d+)", part):
            low, high = int(span[1]), int(span[2])
            if high < low or high - low > 100_000:
                raise InvalidInput(f"placement pattern {pattern!r}: {part} is not a range such as 30-60")
            parts.append("(?:" + "|".join(map(str, range(low, high + 1))) + ")")
        else:
            parts.append(re.escape(part).replace(r"\*", "[^.]*"))
    return re.compile(r"\.".join(parts) + r"(?:\..*)?\Z")


def _examples(pages: dict[str, Page]) -> str:
    names = list(pages)
    return ", ".join(dict.fromkeys([names[0], names[len(names) // 2], names[-1]]))
