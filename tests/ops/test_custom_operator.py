"""Operators of the user's own: they run in place of the engine's in both paths, and what they get wrong is said."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ciuic_runtime import LLM, CiuicTensor, Cost, CustomOperator, register_operator, unregister_operator
from ciuic_runtime.devices.errors import CiuicError, InvalidInput
from ciuic_runtime.devices.spec import Topology
from ciuic_runtime.models.random_checkpoint import write_random_checkpoint
from ciuic_runtime.ops.custom import REPLACEABLE, registered_operators
from ciuic_runtime.ops.moe import choose
from ciuic_runtime.ops.native import REFERENCE, instruction_set

PROMPT = [5, 250, 17, 99, 3, 3, 42, 8]
TINY_V2 = {
    "model_type": "deepseek_v2", "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128,
    "moe_intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4,
    "q_lora_rank": None, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 3, "n_group": 1, "topk_group": 1,
    "topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False, "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 1, "moe_layer_freq": 1, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny_v2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DeepSeek-V2-shaped checkpoint: its router takes a softmax."""
    return write_random_checkpoint(TINY_V2, tmp_path_factory.mktemp("models") / "tiny-v2")


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    left = registered_operators()
    for found in left:
        unregister_operator(found.name)
    assert not left, f"the test left {left}"


@pytest.fixture(params=["reference", "native"])
def kernels(request: pytest.FixtureRequest) -> str:
    chosen = REFERENCE if request.param == "reference" else instruction_set()
    if request.param == "native" and chosen == REFERENCE:
        pytest.skip("the native kernels are not built here")
    return chosen


def logits(model: Path, here: Topology, kernels: str) -> torch.Tensor:
    """Of a prompt and of a token after it."""
    with LLM(model, devices=here, kernels=kernels, max_model_len=64, max_num_seqs=1, threads=1) as llm:
        assert llm.kernels == kernels
        return llm.logits(PROMPT)


calls: list[tuple[int, ...]] = []


class Softmax(CustomOperator):
    def forward(self, x: CiuicTensor) -> CiuicTensor:
        calls.append(x.shape)
        e = (x - x.max(axis=-1, keepdims=True)).exp()
        return e / e.sum(axis=-1, keepdims=True)

    def cost(self, x: CiuicTensor) -> Cost:
        return Cost(flops=5 * x.size, nbytes=2 * x.nbytes)


class Sigmoid(CustomOperator):
    def forward(self, x: CiuicTensor) -> CiuicTensor:
        calls.append(x.shape)
        return 1 / (1 + (-x).exp())


class Norm(CustomOperator):
    def forward(self, x: CiuicTensor, weight: CiuicTensor, eps: float) -> CiuicTensor:
        calls.append(x.shape)
        wide = x.astype("float32")
        return weight * (wide / ((wide * wide).mean(axis=-1, keepdims=True) + eps).sqrt()).astype(x.dtype)


class Route(CustomOperator):
    def forward(self, logits: CiuicTensor, bias: CiuicTensor | None, moe: Any) -> Any:
        calls.append(logits.shape)
        return choose(logits.data, None if bias is None else bias.data, moe)


class Silu(CustomOperator):
    def forward(self, x: CiuicTensor) -> CiuicTensor:
        calls.append(x.shape)
        return x / (1 + (-x).exp())


class Combine(CustomOperator):
    def forward(self, rows: CiuicTensor, weights: CiuicTensor) -> CiuicTensor:
        calls.append(rows.shape)
        return (rows * weights[..., None]).sum(axis=1)


CASES = [
    ("softmax", Softmax, "v2"), ("sigmoid", Sigmoid, "v3"), ("rms_norm", Norm, "v2"), ("route", Route, "v2"),
    ("route", Route, "v3"), ("silu", Silu, "v3"), ("combine", Combine, "v3"),
]  # fmt: skip


