"""The recipe of Hydra: what the configuration makes is the program that one would write in Python."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_launchers import RECIPES, output, write_files

import nestor

hydra = pytest.importorskip("hydra")


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of the losses; the working folder holds the files of the page."""
    write_files("hydra", tmp_path)
    monkeypatch.delitem(sys.modules, "recipe", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return importlib.import_module("recipe")


def configured(folder: Path, *overrides: str) -> nestor.Program:
    with hydra.initialize_config_dir(str(folder / "config"), version_base=None):
        config = hydra.compose("program", list(overrides))
    torch.manual_seed(0)
    program: nestor.Program = hydra.utils.instantiate(config.program, _convert_="all")
    return program


def written(recipe: Any, response: nestor.Response) -> nestor.Program:
    torch.manual_seed(0)
    net, decay = torch.nn.Linear(20, 1), nestor.Variable(torch.full((20,), -4.0))
    sgd = torch.optim.SGD(net.parameters(), lr=0.05)
    adam = torch.optim.Adam(decay.parameters(), lr=0.1, betas=(0.9, 0.99))
    return nestor.Program(
        net=nestor.Problem(net, recipe.train_loss, optimizer=sgd, unroll_steps=5, response=response),
        decay=nestor.Problem(decay, recipe.valid_loss, optimizer=adam),
    )


@pytest.mark.parametrize(
    ("name", "response"),
    [
        ("t1t2", nestor.T1T2()),
        ("implicit", nestor.Implicit(solver=nestor.ConjugateGradient(max_steps=10), damping=0.001)),
    ],
)
def test_a_configuration_is_the_program_that_it_says(
    recipe: Any, tmp_path: Path, name: str, response: nestor.Response
) -> None:
    """Bit for bit, and levels, responses and hyperparameters by name."""
    program, expected = configured(tmp_path, f"response={name}"), written(recipe, response)
    assert list(program.levels) == ["net", "decay"]
    assert repr(program.levels["net"].problem.response) == repr(response)
    metrics, same = (nestor.Engine(p, seed=0).run(50) for p in (program, expected))
    assert metrics == same
    assert metrics["decay/loss"] < nestor.Engine(configured(tmp_path), seed=0).run(5)["decay/loss"]


def test_an_override_reaches_the_optimizer(recipe: Any, tmp_path: Path) -> None:
    program = configured(tmp_path, "program.decay.optimizer.lr=0.05", "program.net.unroll_steps=2")
    optimizer = program.levels["decay"].problem.optimizer
    assert optimizer is not None
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert program.levels["net"].problem.unroll_steps == 2


@pytest.mark.slow
def test_the_commands_run(tmp_path: Path) -> None:
    """Those that the page shows, and an override that is wrong."""
    write_files("hydra", tmp_path)
    page = (RECIPES / "hydra.md").read_text(encoding="utf-8")
    assert f"```text\n{output(tmp_path, 'main.py')}```" in page
    second = output(tmp_path, "main.py", "response=implicit", "program.decay.optimizer.lr=0.05", "steps=100")
    assert second.startswith("Implicit(solver=ConjugateGradient(max_steps=10), damping=0.001) validation loss ")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HYDRA_FULL_ERROR": "0"}
    command = [sys.executable, "main.py", "program.net.unroll=2"]
    wrong = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert wrong.returncode != 0
    assert "unroll" in wrong.stderr
