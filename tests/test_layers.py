"""The folders are the layers: imports run up devices, schedulers, ciuic_runtime only, and planning stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ciuic_runtime

ROOT = Path(__file__).parents[1]
LAYERS = ("devices", "schedulers", "ciuic_runtime")
FILES = sorted(p for layer in LAYERS for p in (ROOT / layer).rglob("*.py"))


def imported(node: ast.AST, path: Path) -> Iterator[str]:
    """Names of the modules that a file imports when it runs, wherever the import stands."""
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        children: list[ast.AST] = list(node.orelse)
    else:
        children = list(ast.iter_child_nodes(node))
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        assert not node.level, f"{path}:{node.lineno} imports relatively; write ciuic_runtime...."
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    for child in children:
        yield from imported(child, path)


def layer_of(module: str) -> int | None:
    """The layer that a module belongs to; None for other people's."""
    parts = module.split(".")
    if parts[0] != "ciuic_runtime":
        return None
    return LAYERS.index(parts[1]) if len(parts) > 1 and parts[1] in LAYERS else LAYERS.index("ciuic_runtime")


def test_the_layers_have_files() -> None:
    assert all(sum(p.is_relative_to(ROOT / layer) for p in FILES) > 5 for layer in LAYERS)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down_only(path: Path) -> None:
    layer = LAYERS.index(path.relative_to(ROOT).parts[0])
    for module in imported(ast.parse(path.read_text()), path):
        assert module.split(".")[0] not in ("devices", "schedulers"), f"{path} imports {module} by its folder's name"
        below = layer_of(module)
        assert below is None or below <= layer, f"{path} in {LAYERS[layer]} imports {module} from above"


def test_an_import_upwards_would_be_seen() -> None:
    code = "def f():\n    from ciuic_runtime.engine import llm\nif TYPE_CHECKING:\n    import ciuic_runtime.model\n"
    found = list(imported(ast.parse(code), Path("x.py")))
    assert found == ["ciuic_runtime.engine.llm"]
    assert [layer_of(m) for m in (*found, "ciuic_runtime.devices.spec", "torch")] == [2, 0, None]


def loaded_by(code: str, *args: str) -> set[str]:
    """Top-level modules in sys.modules after `code` ran in a fresh interpreter."""
    ends = "\nimport sys; print(*sorted({m.partition('.')[0] for m in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code + ends, *args], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


HEAVY = {"torch", "ray", "transformers", "scipy", "triton", "pandas"}


def test_import_is_light() -> None:
    loaded = loaded_by("import ciuic_runtime; dir(ciuic_runtime); ciuic_runtime.__version__")
    assert "ciuic_runtime" in loaded
    assert not loaded & (HEAVY | {"numpy", "tokenizers", "safetensors", "typer", "rich"})


def test_schedulers_are_light() -> None:
    assert not loaded_by("from ciuic_runtime.schedulers import *; TaskScheduler") & HEAVY


def test_planning_is_light(tmp_path: Path) -> None:
    devices = tmp_path / "machine.toml"
    devices.write_text(
        '[[device]]\nname = "cpu"\nkind = "CPU"\nmemory_bytes = "64GiB"\nmemory_bandwidth = 5e10\n'
        "matrix_rates = { bfloat16 = 1e12 }\n"
    )
    code = (
        "import sys, ciuic_runtime as c; hw = c.DeviceManager.from_toml(sys.argv[1]);"
        "print(c.plan(c.Model('deepseek-v2-lite'), hw))"
    )
    assert not loaded_by(code, str(devices)) & HEAVY


def test_every_public_name_is_there() -> None:
    for name in ciuic_runtime.__all__:
        assert getattr(ciuic_runtime, name).__name__ == name
        assert name in dir(ciuic_runtime)
    with pytest.raises(AttributeError, match="no attribute 'missing'"):
        _ = ciuic_runtime.missing


def test_public_names_of_the_lower_layers_are_there() -> None:
    import ciuic_runtime.devices
    import ciuic_runtime.schedulers

    for package in (ciuic_runtime.devices, ciuic_runtime.schedulers):
        assert all(hasattr(package, name) for name in package.__all__)