@pytest.mark.parametrize(("replaces", "cls", "family"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_a_right_replacement_runs_and_changes_nothing(
    replaces: str, cls: type[CustomOperator], family: str, kernels: str, tiny_v2: Path, tiny_v3: Path, here: Topology
) -> None:
    model = {"v2": tiny_v2, "v3": tiny_v3}[family]
    expected = logits(model, here, kernels)
    calls.clear()
    with register_operator("Mine", cls, replaces=replaces, check=True):
        found = logits(model, here, kernels)
    assert len(PROMPT) in {shape[0] for shape in calls}
    assert torch.dist(found, expected) <= (0.02 if kernels == REFERENCE else 1e-4) * expected.norm()
    calls.clear()
    again = logits(model, here, kernels)
    assert not calls
    assert torch.equal(again, expected)


def test_every_replaceable_operator_was_tried() -> None:
    assert {case[0] for case in CASES} == set(REPLACEABLE)


class Even(CustomOperator):
    def forward(self, x: CiuicTensor) -> CiuicTensor:
        return x * 0 + 1 / x.shape[-1]


def test_without_check_what_the_replacement_gives_is_used(kernels: str, tiny_v2: Path, here: Topology) -> None:
    expected = logits(tiny_v2, here, kernels)
    with register_operator("Even", Even, replaces="softmax"):
        assert torch.dist(logits(tiny_v2, here, kernels), expected) > 0.01 * expected.norm()


def giving(value: Any) -> type[CustomOperator]:
    class Giving(CustomOperator):
        def forward(self, *inputs: Any) -> Any:
            return value(*inputs)

    return Giving


def with_nan(x: CiuicTensor) -> CiuicTensor:
    scores = x.data.softmax(-1)
    scores[0, 3] = float("nan")
    return CiuicTensor.of(scores)


def slightly_off(x: CiuicTensor) -> CiuicTensor:
    scores = x.data.softmax(-1)
    scores[-1, 2] += 0.001
    return CiuicTensor.of(scores)


@pytest.mark.parametrize(
    ("value", "check", "says"),
    [
        (slightly_off, True, r"differs from the reference by up to 0.001, at \[1, 2\], where it gives 0\.\d+ and"),
        (with_nan, True, r"differs from the reference by up to inf, at \[0, 3\], where it gives nan and"),
        (lambda x: x.max(axis=-1, keepdims=True), False, r"gives float32 \[2, 1\] where float32 \[2, 8\] is wanted"),
        (lambda x: x > 0, False, r"gives bool \[2, 8\] where float32 \[2, 8\] is wanted"),
        (lambda x: x.numpy(), False, r"gives ndarray where a CiuicTensor, float32 \[2, 8\], is wanted"),
        (lambda x: None, False, "gives NoneType where"),
        (lambda x: (x, x), False, "gives 2 results where 1 are wanted"),
        (lambda x: x / x.nothing, False, "AttributeError: 'CiuicTensor' object has no attribute 'nothing'"),
        (lambda x: x.sum(axis=7), False, "IndexError: Dimension out of range"),
    ],
)
def test_a_wrong_replacement_is_one_line(
    value: Any, check: bool, says: str, kernels: str, tiny_v2: Path, here: Topology
) -> None:
    """Met while the model is opened: two tokens are run to warm up."""
    wrong = register_operator("Wrong", giving(value), replaces="softmax", check=check)
    with wrong, pytest.raises(CiuicError, match=says) as failed:
        logits(tiny_v2, here, kernels)
    assert str(failed.value).startswith("operator 'Wrong' in place of softmax, layers.1.router: ")
    assert "\n" not in str(failed.value)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (lambda logits, bias, moe: logits, "gives 1 results where 2 are wanted"),
        (lambda logits, bias, moe: (logits[:, :3], logits[:, :3]), r"float32 \[2, 3\] where int64 \[2, 3\]"),
        (lambda logits, bias, moe: (logits[:, :3].astype("int64") * 0 + 8, logits[:, :3]), "the model has 0 to 7"),
        (lambda logits, bias, moe: (logits[:, :3].astype("int64") * 0 - 1, logits[:, :3]), "do not exist"),
    ],
)
def test_a_wrong_route_never_reaches_the_experts(
    value: Any, says: str, kernels: str, tiny_v2: Path, here: Topology
) -> None:
    with register_operator("Wrong", giving(value), replaces="route"), pytest.raises(CiuicError, match=says):
        logits(tiny_v2, here, kernels)


