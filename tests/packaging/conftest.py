"""The wheel and the sdist of the working tree, and a clean environment in which the wheel is installed."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from clean_environment import ROOT, Environment, build


@pytest.fixture(scope="session")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist."""
    folder = tmp_path_factory.mktemp("distributions")
    build(ROOT, folder)
    return folder


@pytest.fixture(scope="session")
def environment(distributions: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """A new environment with the wheel; its dependencies are those of the test environment.

    A line of a ``.pth`` file adds a folder at the end of the path, and does not read the ``.pth`` files of that folder:
    the editable nestor of the test environment is not seen.
    """
    folder = tmp_path_factory.mktemp("environment")
    (wheel,) = distributions.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=100)
    python = str(folder / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([*pip, "--disable-pip-version-check"], check=True, timeout=100)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return Environment(folder, packages)
