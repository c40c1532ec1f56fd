"""The libraries that are there, and their cases."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

from benchmarks.case import Case

# Name, module of the adapter, distribution; the first two need nothing but the project's own environment.
LIBRARIES: Mapping[str, tuple[str, str]] = {
    "hand": ("by_hand", "torch"),
    "nestor": ("by_nestor", "nestor"),
    "betty": ("by_betty", "betty-ml"),
    "higher": ("by_higher", "higher"),
    "torchopt": ("by_torchopt", "torchopt"),
    "jax": ("by_jax", "jax"),
}
OWN = ("hand", "nestor")

Builders = Mapping[str, Mapping[str, Callable[[Any], Case]]]


def builders(library: str) -> Builders:
    """Load an adapter; fails as the import of its library does."""
    module = importlib.import_module(f"benchmarks.adapters.{LIBRARIES[library][0]}")
    found: Builders = module.CASES
    return found


def version(library: str) -> str:
    """The installed version of a library."""
    return metadata.version(LIBRARIES[library][1])