def test_numbers_of_another_precision_are_rounded(kernels: str, tiny_v2: Path, here: Topology) -> None:
    with register_operator(
        "Wide", giving(lambda x: x.astype("float64").data.softmax(-1)), replaces="softmax", check=True
    ):
        logits(tiny_v2, here, kernels)


def test_an_open_model_keeps_what_it_was_opened_with(kernels: str, tiny_v2: Path, here: Topology) -> None:
    options: dict[str, Any] = {"devices": here, "kernels": kernels, "max_model_len": 64, "max_num_seqs": 1}
    with LLM(tiny_v2, threads=1, **options) as plain, register_operator("Mine", Softmax, replaces="softmax"):
        calls.clear()
        plain.logits(PROMPT)
        assert not calls
        with LLM(tiny_v2, threads=1, **options) as mine:
            unregister_operator("Mine")
            calls.clear()
            mine.logits(PROMPT)
            assert calls == [(len(PROMPT), 8)] * 2
            assert "operator 'Mine' replaces softmax" in mine.trace.notes


def test_a_model_without_the_operator_says_so(tiny_v3: Path, here: Topology, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("ciuic").propagate = True
    with register_operator("Mine", Softmax, replaces="softmax"), caplog.at_level("WARNING", "ciuic"):
        logits(tiny_v3, here, REFERENCE)
    [said] = [r.getMessage() for r in caplog.records if "Mine" in r.getMessage()]
    assert "replaces softmax" in said
    assert "sigmoid" in said


# Registering


class Needy(CustomOperator):
    def __init__(self, size: int) -> None: ...

    def forward(self, x: Any) -> Any:
        return x


@pytest.mark.parametrize(
    ("name", "cls", "replaces", "says"),
    [
        ("", Softmax, "softmax", "cannot be called ''"),
        ("Mine", Softmax, "attention", "what can be replaced is rms_norm, route, softmax"),
        ("Mine", CustomOperator, "softmax", "that has forward"),
        ("Mine", Softmax(), "softmax", "give a class derived from CustomOperator"),
        ("Mine", dict, "softmax", "give a class derived from CustomOperator"),
        ("Mine", Needy, "softmax", r"Needy\(\) raises TypeError"),
    ],
)
def test_what_cannot_be_registered(name: Any, cls: Any, replaces: str, says: str) -> None:
    with pytest.raises(InvalidInput, match=says) as refused:
        register_operator(name, cls, replaces=replaces)
    assert "\n" not in str(refused.value)
    assert not registered_operators()


def test_one_operator_has_one_replacement() -> None:
    with register_operator("A", Softmax, replaces="softmax"):
        for replaces in ("softmax", "route"):
            with pytest.raises(InvalidInput, match=r"'A' replaces softmax already; unregister_operator\('A'\) first"):
                register_operator("B", Softmax, replaces=replaces)
        with register_operator("B", Sigmoid, replaces="sigmoid"):
            assert [r.name for r in registered_operators()] == ["A", "B"]


def test_a_name_registered_again_is_replaced() -> None:
    register_operator("A", Softmax, replaces="softmax")
    with register_operator("A", Sigmoid, replaces="sigmoid", check=True):
        [found] = registered_operators()
        assert (found.replaces, type(found.operator), found.check) == ("sigmoid", Sigmoid, True)
    assert not registered_operators()


def test_unregistering() -> None:
    register_operator("A", Softmax, replaces="softmax")
    with pytest.raises(InvalidInput, match="no operator 'B' is registered; there is 'A'"):
        unregister_operator("B")
    unregister_operator("A")
    with pytest.raises(InvalidInput, match="no operator 'A' is registered; there is none"):
        unregister_operator("A")
