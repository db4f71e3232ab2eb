"""An LLM that keeps the logits which each token was sampled from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ciuic_runtime.engine.draw import Draw, Drawn
from ciuic_runtime.engine.engine import LocalRunner
from ciuic_runtime.engine.llm import LLM


class Watched(LLM):
    seen: dict[int, list[torch.Tensor]]  # by prompt, in order

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        runner = self.engine.runner
        assert isinstance(runner, LocalRunner)
        self.seen, draw = {}, runner.draw

        def watched(draws: Sequence[Draw], logits: torch.Tensor) -> list[Drawn]:
            at = 0
            for one in draws:
                at += one.rows
                if one.wanted:
                    self.seen.setdefault(one.request, []).append(logits[at - 1].clone())
            return draw(draws, logits)

        runner.draw = watched  # type: ignore[method-assign]
