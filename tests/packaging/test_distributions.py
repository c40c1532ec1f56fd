"""The wheel and the sdist: what they hold, and that the wheel works where nothing else of the repository is."""

import importlib.metadata
import json
import re
import tarfile
import zipfile
from pathlib import Path

import pytest
from clean_environment import ROOT, Environment, build

import nestor


def test_sdist_holds_what_a_developer_needs(distributions: Path, tmp_path: Path) -> None:
    """Every tracked part of the repository, and the wheel that is built from it is that of the repository."""
    (archive,) = distributions.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path, filter="data")
    (source,) = (folder for folder in tmp_path.iterdir() if folder.is_dir())
    for kind in (
        "src/**/*.py",
        "docs/**/*.md",
        "docs/**/*.png",
        "benchmarks/**/*.py",
        "examples/**/*.py",
        "tests/**/*.py",
    ):
        here = {str(path.relative_to(ROOT)) for path in ROOT.glob(kind)}
        assert here
        assert here == {str(path.relative_to(source)) for path in source.glob(kind)}, kind
    for name in ("README.md", "LICENSE", "CITATION.cff", "SECURITY.md", "Makefile", "mkdocs.yml", "constraints.txt"):
        assert (source / name).read_bytes() == (ROOT / name).read_bytes()
    build(source, tmp_path / "again", "-t", "wheel")
    ours, theirs = (next(iter(folder.glob("*.whl"))) for folder in (distributions, tmp_path / "again"))
    with zipfile.ZipFile(ours) as one, zipfile.ZipFile(theirs) as other:
        assert {item.filename: item.CRC for item in one.infolist()} == {
            item.filename: item.CRC for item in other.infolist()
        }


def test_wheel_holds_the_package_and_the_demo_only(distributions: Path) -> None:
    """Every file of ``src/nestor``, the two of the demo, and nothing else."""
    (wheel,) = distributions.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        names = {name for name in opened.namelist() if ".dist-info/" not in name}
    source = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src").rglob("*.py")}
    demo = {"nestor/examples/hyper_cleaning.py", "nestor/examples/hyper_cleaning_report.py"}
    assert names == source | demo | {"nestor/py.typed"}
    assert f"dist/{wheel.name}" in (ROOT / "docs" / "install.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.ci
def test_wheel_works_in_a_clean_environment(environment: Environment, tmp_path: Path) -> None:
    """The commands of a first visit, in an empty folder; nestor is that of the wheel."""
    where = "import nestor; print(nestor.__file__, nestor.__version__)"
    file, version = environment.run("python", "-c", where, cwd=tmp_path).split()
    assert Path(file).is_relative_to(environment.packages)
    assert version == nestor.__version__

    printed = environment.run("nestor", "demo", "--steps", "60", cwd=tmp_path)
    assert re.search(r"bilevel +│ +\d\d\.\d%", printed)
    run = tmp_path / "runs" / "demo"
    assert {"metrics.jsonl", "program.mmd", "report.png"} == {path.name for path in run.iterdir()}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert max(line["step"] for line in lines) == 60

    assert re.search(r"All \d+ checks passed", environment.run("nestor", "doctor", cwd=tmp_path))
    assert "curves.png" in environment.run("nestor", "plot", "runs/demo", cwd=tmp_path)
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_installed_version_is_that_of_the_source() -> None:
    """Of the environment in which the tests run."""
    assert importlib.metadata.version("nestor") == nestor.__version__
