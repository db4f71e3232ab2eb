"""Which token is drawn: the distributions against transformers' own processors, and draws that depend on seed and
position only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.engine import sampling
from ciuic_runtime.engine.sampling import SamplingParams, sample, uniform

GRID = 400  # draws at evenly spaced numbers measure each probability to within one part in this many
LOGITS = torch.randn(12, generator=torch.Generator().manual_seed(0)) * 2


def distribution(logits: torch.Tensor, params: SamplingParams, history: list[int]) -> torch.Tensor:
    """The probabilities that `sample` draws with, found by letting its random number run through [0, 1)."""
    counts = torch.zeros(len(logits))
    with pytest.MonkeyPatch.context() as patch:
        for i in range(GRID):
            patch.setattr(sampling, "uniform", lambda seed, position, u=(i + 0.5) / GRID: u)
            counts[sample(logits, params, history, 0, 0)] += 1
    return counts / GRID


def theirs(logits: torch.Tensor, params: SamplingParams, history: list[int]) -> torch.Tensor:
    steps = LogitsProcessorList()
    if params.repetition_penalty != 1.0:
        steps.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    steps.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        steps.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        steps.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        steps.append(MinPLogitsWarper(params.min_p))
    return steps(torch.tensor([history]), logits[None].clone())[0].softmax(-1)


@given(
    temperature=st.floats(0.2, 3.0), top_k=st.integers(0, 14), top_p=st.floats(0.05, 1.0), min_p=st.floats(0.0, 0.6),
    penalty=st.sampled_from([1.0, 1.3, 0.7, 5.0]), history=st.lists(st.integers(0, 11), min_size=1, max_size=6),
    seed=st.integers(0, 10),
)  # fmt: skip
@example(temperature=1.0, top_k=3, top_p=1.0, min_p=0.0, penalty=1.0, history=[0], seed=0)
@example(temperature=1.0, top_k=0, top_p=0.5, min_p=0.0, penalty=1.0, history=[0], seed=1)
@example(temperature=1.0, top_k=0, top_p=1.0, min_p=0.3, penalty=1.0, history=[0], seed=2)
@example(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, penalty=2.0, history=[1, 1, 7], seed=3)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_distribution_is_that_of_transformers(seed: int, history: list[int], penalty: float, **values: Any) -> None:
    logits = torch.randn(12, generator=torch.Generator().manual_seed(seed)) * 2
    params = SamplingParams(repetition_penalty=penalty, **values)
    expected = theirs(logits, params, history)
    got = distribution(logits, params, history)
    torch.testing.assert_close(got, expected, rtol=0, atol=1.5 / GRID)
    assert set(got.nonzero().flatten().tolist()) <= set(expected.nonzero().flatten().tolist())


def sorted_first(logits: torch.Tensor, params: SamplingParams, number: float) -> int:
    """As the definition has it: all tokens in order, then what the filters leave."""
    ranked, ids = ((logits - logits.max()).double() / params.temperature).sort(descending=True, stable=True)
    probabilities = ranked.softmax(dim=0)
    keep = torch.ones_like(probabilities, dtype=torch.bool)
    if params.top_k:
        keep[params.top_k :] = False
    if params.top_p < 1:
        kept = probabilities * keep / (probabilities * keep).sum()
        keep &= kept.cumsum(dim=0) - kept < params.top_p
    if params.min_p:
        keep &= probabilities >= params.min_p * probabilities[0]
    keep[0] = True
    cumulative = (probabilities * keep).cumsum(dim=0)
    return int(ids[(cumulative <= number * cumulative[-1]).sum().clamp(max=int(keep.sum()) - 1)])


@given(
    vocab=st.integers(1, 300), spread=st.sampled_from([0.0, 0.01, 1.0, 5.0]), likeliest=st.integers(1, 300),
    temperature=st.floats(0.2, 3.0), top_k=st.sampled_from([0, 1, 2, 7, 40, 299, 1000]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 1e-9]), min_p=st.sampled_from([0.0, 0.0, 0.01, 0.5, 1.0]),
    equal=st.booleans(), seed=st.integers(0, 1000),
)  # fmt: skip
@settings(max_examples=300, deadline=None, derandomize=True)
def test_the_likeliest_are_enough_or_all_are_looked_at(
    vocab: int, spread: float, likeliest: int, equal: bool, seed: int, **values: Any
) -> None:
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * spread
    logits = (logits * 2).round() / 2 if equal else logits
    params, number = SamplingParams(**values), uniform(seed, vocab)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "uniform", lambda seed, position: number)
        patch.setattr(sampling, "LIKELIEST", likeliest)
        some = sample(logits, params, (), 0, 0)
        patch.setattr(sampling, "LIKELIEST", vocab)
        assert some == sample(logits, params, (), 0, 0)
    if not equal and spread:  # else sums meet the filters' bounds but for rounding
        assert some == sorted_first(logits, params, number)


@pytest.mark.parametrize("penalty", [5e-324, 1e-300, 1e-38])
def test_the_smallest_penalty_draws_what_was_seen(penalty: float) -> None:
    params = SamplingParams(repetition_penalty=penalty, temperature=1.0)
    for seen in ([2], [1, 2], [0, 2]):
        assert sample(torch.tensor([-3.0, 0.0, 1.5, 9.0]), params, seen, 0, 1) == 2


def test_repetition_penalty_acts_on_greedy_choice_and_both_signs() -> None:
    logits = torch.tensor([2.0, 1.9, -1.0, -1.2])
    greedy = SamplingParams(repetition_penalty=1.5)
    assert sample(logits, greedy, [], 0, 0) == 0
    assert sample(logits, greedy, [0, 0, 2], 0, 0) == 1
    assert sample(torch.tensor([-1.0, -1.2]), greedy, [0], 0, 0) == 1
    assert logits.tolist() == pytest.approx([2.0, 1.9, -1.0, -1.2]), "the logits were changed"


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    expected = probabilities * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("along", ["positions", "seeds"])
def test_draws_follow_the_distribution(along: str, temperature: float) -> None:
    """4000 draws with consecutive positions of one seed, or consecutive seeds at one position (fixed, so no flakes).

    The bound is the 99.9 % quantile of chi-square with 11 degrees of freedom."""
    params = SamplingParams(temperature=temperature)
    at = (lambda i: (7, i)) if along == "positions" else (lambda i: (i, 7))
    drawn = torch.tensor([sample(LOGITS, params, (), *at(i)) for i in range(4000)])
    counts = torch.bincount(drawn, minlength=12).float()
    assert chi_square(counts, (LOGITS / temperature).softmax(0)) < 31.3
    wrong = (LOGITS / (temperature * 1.3)).softmax(0)
    assert chi_square(counts, wrong) > 31.3, "the bound would not notice another temperature"
    pairs = torch.bincount(drawn[:-1] * 12 + drawn[1:], minlength=144).view(12, 12).float()
    top = counts.argsort(descending=True)[:3]
    together = pairs[top][:, top] / pairs[top][:, top].sum()
    independent = together.sum(1, keepdim=True) * together.sum(0, keepdim=True)
    assert (together - independent).abs().max() < 0.03, "consecutive draws hang together"


def test_a_draw_depends_on_seed_and_position_only() -> None:
    values = {(s, p): uniform(s, p) for s in (0, 1, 2**63 - 1) for p in (0, 1, 63, 10**6)}
    assert len(set(values.values())) == len(values)
    assert all(0 <= v < 1 for v in values.values())
    assert values == {(s, p): uniform(s, p) for s, p in reversed(values)}
    # Recorded, so that a seed keeps meaning the same text from one version to the next.
    assert (uniform(0, 0), uniform(1, 5)) == RECORDED


RECORDED = (0.011546754286331562, 0.9719207784869555)


def test_greedy() -> None:
    assert sample(LOGITS, SamplingParams(), (), 5, 9) == int(LOGITS.argmax())
    assert sample(torch.tensor([1.0, 3.0, 3.0]), SamplingParams(), (), 0, 0) == 1


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-40, 1e-6])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    for seed in range(20):
        assert sample(LOGITS * 50, SamplingParams(temperature=temperature), (), seed, 3) == int(LOGITS.argmax())


def test_only_the_likeliest_is_left() -> None:
    for narrow in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}):
        params = SamplingParams(temperature=5.0, **narrow)
        assert {sample(LOGITS, params, (), s, 0) for s in range(50)} == {int(LOGITS.argmax())}


def test_tokens_ruled_out_are_never_drawn() -> None:
    logits = LOGITS.clone()
    logits[::2] = float("-inf")
    drawn = {sample(logits, SamplingParams(temperature=100.0), (), s, 0) for s in range(300)}
    assert drawn == {1, 3, 5, 7, 9, 11}


def test_the_largest_random_number_stays_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "uniform", lambda seed, position: 1 - 2**-53)
    order = LOGITS.argsort(descending=True).tolist()
    assert sample(LOGITS, SamplingParams(temperature=1.0, top_k=4), (), 0, 0) == order[3]
    monkeypatch.setattr(sampling, "uniform", lambda seed, position: 0.0)
    assert sample(LOGITS, SamplingParams(temperature=1.0), (), 0, 0) == order[0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_are_reported(bad: float, temperature: float) -> None:
    logits = LOGITS.clone()
    logits[4] = bad
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        sample(logits, SamplingParams(temperature=temperature), (), 0, 0)
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        sample(torch.full((5,), float("-inf")), SamplingParams(temperature=temperature), (), 0, 0)


WRONG: list[dict[str, Any]] = [
    {"max_tokens": 0}, {"max_tokens": 1.5}, {"max_tokens": True}, {"temperature": -0.1}, {"temperature": float("nan")},
    {"temperature": "1"}, {"temperature": float("inf")}, {"top_k": -1}, {"top_k": 2.0}, {"top_p": 0}, {"top_p": 1.01},
    {"min_p": -0.1}, {"min_p": 1.1}, {"repetition_penalty": 0}, {"repetition_penalty": -1}, {"seed": -1},
    {"seed": 2**64}, {"seed": 1.0}, {"stop": ("a", "")}, {"stop": (1,)}, {"stop": None}, {"stop": 5}, {"stop": ""},
]  # fmt: skip


@pytest.mark.parametrize("values", WRONG, ids=str)
def test_wrong_parameters_are_named(values: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match=next(iter(values))):
        SamplingParams(**values)


def test_one_stop_string_may_be_given_plainly() -> None:
    assert SamplingParams(stop="END").stop == ("END",)  # type: ignore[arg-type]
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]
