"""The memory of an autograd graph."""

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

T = TypeVar("T")


def with_graph_size(build: Callable[[], T], held: Callable[[], Iterable[Tensor]]) -> tuple[T, int | None]:
    """Build a graph, and count the bytes of the tensors that it keeps.

    Args:
        build: Builds the graph. It is called twice if the first graph cannot be observed.
        held: Returns the tensors that exist without the graph, which are not counted.

    Returns:
        What ``build`` returned, and the size; None if the graph cannot be observed, because it uses ``torch.func``.
    """
    saved: list[torch.UntypedStorage] = []

    def observe(tensor: Tensor) -> Tensor:
        saved.append(tensor.untyped_storage())
        return tensor

    try:
        with saved_tensors_hooks(observe, lambda tensor: tensor):
            found = build()
    except RuntimeError:
        return build(), None
    # Tensors that share a storage return the same object.
    known = {id(t.untyped_storage()) for t in held()}
    return found, sum({id(s): s.nbytes() for s in saved if id(s) not in known}.values())
