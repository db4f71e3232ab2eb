"""How much of a prompt shares a pass with sequences that decode."""

from __future__ import annotations

import math

import pytest

from ciuic_runtime.schedulers.policies.mixing import Mixing, Size, prompt_share, shares


def linear(a: float, b: float):
    """Seconds of a pass: a, and b for each token of a prompt."""
    return lambda size: (a if size.decodes else 0.05 * a) + b * size.tokens


@pytest.mark.parametrize(("waiting", "decodes"), [(1, 1), (1, 8), (4, 1), (8, 8), (16, 1)])
def test_the_share_balances_time_per_token_with_time_to_first_token(waiting: int, decodes: int) -> None:
    """With passes of a + b n seconds, near (a / b) sqrt(waiting / decodes)."""
    a, b = 0.1, 0.001
    got = prompt_share(linear(a, b), Size(decodes, 500), waiting, 4096, 0, 2048)
    best = a / b * math.sqrt(waiting / decodes)
    assert best / 1.6 <= got <= best * 1.6


def test_more_who_wait_get_more_and_more_who_decode_give_less() -> None:
    def share(waiting: int, decodes: int) -> int:
        return prompt_share(linear(0.1, 0.0005), Size(decodes, 500), waiting, 8192, 0, 4096)

    assert share(8, 2) > share(1, 2) > share(1, 16)


def test_a_share_is_never_more_than_is_left_or_than_a_pass_takes() -> None:
    for left in (1, 5, 16, 17, 300):
        assert prompt_share(linear(1.0, 1e-6), Size(1, 10), 4, left, 0, 512) <= left
    assert prompt_share(linear(1.0, 1e-6), Size(1, 10), 4, 10_000, 0, 512) == 512
    assert shares(40) == [16, 32, 40]
    assert shares(7) == [7]


def test_the_engine_asks_with_contexts_and_what_is_left() -> None:
    seen: list[Size] = []

    def seconds(size: Size) -> float:
        seen.append(size)
        return 1.0 + size.tokens

    assert 1 <= Mixing(seconds, 512)([100, 300], [(64, 30), (0, 10)]) <= 40
    assert seen[0] == Size(2, 200)
    assert {s.at for s in seen if s.tokens} == {64}


def test_sizes_are_rounded_so_that_few_are_simulated() -> None:
    assert Size(3, 500, 100, 300).rounded == Size(3, 512, 112, 256)
    assert Size(3, 500, 0, 300).rounded == Size(3, 512, 0, 0)
    assert Size(0, 0, 5, 0).rounded == Size(0, 0, 5, 0)
