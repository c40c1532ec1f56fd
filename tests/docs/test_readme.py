"""The README's code runs as printed, and says what it says."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import nestor

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run(block: str) -> dict[str, Any]:
    namespace: dict[str, Any] = {"__name__": "readme"}
    exec(compile(block, "README.md", "exec"), namespace)
    return namespace


def test_opening_program_stands_above_the_fold() -> None:
    """The first block is the program, within the first 50 lines."""
    assert README.index("nestor.Program(") < len("\n".join(README.splitlines()[:50]))


def test_opening_program_trains_and_weighs_wrong_labels_down() -> None:
    """Two separable classes, a third of the labels wrong: the learned weights tell which."""
    torch.manual_seed(0)
    images = torch.cat([torch.randn(60, 4) + 2, torch.randn(60, 4) - 2])
    labels = torch.cat([torch.zeros(60), torch.ones(60)]).long()
    wrong = torch.rand(120) < 0.33
    noisy = torch.where(wrong, 1 - labels, labels)
    train_data = DataLoader(TensorDataset(images, noisy, torch.arange(120)), batch_size=60, shuffle=True)
    clean_data = [(images[::8], labels[::8])]
    program = run(BLOCKS[0])["train"](nn.Linear(4, 2), train_data, clean_data, steps=150)
    weights = torch.sigmoid(program.levels["weights"].parameters[0])
    assert weights[~wrong].mean() > 2 * weights[wrong].mean()


def test_trilevel_block_prints_the_hypergradient(capsys: pytest.CaptureFixture[str]) -> None:
    """The block shows the table and a finite total derivative."""
    namespace = run(BLOCKS[1])
    printed = capsys.readouterr().out
    assert "highest level first" in printed
    gradient = namespace["program"].hypergradient("top")["value"]
    assert gradient.shape == (3,)
    assert torch.isfinite(gradient).all()


def test_functional_block_prints_the_stated_value(capsys: pytest.CaptureFixture[str]) -> None:
    """d theta^3 / d weight = 3 weight^2 = 12 at weight 2."""
    run(BLOCKS[2])
    assert capsys.readouterr().out.strip() == "(tensor(12.),)"


def test_every_block_is_tested() -> None:
    """A new block needs a new test."""
    assert len(BLOCKS) == 3


def test_public_names_are_importable_and_documented() -> None:
    """Everything in ``__all__`` exists and has a docstring."""
    for name in nestor.__all__:
        assert getattr(nestor, name).__doc__, name
