"""What a user's editor and type checker see of the package."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import nestor

PROGRAM = Path(__file__).with_name("user_program.py")


@pytest.mark.slow
@pytest.mark.ci
def test_a_users_program_passes_mypy_strictly(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path), str(PROGRAM)]
    checked = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.slow
@pytest.mark.ci
def test_a_users_program_passes_pyright_strictly(tmp_path: Path) -> None:
    """basedpyright is pyright as a package of PyPI, with more rules; ``strict`` is pyright's own mode."""
    settings = {"typeCheckingMode": "strict", "include": [str(PROGRAM)]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "basedpyright", "-p", str(tmp_path), "--pythonpath", sys.executable]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
    assert "0 errors" in checked.stdout


def test_the_program_of_the_type_checkers_runs() -> None:
    ended = subprocess.run([sys.executable, str(PROGRAM)], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def test_dir_lists_the_public_names() -> None:
    """Those that are imported late too, and nothing else."""
    assert set(dir(nestor)) == set(nestor.__all__)
    assert {"DataParallel", "FullySharded"} <= set(dir(nestor))


def test_a_program_shows_no_internals() -> None:
    public = {name for name in dir(nestor.Program) if not name.startswith("_")}
    assert public == {
        *("adapt", "copies", "explain", "hypergradient", "levels", "lowers", "objective", "peers", "to_mermaid"),
        *("uppers", "with_responses"),
    }


@pytest.mark.parametrize("make", [nestor.T1T2, nestor.SAMA, nestor.FiniteDifference, nestor.Implicit])
def test_a_response_is_shown_as_it_is_written(make: type[nestor.Response]) -> None:
    assert repr(make()) == f"{make.__name__}()"
