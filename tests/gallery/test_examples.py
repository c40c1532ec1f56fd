"""The examples of the gallery: their files, their results, and that each of them runs."""

import ast
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shared import gallery, pages
from shared.experiment import NO_DATA

EXAMPLES = gallery.examples()
RESULTS = pages.results()


def test_there_are_at_least_sixteen() -> None:
    assert len(EXAMPLES) >= 16


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_one_readable_file(name: str) -> None:
    """Under 150 lines, with a docstring that says what the task is."""
    text = EXAMPLES[name].read_text()
    assert len(text.splitlines()) < 150
    assert len(ast.get_docstring(ast.parse(text)) or "") > 200


def test_the_page_says_what_the_results_say() -> None:
    """``docs/gallery.md`` is what ``shared.pages`` writes."""
    assert pages.PAGE.read_text(encoding="utf-8") == pages.render()


def test_the_readme_says_what_the_results_say() -> None:
    """Its table of the gallery is written by ``shared.pages`` too."""
    readme = pages.README.read_text(encoding="utf-8")
    assert pages._BEGIN in readme
    assert readme == pages.with_summary(readme)


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_has_five_seeds_and_a_picture(name: str) -> None:
    result = RESULTS[name]
    assert name in EXAMPLES
    assert len(result["seeds"]) >= 5
    for method in result["methods"].values():
        for values in (*method["metrics"].values(), method["seconds"], method["peak_memory_mib"]):
            assert len(values) == len(result["seeds"])
    assert {result["ours"], *result["baselines"]} <= set(result["methods"])
    assert (pages.RESULTS / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name: str, tmp_path: Path) -> None:
    """``--quick`` writes a result and a picture in seconds."""
    begin = time.perf_counter()
    command = [sys.executable, str(EXAMPLES[name]), "--quick", "--output", str(tmp_path)]
    ended = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        cwd=gallery.ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if ended.returncode == NO_DATA:
        pytest.skip(ended.stderr.strip())
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["methods"][result["ours"]]["metrics"][result["metric"]] is not None
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"
    assert time.perf_counter() - begin < 90
