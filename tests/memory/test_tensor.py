"""`CiuicTensor` beside numpy: what is written for one gives the same with the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.memory.tensor import CiuicTensor

VALUES = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
SAME: dict[str, Callable[[Any], Any]] = {
    "softmax": lambda x: np.exp(x - x.max(axis=-1, keepdims=True)),
    "numpy's reductions": lambda x: (x - np.max(x, axis=-1, keepdims=True)) / np.sum(x, 1, keepdims=True),
    "norm": lambda x: x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-6),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "reductions": lambda x: x.sum() + x.max(axis=(0, 1)) - x.min(axis=None) * np.mean(x) + np.sum(x, axis=0)[2],
    "numbers on the left": lambda x: (2 - x) * np.float32(3) + 2**x + 1 / (2 + abs(x)),
    "numpy's own scalars and arrays": lambda x: np.float64(2) * x + VALUES[0] - np.multiply(VALUES, x),
    "functions": lambda x: np.tanh(x) + np.log(np.maximum(x, 0.5)) + np.power(x, 2),
    "comparisons": lambda x: (x > 0) * x + (x <= -1) * 2.0,
    "shapes": lambda x: x.T.reshape(3, 8)[:, 1:, None] + x.reshape((2, 12))[0, 3],
    "products": lambda x: x @ x.T,
}  # fmt: skip


@pytest.mark.parametrize("case", SAME)
def test_it_gives_what_numpy_gives(case: str) -> None:
    expected, found = SAME[case](VALUES), SAME[case](CiuicTensor.of(torch.from_numpy(VALUES)))
    assert isinstance(found, CiuicTensor)
    assert found.shape == np.shape(expected)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_numbers_leave_the_type_as_it_is() -> None:
    x = CiuicTensor((2, 3), "bfloat16")
    assert {t.dtype for t in (x * 2.0, 1 - x, np.float64(2) * x, x + np.float32(1), np.exp(x))} == {"bfloat16"}
    assert x.astype("float32").dtype == "float32"
    assert x.numpy().dtype == np.float32


def test_what_it_says_of_itself() -> None:
    x = CiuicTensor((8, 2048), "float32")
    assert (x.shape, x.ndim, x.size, x.nbytes, x.dtype, len(x)) == ((8, 2048), 2, 16384, 65536, "float32", 8)
    assert float(x.max()) == 0
    assert repr(x) == "CiuicTensor((8, 2048), float32, cpu)"
    assert CiuicTensor(3).shape == (3,)


def test_it_is_always_true_and_equal_to_itself_only() -> None:
    x, y = CiuicTensor((1,)), CiuicTensor((0,))
    assert x
    assert y
    assert x == x
    assert x not in [y, CiuicTensor((1,))]


def test_results_are_new_and_views_share() -> None:
    memory = torch.zeros(3)
    x = CiuicTensor.of(memory)
    y = x
    y += 1
    assert memory.tolist() == [0, 0, 0]
    assert x.data is memory
    assert x.copy().data.data_ptr() != memory.data_ptr()


def test_what_it_cannot_do_is_an_error() -> None:
    x = CiuicTensor((2, 2))
    with pytest.raises(InvalidInput, match="dtype 'float7' is not known"):
        CiuicTensor((2,), "float7")
    with pytest.raises(TypeError):
        np.sort(x)
    with pytest.raises(TypeError):
        np.rint(x)
    with pytest.raises(TypeError):
        np.add.reduce(x)
