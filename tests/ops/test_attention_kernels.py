"""Attention by the native kernels of every instruction set: right within the rounding of its format, over scattered
blocks; a token's bits depend neither on chunks, nor on its batch, nor on where its blocks lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from attention_cases import Gqa, Layer, Mla, Piece, Run, Text, cuts, texts_of
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    LAYOUTS,
    SETS,
    THREADS,
    every_set,
    examples,
    native,
    native_only,
    operators,
    rng,
    same_bits,
    ways,
)

pytestmark = native_only
BLOCKS = 16
# Of a row's norm. Beside float32's own rounding there are values that are rounded once more on the way (the query's
# latent, what attention gives): a few of them fall to the other side of a tie. AMX reads float32 queries and softmax
# weights as two bfloat16 parts, to 2^-17 of each.
ROUNDING = {"f32-rows": 5e-5, "bf16-rows": 2e-3, "w8g128-t16": 1e-2, "w4g128-t16": 1e-2}
UNROUNDED = {"f32-rows": 5e-5, "bf16-rows": 0.03, "w8g128-t16": 0.15, "w4g128-t16": 0.15}

MAKERS: dict[str, Callable[[str], Layer]] = {
    "mla": lambda layout: Mla(layout, 4, 16, 8, 16, 32, None, 64),
    "mla, low-rank queries": lambda layout: Mla(layout, 3, 34, 6, 33, 140, 60, 96, interleaved=False, biased=True),
    "gqa": lambda layout: Gqa(layout, 4, 2, 16, 64),
    "gqa, odd heads": lambda layout: Gqa(layout, 6, 2, 22, 150, interleaved=True, biased=True),
}
layers = st.one_of(
    st.builds(
        Mla, st.sampled_from(LAYOUTS), st.sampled_from([1, 2, 5]), st.sampled_from([1, 16, 31, 128, 129]),
        st.sampled_from([2, 8, 34, 64]), st.sampled_from([1, 16, 20, 127, 128]), st.sampled_from([16, 33, 128, 140]),
        st.sampled_from([None, 24, 129]), st.sampled_from([40, 150]), st.booleans(), st.booleans(), st.integers(0, 99),
    ),
    st.builds(
        lambda layout, kv_heads, share, *rest: Gqa(layout, kv_heads * share, kv_heads, *rest),
        st.sampled_from(LAYOUTS), st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 3, 7]),
        st.sampled_from([2, 16, 18, 64, 130]), st.sampled_from([40, 150]), st.booleans(), st.booleans(),
        st.integers(0, 99),
    ),
)  # fmt: skip
lengths = st.one_of(st.integers(1, 20), st.sampled_from([63, 64, 65, 127, 128, 129, 150]))


def generate(run: Run, ops: object, texts: Sequence[Text], chunk: int, in_place: bool = False) -> None:
    """Prompts in chunks, all sequences together; then generated tokens one by one, all sequences together."""
    for pieces in rounds([cuts(i, 0, t.prompt, chunk) for i, t in enumerate(texts)]):
        run.step(ops, pieces, in_place)
    for pieces in rounds([cuts(i, t.prompt, len(t.x), 1) for i, t in enumerate(texts)]):
        run.step(ops, pieces, in_place)


def rounds(queues: Sequence[Sequence[Piece]]) -> list[list[Piece]]:
    return [[q[i] for q in queues if i < len(q)] for i in range(max((len(q) for q in queues), default=0))]


def check(layer: Layer, run: Run, what: str) -> None:
    for i, text in enumerate(run.texts):
        entries = run.entries(i)
        expected, made = layer.reference(text, entries)
        plain = layer.plain(text, entries)
        size = (plain - text.residual).norm(dim=1)
        size = size.maximum(size.mean())  # where values cancel, their rounding remains
        got = run.out[i].double()
        # One place of bfloat16, or the rounding of what cancelled.
        assert ((entries.double() - made).abs() <= made.abs() * 2.0**-8 + made.abs().amax(1, keepdim=True) * 1e-5).all()
        # Rounding is small beside what many values come to; one or two may come to nothing, or be off as a whole.
        few = layer.results < 16
        for other, allowed in ((expected, ROUNDING), (plain, UNROUNDED))[: 1 if few else 2]:
            most = allowed[layer.layout] * (4 if few else 1)
            error = ((got - other).norm(dim=1) / size).nan_to_num(nan=float("inf"))
            assert error.max() <= most, f"{what}: {error.max():.1e} at token {int(error.argmax())}"
    assert run.untouched(), f"{what}: other sequences' blocks were written to"


@given(layers, st.lists(st.tuples(lengths, st.integers(0, 3)), min_size=1, max_size=3), st.data())
@settings(max_examples=examples(12), deadline=None)
def test_attention(layer: Layer, sizes: list[tuple[int, int]], data: st.DataObject) -> None:
    texts = texts_of(layer.hidden, sizes, BLOCKS, data.draw(st.integers(0, 99)))
    chunk = data.draw(st.sampled_from([7, 64, 100, 1000]))
    threads, in_place = data.draw(st.sampled_from(THREADS)), data.draw(st.booleans())
    for isa in SETS:
        run = Run(layer, texts, BLOCKS)
        generate(run, operators(isa, threads), texts, chunk, in_place)
        check(layer, run, f"{layer.layout} by {isa}, {threads} threads")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MAKERS)
def test_a_tokens_bits_are_its_own(name: str, layout: str) -> None:
    """Whole prompts, every size of chunk, alone and in a batch, any number of threads, blocks anywhere, generated
    tokens one by one or replayed many at once, in any company of prompts: always the same."""
    layer = MAKERS[name](layout)
    texts = texts_of(layer.hidden, [(150, 6), (65, 3), (1, 70), (64, 0)], BLOCKS, 3)
    for isa in SETS:
        first = Run(layer, texts, BLOCKS)
        generate(first, operators(isa), texts, 1000)

        def same(run: Run, what: str, isa: str = isa, first: Run = first) -> None:
            for i, text in enumerate(texts):
                assert same_bits(run.out[i], first.out[i]), f"{isa}, sequence {i} of {len(text.x)}: {what}"
                assert same_bits(run.entries(i), first.entries(i)), f"{isa}, cache of sequence {i}: {what}"

        for chunk, threads in ((5, 1), (33, 2), (64, 3), (100, 5)):
            run = Run(layer, texts, BLOCKS)
            generate(run, operators(isa, threads), texts, chunk)
            same(run, f"chunks of {chunk} on {threads} threads")
        free = torch.randperm(BLOCKS, generator=rng(9)).tolist()
        moved = Run(layer, [replace(t, blocks=[free.pop() for _ in t.blocks]) for t in texts], BLOCKS)
        for i, text in enumerate(texts):  # one sequence after the other
            moved.step(operators(isa, 2), [Piece(i, 0, text.prompt)])
            for piece in cuts(i, text.prompt, len(text.x), 1):
                moved.step(operators(isa, 2), [piece])
        same(moved, "alone, in other blocks")
        replayed = Run(layer, texts, BLOCKS)
        replayed.step(operators(isa, 3), [Piece(2, 0, 1)])
        replayed.step(operators(isa, 3), [Piece(0, 0, 150), Piece(2, 1, 40), Piece(1, 0, 65)])
        replayed.step(operators(isa, 2), [Piece(1, 65, 68), Piece(3, 0, 64), Piece(2, 40, 71), Piece(0, 150, 156)])
        same(replayed, "generated tokens many at once, beside prompts")


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("layout", ["w8g128-t16", "bf16-rows"])
def test_long_contexts(name: str, layout: str) -> None:
    """More rows than a block of any kernel, and contexts that several threads may share."""
    layer = MAKERS[name](layout)
    texts = texts_of(layer.hidden, [(300, 3), (450, 0), (1, 280)], 2 * BLOCKS, 5)
    for isa in SETS:
        whole, cut = Run(layer, texts, 2 * BLOCKS), Run(layer, texts, 2 * BLOCKS)
        for i in range(3):
            whole.step(operators(isa, 2), [Piece(i, 0, texts[i].prompt)])
        whole.step(operators(isa, 2), [Piece(0, 300, 303), Piece(2, 1, 281)])
        for pieces in rounds([cuts(0, 0, 300, 130), cuts(1, 0, 450, 130), [Piece(2, 0, 1), *cuts(2, 1, 278, 93)]]):
            cut.step(operators(isa, 3), pieces)
        for i in range(3):
            cut.step(operators(isa, 1 + 2 * i), [Piece(2, 278 + i, 279 + i), Piece(0, 300 + i, 301 + i)])
        assert all(same_bits(a, b) for a, b in zip(whole.out, cut.out, strict=True)), isa
        check(layer, whole, isa)


@pytest.mark.parametrize("name", MAKERS)
def test_instruction_sets_agree_within_rounding(name: str) -> None:
    layer = MAKERS[name]("f32-rows")
    texts = texts_of(layer.hidden, [(70, 3)], BLOCKS, 6)
    outs = []
    for what, ops in ways([2]):
        run = Run(layer, texts, BLOCKS)
        generate(run, ops, texts, 1000)
        outs.append((what, run.out[0]))
    for what, out in outs[1:]:
        # The caches hold bfloat16, of which a value may fall to the other side of a tie.
        assert (out - outs[0][1]).norm() <= 2e-3 * outs[0][1].norm(), what


@every_set
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_from_its_token_on_and_nowhere_else(
    name: str, layout: str, isa: str, bad: float
) -> None:
    layer = MAKERS[name](layout)
    texts = texts_of(layer.hidden, [(90, 3), (40, 4)], BLOCKS, 7)
    clean = Run(layer, texts, BLOCKS)
    generate(clean, operators(isa), texts, 1000)
    for token in (70, 91):  # of the prompt, and generated
        touched = texts[0].x.clone()
        touched[token, 5] = bad
        run = Run(
            layer, [Text(touched, *(getattr(texts[0], f) for f in ("residual", "prompt", "blocks"))), texts[1]], BLOCKS
        )
        generate(run, operators(isa, 2), run.texts, 1000)
        assert not run.out[0][token:].isfinite().any(), f"hidden after token {token}"
        assert same_bits(run.out[1], clean.out[1]), "it spread to another sequence"
        assert same_bits(run.out[0][:token], clean.out[0][:token]), f"it spread to tokens before {token}"


def test_batches_that_cannot_be_are_refused() -> None:
    for start, length, position in ((0, 5, 0), (1, 4, 0), (-1, 2, 0), (0, 0, 0), (0, 4, 62), (0, 4, -1)):
        with pytest.raises(ValueError, match=r"batch|block table"):
            native.Batch(4, 64, 64, [(start, length, position, [0], True)])


def test_weights_that_do_not_fit_are_refused() -> None:
    for change in ("heads", "kv_heads", "dim"):
        good = Gqa("f32-rows", 4, 2, 16, 64)
        matrices = [w.matrix for w in (good.q, good.k, good.v, good.o)]
        sizes = {"heads": (5, 2, 16), "kv_heads": (4, 3, 16), "dim": (4, 2, 17)}[change]
        with pytest.raises(ValueError, match="do not fit"):
            native.GqaWeights(sizes, matrices, [0] * 4, 1.0)
