"""The engine against closed forms: pipelines, double buffering, 1F1B, fair sharing, and memory that runs out."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ciuic_runtime.schedulers.events import Engine, Job, max_min

times = st.floats(1e-6, 1e3)


def run(jobs: list[Job], shared: dict[str, float] | None = None, pools: dict[str, float] | None = None) -> Engine:
    engine = Engine(shared, pools)
    for job in jobs:
        engine.add(job)
    engine.run()
    return engine


def close(value: float | list[float]) -> object:
    return pytest.approx(value, rel=1e-9)


def test_first_come_first_served_and_ties_in_the_order_of_adding() -> None:
    engine = run(
        [
            Job("slow", on="s", seconds=3.0),
            Job("late", seconds=2.0),
            Job("b", (1,), "s", 1.0),  # ready at 2
            Job("a", (), "s", 1.0),  # ready at 0
            Job("c", (1,), "s", 1.0),  # ready at 2 as well
        ]
    )
    assert engine.start == [0.0, 0.0, 4.0, 3.0, 5.0]
    assert engine.end == [3.0, 2.0, 5.0, 4.0, 6.0]
    assert engine.now == 6.0


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 30), times, times)
def test_a_pipeline_of_two_stages(m: int, s: float, c: float) -> None:
    jobs = []
    for i in range(m):
        jobs += [Job(f"s{i}", (), "s", s), Job(f"c{i}", (2 * i,), "c", c)]
    assert max(run(jobs).end) == close(s + c + (m - 1) * max(s, c))


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 30), times, times, st.integers(1, 4))
def test_buffered_streaming(m: int, load: float, compute: float, buffers: int) -> None:
    """With two buffers or more the slower of both hides the other; with one they take turns. A pool of buffers and
    dependencies on whoever had the buffer before give the same."""
    by_pool, by_dependency = [], []
    for i in range(m):
        by_pool += [
            Job(f"load {i}", (), "link", load, takes=(("buffers", 1.0),)),
            Job(f"compute {i}", (2 * i,), "device", compute, gives=(("buffers", 1.0),)),
        ]
        freed = (2 * (i - buffers) + 1,) if i >= buffers else ()
        by_dependency += [Job(f"load {i}", freed, "link", load), Job(f"compute {i}", (2 * i,), "device", compute)]
    engine = run(by_pool, pools={"buffers": float(buffers)})
    whole = m * (load + compute) if buffers == 1 else load + compute + (m - 1) * max(load, compute)
    assert max(engine.end) == close(whole)
    assert run(by_dependency).end == engine.end
    assert engine.high_water["buffers"] <= buffers
    assert engine.shortage is None


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 6), st.integers(0, 10), times, times)
def test_1f1b_bubble(p: int, more: int, forward: float, backward: float) -> None:
    """PipeDream-Flush (Narayanan et al., 2021): of the time each of p stages idles (p - 1) / (m + p - 1)."""
    m = p + more
    orders = []
    for stage in range(p):
        warm = p - 1 - stage
        order = [("F", i) for i in range(warm)]
        for i in range(m - warm):
            order += [("F", warm + i), ("B", i)]
        orders.append(order + [("B", i) for i in range(m - warm, m)])
    engine, numbers = Engine(), {}
    at = [0] * p
    while any(at[s] < len(orders[s]) for s in range(p)):
        for stage in range(p):
            if at[stage] == len(orders[stage]):
                continue
            kind, i = orders[stage][at[stage]]
            needs = [(kind, i, stage - 1)] if kind == "F" else [("F", i, stage), (kind, i, stage + 1)]
            needs = [n for n in needs if 0 <= n[2] < p]
            if at[stage]:
                needs.append((*orders[stage][at[stage] - 1], stage))
            if all(n in numbers for n in needs):
                seconds = forward if kind == "F" else backward
                after = tuple(numbers[n] for n in needs)
                numbers[kind, i, stage] = engine.add(Job(f"{kind}{i}", after, f"stage {stage}", seconds))
                at[stage] += 1
    engine.run()
    makespan = max(engine.end)
    assert makespan == close((m + p - 1) * (forward + backward))
    assert 1 - m * (forward + backward) / makespan == pytest.approx((p - 1) / (m + p - 1), abs=1e-9)


def test_max_min_of_textbooks() -> None:
    # As in Bertsekas and Gallager: three sessions share a link, and what one of them cannot use elsewhere others get
    paths = [("b",), ("a",), ("a", "b"), ("c",), ("a", "d")]
    rates = max_min([math.inf] * 5, paths, dict.fromkeys("abcd", 1.0))
    assert rates == pytest.approx([2 / 3, 1 / 3, 1 / 3, 1.0, 1 / 3], rel=1e-12)
    # The parking lot: one long flow and a short one on each link
    links = [f"l{i}" for i in range(4)]
    assert max_min([math.inf] * 5, [links, *([x] for x in links)], dict.fromkeys(links, 1.0)) == [0.5] * 5
    # What one flow may not have goes to the others
    assert max_min([0.1, math.inf, math.inf], [("a",)] * 3, {"a": 1.0}) == pytest.approx([0.1, 0.45, 0.45], rel=1e-12)
    assert max_min([2.0], [()], {}) == [2.0]
    assert max_min([], [], {"a": 1.0}) == []


def random_flows(rng: random.Random) -> tuple[list[float], list[list[str]], dict[str, float]]:
    links = {f"l{i}": 10 ** rng.uniform(0, 3) for i in range(rng.randint(1, 6))}
    paths = [rng.sample(sorted(links), rng.randint(1, len(links))) for _ in range(rng.randint(1, 12))]
    return [rng.choice([math.inf, 10 ** rng.uniform(-1, 3)]) for _ in paths], paths, links


@pytest.mark.parametrize("seed", range(100))
def test_max_min_is_feasible_and_everybody_has_a_bottleneck(seed: int) -> None:
    """Which is what makes rates max-min fair: each flow is at its limit, or crosses a full link on which nobody has
    more."""
    limits, paths, links = random_flows(random.Random(seed))
    rates = max_min(limits, paths, links)
    used = {x: sum(r for r, path in zip(rates, paths, strict=True) if x in path) for x in links}
    assert all(used[x] <= links[x] * (1 + 1e-9) for x in links)
    for rate, limit, path in zip(rates, limits, paths, strict=True):
        assert 0 < rate <= limit
        most = {x: max(r for r, other in zip(rates, paths, strict=True) if x in other) for x in path}
        bottleneck = any(used[x] == close(links[x]) and rate >= most[x] * (1 - 1e-9) for x in path)
        assert bottleneck or rate == limit


def test_flows_share_while_they_overlap() -> None:
    """100 B over a domain of 10 B/s, and after 2 s of latency 40 B more: alone, both at 5 B/s, alone again."""
    engine = run(
        [Job("long", nbytes=100.0, limit=10.0, via=("d",)), Job("short", (), "", 2.0, 40.0, 8.0, ("d",))], {"d": 10.0}
    )
    assert engine.end == close([14.0, 10.0])
    alone = run([Job("short", (), "", 2.0, 40.0, 8.0, ("d",))], {"d": 10.0})
    assert alone.end == close([7.0])
    assert run([Job("free", (), "", 2.0, 40.0, 8.0)]).end == close([7.0])
    assert run([Job("empty", (), "", 2.0, 0.0, 8.0, ("d",))], {"d": 10.0}).end == [2.0]


@pytest.mark.parametrize("seed", range(30))
def test_a_domain_is_never_idle_while_there_is_something_to_move(seed: int) -> None:
    rng = random.Random(seed)
    sizes = [rng.uniform(1, 100) for _ in range(rng.randint(1, 20))]
    engine = run([Job(f"{i}", nbytes=n, via=("d",)) for i, n in enumerate(sizes)], {"d": 7.0})
    assert max(engine.end) == close(sum(sizes) / 7.0)
    assert sorted(range(len(sizes)), key=lambda i: sizes[i]) == sorted(range(len(sizes)), key=lambda i: engine.end[i])


def test_memory_that_runs_out_is_an_outcome() -> None:
    pool = (("memory", 6.0),)
    engine = run(
        [
            Job("first", seconds=1.0, takes=pool),  # keeps what it took
            Job("second", (0,), "stream", 1.0, takes=pool),
            Job("behind it", (0,), "stream", 1.0),
            Job("elsewhere", (0,), "other", 1.0),
        ],
        pools={"memory": 10.0},
    )
    found = engine.shortage
    assert found is not None
    assert (found.job, found.time, found.pool, found.need, found.free, found.capacity) == (
        "second", 1.0, "memory", 6.0, 4.0, 10.0,
    )  # fmt: skip
    assert str(found) == "second needs 6 B of memory at 1 s; 4 B of 10 B are free and nothing will free more"
    assert math.isnan(engine.end[1])
    assert math.isnan(engine.end[2])
    assert engine.end[3] == 2.0
    assert engine.high_water == {"memory": 6.0}


def test_nobody_overtakes_who_waits_for_memory() -> None:
    def job(name: str, need: float, seconds: float, after: tuple[int, ...] = ()) -> Job:
        return Job(name, after, "", seconds, takes=(("memory", need),), gives=(("memory", need),))

    engine = run([job("a", 6, 5.0), job("b", 3, 1.0), job("large", 9, 1.0), job("small", 1, 1.0)], pools={"memory": 10})
    assert engine.start == [0.0, 0.0, 5.0, 5.0]
    assert engine.high_water["memory"] == 10
    assert engine.free == engine.pools
    assert engine.shortage is None


def random_jobs(rng: random.Random) -> list[Job]:
    jobs: list[Job] = []
    for i in range(rng.randint(1, 60)):
        after = tuple(rng.sample(range(i), min(i, rng.choice([0, 0, 1, 2]))))
        on, seconds = rng.choice(["", "s", "t", "u"]), rng.choice([0.0, 1.0, rng.uniform(0, 3)])
        takes = (("pool", rng.uniform(0, 5)),) if rng.random() < 0.3 else ()
        if rng.random() < 0.4:
            via = tuple(rng.sample(["d", "e"], rng.randint(1, 2)))
            jobs.append(
                Job(f"{i}", after, on, seconds, rng.uniform(0, 9), rng.choice([math.inf, 2.0]), via, takes, takes)
            )
        else:
            jobs.append(Job(f"{i}", after, on, seconds, takes=takes, gives=takes))
    return jobs


@pytest.mark.parametrize("seed", range(60))
def test_random_jobs_keep_every_promise(seed: int) -> None:
    """Dependencies, exclusiveness, memory; the same again; and the same if jobs are added while time stands still."""
    jobs, shared, pools = random_jobs(random.Random(seed)), {"d": 3.0, "e": 1.0}, {"pool": 6.0}
    engine = run(jobs, shared, pools)
    assert engine.shortage is None
    assert not any(math.isnan(t) for t in engine.end)
    for i, job in enumerate(jobs):
        assert engine.start[i] >= max((engine.end[j] for j in job.after), default=0.0)
        least = job.seconds + (job.nbytes / min(job.limit, *(shared[d] for d in job.via)) if job.via else 0.0)
        assert engine.end[i] - engine.start[i] >= least * (1 - 1e-9) - 1e-12
        if not job.via:
            assert engine.end[i] - engine.start[i] == pytest.approx(least, rel=1e-9, abs=1e-12)
    for on in "stu":
        spans = sorted((engine.start[i], engine.end[i]) for i, job in enumerate(jobs) if job.on == on)
        assert all(a[1] <= b[0] for a, b in pairwise(spans))
    assert 0 <= engine.high_water["pool"] <= 6.0
    again = run(jobs, shared, pools)
    assert (again.start, again.end) == (engine.start, engine.end)


def test_jobs_can_be_added_while_time_stands_still() -> None:
    engine = Engine({"d": 10.0})
    first, slow = engine.add(Job("first", seconds=1.0)), engine.add(Job("slow", nbytes=100.0, via=("d",)))
    engine.run(until=first)
    assert (engine.now, engine.end[first]) == (1.0, 1.0)
    assert math.isnan(engine.end[slow])
    assert engine.shortage is None
    both = engine.add(Job("both", (first, slow), "s", 2.0))
    beside = engine.add(Job("beside", (first,), "s", 3.0, 45.0, via=("d",)))
    engine.run()
    assert (engine.start[beside], engine.start[both]) == (1.0, engine.end[slow])
    assert engine.end == close([1.0, 14.5, 16.5, 13.0])  # alone until 4 s, then both at half the rate until 13 s


def test_a_job_cannot_wait_for_a_later_one() -> None:
    with pytest.raises(AssertionError, match="x comes after job 0, which is not there yet"):
        Engine().add(Job("x", (0,)))
