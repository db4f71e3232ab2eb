"""An LLM that keeps the logits which each token was sampled from."""

from __future__ import annotations

from typing import Any

import torch

from ciuic_runtime.engine.llm import LLM
from ciuic_runtime.engine.request import Request


class Watched(LLM):
    seen: dict[int, list[torch.Tensor]]  # by prompt, in order

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.seen, sample = {}, self.engine.sample

        def watched(request: Request, logits: torch.Tensor) -> Any:
            self.seen.setdefault(request.index, []).append(logits.clone())
            return sample(request, logits)

        self.engine.sample = watched  # type: ignore[method-assign]
