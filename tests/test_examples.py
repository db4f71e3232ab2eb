"""Every example runs as its first lines say, and shows what it is there to show."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, *arguments: object) -> str:
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_tested() -> None:
    tested = Path(__file__).read_text()
    assert all(f'"{path.name}"' in tested for path in EXAMPLES.glob("*.py"))


def test_split_layers_by_hand(smollm2: Path) -> None:
    out = run("split_layers.py", smollm2, 12)
    assert "rules applied" in out
    assert "sim:0" in out
    assert "Paris" in out
    assert "copy" in out  # the trace shows the crossing between the devices


def test_plan_hardware_you_do_not_have() -> None:
    out = run("plan_hardware_you_do_not_have.py")
    assert "cuda:1" in out
    assert "estimated" in out
    assert "layers.25.experts.17" in out.splitlines()[-1]


def test_own_policy() -> None:
    assert "attention on the fastest" in run("own_policy.py")


def test_own_operator() -> None:
    out = run("own_operator.py")
    assert "8 tokens" in out
    assert "operator 'FastSoftmax' replaces softmax" in out
    assert "FastSoftmax ran 70 times" in out  # 7 layers, 2 passes to warm up and 8 for the tokens


def test_generate_and_random_deepseek(tmp_path: Path) -> None:
    assert "wrote" in run("random_deepseek.py", tmp_path / "model")
    out = run("generate.py", tmp_path / "model")
    assert "[0]" in out
    assert "[1]" in out
    assert "tokens/s" in out
