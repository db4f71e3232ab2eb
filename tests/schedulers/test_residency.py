"""The state machine that decides which pages are in memory: races as lists of events, and what holds after any events
in any order."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ciuic_runtime.schedulers.policies.cache import CACHE_POLICIES, lru
from ciuic_runtime.schedulers.residency import Cancel, Command, Evict, PageFacts, Promote, Read, Residency, Where


def experts(count: int, places: int = 1, nbytes: int = 10) -> list[PageFacts]:
    return [PageFacts(f"layers.{i % places}.experts.{i}", nbytes, i % places, routed=True) for i in range(count)]


def dense(place: int, nbytes: int = 10) -> PageFacts:
    return PageFacts(f"layers.{place}.attention", nbytes, place)


def used_once(state: Residency, pages: Iterable[int]) -> None:
    """One after the other, as if each had a place of its own in the pass."""
    for p in pages:
        ready, _ = state.need([p])
        if not ready:
            assert state.arrived(p) == (True, [])
        state.release([p])


def reads(commands: list[Command]) -> list[int]:
    return [c.page for c in commands if isinstance(c, Read)]


# Needing and holding


def test_what_is_needed_is_read_and_held_until_it_is_released() -> None:
    state = Residency(experts(3), 20)
    assert state.need([0, 1, 2]) == ([], [Read(0), Read(1)])
    assert state.arrived(1) == (True, [])
    assert state.held == [0, 1, 0]
    assert state.release([1]) == [Evict(1), Read(2)]
    assert state.arrived(0) == (True, [])
    assert state.arrived(2) == (True, [])
    assert state.held == [1, 0, 1]
    assert state.used == 20


def test_pages_that_are_there_are_handed_out_at_once_and_the_rest_as_they_come() -> None:
    state = Residency(experts(3), 30)
    used_once(state, [1])
    assert state.need([0, 1, 2]) == ([1], [Read(0), Read(2)])
    assert state.arrived(2) == (True, [])
    assert state.arrived(0) == (True, [])
    assert state.release([1, 2, 0]) == []
    assert not any(state.held)


def test_a_page_that_is_asked_for_twice_is_read_once() -> None:
    state = Residency(experts(2), 20)
    _, commands = state.need([1, 1])
    assert commands == [Read(1)]


def test_whoever_waits_for_room_starves_only_while_nothing_that_is_wanted_is_on_its_way() -> None:
    state = Residency(experts(3), 20)
    state.need([0, 1, 2])
    assert not state.starved, "0 and 1 are on their way"
    state.arrived(0)
    assert not state.starved
    state.arrived(1)
    assert state.starved, "2 waits for somebody to let go"
    state.release([0])
    assert not state.starved


def test_a_page_held_twice_stays_until_both_have_released_it() -> None:
    state = Residency(experts(2), 10)
    used_once(state, [0])
    assert state.need([0]) == ([0], [])
    assert state.need([0]) == ([0], [])
    assert state.need([1]) == ([], [])
    assert state.release([0]) == []
    assert state.release([0]) == [Evict(0), Read(1)]
    with pytest.raises(AssertionError, match="nobody holds it"):
        state.release([0])


# Reading ahead


def test_an_expected_page_is_promoted_when_it_is_needed_and_cancelled_when_it_is_not() -> None:
    state = Residency(experts(3), 30)
    assert reads(state.expect([0, 1])) == [0, 1]
    assert state.need([0, 2]) == ([], [Promote(0), Cancel(1), Read(2)])
    assert state.cancelled(1) == []
    assert state.where[1] == Where.ABSENT
    assert state.arrived(0) == (True, [])


def test_what_is_expected_is_read_in_the_order_of_the_pass_behind_everything_that_is_waited_for() -> None:
    state = Residency(experts(4, places=4), 40)
    state.begin_step()
    [third] = state.expect([3])
    [second] = state.expect([2])
    _, [first] = state.need([0])
    assert isinstance(first, Read)
    assert isinstance(second, Read)
    assert isinstance(third, Read)
    assert 0 == first.order < second.order < third.order
    state.begin_step()
    [later] = state.expect([1])
    assert isinstance(later, Read)
    assert later.order > third.order, "the next pass comes after this one"


def test_a_read_that_could_not_be_taken_back_arrives_and_nobody_holds_it() -> None:
    state = Residency(experts(3), 20)
    state.expect([0])
    _, commands = state.need([1])
    assert commands == [Cancel(0), Read(1)]
    assert state.arrived(0) == (False, [])
    assert state.need([2]) == ([], [Evict(0), Read(2)])


def test_a_read_that_was_stopped_though_it_is_wanted_by_now_begins_again() -> None:
    state = Residency(experts(2, places=2), 20)
    state.expect([0])
    assert state.need([1]) == ([], [Read(1)])
    assert state.abandon() == [Cancel(0)]
    assert state.need([0]) == ([], [Promote(0)])
    assert state.failed(0, again=True) == [Read(0)]
    assert state.arrived(0) == (True, [])


def test_a_stopped_read_that_nobody_wants_is_not_begun_again() -> None:
    state = Residency(experts(2), 20)
    state.expect([0])
    state.need([1])
    assert state.failed(0, again=True) == []
    assert (state.where[0], state.used) == (Where.ABSENT, 10)


def test_what_perhaps_is_needed_waits_until_nothing_is_read() -> None:
    state = Residency(experts(4), 40)
    assert reads(state.expect([0], perhaps=[1, 2])) == [0]
    wanted, commands = state.arrived(0)
    assert not wanted
    assert reads(commands) == [1]
    _, commands = state.arrived(1)
    assert reads(commands) == [2]


def test_expected_pages_do_not_evict_one_another_but_whoever_waits_may() -> None:
    state = Residency([*experts(3, places=1), dense(1), dense(2)], 30)
    assert reads(state.expect([0, 1, 2])) == [0, 1, 2]
    for p in (0, 1, 2):
        state.arrived(p)
    assert state.expect([4]) == [], "all that is there is expected"
    _, commands = state.need([3])
    assert [type(c) for c in commands] == [Evict, Read]
    assert reads(commands) == [3]


def test_a_page_that_was_read_ahead_counts_as_a_miss_once() -> None:
    state = Residency(experts(2, places=2), 20)
    state.expect([0])
    state.arrived(0)
    used_once(state, [0])
    assert (state.counts.hits, state.counts.misses) == (0, 1)
    used_once(state, [0, 1, 1])
    assert (state.counts.hits, state.counts.misses) == (2, 2)
    assert (state.counts.routed_hits, state.counts.routed_misses) == (2, 2)


# What goes first


def test_pages_of_every_pass_go_after_routed_ones_and_expected_ones_last() -> None:
    pages = [dense(0), *experts(2), PageFacts("layers.1.experts.0", 10, 1, routed=True), dense(2), dense(3)]
    state = Residency(pages, 40)
    used_once(state, [0, 1, 2, 3])
    state.expect([3])
    assert state.need([4]) == ([], [Evict(1), Read(4)]), "the routed one that nobody expects and was used least"
    state.arrived(4)
    assert state.need([5]) == ([], [Evict(2), Read(5)])
    state.arrived(5)
    state.release([4, 5])
    used_once(state, [0])
    [evicted, *_] = state.set_budget(30)
    assert evicted == Evict(0), "of what every pass needs, that whose next use is farthest; the expected one stays"
    assert state.set_budget(10) == [Evict(5), Evict(4)]
    assert state.set_budget(0) == [Evict(3)]


@pytest.mark.parametrize("scanning", [False, True])
def test_what_can_be_had_by_rows_goes_first_and_no_pass_needs_room_for_it(scanning: bool) -> None:
    state = Residency([PageFacts("embedding", 50, 0, by_rows=True), *experts(3), dense(1)], 90)
    assert state.minimum == 10, "of what a pass needs whole"
    used_once(state, [0, 1, 2, 3, 4])
    state.begin_step(scanning)
    assert state.set_budget(80) == [Evict(0)]
    assert state.need([4])[0] == [4]


def test_the_least_frequently_used_expert_goes_where_uses_of_long_ago_have_faded() -> None:
    state = Residency(experts(3), 20)
    for _ in range(3):
        state.begin_step()
        used_once(state, [0])
    state.begin_step()
    used_once(state, [1])
    assert state.need([2]) == ([], [Evict(1), Read(2)])
    state.arrived(2)
    state.release([2])
    for _ in range(5000):
        state.begin_step()
    used_once(state, [2])
    assert state.need([1]) == ([], [Evict(0), Read(1)]), "three uses, five thousand steps ago"


@pytest.mark.parametrize("policy", CACHE_POLICIES)
def test_uses_are_counted_for_as_many_steps_as_anybody_runs(policy: str) -> None:
    """The weight of a use grows with every step; it must not overflow."""
    state = Residency(experts(3), 20, CACHE_POLICIES[policy])
    state._weight = 1e100
    used_once(state, [0])
    for _ in range(3):
        state.begin_step()
        used_once(state, [1])
    assert state._weight < 1e100
    assert 0 < state.use.uses[0] < state.use.uses[1]


def passes(state: Residency, count: int, scanning: bool) -> float:
    """Uses every page in turn, over and over; the hit rate of the last pass."""
    before = 0
    for _ in range(count):
        before = state.counts.hits
        state.begin_step(scanning)
        for p in range(len(state.pages)):
            ready, commands = state.need([p])
            for read in reads(commands):
                state.arrived(read)
            state.release(ready or [p])
    return (state.counts.hits - before) / len(state.pages)


@pytest.mark.parametrize(("count", "fit"), [(20, 15), (20, 2), (7, 6), (50, 25)])
def test_a_scan_larger_than_the_cache_gets_no_hit_from_lru_and_the_cached_share_by_next_use(
    count: int, fit: int
) -> None:
    """Belady's optimum for a cycle of n pages of which c fit: all but n - c + 1 of every n uses hit, or one more where
    the page that is read may take the place of the one just used."""
    pages = experts(count, places=count)
    assert passes(Residency(pages, 10 * fit, lru), 4, scanning=False) == 0
    assert passes(Residency(pages, 10 * fit, lru), 4, scanning=True) == pytest.approx((fit - 1) / (count - 1), abs=0.03)
    assert passes(Residency(pages, 10 * fit, CACHE_POLICIES["pin"]), 4, scanning=False) >= (fit - 1) / count


def scan(state: Residency, last_scan: bool) -> tuple[list[int], int]:
    """A pass that uses everything: how many pages of each place are there afterwards, and how many it had to read."""
    before = state.counts.misses
    state.begin_step(scanning=True, last_scan=last_scan)
    for place in range(state.places):
        pages = [p for p, facts in enumerate(state.pages) if facts.place == place]
        ready, commands = state.need(pages)
        state.release(ready)
        way = reads(commands)
        while way:
            page = way.pop(0)
            wanted, commands = state.arrived(page)
            way += reads(commands + (state.release([page]) if wanted else []))
    there = [0] * state.places
    for facts, where in zip(state.pages, state.where, strict=True):
        there[facts.place] += where == Where.RESIDENT
    return there, state.counts.misses - before


@pytest.mark.parametrize("fit", [110, 90, 60])
def test_after_the_last_scan_what_is_missing_is_missing_evenly(fit: int) -> None:
    """But of the two places at its end: what is in use cannot go."""
    pages = experts(120, places=10)
    state, by_turns = Residency(pages, 10 * fit), Residency(pages, 10 * fit)
    for one in (state, by_turns):
        scan(one, last_scan=False)
    there, misses = scan(state, last_scan=True)
    assert sum(there) == fit
    assert max(there[:-2]) - min(there[:-2]) <= 1
    others, fewest = scan(by_turns, last_scan=False)
    assert sum(others) == fit
    assert min(others) == 0 or fit == 110, "which is what it is for"
    assert misses <= fewest + 12, "at most a place's pages more are read"


def test_a_scan_of_pages_that_every_pass_needs_hits_their_cached_share_whatever_the_policy() -> None:
    for policy in CACHE_POLICIES.values():
        state = Residency([dense(i) for i in range(20)], 150, policy)
        assert passes(state, 4, scanning=False) >= 14 / 20


# Budgets, pins, interruptions


def test_a_lower_budget_takes_effect_at_once_but_for_what_is_held() -> None:
    state = Residency(experts(3), 30)
    state.need([0, 1, 2])
    for p in (0, 1, 2):
        state.arrived(p)
    assert state.set_budget(10) == []
    assert state.release([1, 2]) == [Evict(1), Evict(2)]
    assert state.used == 10


def test_a_lower_budget_waits_for_reads_that_are_under_way() -> None:
    state = Residency(experts(3), 30)
    state.expect([0, 1, 2])
    assert state.set_budget(10) == []
    assert state.used == 30
    assert state.arrived(0) == (False, [Evict(0)])
    assert state.arrived(1) == (False, [Evict(1)])
    assert state.arrived(2) == (False, [])


def test_a_higher_budget_lets_those_in_who_wait() -> None:
    state = Residency(experts(3), 10)
    assert state.need([0, 1, 2]) == ([], [Read(0)])
    assert state.set_budget(30) == [Read(1), Read(2)]


def test_a_pinned_page_stays_and_an_abandoned_pass_holds_nothing() -> None:
    state = Residency(experts(3), 20)
    assert state.pin(0) == []
    state.need([0, 1])
    state.arrived(0)
    state.arrived(1)
    assert state.abandon() == []
    assert state.held == [0, 0, 0]
    assert state.need([2]) == ([], [Evict(1), Read(2)])
    assert state.evict(0) == []
    state.pin(0, False)
    assert state.evict(0) == [Evict(0)]
    assert state.evict(0) == []


def test_an_abandoned_pass_takes_back_what_it_expected_and_forgets_what_it_waits_for() -> None:
    state = Residency(experts(4, places=4), 20)
    state.expect([2, 3])
    assert state.need([0]) == ([], [])
    assert sorted(state.abandon(), key=str) == [Cancel(2), Cancel(3)]
    assert state.cancelled(2) == []
    assert state.arrived(3) == (False, [])
    assert (state.used, state.starved) == (10, False)


def test_a_read_that_failed_leaves_nothing_behind() -> None:
    state = Residency(experts(3), 10)
    assert state.need([0, 1]) == ([], [Read(0)])
    assert state.failed(0) == [Read(1)], "the other is read all the same"
    assert state.where[0] == Where.ABSENT
    assert state.arrived(1) == (True, [])
    assert state.abandon() == []
    assert state.need([0]) == ([], [Evict(1), Read(0)])


NUM_PAGES, PLACES, MOST = 14, 5, 60


class AnyEvents(RuleBasedStateMachine):
    """Whoever carries commands out and reports events in any order that a disk, a user and a pass may come up with."""

    def __init__(self) -> None:
        super().__init__()
        self.loading: set[int] = set()
        self.stopped: set[int] = set()  # loading, but asked to stop: may end without having been read
        self.resident: set[int] = set()
        self.needs: list[tuple[set[int], list[int]]] = []  # open ones: (still to come, held)

    @initialize(
        sizes=st.lists(st.integers(1, 9), min_size=NUM_PAGES, max_size=NUM_PAGES),
        places=st.lists(st.integers(0, PLACES - 1), min_size=NUM_PAGES, max_size=NUM_PAGES),
        routed=st.lists(st.booleans(), min_size=NUM_PAGES, max_size=NUM_PAGES),
        policy=st.sampled_from(sorted(CACHE_POLICIES)),
        budget=st.integers(0, MOST),
    )
    def begin(self, sizes: list[int], places: list[int], routed: list[bool], policy: str, budget: int) -> None:
        self.pages = [PageFacts(f"p{i}", *facts) for i, facts in enumerate(zip(sizes, places, routed, strict=True))]
        self.state = Residency(self.pages, max(budget, max(sizes)), CACHE_POLICIES[policy])

    @property
    def pinned(self) -> int:
        """Bytes."""
        return sum(p.nbytes for p, pinned in zip(self.pages, self.state.pinned, strict=True) if pinned)

    def obey(self, commands: list[Command], taken_back: bool = False) -> None:
        work = list(commands)
        while work:
            match work.pop(0):
                case Read(page, order):
                    assert page not in self.loading | self.resident, "it is there, or on its way"
                    assert order >= 0
                    self.loading.add(page)
                case Evict(page):
                    assert page in self.resident, "only what is there is evicted"
                    assert not self.state.held[page], "somebody computes with it"
                    assert not self.state.pinned[page]
                    self.resident.remove(page)
                case Promote(page):
                    assert page in self.loading
                case Cancel(page):
                    assert page in self.loading
                    if taken_back:
                        self.end(page)
                        work += self.state.cancelled(page)
                    else:
                        self.stopped.add(page)

    def end(self, page: int) -> None:
        self.loading.remove(page)
        self.stopped.discard(page)

    def come(self, page: int) -> None:
        self.end(page)
        self.resident.add(page)
        wanted, commands = self.state.arrived(page)
        for left, held in self.needs:
            if page in left:
                assert wanted
                left.remove(page)
                held.append(page)
                break
        else:
            assert not wanted
        self.obey(commands)

    # What happens

    @rule(pages=st.sets(st.integers(0, NUM_PAGES - 1), min_size=1), taken_back=st.booleans())
    def need(self, pages: set[int], taken_back: bool) -> None:
        """The next place of a pass; a second one, while the first is still held, only where both have room together."""
        place = self.pages[min(pages)].place
        asked = [p for p in sorted(pages) if self.pages[p].place == place]
        assume(not any(set(asked) & (left | set(held)) for left, held in self.needs))
        together = [*asked, *(p for left, held in self.needs for p in (*left, *held))]
        room = self.state.budget - self.pinned
        assume(not self.needs or (len(self.needs) < 2 and sum(self.pages[p].nbytes for p in together) <= room))
        ready, commands = self.state.need(asked)
        assert set(ready) == set(asked) & self.resident
        self.needs.append((set(asked) - set(ready), list(ready)))
        self.obey(commands, taken_back)

    @rule(
        pages=st.lists(st.integers(0, NUM_PAGES - 1), max_size=6),
        perhaps=st.lists(st.integers(0, NUM_PAGES - 1), max_size=3),
    )
    def expect(self, pages: list[int], perhaps: list[int]) -> None:
        self.obey(self.state.expect(pages, perhaps))

    @precondition(lambda self: self.loading)
    @rule(data=st.data())
    def arrive(self, data: st.DataObject) -> None:
        self.come(data.draw(st.sampled_from(sorted(self.loading))))

    @precondition(lambda self: self.stopped)
    @rule(data=st.data())
    def stop(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(sorted(self.stopped)))
        self.end(page)
        self.obey(self.state.failed(page, again=True))

    @precondition(lambda self: self.loading)
    @rule(data=st.data(), taken_back=st.booleans())
    def fail(self, data: st.DataObject, taken_back: bool) -> None:
        """The disk gives an error; whoever waited for the page gives the pass up."""
        page = data.draw(st.sampled_from(sorted(self.loading)))
        self.end(page)
        self.obey(self.state.failed(page))
        if any(page in left for left, _ in self.needs):
            self.abandon(taken_back)

    @rule(taken_back=st.booleans())
    def abandon(self, taken_back: bool) -> None:
        self.needs.clear()
        self.obey(self.state.abandon(), taken_back)
        assert not any(self.state.held)

    @precondition(lambda self: self.needs)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        at = data.draw(st.integers(0, len(self.needs) - 1))
        left, held = self.needs[at]
        if not left:
            self.needs.pop(at)
        self.obey(self.state.release(list(held)))
        held.clear()

    @precondition(lambda self: self.resident)
    @rule(data=st.data())
    def touch(self, data: st.DataObject) -> None:
        self.state.touch(data.draw(st.sampled_from(sorted(self.resident))))

    @precondition(lambda self: not self.needs)
    @rule(scanning=st.booleans(), last_scan=st.booleans())
    def begin_step(self, scanning: bool, last_scan: bool) -> None:
        self.state.begin_step(scanning, last_scan)

    @precondition(lambda self: len(self.needs) < 2)
    @rule(budget=st.integers(0, MOST))
    def set_budget(self, budget: int) -> None:
        self.obey(self.state.set_budget(max(budget, self.state.minimum + self.pinned)))

    @precondition(lambda self: len(self.needs) < 2)
    @rule(page=st.integers(0, NUM_PAGES - 1), pinned=st.booleans())
    def pin(self, page: int, pinned: bool) -> None:
        if pinned:
            assume(not self.state.pinned[page])
            assume(self.pinned + self.pages[page].nbytes + self.state.minimum <= self.state.budget)
        self.obey(self.state.pin(page, pinned))

    @rule(page=st.integers(0, NUM_PAGES - 1))
    def evict(self, page: int) -> None:
        may_go = page in self.resident and not self.state.held[page] and not self.state.pinned[page]
        commands = self.state.evict(page)
        assert commands == ([Evict(page)] if may_go else [])
        self.obey(commands)

    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        """All that is needed comes, is used, and is let go of: nobody starves while the largest page fits."""
        while self.needs:
            left, held = self.needs[-1]
            self.obey(self.state.release(list(held)))
            held.clear()
            if not left:
                self.needs.pop()
                continue
            assert self.loading, f"starved: {self.state.used} of {self.state.budget} bytes, waits for {left}"
            self.come(data.draw(st.sampled_from(sorted(self.loading))))

    # What holds then

    @invariant()
    def bytes_are_counted(self) -> None:
        if hasattr(self, "state"):
            assert self.state.used == sum(self.pages[p].nbytes for p in self.loading | self.resident)
            assert self.state.whole == (len(self.resident) == NUM_PAGES)

    @invariant()
    def the_state_says_where_pages_are(self) -> None:
        if hasattr(self, "state"):
            assert {p for p, w in enumerate(self.state.where) if w == Where.RESIDENT} == self.resident
            assert {p for p, w in enumerate(self.state.where) if w == Where.LOADING} == self.loading

    @invariant()
    def whoever_needs_a_page_holds_it(self) -> None:
        if hasattr(self, "state"):
            holders = [sum(p in held for _, held in self.needs) for p in range(NUM_PAGES)]
            assert self.state.held == holders

    @invariant()
    def the_budget_is_exceeded_only_by_what_cannot_go(self) -> None:
        if hasattr(self, "state") and self.state.used > self.state.budget:
            held, pinned = self.state.held, self.state.pinned
            assert not [p for p in self.resident if not held[p] and not pinned[p]]

    def teardown(self) -> None:
        """Whatever came before, it comes to rest."""
        if not hasattr(self, "state"):
            return
        for _ in range(1000):
            if not (self.needs or self.loading):
                break
            for left, held in self.needs:
                self.obey(self.state.release(list(held)))
                held.clear()
                assert not left or self.loading, f"starved: {self.state.used} of {self.state.budget}, {left}"
            self.needs = [need for need in self.needs if need[0]]
            for page in sorted(self.loading):
                self.come(page)
        assert not self.needs
        assert self.state.used <= self.state.budget
        assert not any(self.state.held)


AnyEvents.TestCase.settings = settings(stateful_step_count=40)
TestWhateverHappensInWhateverOrder = AnyEvents.TestCase
