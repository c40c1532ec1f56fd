"""Private names of torch stand in two files."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.attention
from torch import nn
from torch.optim import SGD

SOURCE = Path(__file__).parents[2] / "src" / "nestor"
FILES = sorted(SOURCE.rglob("*.py"))

# (file, name): why it cannot move.
ALLOWED = {
    # Variable is below autodiff, and its forward is called at every read: a call in between would take as long.
    ("variable.py", "_parameters"),
}
PLACES = {"autodiff/torch_private.py", "autodiff/torch_compiler.py"}

OBJECTS = (torch.ones(1), torch.ones(1).untyped_storage(), nn.Linear(1, 1), SGD([torch.ones(1)], lr=0.1), torch)
WRAPPED = {"__wrapped__", "hooked"}  # what torch sets on the step of an optimizer


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


OF_TORCH = {name for thing in OBJECTS for name in dir(thing) if is_private(name)} | WRAPPED


def private_names(tree: ast.Module) -> Iterator[str]:
    """Yield private modules and names that are imported from torch, and private attributes of what comes from torch."""
    roots, own = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "torch":
                    roots.add((alias.asname or alias.name).split(".")[0])
                    yield from filter(is_private, alias.name.split("."))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            roots |= {alias.asname or alias.name for alias in node.names}
            yield from filter(is_private, [*(node.module or "").split("."), *(alias.name for alias in node.names)])
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _root(node) == "self":
            own.add(node.attr)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            own.add(node.target.id)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            of_nestor = _root(node) == "self" and node.attr in own
            if (is_private(node.attr) and _root(node) in roots) or (node.attr in OF_TORCH and not of_nestor):
                yield node.attr
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "setattr"):
            yield from (str(a.value) for a in node.args if isinstance(a, ast.Constant) and a.value in OF_TORCH)


def _root(node: ast.expr) -> str | None:
    while isinstance(node, ast.Attribute | ast.Call | ast.Subscript):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_private_names_stand_in_two_files(path: Path) -> None:
    """An import or an attribute that begins with an underscore, of torch or of one of its objects."""
    file = path.relative_to(SOURCE).as_posix()
    found = {(file, name) for name in private_names(ast.parse(path.read_text(encoding="utf-8")))}
    assert file in PLACES or not found - ALLOWED


@pytest.mark.parametrize(
    "line",
    [
        "import torch._C",
        "from torch._C import Graph",
        "from torch.utils import _pytree as pytree",
        "import torch\ntorch._foreach_add([], [])",
        "from torch import nn\nnn.modules.conv._ConvNd",
        "from torch.autograd import Variable\nVariable._execution_engine",
        "def f(x): return x._version",
        "def f(x): return x.untyped_storage()._cdata",
        "def f(module): return module._parameters",
        "def f(optimizer): optimizer._optimizer_step_pre_hooks = {}",
        "def f(kind): return getattr(kind.step, '__wrapped__', None)",
    ],
)
def test_every_kind_is_seen(line: str) -> None:
    """The search finds what it is for."""
    assert list(private_names(ast.parse(line)))


def test_own_names_are_no_names_of_torch() -> None:
    """What a class of nestor keeps itself may be called like something of torch."""
    assert not list(private_names(ast.parse("class A:\n def f(self, p):\n  self._parameters = p\n  self._parameters")))
    assert {path.relative_to(SOURCE).as_posix() for path in FILES} >= PLACES
