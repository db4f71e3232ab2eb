"""Which pages are in memory: a state machine that takes events and returns what is to be read and evicted.
Knows pages as numbers, bytes and order; no threads, no clock, no files, so that every race is a list in a test.
Where nothing has to leave, a use costs next to nothing: what only evictions need is made up when there is one."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from ciuic_runtime.schedulers.policies.cache import HALF_LIFE, CachePolicy, PageUse, lfu


@dataclass(frozen=True, slots=True)
class PageFacts:
    """What a page is, as far as keeping it is concerned."""

    name: str
    nbytes: int
    place: int  # in a forward pass; pages that are needed at the same time have the same
    routed: bool = False  # needed by some tokens only; all others are needed in every pass
    by_rows: bool = False  # a pass can read the rows that it needs: never needed whole, and first to go
    popularity: float = 0.0  # expected uses per token


def largest_needed(pages: Iterable[PageFacts]) -> int:
    """Bytes of the largest page that a pass needs whole."""
    return max((p.nbytes for p in pages if not p.by_rows), default=0)


@dataclass(frozen=True, slots=True)
class Read:
    """Fill a slot with the page; `arrived` or `failed` follows."""

    page: int
    order: int = 0  # smaller ones come first; 0: somebody waits for it


@dataclass(frozen=True, slots=True)
class Evict:
    """Its slot is free."""

    page: int


@dataclass(frozen=True, slots=True)
class Promote:
    """A read that is under way has become urgent."""

    page: int


@dataclass(frozen=True, slots=True)
class Cancel:
    """A read under way is not wanted any more; `cancelled` follows if it could be taken back."""

    page: int


IDLE = 1  # reads under way, below which a disk has time for what may not be needed
Command = Read | Evict | Promote | Cancel


class Where(IntEnum):
    ABSENT = 0
    LOADING = 1
    RESIDENT = 2


@dataclass(slots=True)
class Counts:
    """Uses of pages: a hit was in memory before anybody asked, a miss had to be read, ahead of time or not."""

    hits: int = 0
    misses: int = 0
    routed_hits: int = 0
    routed_misses: int = 0


class Residency:
    """Pages within a budget of bytes. A page that is needed is held from when it is there until it is released; held
    pages are not evicted, expected ones only for somebody who waits.

    Eviction: of routed pages the one that the policy values least, but during a scan (a pass that touches nearly all of
    them) the one whose next use is farthest, which is Belady's choice when everything is used in turn, and during the
    last scan, of those that it has used, one of the place that has most; pages that every pass needs go last, again by
    their next use."""

    def __init__(self, pages: Sequence[PageFacts], budget: int, policy: CachePolicy = lfu) -> None:
        self.pages, self.policy = tuple(pages), policy
        self.places = max((p.place for p in pages), default=0) + 1
        self.used = 0  # bytes of what is there or on its way
        self.total = sum(p.nbytes for p in pages)
        self._num_resident = 0
        self.where = [Where.ABSENT] * len(pages)
        self._counts = Counts()
        self.scanning = self.last_scan = False
        self.step = 0
        self.held = [0] * len(pages)
        self.pinned = [False] * len(pages)
        self.pinned_nbytes = 0
        self.minimum = largest_needed(pages)  # bytes below which no pass can be made
        self.num_uses, self.num_hits = (np.zeros(len(pages), dtype=np.int64) for _ in range(2))  # by page, but for:
        self._hits: list[int] = []  # uses in this pass of pages that were there
        self._fresh = [False] * len(pages)  # read since its last use
        self._place = np.array([p.place for p in pages], dtype=np.int64)
        self._routed = np.array([p.routed for p in pages], dtype=bool)
        self._by_rows = np.array([p.by_rows for p in pages], dtype=bool)
        self._first_to_go = self._routed | self._by_rows
        self._every = np.flatnonzero(~self._routed)  # pages that are not routed
        self._turns = np.tile(np.arange(self.places, dtype=float), 2)
        self._idle = np.zeros(len(pages), dtype=bool)  # resident and not held, but for these:
        self._unsettled: set[int] = set()
        self._expected = np.zeros(len(pages), dtype=bool)
        self._group: dict[int, list[int]] = {}  # place -> expected pages
        self._wanted: set[int] = set()  # needed, not there yet
        self._urgent: deque[int] = deque()  # wanted, without room so far
        self._later: deque[int] = deque()  # expected, without room so far
        self._perhaps: deque[int] = deque()  # may be needed: for when nothing else is read
        self._num_loading = 0
        self._position = 0
        zeros = np.zeros(len(pages))
        liked = np.array([p.popularity for p in pages], dtype=float)
        self.use = PageUse(zeros - 1, zeros.copy(), self._place.astype(float), liked, zeros.copy())
        self._weight = 1.0  # of one use now, in `use.uses`: grows, so that old uses need not be touched to fade
        self._keys: np.ndarray | None = None  # what eviction goes by, until something is used
        self.budget = budget

    @property
    def counts(self) -> Counts:
        self.count_uses()
        return self._counts

    def clear_counts(self) -> None:
        """Of uses by page."""
        self.count_uses()
        self.num_uses[:] = self.num_hits[:] = 0

    @property
    def whole(self) -> bool:
        """Everything is there."""
        return self._num_resident == len(self.pages)

    @property
    def starved(self) -> bool:
        """Whoever waits, waits for room: nothing that is wanted is on its way."""
        return bool(self._urgent) and not any(self.where[p] == Where.LOADING for p in self._wanted)

    # Events

    def begin_step(self, scanning: bool = False, last_scan: bool = False) -> None:
        """A pass begins; `scanning`: it will use nearly all routed pages; `last_scan`: and what follows will not."""
        self.count_uses()
        self.step, self.scanning, self.last_scan = self.step + 1, scanning, scanning and last_scan
        self._position, self._keys = 0, None
        self._weight *= 2.0 ** (1.0 / HALF_LIFE)
        if self._weight > 1e100:
            self.use.uses[:] /= self._weight
            self._weight = 1.0

    def need(self, pages: Sequence[int]) -> tuple[list[int], list[Command]]:
        """Pages of one place are needed: those that are there, held from now on, and commands. The others are held, and
        named by `arrived`, when they come."""
        commands: list[Command] = []
        ready = []
        for p in dict.fromkeys(pages):
            self._touch(p)
            if self.where[p] is Where.RESIDENT:
                self._hold(p)
                ready.append(p)
                continue
            self._wanted.add(p)
            if self.where[p] == Where.LOADING:
                commands.append(Promote(p))
            else:
                self._urgent.append(p)
        if pages:
            self._position = self.pages[pages[0]].place
            commands += self._forget(self._position)
        return ready, commands + self._fill()

    def expect(self, pages: Iterable[int], perhaps: Iterable[int] = ()) -> list[Command]:
        """Pages that will be needed soon, in the order in which they will; and some that may be, which are read when
        nothing else is to be read."""
        for queue, some in ((self._later, pages), (self._perhaps, perhaps)):
            for p in some:
                if self._expected[p] or p in self._wanted:
                    continue
                self._expected[p] = True
                self._group.setdefault(self.pages[p].place, []).append(p)
                if self.where[p] == Where.ABSENT:
                    queue.append(p)
        return self._fill() if self._later or self._perhaps else []

    def arrived(self, page: int) -> tuple[bool, list[Command]]:
        """A read has ended well: whether somebody waits for the page, who then holds it; and commands."""
        assert self.where[page] == Where.LOADING, f"{self.pages[page].name} arrived without having been asked for"
        self.where[page] = Where.RESIDENT
        self._num_loading -= 1
        self._num_resident += 1
        wanted = page in self._wanted
        if wanted:
            self._wanted.discard(page)
            self.held[page] += 1
        else:
            self._unsettled.add(page)
            self._fresh[page] = True
        return wanted, self._fill()

    def failed(self, page: int, again: bool = False) -> list[Command]:
        """A read has failed: the page is not there. `again`: it was only stopped, and whoever wants it still does."""
        self._forget_read(page)
        if page in self._wanted and again:
            self._urgent.append(page)
        else:
            self._wanted.discard(page)
        return self._fill()

    def cancelled(self, page: int) -> list[Command]:
        """A read was taken back before it began."""
        self._forget_read(page)
        return self._fill()

    def release(self, pages: Iterable[int]) -> list[Command]:
        """Whoever needed them is done."""
        for p in pages:
            assert self.held[p] > 0, f"{self.pages[p].name} is released and nobody holds it"
            self.held[p] -= 1
            self._unsettled.add(p)
        waiting = self._urgent or self._later or self._perhaps
        return self._fill() if waiting or self.used > self.budget else []

    def touch(self, *pages: int) -> None:
        """A use of pages of one place that are there, by somebody who is done before the next event."""
        for page in pages:
            self._touch(page)
        self._position = self.pages[pages[0]].place

    def set_budget(self, budget: int) -> list[Command]:
        """At once as far as nobody holds what must go, the rest as it is released."""
        self.budget = budget
        return self._fill()

    def pin(self, page: int, pinned: bool = True) -> list[Command]:
        """A pinned page stays once it is there, until it is not pinned any more."""
        self.pinned_nbytes += (pinned - self.pinned[page]) * self.pages[page].nbytes
        self.pinned[page] = pinned
        self._unsettled.add(page)
        return [] if pinned else self._fill()

    @property
    def pinned_pages(self) -> set[int]:
        return {p for p, pinned in enumerate(self.pinned) if pinned}

    def evict(self, page: int) -> list[Command]:
        """By hand; nothing where the page is held or not there."""
        self._settle()
        return [self._evict(page)] if self._idle[page] else []

    def abandon(self) -> list[Command]:
        """A pass did not come to its end: nobody holds or wants anything any more; reads under way go on."""
        return self._release_all() + self._fill()

    def recover(self, there: Iterable[int]) -> list[Command]:
        """As `abandon`, after which no read is under way and exactly these pages are there."""
        self._release_all()
        for queue in (self._later, self._perhaps):
            queue.clear()
        found = set(there)
        self.where = [Where.RESIDENT if p in found else Where.ABSENT for p in range(len(self.pages))]
        self.used = sum(self.pages[p].nbytes for p in found)
        self._num_resident, self._num_loading = len(found), 0
        self._unsettled.update(range(len(self.pages)))
        return self._fill()

    def _release_all(self) -> list[Command]:
        for p, count in enumerate(self.held):
            if count:
                self.held[p] = 0
                self._unsettled.add(p)
        self._wanted.clear()
        self._urgent.clear()
        commands: list[Command] = []
        for place in list(self._group):
            commands += self._forget(place)
        return commands

    # Decisions

    def _fill(self) -> list[Command]:
        """Reads what is asked for as far as there is room, or room can be made; and makes up for a lowered budget."""
        commands: list[Command] = []
        self._make_room(0, True, commands)
        while self._urgent and self._make_room(self.pages[self._urgent[0]].nbytes, True, commands):
            commands.append(self._read(self._urgent.popleft(), 0))
        for queue, most_loading in ((self._later, len(self.pages)), (self._perhaps, IDLE)):
            while queue and not self._urgent and self._num_loading < most_loading:
                p = queue[0]
                if self._expected[p] and self.where[p] == Where.ABSENT:
                    if not self._make_room(self.pages[p].nbytes, False, commands):
                        break
                    commands.append(self._read(p, 1 + self.step * self.places + self.pages[p].place))
                queue.popleft()
        return commands

    def _make_room(self, nbytes: int, urgent: bool, commands: list[Command]) -> bool:
        """Whether there is room for so many bytes, after evicting what may go."""
        while self.used + nbytes > self.budget:
            victim = self._victim(urgent)
            if victim is None:
                return False
            commands.append(self._evict(victim))
        return True

    def _victim(self, urgent: bool) -> int | None:
        """Step 1: a routed page that nobody expects, or one by rows. Step 2: a page of every pass. Step 3: for somebody
        who waits, an expected one."""
        self._settle()
        if self._hits or self._keys is None:
            self.count_uses()
            self._keys = self._worth()
        for candidates in self._may_go(urgent):
            if candidates.any():
                return int(np.where(candidates, self._keys, np.inf).argmin())
        return None

    def _may_go(self, urgent: bool) -> Iterator[np.ndarray]:
        free = self._idle & ~self._expected
        yield free & self._first_to_go
        yield free & ~self._first_to_go
        if urgent:
            yield self._idle

    def _worth(self) -> np.ndarray:
        """What each page's place in memory is worth now; smallest goes first."""
        turns = self._turns[self.places - 1 - self._position :][: self.places]  # until that of a place
        self.use.away[:] = (turns / self.places)[self._place]
        valued = self.policy(self.use)
        if self.scanning:  # by next use, what was just used comes last; among pages of one place by the policy
            nearness = -turns[self._place]
            low, high = valued.min(), valued.max()
            share = (valued - low) / (high - low) * 0.5 if high > low else np.zeros(len(valued))
            worth = nearness + share
            if self.last_scan:
                used, levels = self._levels(valued)
                worth[used] = share[used] - self.places - levels
        else:
            worth = valued.copy()
            worth[self._every] = -turns[self._place[self._every]]
        worth[self._by_rows] = -np.inf
        return worth

    def _levels(self, valued: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Routed pages that this pass has used, and of each how many of its place are valued at least as much. Where
        the highest go first, every place loses as much, so that what is missing later is missed evenly: a pass that
        needs a few pages of each place waits longest where all that one place has is gone."""
        used = np.flatnonzero(self._idle & self._routed & (self._place <= self._position))
        order = used[np.lexsort((-valued[used], self._place[used]))]  # by place, in each the most valued first
        places = self._place[order]
        begins = np.searchsorted(places, places)  # of the page's place
        return order, np.arange(len(order)) - begins + 1

    def _evict(self, page: int) -> Evict:
        self.where[page] = Where.ABSENT
        self._num_resident -= 1
        self._unsettled.discard(page)
        self._idle[page] = self._fresh[page] = False
        if self._expected[page]:  # it will be asked for again
            self._expected[page] = False
            self._group[self.pages[page].place].remove(page)
        self.used -= self.pages[page].nbytes
        return Evict(page)

    def _read(self, page: int, order: int) -> Read:
        self.where[page] = Where.LOADING
        self._num_loading += 1
        self.used += self.pages[page].nbytes
        return Read(page, order)

    def _forget_read(self, page: int) -> None:
        assert self.where[page] == Where.LOADING, f"no read of {self.pages[page].name} is under way"
        self._num_loading -= 1
        self.where[page] = Where.ABSENT
        self.used -= self.pages[page].nbytes

    def _forget(self, place: int) -> list[Command]:
        """What was expected at a place is needed by now, or was expected in vain."""
        commands: list[Command] = []
        for p in self._group.pop(place, ()):
            self._expected[p] = False
            if self.where[p] == Where.LOADING and p not in self._wanted:
                commands.append(Cancel(p))
        return commands

    def _hold(self, page: int) -> None:
        self.held[page] += 1
        self._unsettled.add(page)

    def _settle(self) -> None:
        """Which pages may go."""
        for p in self._unsettled:
            self._idle[p] = self.where[p] is Where.RESIDENT and not self.held[p] and not self.pinned[p]
        self._unsettled.clear()

    def _touch(self, page: int) -> None:
        if self.where[page] is Where.RESIDENT and not self._fresh[page]:
            self._hits.append(page)
            return
        self._fresh[page] = False
        self._counts.misses += 1
        self._counts.routed_misses += self.pages[page].routed
        self.num_uses[page] += 1
        self.use.last[page] = self.step
        self.use.uses[page] += self._weight
        self._keys = None

    def count_uses(self) -> None:
        """All so far, those of the pass that is under way too."""
        if not self._hits:
            return
        hits = np.array(self._hits)  # pages, some of them perhaps more than once
        self._counts.hits += len(hits)
        self._counts.routed_hits += int(self._routed[hits].sum())
        for counts, more in ((self.num_uses, 1), (self.num_hits, 1), (self.use.uses, self._weight)):
            np.add.at(counts, hits, more)
        self.use.last[hits] = self.step
        self._hits.clear()
        self._keys = None
