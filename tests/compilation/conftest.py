"""What all tests of compiled runs want."""

import warnings
from collections.abc import Iterator

import pytest

from nestor.compilation import generated


@pytest.fixture(autouse=True)
def _quiet_compiler() -> Iterator[None]:
    """torch's compiler warns of its own deprecations and of settings; a level that steps eagerly is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=r"Engine\(compile=True\)")
        yield


@pytest.fixture
def on_stack() -> None:
    """Tiny graphs keep their intermediate results on the stack, as they do outside of tests."""


@pytest.fixture(autouse=True)
def _quick_compiler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such graphs take ten seconds more to compile: only the tests that ask for them have any."""
    if "on_stack" not in request.fixturenames:
        monkeypatch.setattr(generated, "_TINY", -1)
