"""``nestor demo``: run the hyper-cleaning example and draw its report."""

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

NEEDED = ("mlxtend", "matplotlib")


def run_demo(*, output: Path, **options: Any) -> int:
    """Run the example; return the exit status.

    Args:
        output: Folder for the files that the example writes.
        **options: The arguments ``seed``, ``steps``, ``noise`` and ``device`` of ``hyper_cleaning.run``.
    """
    console = Console()
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        console.print(f"The demo needs {' and '.join(missing)}: pip install 'nestor\\[demo]'", style="red")
        return 1
    sys.path.insert(0, str(examples()))
    try:
        example = importlib.import_module("hyper_cleaning")
        report = importlib.import_module("hyper_cleaning_report")
    finally:
        sys.path.pop(0)
    outcome = example.run(output=output, console=console, **options)
    report.draw(outcome, output / "report.png")
    (output / "program.mmd").write_text(outcome.program.to_mermaid(), encoding="utf-8")
    console.print(f"Wrote {', '.join(str(path) for path in sorted(output.iterdir()))}", soft_wrap=True)
    return 0


def examples() -> Path:
    """Return the folder of the examples: ``nestor/examples`` in a wheel, ``examples`` at the top of the repository."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "examples"
    return installed if installed.is_dir() else package.parents[1] / "examples"
