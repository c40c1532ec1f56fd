"""Scopes: the tensors that modules contain while a graph is built, and whenever the graph is differentiated."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self, TypeAlias

import torch
from torch import Tensor

from nestor.autodiff.grad import Params, accumulate, grad, scaled_grad
from nestor.autodiff.instruments import count_gradient
from nestor.autodiff.torch_private import over_batch, restore_attention, use_math_attention

Slot: TypeAlias = tuple[dict[str, Any], str]
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
            entry._kernels = None
        elif entry._outer is not None:
            use_math_attention()
            entry._outer = None

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


def place(placed: Sequence[tuple[Slot, Tensor]]) -> bool:
    """Put tensors into modules until the innermost scope exits; return False, and do nothing, if no scope is active."""
    if not _active:
        return False
    scope = _active[-1]
    scope._put(placed)
    scope._placed.extend(placed)
    return True


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
        if create_graph and _active:
            return self._differentiated(term(theta, inputs), wrt, create_graph=True)
        with Scope(twice=create_graph):
            return self._differentiated(term(theta, inputs), wrt, create_graph=create_graph)

    def _differentiated(self, value: Tensor, wrt: Params, *, create_graph: bool) -> list[Tensor | None]:
        count_gradient(self.name)
        return scaled_grad(value, wrt, self.loss_scale, create_graph=create_graph)
