"""The user's rules about what goes where: ordered patterns over task names, a later rule overriding an earlier one.
Knows what patterns and devices mean and what a file of rules may hold; what the rules leave open is for the planner."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.devices.spec import Kind, Topology
from ciuic_runtime.schedulers.graph import TaskGraph
from ciuic_runtime.schedulers.spread import Order, spread
from ciuic_runtime.schedulers.workload import Workload

By = Literal["order", "popularity", "share"]
_KEYS = ("pattern", "on", "by", "shares", "store")


@dataclass(frozen=True, slots=True)
class Rule:
    """Tasks whose name matches `pattern` go on the devices that match `on`, their weights on the disk `store` if given.

    In a pattern, `*` stands for one part of a name, `30-60` for a range of numbers, and a pattern also covers
    everything below what it names: `layers.3` is the whole layer, `layers.*.experts` all routed experts.
    In `on`, `*` stands for anything, `cpu` also for `cpu:0` and `cpu:1`, and a kind (`GPU`, `CPU`) for all usable
    devices of that kind, the fastest memory first. With several devices, `by` says how they share: "order" fills them
    one after the other as far as there is room, "popularity" does so with the most used experts first, "share" splits
    by `shares` of the bytes."""

    pattern: str
    on: tuple[str, ...]
    by: By = "order"
    shares: tuple[float, ...] = ()
    store: str = ""  # "": where it is computed

    def __str__(self) -> str:
        stored = f", stored on {self.store}" if self.store else ""
        return f"{self.pattern} on {', '.join(self.on)}{stored}"

    def matches(self, name: str) -> bool:
        shape, ranges = _shape(self.pattern)
        found = shape.match(name)
        return found is not None and all(int(n) in span for n, span in zip(found.groups(), ranges, strict=True))


@dataclass(frozen=True, slots=True)
class Placement:
    rules: tuple[Rule, ...] = ()

    def put(
        self, pattern: str, on: str | Sequence[str], by: By | None = None, shares: Sequence[float] = (), store: str = ""
    ) -> Placement:
        """This placement with one more rule, which overrides the earlier ones where they meet."""
        if not isinstance(on, (str, Sequence)) or not isinstance(shares, Sequence):
            raise InvalidInput(
                f"placement rule for {pattern}: 'on' must be a name or a list of names, 'shares' a list of numbers"
            )
        devices = (on,) if isinstance(on, str) else tuple(on)
        default: By = "share" if shares else "order"
        rule = Rule(pattern, devices, default if by is None else by, tuple(shares), store)
        _check(rule)
        return Placement((*self.rules, rule))

    @staticmethod
    def from_toml(path: str | Path) -> Placement:
        """Reads `[[put]]` tables with `pattern`, `on` and optionally `by`, `shares` and `store`."""
        try:
            data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise InvalidInput(f"cannot read placement {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise InvalidInput(f"placement {path} is not UTF-8 text; save it as such") from error
        except (ValueError, RecursionError) as error:
            raise InvalidInput(f"placement {path} is not TOML: {error}") from error
        if strange := sorted(set(data) - {"put"}):
            raise InvalidInput(f"placement {path}: {unknown_key(strange[0], ('put',))}; rules are [[put]] tables")
        tables = data.get("put", [])
        if not isinstance(tables, list):
            raise InvalidInput(f"placement {path}: put is {shown(tables)}; rules are [[put]] tables")
        if not tables:
            raise InvalidInput(
                f"placement {path} has no rules; write [[put]] tables with pattern and on, or leave it out"
            )
        placement = Placement()
        for i, table in enumerate(tables):
            placement = placement._put_table(table, f"placement {path}, rule {i + 1}")
        return placement

    def _put_table(self, table: Any, where: str) -> Placement:
        allowed = "a rule has pattern, on, and optionally by, shares and store"
        if not isinstance(table, dict):
            raise InvalidInput(f"{where}: {allowed}; this one is {shown(table)}")
        if strange := sorted(set(table) - set(_KEYS)):
            raise InvalidInput(f"{where}: {unknown_key(strange[0], _KEYS)}; {allowed}")
        if missing := [key for key in ("pattern", "on") if key not in table]:
            raise InvalidInput(f"{where}: {missing[0]} is missing; {allowed}")
        try:
            return self.put(**table)
        except InvalidInput as error:
            raise InvalidInput(f"{where}: {error}") from error

    def resolve(self, graph: TaskGraph, topology: Topology, workload: Workload | None = None) -> dict[str, str]:
        """Row name -> device for everything that the rules decide.

        Rules that leave no choice (one device, or shares) take their room first, the others fill what is left.
        Raises InvalidInput for a rule that matches nothing, is wholly overridden or names no device or disk, and
        OutOfMemory for rules that cannot fit (with the cache and working memory of the workload); each names them."""
        popularity = _popularity(graph)
        orders = []
        for rule, rows in zip(self.rules, self._rows(graph), strict=True):
            _store(rule, topology)
            if rule.by == "popularity":
                rows.sort(key=lambda row: -popularity.get(row, 0.0))
            orders.append(Order(rule, rows, _devices(rule, topology)))
        return spread(orders, graph, topology, workload or Workload())

    def left_on(self, topology: Topology) -> Placement | None:
        """These rules without the devices that are gone, and without those that name nothing else; shares go to what
        is left. For rules that could all be kept once."""
        left = []
        for rule in self.rules:
            there = [i for i, pattern in enumerate(rule.on) if _named(pattern, topology)]
            on, shares = tuple(rule.on[i] for i in there), tuple(rule.shares[i] for i in there if rule.shares)
            if shares and not sum(shares):  # all of it was to be on what is gone
                left.append(replace(rule, on=on, by="order", shares=()))
            elif on:
                left.append(replace(rule, on=on, shares=shares))
        return Placement(tuple(left)) if left else None

    def homes(self, graph: TaskGraph, topology: Topology) -> dict[str, str]:
        """Row name -> the disk that stores its weights, for everything that a rule does not store where it is computed.

        Raises InvalidInput as `resolve` does, and for a store that is no disk of the topology."""
        stores = [_store(rule, topology) for rule in self.rules]
        return {row: stores[i] for i, rows in enumerate(self._rows(graph)) for row in rows if stores[i]}

    def _rows(self, graph: TaskGraph) -> list[list[str]]:
        """For each rule the rows that it decides: it matches them and no later one does."""
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
        decided: list[list[str]] = [[] for _ in self.rules]
        for row in graph.rows:
            if row in last:
                decided[last[row]].append(row)
        return decided


def _check(rule: Rule) -> None:
    where = f"placement rule for {rule.pattern}"
    if not isinstance(rule.pattern, str) or not all(rule.pattern.split(".")):
        raise InvalidInput(
            f"placement pattern {rule.pattern!r} is empty or has an empty part; write e.g. layers.*.experts"
        )
    _shape(rule.pattern)
    if not rule.on or not all(isinstance(d, str) and d for d in rule.on):
        raise InvalidInput(f"{where}: 'on' is {rule.on!r}; it must name at least one device")
    if not isinstance(rule.store, str):
        raise InvalidInput(f"{where}: 'store' is {rule.store!r}; it must name one disk")
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


def _devices(rule: Rule, topology: Topology) -> list[str]:
    found: list[str] = []
    for pattern in rule.on:
        hits = _named(pattern, topology)
        if not hits:
            raise InvalidInput(f"placement rule '{rule}' names {_unfit(pattern, topology)}")
        if rule.by == "share" and len(hits) > 1:
            raise InvalidInput(
                f"placement rule '{rule}': with shares, {pattern} must name one device, not {', '.join(hits)}"
            )
        found += hits
    if rule.by == "share" and len(set(found)) < len(found):
        raise InvalidInput(
            f"placement rule '{rule}': with shares, a device can be named once; it has {', '.join(found)}"
        )
    return list(dict.fromkeys(found))


def _named(pattern: str, topology: Topology) -> list[str]:
    """Devices that can compute: all of a kind, the fastest memory first, or those whose names match."""
    able = topology.compute_devices
    if pattern in get_args(Kind):
        of_kind = [d for d in able if d.kind == pattern]
        return [d.name for d in sorted(of_kind, key=lambda d: (-(d.memory_bandwidth or 0.0), d.name))]
    return [d.name for d in able if fnmatchcase(d.name, pattern) or d.name.startswith(f"{pattern}:")]


def _unfit(pattern: str, topology: Topology) -> str:
    """What a rule names that cannot compute, and what there is instead."""
    able = topology.compute_devices
    kinds = ", ".join(sorted({d.kind for d in able}))
    there = f"devices that can compute are {', '.join(d.name for d in able)}; kinds {kinds}"
    if disks := [d.name for d in topology.by_kind("DISK") if pattern in (d.name, d.kind)]:
        return f'{pattern}, which cannot compute; to store weights there write store = "{disks[0]}"; {there}'
    broken = [d for d in topology.devices if d.can_compute and not d.usable and pattern in (d.name, d.kind)]
    why = f", which is not usable ({broken[0].why_not_usable or 'cannot compute here'})" if broken else ""
    return f"{'kind' if pattern in get_args(Kind) else 'device'} {pattern}{why}; {there}"


def _store(rule: Rule, topology: Topology) -> str:
    """The disk that keeps the weights; "" where they are computed."""
    if not rule.store:
        return ""
    disks = [d.name for d in topology.by_kind("DISK")]
    if rule.store in disks:
        return rule.store
    kind = next((f"a {d.kind}, not a disk" for d in topology.devices if d.name == rule.store), "not here")
    raise InvalidInput(
        f"placement rule '{rule}' stores on {rule.store}, which is {kind}; disks here: {', '.join(disks) or 'none'}; "
        "name one, or leave 'store' out to keep weights where they are computed"
    )


def _popularity(graph: TaskGraph) -> dict[str, float]:
    return {
        page.name: share
        for task in graph
        if task.popularity
        for page, share in zip(task.pages, task.popularity, strict=True)
    }


@lru_cache(maxsize=1024)
def _shape(pattern: str) -> tuple[re.Pattern[str], tuple[range, ...]]:
    """A regular expression with a group for every range of numbers, and those ranges."""
    parts, ranges = [], []
    for part in pattern.split("."):
        if span := re.fullmatch(r"([0-9]{1,5})-([0-9]{1,5})", part):
            low, high = int(span[1]), int(span[2])
            if high < low:
                raise InvalidInput(f"placement pattern {pattern!r}: {part} is not a range such as 30-60")
            ranges.append(range(low, high + 1))
            parts.append("(0|[1-9][0-9]{0,4})")
        else:
            parts.append(re.escape(part).replace(r"\*", "[^.]*"))
    return re.compile(r"\.".join(parts) + r"(?:\..*)?\Z"), tuple(ranges)


def _examples(rows: Iterable[str]) -> str:
    names = list(rows)
    return ", ".join(dict.fromkeys([names[0], names[len(names) // 2], names[-1]]))


def unknown_key(key: Any, allowed: Sequence[str]) -> str:
    near = get_close_matches(key, allowed, n=1, cutoff=0.6)
    return f"unknown key {shown(key)}" + (f", did you mean {near[0]}?" if near else "")


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
