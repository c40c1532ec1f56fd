"""What tells the arguments of one graph from those of another."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import Tensor

from nestor.compilation.graph import Unsuitable


def kind_of(value: Any) -> Hashable:
    """Describe a tensor; anything else is a constant of the graph, itself.

    Raises:
        Unsuitable: If it cannot be told from another one.
    """
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if not isinstance(value, Hashable):
        raise Unsuitable(f"a batch holds a {type(value).__name__}, which a graph cannot tell from another one")
    return value
