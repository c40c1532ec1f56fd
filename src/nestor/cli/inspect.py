"""``nestor inspect``: show what checkpoints contain, and whether they are whole. No code of a checkpoint runs."""

import time
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Column, Table

from nestor.checkpoints.folder import complete
from nestor.checkpoints.manifest import Manifest, check_files, read_manifest
from nestor.checkpoints.tensor_files import sizes
from nestor.errors import CheckpointError


def run_inspect(*, folder: Path, console: Console | None = None) -> int:
    """Show one checkpoint, or all checkpoints of a run.

    Args:
        folder: The folder of one checkpoint, or of a run.
        console: Where the tables are printed; None is the terminal.

    Returns:
        The exit status: 1 if there is no checkpoint, or one is damaged or of another version of the format.
    """
    console = console or Console()
    folders = complete(folder) or [folder]
    table = Table(
        *("checkpoint", Column("step", justify="right"), Column("size", justify="right")),
        *("saved", "run", Column("state", overflow="fold")),
        title=escape(str(folder)),
        title_justify="left",
    )
    newest, status = None, 0
    for path in folders:
        try:
            manifest = read_manifest(path)
            row = _row(manifest)
            check_files(path, manifest)
            newest = path, manifest
            table.add_row(path.name, *row, "[green]whole[/green]")
        except (CheckpointError, OSError) as error:
            status = 1
            table.add_row(path.name, "", "", "", "", f"[red]{escape(str(error))}[/red]")
    details: list[RenderableType] = []
    if newest is not None:
        try:
            details = _details(*newest)
        except (CheckpointError, LookupError, TypeError, AttributeError) as error:
            status = 1
            details = [
                f"[red]{newest[0].name} does not describe its program as nestor does: {escape(str(error))}[/red]"
            ]
    console.print(Group(table, *details))
    return status


def _row(manifest: Manifest) -> tuple[str, str, str, str]:
    saved = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(manifest.saved))
    total = sum(entry["bytes"] for entry in manifest.files.values())
    return str(manifest.step), _bytes(total), saved, manifest.run[:8]


def _details(path: Path, manifest: Manifest) -> list[RenderableType]:
    """Show the program of a checkpoint, and the bytes that each level takes in it."""
    structure, settings = manifest.program["structure"], manifest.program["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    title = f"{path.name}: format version {manifest.version}, {versions}, nesting {structure['nesting']}"
    table = Table(
        *("level", Column("variables", justify="right"), "optimizer", Column("response", overflow="fold")),
        *(Column("module", justify="right"), Column("state", justify="right")),
        title=escape(title),
        title_justify="left",
    )
    modules, states = _by_level(path, "modules"), _by_level(path, "states")
    for name, level in structure["levels"].items():
        optimizer = (level["optimizer"] or "update rule").rpartition(".")[2]
        response = settings["levels"][name]["response"] or ""
        row = (name, str(len(level["variables"])), optimizer, response)
        table.add_row(*map(escape, row), _bytes(modules.get(name, 0)), _bytes(states.get(name, 0)))
    files = Table("file", Column("size", justify="right"), "SHA-256", title_justify="left")
    for name, entry in manifest.files.items():
        files.add_row(escape(name), _bytes(entry["bytes"]), entry["sha256"][:16])
    return [table, files]


def _by_level(path: Path, kind: str) -> dict[str, int]:
    """Sum the bytes of the tensors whose names begin with a kind and the name of a level."""
    totals: dict[str, int] = {}
    for name, size in sizes(path).items():
        first, _, rest = name.partition("/")
        if first == kind:
            level = rest.partition("/")[0]
            totals[level] = totals.get(level, 0) + size
    return totals


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
