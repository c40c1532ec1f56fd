"""Custom functions (``torch.autograd.Function``) in a graph: whether their backward has a derivative."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from nestor.autodiff.torch_private import class_of, cotangents_of, tree_map


class CustomFunction:
    """A custom function in a graph, whose backward is called with cotangents of its own.

    A backward that raises an error is not judged: it raises it again when the loss is differentiated.

    Args:
        node: The node, which is also the context of the backward.

    Attributes:
        kind: The class of the function.
    """

    def __init__(self, node: Any) -> None:
        self.kind: Any = class_of(node)
        self._node = node

    @property
    def is_users(self) -> bool:
        """Whether a user has written it, perhaps as a ``torch.library.custom_op``, or a part of torch like a user."""
        library = self.kind.__module__.partition(".")[0] in ("torch", "nestor")
        is_custom = self.kind.__name__.startswith("GeneratedBackward") or self.kind.__module__.startswith(_LIKE_USERS)
        return bool(cotangents_of(self._node)) and (not library or is_custom)

    def stores_gradients(self, parameters: Iterable[Tensor]) -> bool:
        """Return whether the backward stores gradients in ``.grad`` of parameters, which are as before afterwards."""
        leaves = [p for p in parameters if p.is_leaf]
        before = [p.grad for p in leaves]
        try:
            for parameter in leaves:
                parameter.grad = None
            self._backward(self._saved_at(1.0))
            return any(parameter.grad is not None for parameter in leaves)
        except Exception:  # whatever the user's code raises
            return False
        finally:
            for parameter, grad in zip(leaves, before, strict=True):
                parameter.grad = grad

    def is_differentiable_twice(self, displaced: Callable[[float], Sequence[Tensor]]) -> bool:
        """Return whether the graph of the backward contains its cotangents and everything that moves.

        The backward is linear in the cotangents, so a gradient without a graph to them is wrong unless it is zero.
        Gradients must not change smoothly with anything else that has no graph in the backward: twice the change of
        the cause must not change them twice as much. Masks and constants may be kept.

        Args:
            displaced: Evaluates the loss again, with its variables moved by a relative step, and returns the tensors
                whose graph contains the function.
        """
        try:
            return not self._cuts_off() and not self._reads_hidden(displaced)
        except Exception:  # whatever the user's code raises: its own evaluations report it
            return True

    def _cuts_off(self) -> bool:
        """Return whether the gradients have no graph to the cotangents, or to a saved tensor that has a graph."""
        saved = self._saved_at(1.0)
        gradients = self._backward(saved)
        if not all(map(_has_graph, gradients)):
            return True
        live = [g.sum() for g in gradients if g.requires_grad]
        leaves = [t for t in saved if t is not None and t.requires_grad]
        if not live or not leaves:
            return False
        found = torch.autograd.grad(live, leaves, allow_unused=True)
        missing = {id(leaf) for leaf, grad in zip(leaves, found, strict=True) if grad is None}
        moves = [t is not None and id(t) in missing for t in saved]
        return _doubles(
            *(_distance(gradients, self._backward(self._saved_at(1 + step, moves))) for step in (1e-3, 2e-3))
        )

    def _reads_hidden(self, displaced: Callable[[float], Sequence[Tensor]]) -> bool:
        """Return whether the gradients change with the variables though the saved tensors with a graph do not.

        Small steps are lost in the rounding of low precisions, and large ones are not linear.
        """

        def at(step: float) -> CustomFunction:
            return next(CustomFunction(node) for node in custom_nodes(displaced(step)) if class_of(node) is self.kind)

        here = at(0.0)
        is_alone, found = not has_processes(), False  # processes that share a loss evaluate it equally often
        for step in (1e-2, 1e-3, 1e-4):
            once = at(step).change_from(here)
            if once == 0.0 and is_alone:
                return False
            found = _doubles(once, at(2 * step).change_from(here)) or found
            if found and is_alone:
                return True
        return found

    def change_from(self, other: CustomFunction) -> float:
        """Return how far the gradients move from another point, if the saved tensors with a graph stay there.

        What moves then has no graph in the backward: an intermediate result that the forward has saved, an attribute of
        the context, or a value outside of torch.
        """
        mine, theirs = self._saved_at(1.0), other._saved_at(1.0)
        saved = [t if t is not None and t.requires_grad else m for m, t in zip(mine, theirs, strict=True)]
        return _distance(self._backward(saved), other._backward(theirs))

    def _saved_at(self, factor: float, moves: Sequence[bool] | None = None) -> list[Tensor | None]:
        """Copy the saved tensors, and multiply those that ``moves`` marks (a factor leaves signs and zeros)."""
        copies: list[Tensor | None] = []
        for index, tensor in enumerate(self._node.saved_tensors):
            if tensor is None:
                copies.append(None)
                continue
            copy = tensor.detach().clone()
            if moves is not None and moves[index]:
                copy *= factor
            copies.append(copy.requires_grad_(tensor.requires_grad))
        return copies

    def _backward(self, saved: list[Tensor | None]) -> list[Tensor]:
        given = [c.requires_grad_() if c.is_floating_point() else c for c in cotangents_of(self._node)]
        backward = self.kind.backward if self.kind.vjp is torch.autograd.Function.vjp else self.kind.vjp
        with torch.enable_grad():
            context = _Context(self._node, saved)
            found = backward(context, *given)
        return [g for g in (found if isinstance(found, tuple) else (found,)) if isinstance(g, Tensor)]


class _Context:
    """The context of a custom function with other saved tensors, and copies of its attributes.

    A backward may overwrite both.
    """

    def __init__(self, node: Any, saved: list[Tensor | None]) -> None:
        self.node = node
        vars(self).update(tree_map(_copy, dict(vars(node))))
        # A backward that overwrites a tensor in place must not overwrite a leaf.
        self.saved_tensors = tuple(t.view_as(t) if t is not None and t.requires_grad else t for t in saved)

    def __getattr__(self, name: str) -> Any:
        """Return what the forward has stored."""
        return getattr(self.node, name)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _has_graph(gradient: Tensor) -> bool:
    """Return whether a gradient has a graph to the cotangents, or is zero."""
    if gradient.grad_fn is None:
        return gradient.requires_grad or not bool(gradient.any())
    return not gradient.grad_fn.name().endswith("::Error")  # once_differentiable


def _doubles(once: float, twice: float) -> bool:
    """Return whether a change is twice as large for twice the cause: something moves smoothly."""
    return 1.8 * once < twice < 2.2 * once


def _distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return sum(float((x - y).detach().norm()) for x, y in zip(a, b, strict=True))


def custom_nodes(roots: Sequence[Tensor]) -> Iterator[BackwardCFunction]:
    """Yield the nodes of custom functions in the graph of some tensors."""
    return (node for node in nodes(roots) if isinstance(node, BackwardCFunction))


def nodes(roots: Sequence[Tensor]) -> Iterator[Any]:
    """Yield the nodes of the graph of some tensors; equal graphs have the same order."""
    waiting: list[Any] = [root.grad_fn for root in roots if root.grad_fn is not None]
    found = set(waiting)
    while waiting:
        node = waiting.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in found:
                found.add(following)
                waiting.append(following)


def has_processes() -> bool:
    """Return whether several processes may share the evaluations of a loss."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


# Parts of torch whose functions are written in Python, and of which some cannot be differentiated twice.
_LIKE_USERS = ("torch.distributions", "torch._lobpcg", "torch.masked", "torch._higher_order_ops")
