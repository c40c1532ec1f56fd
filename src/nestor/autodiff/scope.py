"""Scopes: the tensors that modules contain while a graph is built, and whenever the graph is differentiated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from nestor.autodiff.grad import Params, accumulate, grad, scaled_grad
from nestor.autodiff.instruments import count_gradient
from nestor.autodiff.torch_private import restore_attention, use_math_attention

Slot: TypeAlias = "tuple[dict[str, Any], str]"
"""The location of a tensor in a module: the module's dictionary of parameters or buffers, and the key."""


class Scope:
    """Puts the tensors at which a loss is evaluated into the modules, for the loss and every derivative of its graph.

    A model may read its parameters again while its graph is differentiated: activation checkpointing evaluates a block
    a second time, adjoint solvers and reversible blocks evaluate it backwards. If a loss is evaluated at other tensors
    than the modules' own, :func:`place` puts these tensors into the modules until the scope exits. Every later pass
    through the graph enters the scope again. The scope also selects the attention kernels.

    Scopes form a stack: a pass through one graph may evaluate other losses at other tensors, each in its own scope.
    Entering the innermost scope again costs nothing, so a solver enters the scope once for all its products.

    Args:
        twice: Whether the graph is differentiated more than once. Attention then runs on the math kernel, because
            torch's fused attention kernels have no second derivative.

    Example:
        >>> with Scope(twice=True) as scope:
        ...     gradient = torch.autograd.grad(loss(), weight, create_graph=True)
        >>> with scope:
        ...     torch.autograd.grad(gradient, weight, vector)
    """

    __slots__ = ("_placed", "_twice")

    def __init__(self, *, twice: bool = False) -> None:
        self._placed: list[tuple[Slot, Tensor]] = []
        self._twice = twice

    def __enter__(self) -> Scope:
        """Put the tensors of all evaluations in this scope so far into the modules."""
        if _entries and _entries[-1].scope is self:
            _entries[-1].depth += 1
            return self
        kernels = outer = None
        if self._twice:
            kernels = use_math_attention()
        elif _entries:
            # An evaluation of first order inside one of second order takes the kernels from outside all scopes.
            outer = next((entry.kernels for entry in _entries if entry.kernels is not None), None)
            if outer is not None:
                restore_attention(outer)
        _entries.append(_Entry(self, kernels, outer))
        if self._placed:
            _entries[-1].put(self._placed)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put back what the modules held before."""
        entry = _entries[-1]
        if entry.depth:
            entry.depth -= 1
            return
        _entries.pop()
        for (_, name), (owner, value) in entry.before.items():
            owner[name] = value
        if entry.kernels is not None:
            restore_attention(entry.kernels)
        elif entry.outer is not None:
            use_math_attention()


class _Entry:
    """One activation of a scope: stores what is restored when the scope exits.

    A scope may be active several times, with other scopes in between. The saved tensors therefore belong to an entry of
    the stack, and the scope itself stores only the tensors to place.

    Attributes:
        scope: The scope.
        kernels: The attention kernels before the entry, if it has chosen the math kernel; None if it has not.
        outer: The kernels from outside all scopes, if the entry has restored them.
        depth: How often the scope was entered again while it was the innermost one.
        before: What each slot held at the entry.
    """

    __slots__ = ("before", "depth", "kernels", "outer", "scope")

    def __init__(self, scope: Scope, kernels: Any, outer: Any) -> None:
        self.scope, self.kernels, self.outer = scope, kernels, outer
        self.depth = 0
        self.before: dict[tuple[int, str], tuple[dict[str, Any], Any]] = {}

    def put(self, placed: Sequence[tuple[Slot, Tensor]]) -> None:
        before = self.before
        for (owner, name), tensor in placed:
            # A slot that is written twice is restored to its tensor before the first write.
            before.setdefault((id(owner), name), (owner, owner[name]))
            owner[name] = tensor


# The entries of scopes, innermost last.
_entries: list[_Entry] = []


def place(placed: Sequence[tuple[Slot, Tensor]]) -> None:
    """Put tensors into modules until the innermost scope exits; a scope must be active."""
    _entries[-1].put(placed)
    _entries[-1].scope._placed.extend(placed)


def in_scope() -> bool:
    """Return whether a scope is active."""
    return bool(_entries)


def original(owner: dict[str, Any], name: str) -> Any:
    """Return the tensor that a module contains outside all scopes."""
    for entry in _entries:  # the outermost entry that wrote the slot saved the module's own tensor
        if (found := entry.before.get((id(owner), name))) is not None:
            return found[1]
    return owner[name]


def enclosed(
    function: Callable[[list[Tensor]], Sequence[Tensor | None]], tensors: Sequence[Tensor], *, twice: bool = True
) -> list[Tensor | None]:
    """Evaluate a function in its own scope, and make all its operations one node of the surrounding graph.

    The function is evaluated at leaves. If gradients are enabled, a node connects its outputs to ``tensors``. The node
    is differentiable to any order, and enters the scope for every pass through the function's graph. One surrounding
    graph may therefore contain evaluations at many points.

    Args:
        function: A function of a list like ``tensors``; an output may be None.
        tensors: The arguments, floating point.
        twice: See :class:`Scope`.

    Returns:
        The outputs of the function, connected to ``tensors`` if gradients are enabled.
    """
    leaves = [t.detach().requires_grad_() for t in tensors]
    with Scope(twice=twice) as scope, torch.enable_grad():
        outputs = function(leaves)
    present = [output for output in outputs if output is not None]
    if not present or not torch.is_grad_enabled():
        return [None if output is None else output.detach() for output in outputs]
    attached = iter(_Enclosed.apply(scope, leaves, present, *tensors))  # type: ignore[no-untyped-call]
    return [None if output is None else next(attached) for output in outputs]


class _Enclosed(torch.autograd.Function):
    """The map ``tensors -> outputs``, given by an inner graph from ``leaves`` to ``outputs`` that a scope belongs to.

    Its derivative is again a node of this class: around the inner graph, extended by the reverse pass.
    """

    @staticmethod
    def forward(
        ctx: Any, scope: Scope, leaves: list[Tensor], outputs: list[Tensor], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.scope, ctx.leaves, ctx.outputs = scope, leaves, outputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return tuple(output.detach() for output in outputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[3:]
        wrt = [leaf for leaf, need in zip(ctx.leaves, needed, strict=True) if need]
        pairs = [
            (output, cotangent)
            for output, cotangent in zip(ctx.outputs, cotangents, strict=True)
            if cotangent is not None and output.requires_grad
        ]
        found: list[Tensor | None] = [None] * len(wrt)
        if pairs:
            outputs, vectors = [output for output, _ in pairs], [vector for _, vector in pairs]
            if not torch.is_grad_enabled():
                with ctx.scope:  # a plain reverse pass through the inner graph
                    found = grad(outputs, wrt, vectors, retain_graph=True)
            else:
                # The result must be differentiable: extend the inner graph by its reverse pass, with leaves (seeds) for
                # the cotangents. A node around the extended graph then connects the result to tensors and cotangents.
                seeds = [vector.detach().requires_grad_() for vector in vectors]
                with ctx.scope:
                    found = grad(outputs, wrt, seeds, create_graph=True)
                present = [value for value in found if value is not None]
                attached = iter(
                    _Enclosed.apply(  # type: ignore[no-untyped-call]
                        ctx.scope, [*ctx.leaves, *seeds], present, *ctx.saved_tensors, *vectors
                    )
                    if present
                    else ()
                )
                found = [None if value is None else next(attached) for value in found]
        values = iter(found)
        return (None, None, None, *(next(values) if need else None for need in needed))


Term: TypeAlias = Callable[[Params, Params], Tensor]
"""Maps a level's variables and the tensors of the levels above to a scalar."""


