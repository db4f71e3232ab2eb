"""Reference models, made once per session and by name only when a test asks for one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hf_reference import CASES, Case, Reference, make

Reader = Callable[[Case], Reference]


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    """The reference of a case; the cases that tests share are computed once."""
    torch.set_num_threads(1)  # more only wait for each other in models this small
    known: dict[str, Reference] = {}

    def of(case: Case) -> Reference:
        if case.name not in known:
            made = make(case, tmp_path_factory.mktemp(case.name))
            if case not in CASES:
                return made
            known[case.name] = made
        return known[case.name]

    return of
