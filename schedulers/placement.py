"""The user's rules about what goes where: ordered patterns over task names, a later rule overriding an earlier one.
Knows how rules turn into exact placements; what they leave open is for the planner."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

from ciuic_runtime.devices.errors import InvalidInput, OutOfMemory
from ciuic_runtime.devices.spec import Topology
from ciuic_runtime.devices.units import format_bytes
from ciuic_runtime.schedulers.draft import ScheduleDraft
from ciuic_runtime.schedulers.graph import TaskGraph
from ciuic_runtime.schedulers.workload import Workload

By = Literal["order", "popularity", "share"]
_KEYS = ("pattern", "on", "by", "shares")


@dataclass(frozen=True, slots=True)
class Rule:
    """Tasks whose name matches `pattern` go on the devices that match `on`.

    In a pattern, `*` stands for one part of a name, `30-60` for a range of numbers, and a pattern also covers
    everything below what it names: `layers.3` is the whole layer, `layers.*.experts` all routed experts.
    In `on`, `*` stands for anything, and `cpu` also for `cpu:0` and `cpu:1`. With several devices, `by` says how they
    share: "order" fills them one after the other as far as there is room, "popularity" does so with the most used
    experts first, "share" splits by `shares` of the bytes."""

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
        if not isinstance(on, (str, Sequence)) or not isinstance(shares, Sequence):
            raise InvalidInput(
                f"placement rule for {pattern}: 'on' must be a name or a list of names, 'shares' a list of numbers"
            )
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
        tables = data.get("put", [])
        if not isinstance(tables, list):
            raise InvalidInput(f"placement {path}: put is {tables!r}; rules are [[put]] tables")
        placement = Placement()
        for i, table in enumerate(tables):
            placement = placement._put_table(table, f"placement {path}, rule {i + 1}")
        return placement

    def _put_table(self, table: Any, where: str) -> Placement:
        if not isinstance(table, dict) or set(table) - set(_KEYS) or not {"pattern", "on"} <= set(table):
            raise InvalidInput(f"{where}: a rule has pattern, on, and optionally by and shares; this one is {table!r}")
        try:
            return self.put(**table)
        except InvalidInput as error:
            raise InvalidInput(f"{where}: {error}") from error

    def resolve(self, graph: TaskGraph, topology: Topology, workload: Workload | None = None) -> dict[str, str]:
        """Row name -> device for everything that the rules decide.

        Raises InvalidInput for a rule that matches nothing, is wholly overridden or names no device, and OutOfMemory
        for one that cannot fit (with the cache and working memory of the workload); each names the rule."""
        decided = self._last_rule(graph)
        popularity = _popularity(graph)
        draft = ScheduleDraft(graph, topology, workload or Workload())
        for i, rule in enumerate(self.rules):
            rows = [row for row, last in decided.items() if last == i]
            if rule.by == "popularity":
                rows.sort(key=lambda row: -popularity.get(row, 0.0))
            spread = _by_share if rule.by == "share" else _fill
            spread(rule, rows, _devices(rule, topology), draft)
        return draft.where

    def _last_rule(self, graph: TaskGraph) -> dict[str, int]:
        """Row name -> the last rule that matches it, in the order of the graph."""
        hits = [{row for row in graph.rows if rule.matches(row)} for rule in self.rules]
        for i, (rule, mine) in enumerate(zip(self.rules, hits, strict=True)):
            if not mine:
                raise InvalidInput(
                    f"placement rule '{rule}' matches nothing in {graph.name}; names are like {_examples(graph.rows)}"
                )
            later = range(i + 1, len(hits))
            if mine <= set().union(*(hits[j] for j in later)):
                others = " and ".join(f"'{self.rules[j]}'" for j in later if hits[j] & mine)
                raise InvalidInput(
                    f"placement rule '{rule}' is wholly overridden by {others}; remove it or reorder them"
                )
        last = {row: i for i, mine in enumerate(hits) for row in mine}
        return {row: last[row] for row in graph.rows if row in last}


def _check(rule: Rule) -> None:
    where = f"placement rule for {rule.pattern}"
    if not isinstance(rule.pattern, str) or not all(rule.pattern.split(".")):
        raise InvalidInput(
            f"placement pattern {rule.pattern!r} is empty or has an empty part; write e.g. layers.*.experts"
        )
    _regex(rule.pattern)
    if not rule.on or not all(isinstance(d, str) and d for d in rule.on):
        raise InvalidInput(f"{where}: 'on' is {rule.on!r}; it must name at least one device")
    if rule.by not in get_args(By):
        raise InvalidInput(f"{where}: by {rule.by!r} is not one of {', '.join(get_args(By))}")
    if (rule.by == "share") != bool(rule.shares):
        raise InvalidInput(f"{where}: 'shares' goes with by = \"share\"; give both or neither")
    if rule.shares and not (
        len(rule.shares) == len(rule.on)
        and all(isinstance(s, (int, float)) and not isinstance(s, bool) and 0 <= s <= 1e9 for s in rule.shares)
        and sum(rule.shares) > 0
    ):
        raise InvalidInput(
            f"{where}: shares {list(rule.shares)} must be one number >= 0 for each of {', '.join(rule.on)}"
        )


def _fill(rule: Rule, rows: list[str], devices: list[str], draft: ScheduleDraft) -> None:
    """One device after the other; what comes after a full device's last row does not go back to it."""
    at = 0
    for row in rows:
        while at < len(devices) and draft.row_need(row, devices[at]) > draft.room[devices[at]]:
            at += 1
        if at == len(devices):
            left = ", ".join(f"{format_bytes(max(draft.room[d], 0))} on {d}" for d in devices)
            raise OutOfMemory(
                f"placement rule '{rule}' cannot fit: {row} needs {format_bytes(draft.row_need(row, devices[-1]))} "
                f"with its cache; beside working memory there is left {left}; name more devices or fewer tasks"
            )
        draft.put(row, devices[at])


