"""A job as JOB.toml describes it: what is to be done with which model, and how it may lie on a cluster.
Knows what each key may hold, and where a mistake is; carrying jobs out is `run_job.py`'s business, and Ray's."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from ciuic_runtime.cluster.job_file import FLAG, TEXTS, JobFile, checked, choice, number, text, whole
from ciuic_runtime.cluster.prompts import read_prompts, token_ids
from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.devices.files import check_can_write
from ciuic_runtime.devices.toml import Key
from ciuic_runtime.devices.units import parse_bytes
from ciuic_runtime.engine.config import MOST_LOOKAHEAD
from ciuic_runtime.engine.sampling import SamplingParams
from ciuic_runtime.schedulers.placement import Placement, shown, unknown_key
from ciuic_runtime.schedulers.policies.cache import cache_policy
from ciuic_runtime.schedulers.workload import Goal, Workload
from ciuic_runtime.server.config import ServerConfig

Kind = Literal["generate", "serve", "bench"]
FORMATS = ("auto", "float32", "bf16", "int8", "int4")
MOST_RESTARTS = 100


@dataclass(frozen=True)
class Generate:
    """Every prompt of a file, completed; a line of JSON for each one, written as it ends."""

    prompts: Path  # .txt: one a line; .jsonl: {"prompt": text or token ids} a line
    output: Path  # .jsonl
    params: SamplingParams
    chat: bool = False  # each prompt goes through the chat template
    resume: bool = False  # what the output has already is kept


@dataclass(frozen=True)
class Serve:
    config: ServerConfig
    kv_tokens: int | None = None  # positions in the cache, all requests together


@dataclass(frozen=True)
class Bench:
    work: Workload
    rounds: int = 3


@dataclass(frozen=True)
class Job:
    name: str
    kind: Kind
    model: Path  # a checkpoint, at the same place on every node
    task: Generate | Serve | Bench
    format: str = "auto"
    goal: Goal | None = None
    placement: Placement | None = None
    memory: Mapping[str, int] = field(default_factory=dict)  # bytes by device
    context: int | None = None  # positions per sequence
    max_num_seqs: int | None = None
    stages: int | None = None
    micro_batches: int | None = None
    threads: int | None = None  # by stage
    cache_policy: str | None = None
    lookahead: int | None = None
    restarts: int = 0  # after failures, with what is done kept
    use_new_nodes: bool = False  # that join while it runs; else when `ciuic replan` asks

    @property
    def results(self) -> str:
        """Where they are, in words; "" where there are none."""
        return f"finished prompts are in {self.task.output}" if isinstance(self.task, Generate) else ""


def read_job(path: str | Path) -> Job:
    """Raises InvalidInput, with the line, for the first mistake."""
    return parse_job(job_text(path), path)


def check_job(path: str | Path) -> Job:
    """The same, and that the model can take its prompts: everything that can be refused before a job is sent."""
    job = read_job(path)
    if isinstance(job.task, Generate):
        prompt_ids(job, job.task)
    return job


def prompt_ids(job: Job, task: Generate) -> list[Sequence[int]]:
    return token_ids(job.model, task.prompts, read_prompts(task.prompts), task.params, task.chat, job.context)


def job_text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InvalidInput(f"no job file {path}; examples/job.toml is one to begin with") from error
    except OSError as error:
        raise InvalidInput(f"cannot read job {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidInput(f"job {path} is not UTF-8 text; save it as such") from error


def parse_job(content: str, path: str | Path, begun: bool = False) -> Job:
    """The same of what such a file holds; `path` is named in messages, and other files are found from there. A job that
    has `begun` may have its output already."""
    file = JobFile(Path(path), content, begun)
    try:
        document = tomllib.loads(content)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"job {path} is not TOML: {error}") from error
    _known(document, (*_JOB_KEYS, "put", "memory", *get_args(Kind)), file)
    common = {k: v for k, v in document.items() if k in _JOB_KEYS}
    values = file.read(common, _JOB_KEYS)
    if "model" not in values:
        file.fail(f"model is missing; allowed: {_JOB_KEYS['model'].allowed}")
    model = file.beside(values.pop("model"))
    if not model.exists():
        file.fail(f"no model at {model}; give a checkpoint folder or a .gguf file", "", "model")
    kind = _kind(document, values.pop("kind", None), file)
    values["placement"] = _placement(document, values.get("placement"), file)
    values["memory"] = _memory(document.get("memory", {}), file)
    table = _table(document, kind, file)
    _known(table, tuple(_TASK_KEYS[kind]), file, kind)
    name = values.pop("name", Path(path).stem)
    return Job(name, kind, model, _TASKS[kind](file.read(table, _TASK_KEYS[kind], kind), file), **values)


def settings_of(job: Job) -> dict[str, Any]:
    """What `LLM` takes by name."""
    return {
        "dtype": job.format, "goal": job.goal, "placement": job.placement, "memory": dict(job.memory),
        "max_model_len": job.context, "max_num_seqs": job.max_num_seqs, "stages": job.stages,
        "micro_batches": job.micro_batches, "threads": job.threads, "cache_policy": job.cache_policy,
        "lookahead": job.lookahead, "use_new_nodes": job.use_new_nodes,
    }  # fmt: skip


# The three kinds


def _kind(document: Mapping[str, Any], said: Kind | None, file: JobFile) -> Kind:
    tables = [kind for kind in get_args(Kind) if kind in document]
    if len(tables) > 1:
        file.fail(f"[{tables[0]}] and [{tables[1]}] are two kinds of job; write a file for each", tables[1])
    if said is None and not tables:
        file.fail("nothing is said to be done; write a table [generate], [serve] or [bench]")
    if said and tables and said != tables[0]:
        file.fail(
            f"kind is {said!r}, but there is a table [{tables[0]}]; leave kind out, or write [{said}]", "", "kind"
        )
    kind: Kind = said or tables[0]
    return kind


def _generate(values: dict[str, Any], file: JobFile) -> Generate:
    for key in ("prompts", "output"):
        if key not in values:
            file.fail(f"{key} is missing; allowed: {_TASK_KEYS['generate'][key].allowed}", "generate")
    prompts, output = file.beside(values.pop("prompts")), file.beside(values.pop("output"))
    chat, resume = values.pop("chat", False), values.pop("resume", False)
    if not prompts.is_file():
        file.fail(f"no prompts file {prompts}; write one, with a prompt on each line", "generate", "prompts")
    if output.exists() and not (resume or file.begun):
        file.fail(
            f"output {output} is there already; write resume = true to go on with it, give another, or remove it",
            "generate", "output",
        )  # fmt: skip
    found = file.found("generate", "prompts", read_prompts, prompts)
    file.found("generate", "output", check_can_write, output)
    if chat and any(not isinstance(prompt, str) for prompt in found):
        file.fail(f"chat is for prompts of text, and {prompts} has token ids; leave it out", "generate", "chat")
    return Generate(prompts, output, SamplingParams(**values), chat, resume)


def _serve(values: dict[str, Any], file: JobFile) -> Serve:
    kv_tokens, key_file = values.pop("kv_tokens", None), values.pop("api_key_file", None)
    try:
        keys = tuple(file.beside(key_file).read_text(encoding="utf-8").split()) if key_file else ()
    except (OSError, UnicodeDecodeError) as error:
        file.fail(f"cannot read the keys in {file.beside(key_file or '')}: {error}", "serve", "api_key_file")
    if key_file and not keys:
        file.fail(f"{file.beside(key_file)} has no key; write one on each line", "serve", "api_key_file")
    try:
        config = ServerConfig(api_keys=keys, **values)
    except InvalidInput as error:
        file.fail(str(error), "serve", "api_key_file")
    if not (config.loopback or keys or config.insecure):
        file.fail(
            f"host {config.host} can be reached from other machines, and no key is asked for; give api_key_file, or "
            "insecure = true if everybody who can connect may use it",
            "serve", "host",
        )  # fmt: skip
    return Serve(config, kv_tokens)


def _bench(values: dict[str, Any], file: JobFile) -> Bench:
    rounds = values.pop("rounds", 3)
    return Bench(Workload(**values), rounds)


# What all have


def _placement(document: Mapping[str, Any], named: str | None, file: JobFile) -> Placement | None:
    rules = document.get("put")
    if named is not None:
        if rules is not None:
            file.fail("placement names a file and [[put]] gives rules; give one of them", "", "placement")
        return file.found("", "placement", Placement.from_toml, file.beside(named))
    if rules is None:
        return None
    if not isinstance(rules, list) or not all(isinstance(rule, dict) for rule in rules):
        file.fail(f"put is {shown(rules)}; rules are [[put]] tables", "", "put")
    placement = Placement()
    for n, rule in enumerate(rules, 1):
        line = file.line_of("put", "", n)
        where = f"job {file.path}" + (f", line {line}" if line else "") + f": rule {n}"
        allowed = "a rule has pattern, on, and optionally by, shares and store"
        if strange := sorted(set(rule) - set(_RULE_KEYS)):
            raise InvalidInput(f"{where}: {unknown_key(strange[0], _RULE_KEYS)}; {allowed}")
        if missing := [key for key in ("pattern", "on") if key not in rule]:
            raise InvalidInput(f"{where}: {missing[0]} is missing; {allowed}")
        try:
            placement = placement.put(**rule)
        except InvalidInput as error:
            raise InvalidInput(f"{where}: {error}") from error
    return placement


def _memory(table: Any, file: JobFile) -> dict[str, int]:
    example = 'write [memory] with lines such as "node1/cpu" = "16GiB"'
    if not isinstance(table, dict):
        file.fail(f"memory is {shown(table)}; {example}", "", "memory")
    budgets = {}
    for device, size in table.items():
        try:
            if isinstance(size, (bool, dict, list)):
                raise InvalidInput(f"{shown(size)} is not a size; {example}")
            budgets[device] = parse_bytes(size)
        except InvalidInput as error:
            file.fail(f"{device}: {error}", "memory", device)
    return budgets


def _table(document: Mapping[str, Any], name: str, file: JobFile) -> dict[str, Any]:
    table = document.get(name, {})
    if not isinstance(table, dict):
        file.fail(f"{name} is {shown(table)}; it is a table, [{name}]", "", name)
    return table


def _known(table: Mapping[str, Any], keys: Sequence[str], file: JobFile, name: str = "") -> None:
    for key in table:
        if key not in keys:
            elsewhere = [f"[{kind}]" for kind, known in _TASK_KEYS.items() if key in known and kind != name]
            if key in _JOB_KEYS:
                elsewhere = ["the top of the file, above the first table"]
            known_as = f"; it belongs to {' or '.join(elsewhere)}" if elsewhere else f"; allowed: {', '.join(keys)}"
            file.fail(f"{unknown_key(key, keys)}{known_as}", name, key)


# What a key may hold


_TOKENS = whole(1, 2**31, "tokens")
_RULE_KEYS = ("pattern", "on", "by", "shares", "store")
_JOB_KEYS: dict[str, Key] = {
    "name": text("a text"),
    "kind": choice(*get_args(Kind)),
    "model": text("the path of a checkpoint folder or .gguf file, the same on every node"),
    "format": choice(*FORMATS),
    "goal": choice(*get_args(Goal)),
    "placement": text("the path of a file with [[put]] rules"),
    "context": whole(1, 2**31, "positions"),
    "max_num_seqs": whole(1, 2**20, "sequences"),
    "stages": whole(1, 4096, "stages"),
    "micro_batches": whole(1, 4096, "passes at once"),
    "threads": whole(1, 4096, "threads"),
    "cache_policy": checked('the name of a cache policy, such as "lfu"', cache_policy),
    "lookahead": whole(0, MOST_LOOKAHEAD, "layers"),
    "restarts": whole(0, MOST_RESTARTS, "restarts"),
    "use_new_nodes": FLAG,
}
_TASK_KEYS: dict[str, dict[str, Key]] = {
    "generate": {
        "prompts": text('a file such as "prompts.txt" or "prompts.jsonl"', ".txt", ".jsonl"),
        "output": text('a file such as "results.jsonl"', ".jsonl"),
        "chat": FLAG,
        "resume": FLAG,
        "max_tokens": _TOKENS,
        "temperature": number(0, 100),
        "top_k": whole(0, 2**31, "tokens"),
        "top_p": number(0, 1, open_low=True),
        "min_p": number(0, 1),
        "repetition_penalty": number(0, 100, open_low=True),
        "seed": Key("a whole number from 0 to 2**63", whole(0, 2**63, "").read),
        "stop": TEXTS,
        "ignore_eos": FLAG,
    },
    "serve": {
        "host": text("an address to listen at, on the head"),
        "port": Key("a port from 0 (any that is free) to 65535", whole(0, 65535, "").read),
        "api_key_file": text("a file with a key on each line"),
        "insecure": FLAG,
        "model_name": text("a text"),
        "max_waiting": whole(1, 2**20, "requests"),
        "kv_tokens": whole(1, 2**40, "positions"),
    },
    "bench": {
        "prompt_tokens": _TOKENS,
        "max_tokens": _TOKENS,
        "batch": whole(1, 2**20, "sequences"),
        "rounds": whole(1, 1000, "rounds"),
    },
}
_TASKS: dict[str, Callable[[dict[str, Any], JobFile], Any]] = {"generate": _generate, "serve": _serve, "bench": _bench}
