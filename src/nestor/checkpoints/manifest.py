"""The manifest of a checkpoint: what is in its folder, who wrote it, and a checksum for each file."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from nestor.errors import CheckpointError

FORMAT, VERSION = "nestor checkpoint", 1
FILE, CHECKSUM_FILE = "manifest.json", "manifest.sha256"
_OLD_FILE = ".metadata"  # written by torch.distributed.checkpoint, a pickle


class FormatVersionError(CheckpointError):
    """The checkpoint is whole, but its format is of a version that this nestor does not read."""


class Manifest(NamedTuple):
    """What a checkpoint says of itself.

    Attributes:
        version: The version of the format.
        versions: The versions of nestor and torch that wrote it.
        run: The id of the run.
        step: The engine step.
        saved: The time of the save, in seconds since 1970.
        program: The description of the program.
        files: Size in bytes and SHA-256 of each other file.
    """

    version: int
    versions: dict[str, str]
    run: str
    step: int
    saved: float
    program: dict[str, Any]
    files: dict[str, dict[str, Any]]


def write_manifest(
    folder: Path, *, versions: Mapping[str, str], run: str, step: int, saved: float, program: Mapping[str, Any]
) -> None:
    """Write the manifest of all files that a folder contains, and its own checksum, in the format of ``sha256sum``."""
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _checksum(path)} for path in sorted(folder.iterdir())}
    content = {"format": FORMAT, "version": VERSION, "versions": dict(versions), "run": run, "step": step}
    content |= {"saved": saved, "files": files, "program": dict(program)}
    (folder / FILE).write_text(json.dumps(content, indent=1, allow_nan=False), encoding="utf-8")
    (folder / CHECKSUM_FILE).write_text(_checksum_line(folder / FILE), encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a checkpoint, and check it, without the other files.

    Raises:
        FileNotFoundError: If the folder contains no checkpoint.
        FormatVersionError: If the format is of another version.
        CheckpointError: If the manifest is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        if (folder / _OLD_FILE).exists():
            raise FormatVersionError(
                f"{folder} is a checkpoint of format version 0, which contains pickled code. This nestor reads version "
                f"{VERSION} only. Finish that run with the version of nestor that began it."
            )
        raise FileNotFoundError(f"{folder} contains no checkpoint: it has no {FILE}.")
    try:
        line = (folder / CHECKSUM_FILE).read_bytes()
    except OSError as error:
        raise _damaged(folder, f"{CHECKSUM_FILE} cannot be read ({error})") from error
    content = _parse(path, folder)
    if content.get("format") == FORMAT and isinstance(number := content.get("version"), int) and number > VERSION:
        raise FormatVersionError(
            f"{folder} is a checkpoint of format version {number}, written by a later nestor. This one reads version "
            f"{VERSION}. Update nestor."
        )
    if line != _checksum_line(path).encode():
        raise _damaged(folder, f"the checksum of {FILE} is another one")
    entries: list[Any] = [content.get(name) for name in Manifest._fields]
    manifest = Manifest(*entries)
    if not _is_valid(manifest):
        raise _damaged(folder, f"{FILE} is no manifest of format version {VERSION}")
    return manifest


def check_files(folder: Path, manifest: Manifest) -> None:
    """Compare every file of a checkpoint with the manifest.

    Raises:
        CheckpointError: If a file is missing, is damaged, or is not in the manifest. The message names it.
    """
    expected = manifest.files.keys() | {FILE, CHECKSUM_FILE}
    found = {path.name for path in folder.iterdir()}
    if expected != found:
        names = ", ".join(sorted(expected ^ found))
        raise _damaged(folder, f"{names} {'is missing' if expected - found else 'does not belong to it'}")
    for name, entry in manifest.files.items():
        path = folder / name
        if path.is_symlink() or not path.is_file() or path.stat().st_size != entry["bytes"]:
            raise _damaged(folder, f"{name} has another size than when it was written")
        if _checksum(path) != entry["sha256"]:
            raise _damaged(folder, f"{name} has changed since it was written")


def _parse(path: Path, folder: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(folder, f"{path.name} cannot be read ({type(error).__name__})") from error
    if not isinstance(content, dict):
        raise _damaged(folder, f"{path.name} is no manifest")
    return content


def _is_valid(manifest: Manifest) -> bool:
    """Return whether all entries have their types: the author of a folder may have written anything."""
    kinds = (int, dict, str, int, float | int, dict, dict)
    if manifest.version != VERSION or not all(map(isinstance, manifest, kinds)):
        return False
    parts = [manifest.program.get(name) for name in ("structure", "settings")]
    entries = manifest.files.values()
    return all(isinstance(part, dict) and isinstance(part.get("levels"), dict) for part in parts) and all(
        isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and isinstance(entry.get("sha256"), str)
        for entry in entries
    )


def _damaged(folder: Path, why: str) -> CheckpointError:
    return CheckpointError(f"The checkpoint {folder} is damaged: {why}.")


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum_line(path: Path) -> str:
    return f"{_checksum(path)}  {path.name}\n"
