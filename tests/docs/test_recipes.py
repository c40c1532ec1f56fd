"""The recipes: every program of these pages runs as printed, in an empty folder, and prints what the page says.

A block of Python that begins with an import is a program of its own; another block goes on where the block before it
ended. A block that begins with ``# name.py`` is a file, which tests of its own run (``tests/ecosystem``).
"""

import contextlib
import gc
import io
import logging
import os
import random
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_pages import DOCS, FLAGS, ROOT, SAME, blocks

import nestor

NEEDS = {
    "accelerate": ["accelerate"],
    "data": ["datasets", "torchdata", "webdataset"],
    "hydra": ["hydra"],
    "lightning": ["lightning"],
    "logging": ["mlflow", "tensorboard", "wandb"],
    "optimizers": ["lion_pytorch", "schedulefree"],
    "optuna": ["optuna"],
    "peft": ["peft", "transformers"],
    "preferences": ["transformers"],
    "slurm": [],
    "trainer": ["accelerate", "transformers"],
    "validation": ["torchmetrics"],
}
FILES_ONLY = {"hydra", "slurm"}  # tests/ecosystem/test_hydra.py and test_slurm.py run them
SLOW = {"data", "logging", "preferences"}  # more than five seconds on one core
IS_FILE = re.compile(r"# [\w/]+\.(?:py|yaml)\n")


def programs(page: str) -> Iterator[tuple[int, str, str | None]]:
    return (block for block in blocks(f"recipes/{page}") if not IS_FILE.match(block[1]))


def outcome(code: str, place: str, line: int, namespace: dict[str, Any]) -> str:
    """What a program prints, and the warnings of nestor; other libraries may warn of each other."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", nestor.NestorWarning)
        exec(compile("\n" * (line - 1) + code, place, "exec"), namespace)
    return printed.getvalue() + "".join(f"{w.category.__name__}: {w.message}\n" for w in caught)


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder; loggers, random numbers and the environment are as before afterwards."""
    monkeypatch.chdir(tmp_path)
    for name in ("HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM", "WANDB_SILENT"):
        monkeypatch.setenv(name, {"TOKENIZERS_PARALLELISM": "false", "WANDB_SILENT": "true"}.get(name, "1"))
    environment, generators, level = dict(os.environ), (torch.get_rng_state(), random.getstate()), logging.root.level
    yield tmp_path
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves the files of an unfinished pass open
        gc.collect()
    os.environ.clear()
    os.environ.update(environment)
    torch.set_rng_state(generators[0])
    random.setstate(generators[1])
    logging.root.setLevel(level)


def marked(page: str) -> Any:
    return pytest.param(page, marks=[pytest.mark.slow, pytest.mark.ci] if page in SLOW else [])


@pytest.mark.parametrize("page", [marked(page) for page in sorted(NEEDS.keys() - FILES_ONLY)])
def test_recipe_prints_what_it_says(page: str, alone: Path) -> None:
    for package in NEEDS[page]:
        pytest.importorskip(package)
    namespace: dict[str, Any] = {}
    found = list(programs(page))
    assert found
    for line, code, expected in found:
        if code.startswith(("import ", "from ")):
            namespace = {"__name__": "__main__"}
        place = f"docs/recipes/{page}.md"
        got = outcome(code, place, line, namespace)
        assert SAME.check_output(expected or "", got, FLAGS), f"{place}:{line}\nexpected:\n{expected}\ngot:\n{got}"


def test_every_recipe_is_listed() -> None:
    """In the table of the first page, which lists no page that does not exist."""
    listed = set(re.findall(r"\((\w+)\.md", (DOCS / "recipes" / "index.md").read_text(encoding="utf-8")))
    assert set(NEEDS) <= listed <= {page.stem for page in (DOCS / "recipes").glob("*.md")}


def test_packages_of_the_recipes_are_in_their_extra() -> None:
    """What a page imports is installed by one of the extras that the index names."""
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    listed = {re.split(r"[\[<>=]", package)[0] for package in extras["recipes"]}
    named = re.search(r"nestor\[([\w,]+)\]", " ".join(extras["recipes"]))
    assert named is not None
    listed |= set(named[1].split(","))
    known = {"hydra": "hydra-core", "lion_pytorch": "lion-pytorch"}
    assert {known.get(package, package) for needs in NEEDS.values() for package in needs} <= listed
    assert any("recipes" in package for package in extras["dev"])
