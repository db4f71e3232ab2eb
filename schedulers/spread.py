"""How placement rules share devices: what each takes, what is left, and what would do where one does not fit.
Knows which rows a rule decides and on which devices; what its patterns mean is `placement.py`'s business."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from typing import TYPE_CHECKING

from ciuic_runtime.devices.errors import OutOfMemory
from ciuic_runtime.devices.spec import Topology
from ciuic_runtime.devices.units import format_bytes
from ciuic_runtime.schedulers.draft import ScheduleDraft
from ciuic_runtime.schedulers.graph import TaskGraph
from ciuic_runtime.schedulers.workload import Workload

if TYPE_CHECKING:
    from ciuic_runtime.schedulers.placement import Rule

SHARE_STEPS = 50  # how finely shares that would fit are sought, between those asked for and those of the room


@dataclass(frozen=True, slots=True)
class Order:
    """A rule, and what it comes to in a graph on a topology."""

    rule: Rule
    rows: Sequence[str]  # in the order in which they are placed
    devices: Sequence[str]

    @property
    def leaves_no_choice(self) -> bool:
        return len(self.devices) == 1 or self.rule.by == "share"


@dataclass
class Ledger:
    """Room on each device while rules are carried out, and which rule took how much of it."""

    graph: TaskGraph
    workload: Workload
    room: dict[str, float]  # device -> bytes left
    where: dict[str, str] = field(default_factory=dict)  # row -> device
    taken: dict[tuple[Rule, str], float] = field(default_factory=dict)  # (rule, device) -> bytes
    held: set[tuple[str, str]] = field(default_factory=set)  # (page, device)
    slot: dict[str, int] = field(default_factory=dict)  # device -> bytes of the largest page that is read into it

    @staticmethod
    def empty(graph: TaskGraph, topology: Topology, workload: Workload) -> Ledger:
        return Ledger(graph, workload, ScheduleDraft(graph, topology, workload).room)

    def copy(self) -> Ledger:
        return replace(
            self, room={**self.room}, where={**self.where}, taken={**self.taken}, held={*self.held}, slot={**self.slot}
        )

    def need(self, row: str, device: str, stored: bool) -> float:
        """Bytes that the row takes there, cache included. Of what is stored on a disk one page at a time must fit."""
        page, task = self.graph.rows[row], self.graph.by_name.get(row)
        cache = task.kv_bytes_per_token * self.workload.cache_tokens if task else 0.0
        if stored:
            return cache + max(0, _slot_bytes(self.graph, row) - self.slot.get(device, 0))
        return cache + (0 if (page.name, device) in self.held else page.nbytes)

    def put(self, row: str, device: str, rule: Rule) -> None:
        """Puts the row there, whether there is room or not."""
        need = self.need(row, device, bool(rule.store))
        if rule.store:
            self.slot[device] = max(self.slot.get(device, 0), _slot_bytes(self.graph, row))
        else:
            self.held.add((self.graph.rows[row].name, device))
        self.room[device] -= need
        self.taken[rule, device] = self.taken.get((rule, device), 0.0) + need
        self.where[row] = device

    def after(self, order: Order) -> Ledger:
        """How things stand when the rule is carried out too. Room is negative where it does not fit."""
        ledger = self.copy()
        spread = _by_share if order.rule.by == "share" else _fill
        spread(order, ledger)
        return ledger

    def lacking(self, order: Order) -> dict[str, float]:
        """Device -> bytes of room that the rule would need beyond what is left; nothing if it fits."""
        room = self.after(order).room
        return {d: -room[d] for d in order.devices if room[d] < min(0.0, self.room[d])}

    def taken_by(self, rule: Rule, devices: Sequence[str]) -> float:
        return sum(self.taken.get((rule, d), 0.0) for d in devices)


def spread(orders: Sequence[Order], graph: TaskGraph, topology: Topology, workload: Workload) -> dict[str, str]:
    """Row -> device. Rules that leave no choice take their room first, the others fill what is left.

    Raises OutOfMemory, with the rules and the least that would do, for what does not fit."""
    ledger = Ledger.empty(graph, topology, workload)
    for order in sorted(orders, key=lambda order: not order.leaves_no_choice):
        if ledger.lacking(order):
            raise _cannot_fit(order, ledger, topology)
        ledger = ledger.after(order)
    return ledger.where


def _fill(order: Order, ledger: Ledger) -> None:
    """One device after the other, the last one with all that is left over; what comes after a full device's last row
    does not go back to it."""
    at, last = 0, len(order.devices) - 1
    for row in order.rows:
        while (
            at < last and ledger.need(row, order.devices[at], bool(order.rule.store)) > ledger.room[order.devices[at]]
        ):
            at += 1
        ledger.put(row, order.devices[at], order.rule)


def _by_share(order: Order, ledger: Ledger) -> None:
    """Contiguous runs whose bytes are as near to the shares as whole pages allow."""
    sizes = [ledger.graph.rows[row].nbytes for row in order.rows]
    ends, run = [], 0.0
    for share in order.rule.shares:
        run += share / sum(order.rule.shares) * sum(sizes)
        ends.append(run)
    done = 0.0
    for row, size in zip(order.rows, sizes, strict=True):
        at = next((i for i, end in enumerate(ends) if done + size / 2 <= end), len(ends) - 1)
        ledger.put(row, order.devices[at], order.rule)
        done += size


def _slot_bytes(graph: TaskGraph, row: str) -> int:
    """Memory that reading the row's page from a disk takes; of tables read by rows, none that counts."""
    page = graph.rows[row]
    return 0 if page.row_nbytes else page.nbytes


