"""The prompts of a job, and what became of them so far: read from one file, written to another line by line.
Knows files and token ids; what is done with them is `run_job.py`'s business."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.devices.files import write_whole
from ciuic_runtime.engine.request import RequestOutput
from ciuic_runtime.engine.sampling import SamplingParams
from ciuic_runtime.memory.pack_journal import entry_of
from ciuic_runtime.models.checkpoint import open_checkpoint
from ciuic_runtime.models.tokenizer import Tokenizer, load_tokenizer
from ciuic_runtime.schedulers.placement import shown, unknown_key

Prompt = str | tuple[int, ...]  # text, or token ids


def read_prompts(path: Path) -> list[Prompt]:
    """Raises InvalidInput, with the line, for what is no prompt."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise InvalidInput(f"cannot read prompts {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidInput(f"prompts {path} are not UTF-8 text; save them as such") from error
    read = _json_prompt if path.suffix == ".jsonl" else lambda line, where: line
    found = [read(line.rstrip("\r"), f"prompts {path}, line {n}") for n, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise InvalidInput(f"prompts {path} has none; write one on each line")
    return found


def _json_prompt(line: str, where: str) -> Prompt:
    example = 'a line is {"prompt": "text"} or {"prompt": [token ids]}'
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{where} is not JSON ({error}); {example}") from error
    if not isinstance(entry, dict) or "prompt" not in entry:
        raise InvalidInput(f"{where} has no prompt; {example}")
    if strange := sorted(set(entry) - {"prompt"}):
        raise InvalidInput(f"{where}: {unknown_key(strange[0], ('prompt',))}; {example}")
    prompt = entry["prompt"]
    if isinstance(prompt, str) and prompt:
        return prompt
    if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
        return tuple(prompt)
    raise InvalidInput(f"{where}: prompt is {shown(prompt)}; {example}")


def token_ids(
    model: Path, path: Path, prompts: Sequence[Prompt], params: SamplingParams, chat: bool, context: int | None
) -> list[Sequence[int]]:
    """Of every prompt in the file `path`. Raises InvalidInput for what the model cannot take, or if it cannot run."""
    checkpoint = open_checkpoint(model)
    spec = checkpoint.spec
    checkpoint.close()
    if spec.why_not_runnable:
        raise InvalidInput(spec.why_not_runnable)
    tokenizer = load_tokenizer(model) if params.stop or any(isinstance(p, str) for p in prompts) else None
    limit = min(context or spec.max_positions, spec.max_positions)
    found: list[Sequence[int]] = []
    for number, prompt in enumerate(prompts, 1):
        what = f"prompt {number} of {path}"
        ids = _encoded(tokenizer, prompt, chat) if isinstance(prompt, str) and tokenizer else prompt
        if strange := [token for token in ids if not (type(token) is int and 0 <= token < spec.vocab_size)]:
            raise InvalidInput(f"{what} has token id {strange[0]!r}; {spec.name} has 0 to {spec.vocab_size - 1}")
        if len(ids) + params.max_tokens > limit:
            raise InvalidInput(
                f"{what} has {len(ids)} tokens, and max_tokens is {params.max_tokens}; the context holds {limit} "
                f"({spec.name} allows {spec.max_positions}); shorten it, or ask for fewer"
            )
        found.append([int(token) for token in ids])
    return found


def _encoded(tokenizer: Tokenizer, prompt: str, chat: bool) -> list[int]:
    if not chat:
        return tokenizer.encode(prompt)
    text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}])
    return tokenizer.encode(text, add_special=False)


class Results:
    """The output file: a line for each prompt that has ended, so that what there is survives."""

    def __init__(self, path: Path, prompts: Sequence[Prompt]) -> None:
        """Keeps the lines that are there, of these prompts."""
        self.path, self._prompts = path, [_plain(prompt) for prompt in prompts]
        self.lines: dict[int, dict[str, Any]] = {}  # by index of the prompt
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        for line in text.splitlines():
            entry = entry_of(line)
            index = entry.get("index")
            if type(index) is not int or not 0 <= index < len(self._prompts):
                continue
            if entry.get("prompt") == self._prompts[index] and "text" in entry and "token_ids" in entry:
                self.lines[index] = entry
        self.put_in_order()  # without the half of a line that a kill may have left

    @property
    def left(self) -> list[int]:
        return [i for i in range(len(self._prompts)) if i not in self.lines]

    @property
    def new_tokens(self) -> int:
        return sum(len(line["token_ids"]) for line in self.lines.values())

    def add(self, index: int, output: RequestOutput) -> None:
        self.lines[index] = {
            "index": index, "prompt": self._prompts[index], "text": output.text, "token_ids": list(output.token_ids),
            "finish_reason": output.finish_reason, "seed": output.seed, "prompt_tokens": len(output.prompt_token_ids),
        }  # fmt: skip
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(self.lines[index], ensure_ascii=False) + "\n")

    def put_in_order(self) -> None:
        lines = (json.dumps(self.lines[i], ensure_ascii=False) + "\n" for i in sorted(self.lines))
        write_whole(self.path, "".join(lines))


def _plain(prompt: Prompt) -> str | list[int]:
    return prompt if isinstance(prompt, str) else list(prompt)
