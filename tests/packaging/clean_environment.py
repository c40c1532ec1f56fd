"""A clean environment, and the build of the distributions."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Environment:
    """A virtual environment.

    Attributes:
        folder: Where it is.
        packages: Where its own packages are.
    """

    folder: Path
    packages: Path

    def run(self, *command: str, cwd: Path, text: str | None = None) -> str:
        """Run a command of the environment; return what it prints, errors in their place."""
        # Nothing of the test environment but the packages that the .pth file names.
        own = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        finished = subprocess.run(
            [str(self.folder / "bin" / command[0]), *command[1:]],
            cwd=cwd,
            env={**own, "COLUMNS": "110", "OMP_NUM_THREADS": "1"},
            input=text,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=400,
            check=False,
        )
        assert finished.returncode == 0, finished.stdout
        return finished.stdout


def build(source: Path, target: Path, *options: str) -> None:
    """Build distributions as a release does."""
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(target), *options]
    built = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=100, check=False)
    assert built.returncode == 0, built.stderr
