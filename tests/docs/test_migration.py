"""The pages "Coming from another library": every block has a runner, and those of nestor run here.

``make test-peers`` runs the blocks of the other libraries and compares the numbers (``test_migration_pairs.py``).
"""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from migration_pages import FOLDER, PEERS, YOURS, Agreement, Block, check, fresh, names, read, run, words

import nestor

PAGES = sorted(path.stem for path in FOLDER.glob("*.md"))


@pytest.mark.parametrize("page", PEERS)
def test_blocks_of_nestor_print_what_the_page_says(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with fresh():
        namespace = run(page, {"nestor"})["nestor"]
    assert {name for item in read(page) if isinstance(item, Agreement) for name in item.names} <= set(namespace)


def test_every_page_is_run() -> None:
    assert set(PAGES) == {"index", *PEERS}


@pytest.mark.parametrize("page", PAGES)
def test_no_block_escapes_both_runners(page: str) -> None:
    """Every block of Python has the title of a library that is run; fences are read without exception."""
    text = (FOLDER / f"{page}.md").read_text(encoding="utf-8")
    blocks = [item for item in read(page) if isinstance(item, Block)]
    assert len(re.findall(r"^[ >]*(?:```|~~~)", text, re.MULTILINE)) == 2 * len(blocks)
    for block in blocks:
        assert block.language in ("python", "text", "sh"), f"line {block.line}"
        titles = {PEERS[page], "nestor"} if block.language == "python" else {""}
        assert block.title in titles, f"line {block.line}"


@pytest.mark.parametrize("page", PEERS)
def test_every_pair_is_compared(page: str) -> None:
    """A whole program of the other library, a whole program of nestor, and what both define alike."""
    items = [item for item in read(page) if isinstance(item, Agreement) or item.language == "python"]
    places = [place for place, item in enumerate(items) if isinstance(item, Agreement)]
    assert places
    for place in places:
        theirs, ours, agreement = items[place - 2 : place + 1]
        assert [theirs.title, ours.title] == [PEERS[page], "nestor"]
        assert agreement.tolerance <= 1e-6
        for block in (theirs, ours):
            assert all(re.search(rf"\b{name}\b", block.body) for name in agreement.names)
    first = items[: places[0]]
    assert all(re.search(r"^import |^from ", block.body, re.MULTILINE) for block in first)


@pytest.mark.parametrize("page", PEERS)
def test_names_of_nestor_exist(page: str) -> None:
    """Those of the tables, in the sources; the classes among them are public, or torch's."""
    found = names(page, 1)
    assert found - YOURS <= words(Path(nestor.__file__).parent)
    public = {name for module in (nestor, nestor.callbacks, nestor.optim, torch.optim) for name in dir(module)}
    assert {name for name in found if re.match(r"[A-Z][a-z]", name)} <= public


def test_numbers_that_differ_are_found() -> None:
    """Also a shape, a missing number, and one that is not finite."""
    agreement = Agreement(1, ("a",), 1e-9)
    check(agreement, {"a": torch.tensor([1.0, 2.0])}, {"a": np.array([1.0, 2.0])}, "page")
    for other in ([1.0, 2.1], [1.0], [0.0, 0.0], [1.0, float("nan")], []):
        with pytest.raises(AssertionError, match="page: a"):
            check(agreement, {"a": torch.tensor(other)}, {"a": np.array([1.0, 2.0])}, "page")
    with pytest.raises(KeyError):
        check(agreement, {}, {"a": 1.0}, "page")


def test_files_and_targets_that_pages_name_exist() -> None:
    texts = [(FOLDER / f"{page}.md").read_text(encoding="utf-8") for page in PAGES]
    root = FOLDER.parents[1]
    makefile = (root / "Makefile").read_text(encoding="utf-8")
    paths = {
        found for text in texts for found in re.findall(r"`((?:tests|examples|benchmarks|docs|src)/[\w/.-]*)`", text)
    }
    targets = {found for text in texts for found in re.findall(r"`make ([a-z-]+)`", text)}
    assert not {path for path in paths if not (root / path).exists()}
    assert targets >= {"test", "test-peers"}
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