@dataclass(frozen=True)
class Objective:
    r"""The function ``objective(theta, inputs)``: the mean of its ``terms``.

    An evaluation is pure. The same arguments give the same value, because every term replays its random numbers. No
    parameter, buffer or generator changes.

    Args:
        name: Name of the level, for counters and errors.
        terms: One function for each micro-batch of the level's last step.
        nested: Whether the objective contains best responses of other levels, which have no forward-mode rule.
        loss_scale: The factor that multiplies the losses before their reverse passes (fp16); None means 1.
    """

    name: str
    terms: tuple[Term, ...]
    nested: bool = False
    loss_scale: Tensor | None = None

    def __call__(self, theta: Params, inputs: Params) -> Tensor:
        """Evaluate the mean of the terms, in the active scope."""
        values = [term(theta, inputs) for term in self.terms]
        return values[0] if len(values) == 1 else torch.stack(values).mean()

    def gradient(self, theta: Params, inputs: Params, wrt: Params, *, create_graph: bool) -> list[Tensor | None]:
        """Differentiate the objective with respect to ``wrt``, a subset of ``theta`` and ``inputs``.

        With ``create_graph``, the evaluation uses the active scope, in which its graph is differentiated again.

        Returns:
            A vector like ``wrt``; None for a tensor that the objective does not depend on.
        """
        # One micro-batch at a time: without create_graph, only one graph is in memory.
        if len(self.terms) == 1:
            return self._partial(self.terms[0], theta, inputs, wrt, create_graph=create_graph)
        total: list[Tensor | None] = [None] * len(wrt)
        for term in self.terms:
            grads = self._partial(term, theta, inputs, wrt, create_graph=create_graph)
            total = accumulate(total, grads, 1 / len(self.terms))
        return total

    def _partial(
        self, term: Term, theta: Params, inputs: Params, wrt: Params, *, create_graph: bool
    ) -> list[Tensor | None]:
        if create_graph and in_scope():
            return self._gradient(term(theta, inputs), wrt, create_graph=True)
        with Scope(twice=create_graph):
            return self._gradient(term(theta, inputs), wrt, create_graph=create_graph)

    def _gradient(self, value: Tensor, wrt: Params, *, create_graph: bool) -> list[Tensor | None]:
        count_gradient(self.name)
        return scaled_grad(value, wrt, self.loss_scale, create_graph=create_graph)
