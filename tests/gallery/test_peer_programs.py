"""The programs that compare libraries: their files, their results, and that each of them runs."""

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shared import gallery, pages

PEERS = gallery.examples(peers=True)
RESULTS = {file.stem: json.loads(file.read_text()) for file in sorted((pages.RESULTS / "peers").glob("*.json"))}


@pytest.mark.parametrize("name", PEERS)
def test_a_program_is_one_readable_file(name: str) -> None:
    """Under 150 lines, with a docstring that says what is compared."""
    text = PEERS[name].read_text()
    assert len(text.splitlines()) < 150
    docstring = ast.get_docstring(ast.parse(text)) or ""
    assert len(docstring) > 200
    assert "nestor" in docstring.splitlines()[0]


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_has_five_seeds(name: str) -> None:
    result = RESULTS[name]
    assert name in PEERS
    assert len(result["seeds"]) >= 5
    assert {result["ours"], *result["baselines"]} <= set(result["methods"])
    for method in result["methods"].values():
        for values in (*method["metrics"].values(), method["seconds"], method["peak_memory_mib"]):
            assert len(values) == len(result["seeds"])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("betty") is None, reason="needs the other libraries (make gallery-peers)")
@pytest.mark.parametrize("name", PEERS)
def test_a_program_runs(name: str, tmp_path: Path) -> None:
    """``--quick`` writes a result of every method and a picture."""
    command = [sys.executable, str(PEERS[name]), "--quick", "--output", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": "examples", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=gallery.ROOT, env=environment, timeout=300
    )
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    result = json.loads((tmp_path / "result.json").read_text())
    for method in (result["ours"], *result["baselines"]):
        assert result["metric"] in result["methods"][method]["metrics"]
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"
