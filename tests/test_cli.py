"""The command line as people and scripts use it: streams, exit codes, JSON fields, interruptions."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ciuic_runtime.basis import Basis
from ciuic_runtime.ops.native import instruction_set
from ciuic_runtime.schedulers.chrome import read_recording
from ciuic_runtime.schedulers.recording import Recording

PLAN_FIELDS = {"schema_version", "workload", "model", "devices", "assignments", "predicted", "candidates"}
RUN_FIELDS = {
    "schema_version", "text", "token_ids", "prompt_token_ids", "finish_reason", "first_token_s", "prefill_s",
    "decode_s", "prefill_tokens_per_s", "decode_tokens_per_s", "peak_memory_bytes", "schedule",
    "actual_against_forecast",
}  # fmt: skip


def test_plan_json_has_what_the_contract_promises(ciuic, here_toml: Path, tiny_v3: Path) -> None:
    plan = ciuic("plan", tiny_v3, "--devices", here_toml, "--json").json
    assert plan.keys() >= PLAN_FIELDS
    assert plan["model"].keys() >= {"name", "format", "parameters", "active_parameters"}
    assert plan["assignments"][0].keys() >= {"task", "device", "home", "bytes"}
    predicted = plan["predicted"]
    assert predicted.keys() >= {
        "first_token_s", "prefill_tokens_per_s", "decode_tokens_per_s", "range", "bound_by", "memory_bytes", "basis",
    }  # fmt: skip
    low, high = predicted["range"]
    assert low < predicted["decode_tokens_per_s"] < high
    assert predicted["basis"] == "estimated"
    assert {c["name"] for c in plan["candidates"]} == {"all on cpu"}
    rows = {row["task"] for row in plan["assignments"]}
    assert {"embedding", "layers.0.mlp", "layers.1.experts.7", "layers.3.shared_experts", "head"} <= rows


def test_plan_of_a_known_model_loads_neither_torch_nor_ray(here_toml: Path) -> None:
    code = (
        "import sys; from ciuic_runtime.cli.app import exit_code\n"
        f"code = exit_code(['plan', 'deepseek-v2-lite', '--devices', {str(here_toml)!r}, '--memory', 'cpu=1MiB'])\n"
        "assert code == 2, code\n"
        "print([m for m in ('torch', 'ray', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert "1 MiB can be used" in done.stderr


def test_plan_text_and_files(ciuic, tmp_path: Path, here_toml: Path, tiny_v3: Path) -> None:
    saved, trace = tmp_path / "plan.json", tmp_path / "trace.json"
    done = ciuic("plan", tiny_v3, "--devices", here_toml, "--save", saved, "--trace", trace, "--max-tokens", "4")
    assert done.code == 0
    assert "all on cpu" in done.out
    assert json.loads(saved.read_text())["policy"] == "all on cpu"
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e["ph"] == "X"]
    assert {e["args"]["phase"] for e in events} == {"prefill", "decode"}
    assert sum(e["name"] == "head" for e in events) == 4  # one prefill and three decode steps
    basis = Basis.from_dict(read_recording(trace).basis, "trace.json")
    assert Recording.of(basis.forecaster.trace()).seconds == pytest.approx(read_recording(trace).seconds)


def test_run_json_has_what_the_contract_promises(ciuic, here_toml: Path, tiny_v3: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    done = ciuic(
        "run", tiny_v3, "--prompt", "Hello", "--max-tokens", "5", "--ignore-eos", "--devices", here_toml,
        "--trace", trace, "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    report = done.json
    assert report.keys() >= RUN_FIELDS
    assert len(report["token_ids"]) == 5
    assert report["prompt_token_ids"] == list(b"Hello")
    assert report["finish_reason"] == "length"
    assert report["first_token_s"] > 0
    assert report["decode_tokens_per_s"] > 0
    assert report["peak_memory_bytes"]["cpu"] > 1 << 20
    assert report["threads"] >= 1
    assert report["kernels"] == instruction_set()
    assert report["schedule"].keys() >= PLAN_FIELDS
    forecast = report["actual_against_forecast"]["decode_tokens_per_s"]
    assert forecast["forecast"] == report["schedule"]["predicted"]["decode_tokens_per_s"]
    assert forecast["error"] == pytest.approx(forecast["actual"] / forecast["forecast"] - 1)
    spans = [e for e in json.loads(trace.read_text())["traceEvents"] if e["ph"] == "X"]
    assert {e["args"]["step"] for e in spans if e["name"] == "layers.2.experts"} == {0, 1, 2, 3, 4}
    recording = read_recording(trace)
    assert [note.requests for note in recording.passes] == [((0, 5),), *[((0, 1),)] * 4]
    assert Basis.from_dict(recording.basis, "trace.json").schedule.to_dict() == report["schedule"]


def test_run_streams_text_to_stdout_and_figures_to_stderr(ciuic, here_toml: Path, smollm2: Path) -> None:
    done = ciuic("run", smollm2, "--prompt", "The capital of France is", "--max-tokens", "8", "--devices", here_toml)
    assert done.code == 0
    assert "Paris" in done.out
    assert "tokens/s" not in done.out
    assert "forecast" in done.err
    assert "decode tokens/s" in done.err


def test_a_saved_schedule_is_what_runs(ciuic, tmp_path: Path, here_toml: Path, tiny_v3: Path) -> None:
    saved = tmp_path / "plan.json"
    ciuic("plan", tiny_v3, "--devices", here_toml, "--save", saved, "--prompt-tokens", "8", "--max-tokens", "8")
    edited = json.loads(saved.read_text())
    edited["devices"].append({"name": "sim:0", "kind": "SIM", "memory_bytes": 1 << 28})
    for row in edited["assignments"]:
        if row["task"].startswith("layers.2."):
            row["device"] = row["home"] = "sim:0"
    saved.write_text(json.dumps(edited))
    plain = ciuic("run", tiny_v3, "--prompt", "Hello", "--max-tokens", "4", "--devices", here_toml, "--json").json
    moved = ciuic("run", tiny_v3, "--prompt", "Hello", "--max-tokens", "4", "--schedule", saved, "--json").json
    assert moved["token_ids"] == plain["token_ids"]
    assert moved["peak_memory_bytes"]["sim:0"] > 0
    assert "sim:0 is simulated" in moved["notes"]


def test_a_batch_of_prompts(ciuic, here_toml: Path, tiny_v3: Path) -> None:
    batch = ("--prompt", "Hello", "--prompt", "A longer prompt", "--max-tokens", "3", "--devices", here_toml)
    report = ciuic("run", tiny_v3, *batch, "--json").json
    assert [len(o["token_ids"]) for o in report["outputs"]] == [3, 3]
    alone = ciuic("run", tiny_v3, "--prompt", "A longer prompt", "--max-tokens", "3", "--devices", here_toml, "--json")
    assert report["outputs"][1]["prompt_token_ids"] == alone.json["prompt_token_ids"]


def test_seeds_repeat_and_are_reported(ciuic, here_toml: Path, tiny_v3: Path) -> None:
    options = ("--prompt", "Hello", "--max-tokens", "12", "--temperature", "1", "--devices", here_toml, "--json")
    drawn = ciuic("run", tiny_v3, *options).json
    again = ciuic("run", tiny_v3, *options, "--seed", drawn["seed"]).json
    assert again["token_ids"] == drawn["token_ids"]


def test_devices_and_doctor(ciuic, here_toml: Path) -> None:
    found = ciuic("devices", "--devices", here_toml, "--json").json
    assert {d["name"] for d in found["devices"]} >= {"cpu"}
    assert "cpu" in ciuic("devices", "--devices", here_toml).out
    checks = ciuic("doctor", "--json").json["checks"]
    assert {c["name"] for c in checks} >= {"python", "torch", "native kernels", "ray", "triton"}
    text, forced = ciuic("doctor").out, ciuic("doctor", "--kernels", "reference", "--json").json
    assert "operators: " in text
    assert {row["chosen"] for row in forced["operators"]} == {"reference"}
    assert {"linear", "softmax", "attention_mla"} <= {row["name"] for row in forced["operators"]}


def test_help_lists_every_command(ciuic) -> None:
    text = ciuic("--help").out
    assert all(name in text for name in ("devices", "doctor", "plan", "run", "chat"))


def test_chat_answers_and_leaves_at_the_end_of_input(here_toml: Path, smollm2: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "ciuic_runtime.cli",
        "chat",
        str(smollm2),
        "--max-tokens",
        "12",
        "--devices",
        str(here_toml),
    ]
    done = subprocess.run(
        command, input="What is the capital of France?\n", capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout


def test_ctrl_c_keeps_what_was_generated(here_toml: Path, smollm2: Path) -> None:
    command = [
        sys.executable, "-m", "ciuic_runtime.cli", "run", str(smollm2), "--prompt", "Once upon a time", "--max-tokens",
        "4000", "--ignore-eos", "--devices", str(here_toml),
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        begun = b""
        while len(begun) < 20 and (piece := os.read(process.stdout.fileno(), 100)):
            begun += piece
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert len(begun) >= 20
    assert rest.endswith(b"\n")
    assert b"interrupted" in err
    assert b"Traceback" not in err


BAD: list[tuple[Sequence[object], str]] = [
    (("plan",), "Missing argument"),
    (("plan", "no-such-model"), "deepseek-v3"),
    (("plan", "deepseek-v3", "--format", "int3"), "int3"),
    (("plan", "deepseek-v3", "--goal", "speed"), "throughput"),
    (("plan", "deepseek-v3", "--memory", "cpu"), "cpu=16GiB"),
    (("plan", "deepseek-v3", "--memory", "cpu=many"), "16GiB"),
    (("plan", "deepseek-v3", "--memory", "gpu7=1GiB"), "gpu7"),
    (("plan", "deepseek-v3", "--prompt-tokens", "0"), "prompt_tokens"),
    (("plan", "deepseek-v3", "--devices", "missing.toml"), "missing.toml"),
    (("plan", "deepseek-v3", "--placement", "missing.toml"), "missing.toml"),
    (("run", "no-such-folder", "--prompt", "x"), "no-such-folder"),
    (("run", "deepseek-v3", "--prompt", "x"), "deepseek-v3"),
    (("devices", "--measure", "sometimes"), "never"),
    (("doctor", "--kernels", "sse"), "reference"),
    (("frobnicate",), "frobnicate"),
    (("plan", "deepseek-v3", "--frobnicate"), "frobnicate"),
]


@pytest.mark.parametrize(
    ("arguments", "says"), BAD, ids=lambda a: " ".join(map(str, a)) if isinstance(a, tuple) else ""
)
def test_bad_input_is_one_line_and_exit_2(ciuic, here_toml: Path, arguments: Sequence[object], says: str) -> None:
    if arguments[0] in ("plan",) and "--devices" not in arguments:
        arguments = (*arguments, "--devices", here_toml)
    done = ciuic(*arguments)
    assert done.code == 2
    assert done.out == ""
    assert says in done.err
    assert done.err.count("\n") == 1, done.err
    failed = ciuic(*arguments, "--json")
    assert failed.code == 2
    assert says in failed.json["error"]["message"]


RUN_BAD: list[tuple[Sequence[object], str]] = [
    (("--prompt", "x" * 600), "512"),
    (("--prompt", ""), "empty"),
    (("--prompt", "x", "--max-tokens", "0"), "max_tokens"),
    (("--prompt", "x", "--temperature", "-1"), "temperature"),
    (("--prompt", "x", "--top-p", "0"), "top_p"),
    (("--prompt", "x", "--context", "100000"), "512"),
    (("--prompt", "x", "--dtype", "float8"), "float8"),
    (("--prompt", "x", "--threads", "0"), "threads"),
    (("--prompt", "x", "--executor", "spark"), "spark"),
    (("--prompt", "x", "--kernels", "sse"), "reference"),
    (("--prompt", "x", "--kernels", "sse", "--dtype", "float32"), "reference"),
    (("--prompt", "x", "--stages", "2"), "stages"),
    (("--prompt", "x", "--memory", "cpu=100KB"), "cpu"),
    (("--prompt", "x", "--memory", "cpu=900TiB"), "cpu"),
    (("--prompt", "x", "--schedule", "missing.json"), "missing.json"),
    (("--prompt", "x", "--trace", "no/such/folder/trace.json"), "no/such/folder"),
    (("--prompt", "x", "--chat"), "chat template"),
    ((), "--prompt"),
]


@pytest.mark.parametrize(
    ("options", "says"), RUN_BAD, ids=lambda a: " ".join(map(str, a))[:40] if isinstance(a, tuple) else ""
)
def test_bad_run_options_are_one_line_and_exit_2(
    ciuic, here_toml: Path, tiny_v3: Path, options: Sequence[object], says: str
) -> None:
    done = ciuic("run", tiny_v3, *options, "--devices", here_toml, "--json")
    assert done.code == 2, done.err
    assert says in done.json["error"]["message"]


def test_a_schedule_for_another_model_is_refused(
    ciuic, tmp_path: Path, here_toml: Path, tiny_v3: Path, smollm2: Path
) -> None:
    saved = tmp_path / "plan.json"
    ciuic("plan", smollm2, "--devices", here_toml, "--save", saved)
    done = ciuic("run", tiny_v3, "--prompt", "x", "--schedule", saved)
    assert done.code == 2
    assert "schedule" in done.err
    assert "Traceback" not in done.err


def test_an_interrupted_batch_shows_every_prompt(
    ciuic, here_toml: Path, tiny_v3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ciuic_runtime.engine.engine import Engine

    steps = []
    step = Engine.step

    def interrupted(self: Engine) -> Any:
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Engine, "step", interrupted)
    arguments = ("run", tiny_v3, "--prompt", "Hello", "--prompt", "x", "--ignore-eos", "--devices", here_toml)
    done = ciuic(*arguments)
    assert done.code == 130
    assert "--- prompt 0" in done.out
    assert "--- prompt 1" in done.out
    steps.clear()
    report = ciuic(*arguments, "--json")
    assert report.code == 130
    assert [o["finish_reason"] for o in report.json["outputs"]] == ["interrupted"] * 2
    assert [len(o["token_ids"]) for o in report.json["outputs"]] == [2, 2]
    steps[:] = [None, None]  # before the first token
    nothing = ciuic(*arguments, "--json").json
    assert [o["prompt_token_ids"] for o in nothing["outputs"]] == [list(b"Hello"), list(b"x")]
    assert nothing["token_ids"] == []


def test_a_chat_goes_on_after_an_answer_was_stopped_at_once(
    ciuic, here_toml: Path, smollm2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ciuic_runtime.engine.engine import Engine

    questions = iter(["Hello", "What is the capital of France?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(questions))
    step, calls = Engine.step, []

    def interrupted(self: Engine) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Engine, "step", interrupted)
    done = ciuic("chat", smollm2, "--max-tokens", "12", "--devices", here_toml, "--json")
    assert done.code == 0
    messages = done.json["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant"]
    assert "Paris" in messages[1]["content"]


@pytest.mark.slow
def test_odd_surroundings(tmp_path: Path, here_toml: Path, tiny_v3: Path) -> None:
    command = [sys.executable, "-m", "ciuic_runtime.cli"]
    run = [*command, "run", str(tiny_v3), "--prompt", "-", "--devices", str(here_toml), "--temperature", "1"]
    plain = {**os.environ, "PYTHONIOENCODING": "ascii", "CIUIC_LOG": "nonsense"}
    ascii_only = subprocess.run(run, input=b"H\xc3\xa9llo\n", capture_output=True, env=plain, timeout=120)
    assert ascii_only.returncode == 0, ascii_only.stderr
    not_text = subprocess.run(run, input=b"\xff\xfe", capture_output=True, timeout=120)
    assert not_text.returncode == 2
    assert b"UTF-8" in not_text.stderr
    closed = subprocess.run(["sh", "-c", 'exec "$@" <&-', "sh", *run], capture_output=True, timeout=120)
    assert closed.returncode == 2
    assert b"Traceback" not in closed.stderr + ascii_only.stderr + not_text.stderr
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60)
    assert version.stdout.startswith("ciuic ")
    if os.path.exists("/dev/full"):
        full = ["sh", "-c", 'exec "$@" >/dev/full', "sh", *command, "doctor"]
        done = subprocess.run(full, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1
        assert "No space left" in done.stderr
        assert "Traceback" not in done.stderr
