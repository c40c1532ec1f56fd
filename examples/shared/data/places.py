"""Where the data of the gallery are looked up."""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

DEFAULT = Path(__file__).resolve().parents[3] / "data"  # what `make data` fills


class DataMissing(FileNotFoundError):
    """A data set is in none of the places; the message is one line and says how to get it."""


@dataclass(frozen=True)
class Place:
    """Where one data set may lie.

    Args:
        title: The name that people know.
        fetched: Its folder below the data folder as `shared.data.fetch` unpacks it.
        package: The Python package that ships it, if it is installed.
        package_path: Its folder in that package.
        given: Other folders below the data folder, for people who bring the standard set.
        advice: For people with internet: the standard set, and what `--data` is to hold.
    """

    title: str
    fetched: str
    advice: str
    package: str | None = None
    package_path: str = ""
    given: tuple[str, ...] = ()

    def folders(self, folder: Path) -> Iterator[Path]:
        """The given folder, then installed packages, then what `make data` fetched."""
        for root in dict.fromkeys((Path(folder), DEFAULT)):
            yield from (root / name for name in (*self.given, self.fetched))
            if self.package is not None and root == Path(folder):
                yield from _installed(self.package, self.package_path)

    def find(self, folder: Path, *paths: str) -> Path:
        """The first folder that holds all `paths`."""
        for candidate in self.folders(folder):
            if all((candidate / path).exists() for path in paths):
                return candidate
        raise self.missing(folder)

    def missing(self, folder: Path) -> DataMissing:
        return DataMissing(f"{self.title} is not in {folder}: run `make data`, or, with internet, {self.advice}.")


def _installed(package: str, path: str) -> Iterator[Path]:
    try:
        yield Path(str(distribution(package).locate_file(path)))
    except PackageNotFoundError:
        return
