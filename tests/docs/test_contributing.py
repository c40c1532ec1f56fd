"""The worked example of the contributors' page keeps the contract that it says it keeps."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest

PAGE = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


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
