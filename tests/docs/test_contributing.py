"""The contributors' page: its picture is that of the tested floors, its files exist, its example keeps the contract."""

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "nestor"
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_picture_and_table_show_the_floors() -> None:
    """One node a floor, each above the next lower one; every room has its place in the table."""
    floors = runpy.run_path(str(ROOT / "tests" / "structure" / "test_house.py"))["FLOORS"]
    picture = re.search(r"```mermaid\nflowchart TD\n(.*?)```", PAGE, re.DOTALL)
    assert picture is not None
    shown = {int(floor): set(rooms.split(", ")) for floor, rooms in re.findall(r'F(\d+)\["(.*?)"\]', picture[1])}
    assert shown == dict(enumerate(floors))
    arrows = re.findall(r"F(\d+)\S* --> F(\d+)", re.sub(r'\[".*?"\]', "", picture[1]))
    assert sorted((int(low), int(high)) for high, low in arrows) == [(f, f + 1) for f in range(len(floors) - 1)]
    first = re.findall(r"^\| (`.*?`) \|", PAGE, re.MULTILINE)
    named = {name.removesuffix(".py").rstrip("/") for cell in first for name in re.findall(r"`(.*?)`", cell)}
    assert named >= set().union(*floors) - {"__init__"}


def test_files_and_folders_exist() -> None:
    """Whatever is written like a path, in the source or in the repository."""
    paths = {path for path in re.findall(r"`([\w/.]+)`", PAGE) if re.search(r"/|\.(py|md|txt)$", path)}
    assert len(paths) > 50
    bare = {"exact.py", "differences.py"}  # their folder stands behind them
    missing = {path for path in paths - bare if not any((base / path).exists() for base in (SOURCE, ROOT))}
    assert not missing


def test_worked_example_passes_the_contract(tmp_path: Path) -> None:
    """The source file and the test file, as printed, in a folder beside the contract."""
    source, test = BLOCKS
    (tmp_path / "rayleigh.py").write_text(source, encoding="utf-8")
    (tmp_path / "test_rayleigh.py").write_text(test, encoding="utf-8")
    paths = [str(tmp_path), str(Path(__file__).parents[1] / "responses")]
    before, names = list(sys.path), set(sys.modules)
    sys.path[:0] = paths
    try:
        plugin = Silent()
        code = pytest.main(["-q", "-x", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)], [plugin])
    finally:
        sys.path[:] = before
        for name in set(sys.modules) - names:
            if name in ("rayleigh", "test_rayleigh", "contract"):
                del sys.modules[name]
    assert code == 0
    assert plugin.passed >= 9


class Silent:
    """Counts what passed."""

    passed = 0

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.passed += report.when == "call" and report.passed
