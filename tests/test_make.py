"""What the two set-up commands would do a second time: nothing but run."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(not (ROOT / ".venv/.test").exists() or not shutil.which("make"), reason="not set up by make")
@pytest.mark.parametrize("target", ["demo", "test"])
def test_a_second_run_installs_nothing(target: str) -> None:
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "pip install" not in done.stdout
    assert ("ciuic run" if target == "demo" else "pytest") in done.stdout


def test_every_command_in_the_readme_exists() -> None:
    """The commands of the README name files, options and subcommands that are there."""
    from ciuic_runtime.cli.app import app

    text = (ROOT / "README.md").read_text()
    commands = [line.split("#")[0].split() for line in text.splitlines() if line.startswith(".venv/bin/")]
    assert len(commands) >= 5
    known = {name.name or name.callback.__name__ for name in app.registered_commands if name.callback}
    for words in commands:
        if words[0].endswith("/ciuic"):
            assert words[1] in known
        for word in words[1:]:
            assert not word.startswith("examples/") or (ROOT / word).exists(), word
