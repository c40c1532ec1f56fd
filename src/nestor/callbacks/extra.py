"""Optional packages, imported by the callback that needs them."""

from __future__ import annotations

import importlib
from types import ModuleType


def load_extra(module: str, *, extra: str, needed_by: str) -> ModuleType:
    """Import an optional package.

    Args:
        module: The module to import.
        extra: The extra of nestor that installs the package.
        needed_by: The caller; the error message begins with it.

    Raises:
        ImportError: If the import fails; the message says how to install the package.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{needed_by} needs {module}, which cannot be imported ({error}): pip install 'nestor[{extra}]'",
            name=module,
        ) from error
