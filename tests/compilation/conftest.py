"""What all tests of compiled runs want."""

import warnings
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _quiet_compiler() -> Iterator[None]:
    """torch's compiler warns of its own deprecations and of settings; a level that steps eagerly is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=r"Engine\(compile=True\)")
        yield
