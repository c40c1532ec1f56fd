"""Scopes: the tensors that modules contain while a graph is built, and whenever the graph is differentiated."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Self, TypeAlias, TypeVar

import torch
from torch import Tensor

from nestor.autodiff.grad import grad
from nestor.autodiff.torch_private import over_batch, restore_attention, use_math_attention

T = TypeVar("T")

Slot: TypeAlias = tuple[dict[str, Any], str]
"""The location of a tensor in a module: the module's dictionary of parameters or buffers, and the key."""


class Scope:
    """Puts the tensors at which a loss is evaluated into the modules, for the loss and every derivative of its graph.

    A model may read its parameters again while its graph is differentiated: activation checkpointing evaluates a block
    a second time, adjoint solvers and reversible blocks evaluate it backwards. If a loss is evaluated at other tensors
    than the modules' own, :func:`place` puts these tensors into the modules until the scope exits. Every later pass
    through the graph enters the scope again. The scope also selects the attention kernels.

    Scopes form a stack: a pass through one graph may evaluate other losses at other tensors, each in its own scope.

    Args:
        twice: Whether the graph is differentiated more than once. Attention then runs on the math kernel, because
            torch's fused attention kernels have no second derivative.
    """

    # What the scope restores when it exits: what each slot held before (None while the scope is not active), the
    # attention kernels before if it has chosen the math kernel, those outside all scopes if it has restored them.
    _before: dict[tuple[int, str], tuple[dict[str, Any], Any]] | None = None
    _kernels: Any = None
    _outer: Any = None
    _depth = 0  # how often it was entered again while it was the innermost one
    _owner: "Scope | None" = None  # the scope that this object is a second entry of

    def __init__(self, *, twice: bool = False) -> None:
        self._placed: list[tuple[Slot, Tensor]] = []
        self._twice = twice

    def __enter__(self) -> Self:
        """Put the tensors of all evaluations in this scope so far into the modules."""
        if _active and (_active[-1] is self or _active[-1]._owner is self):
            _active[-1]._depth += 1
            return self
        entry: Scope = self
        if self._before is not None:
            # The scope is active below another one: a second object stores what this entry restores.
            entry = Scope(twice=self._twice)
            entry._owner, entry._placed = self, self._placed
        entry._before = {}
        if self._twice:
            entry._kernels = use_math_attention()
        elif _active:
            # An evaluation of first order inside one of second order takes the kernels from outside all scopes.
            entry._outer = next((scope._kernels for scope in _active if scope._kernels is not None), None)
            if entry._outer is not None:
                restore_attention(entry._outer)
        _active.append(entry)
        if self._placed:
            entry._put(self._placed)
        return self

    def __exit__(self, *error: object) -> None:
        """Put back what the modules held before."""
        entry = _active[-1]
        if entry._depth:
            entry._depth -= 1
            return
        _active.pop()
        before, entry._before = entry._before, None
        assert before is not None
        for (_, name), (owner, value) in before.items():
            owner[name] = value
        if entry._twice:
            restore_attention(entry._kernels)
        elif entry._outer is not None:
            use_math_attention()
        entry._kernels = entry._outer = None

    @property
    def is_innermost(self) -> bool:
        """Whether the scope is active, and no other scope was entered since."""
        return bool(_active) and (_active[-1] is self or _active[-1]._owner is self)

    def _put(self, placed: Sequence[tuple[Slot, Tensor]]) -> None:
        assert self._before is not None
        for (owner, name), tensor in placed:
            # A slot that is written twice is restored to its tensor before the first write.
            self._before.setdefault((id(owner), name), (owner, owner[name]))
            owner[name] = tensor


# The active scopes, innermost last.
_active: list[Scope] = []


def is_active() -> bool:
    """Return whether a scope is active."""
    return bool(_active)


def place(placed: Sequence[tuple[Slot, Tensor]]) -> bool:
    """Put tensors into modules until the innermost scope exits; return False, and do nothing, if no scope is active."""
    if not _active:
        return False
    scope = _active[-1]
    scope._put(placed)
    scope._placed.extend(placed)
    return True


def is_twice(*, unless_active: bool = False) -> bool:
    """Return whether the innermost scope is for graphs that are differentiated more than once."""
    return _active[-1]._twice if _active else unless_active


def placed_again(function: Callable[[], tuple[Tensor, T]]) -> tuple[Tensor, T]:
    """Evaluate a function in the innermost scope, in which others are evaluated at other tensors of the same modules.

    A reverse pass through the first result puts the tensors of this function into the modules again, for first
    derivatives, on dual numbers too. For other derivatives, use :func:`enclosed`.
    """
    scope = _active[-1]
    start = len(scope._placed)
    value, rest = function()
    found: Tensor = _PlacedAgain.apply(scope._placed[start:], value)  # type: ignore[no-untyped-call]
    return found, rest


class _PlacedAgain(torch.autograd.Function):
    """The identity. The nodes of one evaluation have consecutive numbers, so that the engine runs them together."""

    @staticmethod
    def forward(ctx: Any, placed: Sequence[tuple[Slot, Tensor]], value: Tensor) -> Tensor:
        ctx.placed = placed
        return value.clone()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[None, Tensor]:
        _active[-1]._put(ctx.placed)
        return None, cotangent

    @staticmethod
    def jvp(ctx: Any, _: None, tangent: Tensor) -> Tensor:
        return tangent.clone()


def original(owner: dict[str, Any], name: str) -> Any:
    """Return the tensor that a module contains outside all scopes."""
    for scope in _active:  # the outermost scope that wrote the slot saved the module's own tensor
        if scope._before is not None and (found := scope._before.get((id(owner), name))) is not None:
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
    if not torch.is_grad_enabled():
        return [o.detach() if o is not None and o.requires_grad else o for o in outputs]
    present = [output for output in outputs if output is not None]
    if not present:
        return list(outputs)
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
        return (None, None, None, *over_batch(partial(_Enclosed._pull_back, ctx), cotangents))

    @staticmethod
    def _pull_back(ctx: Any, *cotangents: Tensor | None) -> list[Tensor | None]:
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
        return [next(values) if need else None for need in needed]
