"""The registry: what can compute each operator, why not, how long it takes, and what was chosen for which reason."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.ops import estimate, native, registry
from ciuic_runtime.ops.custom import REPLACEABLE, CustomOperator, register_operator
from ciuic_runtime.ops.estimate import own_seconds, seconds
from ciuic_runtime.ops.native import REFERENCE, instruction_set, kernels
from ciuic_runtime.ops.registry import (
    INSIDE,
    INSTRUCTION_SETS,
    OPERATORS,
    RegistryReport,
    choose_kernels,
    probe,
    registry_report,
)

native_only = pytest.mark.skipif(kernels() is None, reason="the native kernels are not built here")
ALL = (*INSTRUCTION_SETS, REFERENCE)


@pytest.fixture(autouse=True)
def nothing_forced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever kernels the tests are run with."""
    monkeypatch.delenv("CIUIC_KERNELS", raising=False)
    native.kernels.cache_clear()
    yield
    monkeypatch.undo()
    native.kernels.cache_clear()


@pytest.fixture
def fixed_times(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Seconds by candidate, instead of measuring."""
    times = {name: 1e-3 * (i + 1) for i, name in enumerate(ALL)}
    monkeypatch.setattr(estimate, "seconds", lambda operator, name, threads: times[name])
    return times


@pytest.fixture
def not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an installation without a compiler."""
    monkeypatch.setitem(sys.modules, "ciuic_runtime.ops._kernels", None)
    native.kernels.cache_clear()


def report(wanted: str = "auto") -> RegistryReport:
    found = registry_report(wanted)
    assert found is not None
    return found


def test_every_operator_has_every_candidate_the_reference_last(fixed_times: dict[str, float]) -> None:
    found = report()
    assert [r.name for r in found.operators] == [*OPERATORS, *INSIDE]
    for r in found.operators:
        assert [c.name for c in r.candidates] == list(ALL)
        assert r.chosen == found.kernels == instruction_set()
        assert r.why
        assert r.candidates[-1].usable
        for c in r.candidates:
            assert c.usable == (not probe(c.name))
            assert (c.estimate_s is not None) == (c.usable and r.name in OPERATORS)
    assert set(REPLACEABLE) <= {r.name for r in found.operators}


@native_only
def test_usable_are_those_that_the_kernels_name() -> None:
    module = kernels()
    assert module is not None
    assert [name for name in INSTRUCTION_SETS if not probe(name)] == module.instruction_sets()


def test_without_compiled_kernels_torch_does_it(not_built: None, fixed_times: dict[str, float]) -> None:
    found = report()
    assert found.kernels == REFERENCE
    assert found.why == "the kernels are not compiled in this installation"
    assert [c.name for c in found.operators[0].candidates if c.usable] == [REFERENCE]
    assert "amx cannot be used: the kernels are not compiled in this installation" in str(found)
    with pytest.raises(InvalidInput, match="kernels 'amx' were asked for; this installation and processor have ref"):
        report("amx")


@native_only
def test_a_processor_that_lacks_a_set_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class Module:
        @staticmethod
        def instruction_sets(usable: bool = True) -> list[str]:
            return ["avx2", "portable"] if usable else ["avx512", "avx2", "portable"]

    monkeypatch.setattr(registry, "kernels", lambda: Module)
    assert probe("amx") == "not compiled for this kind of processor"
    assert probe("avx512") == "this processor or system lacks AVX-512 with VNNI and BF16"
    assert probe("avx2") == probe("portable") == probe(REFERENCE) == ""


def test_the_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    best = instruction_set()
    assert choose_kernels(REFERENCE) == (REFERENCE, "asked for")
    if best != REFERENCE:
        assert choose_kernels() == (best, f"{INSTRUCTION_SETS[best][0]}, the best that runs here")
        monkeypatch.setenv("CIUIC_KERNELS", "portable")
        assert choose_kernels() == ("portable", "CIUIC_KERNELS asks for it")
        assert choose_kernels(best) == (best, "asked for")
    monkeypatch.setenv("CIUIC_KERNELS", "sse")
    with pytest.raises(InvalidInput, match=r"kernels 'sse' were asked for; .* have .*reference$"):
        choose_kernels()


def test_a_faster_candidate_is_named_and_not_taken(fixed_times: dict[str, float]) -> None:
    chosen = instruction_set()
    fixed_times[REFERENCE] = 0.9 * fixed_times[chosen]
    assert all("faster" not in r.why for r in report().operators)
    fixed_times[REFERENCE] = 0.1 * fixed_times[chosen]
    found = report()
    for r in found.operators[: len(OPERATORS)]:
        assert r.chosen == chosen
        assert chosen == REFERENCE or r.why.endswith("reference measured faster")


def test_estimates_are_measured_once_for_every_candidate() -> None:
    usable = [name for name in ALL if not probe(name)]
    first = {(operator, name): seconds(operator, name) for operator in OPERATORS for name in usable}
    assert all(0 < s < 1 for s in first.values())
    assert first == {key: seconds(*key) for key in first}


class Softmax(CustomOperator):
    def forward(self, x: Any) -> Any:
        e = (x - x.max(axis=-1, keepdims=True)).exp()
        return e / e.sum(axis=-1, keepdims=True)


def test_an_operator_of_the_users_own_is_reported(fixed_times: dict[str, float]) -> None:
    with register_operator("Mine", Softmax, replaces="softmax", check=True):
        found = report()
    row = next(r for r in found.operators if r.name == "softmax")
    assert (row.chosen, row.why) == ("Mine", "registered in place of softmax, checked as it runs")
    assert [c.name for c in row.candidates] == ["Mine", *ALL]
    assert row.estimate_s is not None
    assert row.estimate_s > 0
    assert "Mine" in str(found)
    assert all(r.chosen != "Mine" for r in report().operators)


@pytest.mark.parametrize("replaces", REPLACEABLE)
def test_an_operator_that_cannot_be_measured_says_why(replaces: str) -> None:
    class Broken(CustomOperator):
        def forward(self, *inputs: Any) -> Any:
            raise ValueError(f"{len(inputs)} inputs\nwere too many")

    with register_operator("Broken", Broken, replaces=replaces) as own:
        taken, work = own_seconds(own)
    assert taken is None
    assert "cannot be measured: ValueError: " in work
    assert "\n" not in work


def test_as_json_and_as_text(fixed_times: dict[str, float]) -> None:
    found = report()
    rows = json.loads(json.dumps(found.to_dict()))
    assert rows["kernels"] == found.kernels
    for row in rows["operators"]:
        assert row.keys() == {"name", "chosen", "why", "candidates"}
        for candidate in row["candidates"]:
            assert candidate.keys() == {"name", "usable", "why_not", "estimate_s"}
    lines = str(found).splitlines()
    assert lines[0].startswith(f"operators: {found.kernels} (")
    assert [line.split()[0] for line in lines[1 : 1 + len(found.operators)]] == [r.name for r in found.operators]
    assert max(map(len, lines[1:])) <= 120


def test_the_doctor_without_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; from ciuic_runtime.cli import main; main(['doctor', '--json'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["operators"] == []
    assert found["kernels"] is None


def test_a_case_has_the_shapes_it_says() -> None:
    assert str(estimate.TOKENS) in estimate.CASE
    assert all(isinstance(i, torch.Tensor) for i in estimate._inputs("combine"))
