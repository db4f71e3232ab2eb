"""A real server in a thread, with a small model that has a chat template."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from running import Running, opened, running, with_template

from ciuic_runtime.devices.spec import Topology
from ciuic_runtime.engine.llm import LLM


@pytest.fixture(scope="session")
def tiny_chat(tiny_int4: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_template(tiny_int4, tmp_path_factory.mktemp("chat") / "tiny-chat")


@pytest.fixture(scope="session")
def reference(tiny_chat: Path, here: Topology) -> Iterator[LLM]:
    """The same model, driven directly."""
    with opened(tiny_chat, here, serving=False) as llm:
        yield llm


@pytest.fixture(scope="session")
def tiny_server(tiny_chat: Path, here: Topology) -> Iterator[Running]:
    """A context of 256 tokens, four requests at once."""
    with opened(tiny_chat, here) as llm, running(llm) as server:
        yield server


@pytest.fixture
def serve(tiny_chat: Path, here: Topology) -> Callable[..., AbstractContextManager[Running]]:
    """A server of a test's own: settings of the server, and `llm` for those of the model."""

    @contextmanager
    def one(path: Path = tiny_chat, llm: dict[str, Any] | None = None, **settings: Any) -> Iterator[Running]:
        with opened(path, here, **(llm or {})) as model, running(model, **settings) as server:
            yield server

    return one
