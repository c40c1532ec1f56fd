"""The plan of the house: imports point one way, no circles, few rooms, short files, small classes."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "nestor"
FILES = sorted(SOURCE.rglob("*.py"))

# A room is a file or a folder directly in src/nestor. Lowest first: a room imports from lower floors only.
FLOORS = [
    {"errors", "variable", "version"},
    {"autodiff"},
    {"vectors", "data"},
    {"optim", "solvers", "estimators", "checkpoints"},
    {"responses"},
    {"functional", "problem"},
    {"levels"},
    {"reformulations", "explain", "distributed"},
    {"program", "training"},
    {"diagnostics", "callbacks", "compilation"},
    {"engine"},
    {"__init__"},
    {"cli"},
    {"__main__"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def room(path: Path) -> str:
    """Name the room that a file belongs to: its folder, or itself."""
    relative = path.relative_to(SOURCE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


@cache
def imports(path: Path) -> frozenset[Path]:
    """List the files of nestor that a file imports, late and for types alone included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {target for name in names if name.split(".")[0] == "nestor" for target in _files(name)}
    return frozenset(found - {path})


def _files(name: str) -> Iterator[Path]:
    """Find the file that defines an imported module, or the package that re-exports an imported name."""
    parts = name.split(".")[1:]
    while parts:
        module = SOURCE.joinpath(*parts)
        for candidate in (module.with_suffix(".py"), module / "__init__.py"):
            if candidate.exists():
                yield candidate
                return
        parts.pop()
    yield SOURCE / "__init__.py"


def room_imports() -> dict[str, set[str]]:
    """For each room, the other rooms that it imports."""
    graph: dict[str, set[str]] = {}
    for path in FILES:
        graph.setdefault(room(path), set()).update(room(target) for target in imports(path))
    return {name: targets - {name} for name, targets in graph.items()}


def circles(graph: dict[object, set[object]]) -> list[object]:
    """Return what cannot be put in order: the members of circles, and what depends on them."""
    left = {name: set(targets) for name, targets in graph.items()}
    while free := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in free:
            del left[name]
    return sorted(map(str, left))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_down(path: Path) -> None:
    """A file imports nothing from its own floor but its own room, and nothing from a floor above."""
    own = FLOOR[room(path)]
    above = {room(t) for t in imports(path) if room(t) != room(path) and FLOOR[room(t)] >= own}
    assert not above, f"{path.relative_to(SOURCE)} (floor {own}) imports {above}"


def test_no_circles() -> None:
    """Neither rooms nor files import each other in a circle; imports for types alone count."""
    assert not circles(room_imports())
    # What a package's __init__ gathers is the content of its files: only the files themselves can make a circle.
    files = {p: {t for t in imports(p) if t.name != "__init__.py"} for p in FILES if p.name != "__init__.py"}
    assert not circles(files)


def test_rooms_and_floors() -> None:
    """The house is small enough to know: rooms, files at the top, and the longest import path."""
    graph = room_imports()
    assert len(graph) <= 28
    assert len([path for path in FILES if path.parent == SOURCE]) <= 8

    @cache
    def height(name: str) -> int:
        return 1 + max((height(target) for target in graph[name]), default=0)

    assert max(map(height, graph)) <= 14


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_files_are_short(path: Path) -> None:
    """One concept a file."""
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 300


def _fields(body: ast.ClassDef) -> set[str]:
    """Name what an instance holds: annotated fields, and attributes that its methods set."""
    annotated = {
        node.target.id
        for node in body.body
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and "ClassVar" not in ast.unparse(node.annotation)
    }
    assigned = {
        node.attr
        for node in ast.walk(body)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }
    return annotated | assigned


def _public(body: ast.ClassDef) -> set[str]:
    methods = {node.name for node in body.body if isinstance(node, ast.FunctionDef)}
    return {name for name in methods | _fields(body) if not name.startswith("_")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_classes_are_small(path: Path) -> None:
    """At most 12 fields and 20 public members, but for Problem, which is the user's declaration."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef) and node.name != "Problem":
            assert len(_fields(node)) <= 12, f"{node.name} holds {sorted(_fields(node))}"
            assert len(_public(node)) <= 20, f"{node.name} shows {sorted(_public(node))}"


def test_import_is_light() -> None:
    """Importing nestor starts no plotting, no distribution and no Hugging Face."""
    code = "import sys, nestor; print(*(m for m in ('matplotlib', 'transformers', 'mlxtend') if m in sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == ""


def test_files_of_tests_have_names_of_their_own() -> None:
    """pytest imports them by name alone: the second of two files of one name is not collected."""
    names = [path.name for path in Path(__file__).parents[1].rglob("test_*.py")]
    assert len(names) == len(set(names)), sorted(name for name in names if names.count(name) > 1)
