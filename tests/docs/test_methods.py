"""The code of the methods page runs as printed, top to bottom."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import nestor

PAGE = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.filterwarnings("ignore:Level 'model'")
def test_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """In one namespace, as the page says."""
    namespace: dict[str, Any] = {"__name__": "methods"}
    torch.manual_seed(0)
    for block in BLOCKS:
        exec(compile(block, "docs/methods.md", "exec"), namespace)
    assert "error: relative" in capsys.readouterr().out
    assert namespace["best"].cosine > 0.99
    assert torch.isfinite(namespace["slope"]).all()
    policy = nestor.Variable(torch.zeros(()))
    namespace["expected_cost"](policy).backward()
    assert policy.value.grad is not None
    model = torch.nn.Linear(5, 1)
    namespace["accuracy_loss"](model).backward()
    assert model.weight.grad is not None


def test_every_response_and_solver_is_named() -> None:
    """A new method needs a line."""
    kinds = (nestor.Response, nestor.LinearSolver, nestor.Curvature)
    for name in nestor.__all__:
        value = getattr(nestor, name)
        if isinstance(value, type) and issubclass(value, kinds) and value not in kinds:
            assert f"{name}" in PAGE, name
