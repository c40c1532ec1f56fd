"""nestor doctor: what it lists, and that its self-test can fail."""

from pathlib import Path

import pytest
import torch

import nestor
from nestor.cli import doctor
from nestor.cli.main import main
from nestor.responses import FirstOrder


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    # Importing these takes seconds, which is not what is tested.
    monkeypatch.setattr(doctor, "EXTRAS", (("matplotlib", "matplotlib", "matplotlib"),))


def test_all_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    """Versions, backends, and one line for every response."""
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for word in (nestor.__version__, torch.__version__, "gloo", "nccl", "mpi", "torch.compile", "threads"):
        assert word in printed
    for word in ("T1T2", "FiniteDifference", "ConjugateGradient", "DenseSolve", "Unrolled", "SAMA"):
        assert word in printed
    assert "All 6 checks passed" in printed
    assert "reverse pass" in printed
    assert "private" in printed


def test_no_self_test(capsys: pytest.CaptureFixture[str]) -> None:
    """Only looks around."""
    assert main(["doctor", "--no-self-test"]) == 0
    assert "relative error" not in capsys.readouterr().out


def test_closed_forms_are_met() -> None:
    """To rounding, not merely to the tolerances; and they differ from one another."""
    checks = doctor.check_closed_forms()
    assert len(checks) == 6
    assert max(error for _, error, _, _ in checks) < 1e-12


def test_wrong_hypergradients_are_seen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A response that is off by a millionth, one that is zero, one that fails: status 1 and what is wrong."""

    monkeypatch.setattr(doctor, "T1T2", lambda: nestor.T1T2(scale=1 + 1e-6))
    monkeypatch.setattr(doctor, "SAMA", FirstOrder)
    # A step beyond the largest eigenvalue: the solver says that it diverges.
    monkeypatch.setattr(doctor, "FiniteDifference", lambda: nestor.Implicit(solver=nestor.Neumann(step_size=1e3)))
    failed = {name for name, error, tolerance, _ in doctor.check_closed_forms() if not error <= tolerance}
    assert failed == {"T1T2", "SAMA", "FiniteDifference"}
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "3 of 6 checks failed" in printed
    assert printed.count("FAIL") == 3
    assert "FiniteDifference: SolverError" in printed


def test_missing_and_broken_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """How to install what is missing; a package that is there but cannot be imported is another matter."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "lacking.py").write_text("import not_there_at_all")
    (tmp_path / "broken.py").write_text("raise RuntimeError('built for another numpy')")
    (tmp_path / "loose.py").touch()
    assert "pip install 'nestor\\[wandb]'" in doctor._extra("not_there_at_all", "wandb", "wandb")
    assert "pip install not_there_at_all" in doctor._extra("lacking", "lacking", "wandb")
    assert "RuntimeError: built for another numpy" in doctor._extra("broken", "broken", "wandb")
    assert doctor._extra("loose", "loose", "wandb") == "yes, version unknown"
    assert doctor._extra("rich", "rich", "rich")[0].isdigit()


def test_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing for torch.compile, and how to get it."""
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert "no C++ compiler" in doctor._compiler()
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/g++")
    monkeypatch.setattr(doctor.sysconfig, "get_path", lambda name: "/nowhere")
    assert "python3-dev" in doctor._compiler()
