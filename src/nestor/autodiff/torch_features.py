"""Features: uses of torch's private interface, each with a public fallback. The choice is made once, at import."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

T = TypeVar("T")

PUBLIC_ONLY: Final = os.environ.get("NESTOR_PUBLIC_TORCH_ONLY") == "1"


@dataclass(frozen=True, eq=False)
class Feature:
    """A use of torch's private interface.

    Attributes:
        purpose: What the function does.
        private: The private function, or a tuple of them; None if it cannot be loaded or fails its self-check.
        public: The fallback.
    """

    purpose: str
    private: Any
    public: Any


features: list[Feature] = []
"""All features, in the order in which they were chosen."""


def choose(purpose: str, load: Callable[[], T], fallback: Any, works: Callable[[T], bool]) -> T:
    """Return the private function if it can be loaded and works, otherwise the fallback."""
    private: T | None = None
    if not PUBLIC_ONLY:
        try:
            loaded = load()
            private = loaded if works(loaded) else None
        except Exception:  # another version of torch may raise any error
            private = None
    features.append(Feature(purpose, private, fallback))
    chosen: T = fallback if private is None else private
    return chosen
