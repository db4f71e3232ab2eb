"""An error is one line, whatever a damaged file or a user put into it."""

from __future__ import annotations

import pytest

from ciuic_runtime.devices.errors import CiuicError, InvalidInput, OutOfMemory


@pytest.mark.parametrize("kind", [CiuicError, InvalidInput, OutOfMemory])
def test_control_characters_are_written_out(kind: type[CiuicError]) -> None:
    error = kind("key 'a\nb\x1b[31m' of modèle 模型")
    assert str(error) == "key 'a\\nb\\x1b[31m' of modèle 模型"
