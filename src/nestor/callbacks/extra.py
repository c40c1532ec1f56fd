"""Optional packages: imported when a callback needs them, not before."""

from __future__ import annotations

import importlib
from types import ModuleType


def load_extra(module: str, *, extra: str, needed_by: str) -> ModuleType:
    """Import an optional package.

    Args:
        module: The module to import.
        extra: The extra of nestor that installs it.
        needed_by: Who needs it; begins the message.

    Raises:
        ImportError: If it cannot be imported; says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{needed_by} needs {module}, which cannot be imported ({error}): pip install 'nestor[{extra}]'",
            name=module,
        ) from error