def _by_share(rule: Rule, rows: list[str], devices: list[str], draft: ScheduleDraft) -> None:
    """Contiguous runs whose bytes are as near to the shares as whole pages allow."""
    sizes = [draft.graph.rows[row].nbytes for row in rows]
    ends, run = [], 0.0
    for share in rule.shares:
        run += share / sum(rule.shares) * sum(sizes)
        ends.append(run)
    done = 0.0
    for row, size in zip(rows, sizes, strict=True):
        device = devices[next((i for i, end in enumerate(ends) if done + size / 2 <= end), len(ends) - 1)]
        draft.put(row, device)
        done += size
    for device in devices:
        if draft.room[device] < 0:
            raise OutOfMemory(
                f"placement rule '{rule}' cannot fit: its share on {device} is "
                f"{format_bytes(-draft.room[device])} too large, with cache and working memory; change the shares"
            )


def _devices(rule: Rule, topology: Topology) -> list[str]:
    names = [d.name for d in topology.compute_devices]
    found: list[str] = []
    for pattern in rule.on:
        hits = [name for name in names if fnmatchcase(name, pattern) or name.startswith(f"{pattern}:")]
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
        if span := re.fullmatch(r"([0-9]{1,5})-([0-9]{1,5})", part):
            low, high = int(span[1]), int(span[2])
            if high < low:
                raise InvalidInput(f"placement pattern {pattern!r}: {part} is not a range such as 30-60")
            parts.append("(?:" + "|".join(map(str, range(low, high + 1))) + ")")
        else:
            parts.append(re.escape(part).replace(r"\*", "[^.]*"))
    return re.compile(r"\.".join(parts) + r"(?:\..*)?\Z")


def _examples(rows: Iterable[str]) -> str:
    names = list(rows)
    return ", ".join(dict.fromkeys([names[0], names[len(names) // 2], names[-1]]))
