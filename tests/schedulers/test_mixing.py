"""How much of a prompt shares a pass with sequences that decode, and how often."""

from __future__ import annotations

import math

import pytest

from ciuic_runtime.schedulers.policies.mixing import LEAST_STRETCH, Mixing, Share, Size, prompt_share, shares

DECODE, TOKEN = 0.1, 0.001  # s: of a pass, and of a token of a prompt beside it


def linear(size: Size) -> float:
    return DECODE * bool(size.decodes) + TOKEN * size.tokens


def fixed(cost: float):
    """Every pass with prompts has to read `cost` seconds' worth of experts first."""
    return lambda size: linear(size) + cost * bool(size.tokens)


def stretch(share: Share, seconds=linear, decodes: int = 8) -> float:
    """Time per token of those who decode, over what it would be without prompts."""
    alone, with_prompts = seconds(Size(decodes, 500)), seconds(Size(decodes, 500, share.tokens))
    return (with_prompts + share.pause * alone) / ((share.pause + 1) * alone)


def test_small_shares_do_where_they_cost_no_more_per_token() -> None:
    assert prompt_share(linear, Size(8, 500), 1, 2000, 0, 512).tokens == 16


def test_shares_are_larger_where_every_pass_with_prompts_costs_something_by_itself() -> None:
    shared = [prompt_share(fixed(cost), Size(8, 500), 1, 2000, 0, 512).tokens for cost in (0.01, 0.05, 0.2)]
    assert shared == sorted(shared)
    assert shared[0] < shared[-1]
    share = prompt_share(fixed(0.2), Size(8, 500), 1, 2000, 0, 512)
    assert (0.2 + TOKEN * share.tokens) / share.tokens <= 1.5 * (0.2 + TOKEN * 512) / 512


@pytest.mark.parametrize("cost", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("decodes", [1, 8, 16])
def test_who_decodes_takes_less_than_twice_as_long_for_one_who_waits(cost: float, decodes: int) -> None:
    share = prompt_share(fixed(cost), Size(decodes, 500), 1, 2000, 0, 512)
    expected = LEAST_STRETCH if decodes > 1 else 2.3
    assert stretch(share, fixed(cost), decodes) <= expected


@pytest.mark.parametrize(("waiting", "decodes"), [(4, 1), (16, 1), (16, 4)])
def test_more_who_wait_get_more_of_the_time(waiting: int, decodes: int) -> None:
    """Near s = 1 + sqrt(waiting c / decodes), at which the slowdowns add up to least."""
    share = prompt_share(fixed(0.5), Size(decodes, 500), waiting, 8192, 0, 512)
    dearer = 8192 / share.tokens * (0.5 + TOKEN * share.tokens) / (16 * (0.5 + TOKEN * 512))
    best = 1 + math.sqrt(waiting * dearer / decodes)
    assert 0.75 * best <= stretch(share, fixed(0.5), decodes) <= best


def test_a_share_is_never_more_than_is_left_or_than_a_pass_takes() -> None:
    for left in (1, 5, 16, 17, 300):
        assert prompt_share(fixed(100), Size(1, 10), 4, left, 0, 512).tokens <= left
    assert prompt_share(fixed(100), Size(1, 10), 4, 10_000, 0, 512).tokens > 256
    assert shares(40) == [16, 32, 40]
    assert shares(7) == [7]


def test_the_engine_gets_a_share_when_the_pause_is_over() -> None:
    mixing, decoding, waiting = Mixing(fixed(0.5), 512), [100, 300], [(64, 2000), (0, 10)]
    share = prompt_share(fixed(0.5), Size(2, 200), 2, 2010, 64, 512)
    assert share.pause > 0
    assert [mixing(decoding, waiting, since) for since in (0, share.pause - 1)] == [0, 0]
    assert mixing(decoding, waiting, share.pause) == share.tokens


def test_sizes_are_rounded_so_that_few_are_simulated() -> None:
    assert Size(3, 500, 100, 300).rounded == Size(3, 512, 112, 256)
    assert Size(3, 500, 0, 300).rounded == Size(3, 512, 0, 0)
    assert Size(0, 0, 5, 0).rounded == Size(0, 0, 5, 0)
