"""The pages "Coming from another library": the programs of both libraries, and their numbers (``make test-peers``).

The other libraries are in an environment of their own, without which every test here is skipped.
"""

import importlib
import importlib.util
import logging
import warnings
from contextlib import ExitStack
from pathlib import Path

import pytest
from migration_pages import PEERS, YOURS, fresh, names, read, run, without_environments, words

pytest.importorskip("betty", reason="the other libraries are in an environment of their own: make test-peers")


def imported(package: str) -> None:
    """Import a library, which may warn of others.

    learn2learn is the one that may be missing: its release has to be compiled anew, which not every machine can.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            importlib.import_module(package)
        except ImportError as error:
            if package != "learn2learn":
                raise
            pytest.skip(f"learn2learn could not be compiled by make test-peers: {error}")


@pytest.mark.parametrize("page", PEERS)
def test_both_programs_print_what_the_page_says_and_agree(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with ExitStack() as stack:
        stack.callback(logging.disable, logging.root.manager.disable)
        stack.enter_context(fresh())
        if page == "learn2learn":
            stack.enter_context(without_environments())
        imported(page)
        namespaces = run(page, {PEERS[page], "nestor"})
    assert read(page)
    assert all(len(namespace) > 5 for namespace in namespaces.values())


@pytest.mark.parametrize("page", PEERS)
def test_names_of_the_other_library_exist(page: str) -> None:
    """Those of the table, in its sources."""
    spec = importlib.util.find_spec(page)
    if spec is None and page == "learn2learn":
        pytest.skip("learn2learn could not be compiled by make test-peers")
    assert spec is not None
    assert names(page, 0) - YOURS <= words(Path(next(iter(spec.submodule_search_locations or ()))))