# What does not fit, beside what, and the least that would do


def _cannot_fit(order: Order, ledger: Ledger, topology: Topology) -> OutOfMemory:
    rule, devices = order.rule, order.devices
    lacking = ledger.lacking(order)
    worst = max(lacking, key=lambda device: lacking[device])
    empty = Ledger.empty(ledger.graph, topology, ledger.workload)
    others = {} if empty.lacking(order) else {r: ledger.taken_by(r, devices) for r, d in ledger.taken if d in devices}
    need = ledger.after(order).taken_by(rule, devices)
    if others:
        names = [f"'{r}' ({format_bytes(others[r])})" for r in sorted(others, key=lambda r: -others[r])]
        also = f" and {len(names) - 2} more" if len(names) > 2 else ""
        what = (
            f"placement rules '{rule}' ({format_bytes(need)}) and {' and '.join(names[:2])}{also} cannot fit together"
        )
    else:
        what = f"placement rule '{rule}' cannot fit: it needs {format_bytes(need)}"
    room = ", ".join(f"{format_bytes(max(0.0, (empty if others else ledger).room[d]))} on {d}" for d in devices)
    more = " and ".join(f"{format_bytes(nbytes)} on {d}" for d, nbytes in lacking.items())
    capacity = ceil(ledger.room[worst]) if ledger.room[worst] > 0 else 0
    return OutOfMemory(
        f"{what} with the cache; beside working memory there is {room}, so {more} are lacking; "
        f"{_remedy(order, ledger, topology)}",
        need=capacity + ceil(lacking[worst]), free=capacity,
    )  # fmt: skip


def _remedy(order: Order, ledger: Ledger, topology: Topology) -> str:
    """The smallest change with which the rule fits."""
    rule = order.rule
    if rule.by == "share":
        if shares := _shares_that_fit(order, ledger):
            return f"shares = {shares} would fit"
    else:
        others = [d.name for d in topology.compute_devices if d.name not in order.devices]
        for name in sorted(others, key=lambda name: -ledger.room[name]):
            if not ledger.lacking(replace(order, devices=[*order.devices, name])):
                return f"add {name} to its devices ({format_bytes(ledger.room[name])} are left there)"
    fits = _most_rows_that_fit(order, ledger)
    left = len(order.rows) - fits
    out = (
        f"leave out its last {left} of {len(order.rows)} tasks, from {order.rows[fits]} on" if fits else "leave it out"
    )
    disk = next((d.name for d in topology.by_kind("DISK") if not rule.store), "")
    if disk and not ledger.lacking(replace(order, rule=replace(rule, store=disk))):
        out = f'store = "{disk}", or {out}'
    return f"give it that much more memory, or {out}"


def _shares_that_fit(order: Order, ledger: Ledger) -> list[int]:
    """Whole percents, as near as possible to the shares asked for on the way to the shares of the room; none if there
    are none."""
    asked, room = order.rule.shares, [max(0.0, ledger.room[d]) for d in order.devices]
    if not sum(room):
        return []
    for step in range(1, SHARE_STEPS + 1):
        t = step / SHARE_STEPS
        exact = [100 * ((1 - t) * a / sum(asked) + t * r / sum(room)) for a, r in zip(asked, room, strict=True)]
        shares = [round(share) for share in exact]
        if any(shares) and not ledger.lacking(replace(order, rule=replace(order.rule, shares=tuple(shares)))):
            return shares
    return []


def _most_rows_that_fit(order: Order, ledger: Ledger) -> int:
    """How many of the first rows fit, if the rule had only those."""
    low, high = 0, len(order.rows)  # `low` rows fit, `high` do not
    while high - low > 1:
        middle = (low + high) // 2
        if ledger.lacking(replace(order, rows=order.rows[:middle])):
            high = middle
        else:
            low = middle
    return low
