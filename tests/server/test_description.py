"""The OpenAPI description is true: what it allows and what it does not are tried, and every answer is as it says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as with_seed
from running import Running, opened, running
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from ciuic_runtime.devices.spec import Topology

GENERATION = ["POST /v1/chat/completions", "POST /v1/completions"]
OTHERS = ["GET /v1/models", "GET /v1/models/{id}", "GET /health", "GET /metrics"]
# A valid request may be of another model, or not fit into the context: its schema cannot say so.
LEFT_OUT = [positive_data_acceptance]


@pytest.fixture(scope="module")
def small(tiny_chat: Path, here: Topology) -> Iterator[Running]:
    """So small a context that answers without a limit end soon."""
    with (
        opened(tiny_chat, here, max_model_len=64) as llm,
        running(llm, max_choices=3, max_body_bytes=1 << 16) as server,
    ):
        yield server


def explore(server: Running, operation: str, mode: GenerationMode, examples: int, seed: int = 0) -> Counter[int]:
    """Statuses that came, each answer checked against the description."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    method, path = operation.split()
    statuses: Counter[int] = Counter()

    @with_seed(seed)
    @settings(
        max_examples=examples, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=schema[path][method].as_strategy(generation_mode=mode))
    def one(case: Any) -> None:
        answer = case.call(timeout=30)
        statuses[answer.status_code] += 1
        case.validate_response(answer, excluded_checks=LEFT_OUT)

    one()
    return statuses


@pytest.mark.parametrize("operation", GENERATION)
def test_requests_as_described_are_answered_as_described(small: Running, operation: str) -> None:
    statuses = explore(small, operation, GenerationMode.POSITIVE, 60)
    assert statuses[200] > 0, statuses  # most ask for more than the context holds
    assert statuses.keys() <= {200, 400, 413, 429}


@pytest.mark.parametrize("operation", GENERATION)
def test_other_requests_are_refused(small: Running, operation: str) -> None:
    statuses = explore(small, operation, GenerationMode.NEGATIVE, 100)
    assert statuses.keys() <= {400, 401, 403, 404, 405, 413, 415}


@pytest.mark.parametrize("operation", OTHERS)
def test_whatever_else_there_is_is_as_described(small: Running, operation: str) -> None:
    explore(small, operation, GenerationMode.POSITIVE, 10)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize("operation", GENERATION)
def test_thousands_of_requests_find_no_mistake(small: Running, operation: str, mode: GenerationMode) -> None:
    for seed in range(1, 6):
        assert 500 not in explore(small, operation, mode, 500, seed)
    assert small.idle


def test_the_description_names_this_server(small: Running) -> None:
    described = httpx.get(f"{small.url}/openapi.json").json()
    fields = described["components"]["schemas"]["ChatRequest"]["properties"]
    assert fields["model"]["enum"] == [small.model]
    assert fields["n"]["anyOf"][0]["maximum"] == 3
    statuses = set(described["paths"]["/v1/completions"]["post"]["responses"])
    assert statuses == {"200", "400", "401", "403", "404", "413", "415", "429", "500", "503"}
    assert "422" not in str(described["paths"])
