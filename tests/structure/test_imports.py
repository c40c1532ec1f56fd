"""Imports point one way: the mathematics knows nothing of programs, engines and callbacks."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "nestor"

# Lowest first: a module imports from its own layer and from the layers before it.
LAYERS = [
    {"tracing"},
    {"errors", "evaluations", "higher_order", "peak_memory", "phases", "randomness", "reverse", "scalar", "tree"},
    {"optim"},
    {"estimators", "lower_level", "recording"},
    {"solvers"},
    {"cross"},
    {"trajectory"},
    {"replay"},
    {"conditions"},
    {"responses"},
    {"best_response", "root", "batches", "mapping", "placement", "precision", "problem", "reader", "variable"},
    {"episodes", "function_update", "reformulations"},
    {"level"},
    {"moment"},
    {"gradient", "graph", "nesting"},
    {"explain", "forecast", "program"},
    {"diagnostics", "guard", "module_state", "readiness", "recorder", "rollback"},
    {"runtimes"},
    {"runner"},
    {"compilation", "schedule", "stepper"},
    {"callbacks", "engine"},
    {"demo", "doctor", "plot"},
    {"__init__", "__main__"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


def part(path: Path) -> str:
    """Name the layer's member that a file belongs to: its folder, or itself."""
    relative = path.relative_to(SOURCE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports(path: Path) -> set[str]:
    """Name the parts of nestor that a file imports at run time."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "nestor":
            inner = node.module.split(".")[1:]
            found |= {inner[0]} if inner else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("nestor.")}
    return found


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_down(path: Path) -> None:
    """A file imports nothing from a layer above its own."""
    own = RANK[part(path)]
    above = {name for name in imports(path) if name in RANK and RANK[name] > own}
    assert not above, f"{path.name} (layer {own}) imports {above}"


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_files_are_short(path: Path) -> None:
    """One concept a file: at most 400 lines."""
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_import_is_light() -> None:
    """Importing nestor starts no plotting, no distribution and no Hugging Face."""
    code = "import sys, nestor; print(*(m for m in ('matplotlib', 'transformers', 'mlxtend') if m in sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == ""
