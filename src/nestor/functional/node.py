"""A best response as a node of the graph: in reverse mode, in forward mode, and under transforms of ``torch.func``."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from nestor.autodiff.grad import vjp
from nestor.autodiff.torch_private import over_batch
from nestor.responses import Response, respond_back
from nestor.responses.unrolling.trajectory import LowerLevel
from nestor.vectors import Params, algebra, split

Lower: TypeAlias = Callable[[Params, Params], tuple[Response, LowerLevel]]
"""Makes the response and the lower level from the variables and the constants."""


def is_transformed() -> bool:
    """Return whether a transform of ``torch.func`` or forward mode is active."""
    return _is_within_transform() or _is_forward_mode()


def _is_within_transform() -> bool:
    try:
        torch.zeros(()).requires_grad_()  # an error within a transform
    except RuntimeError:
        return True
    return False


def _is_forward_mode() -> bool:
    try:
        with forward_ad.dual_level():  # an error within another level of dual numbers
            return False
    except RuntimeError:
        return True


@dataclass(frozen=True)
class Attachment:
    """Makes variables a function of inputs: the same values, whose derivative is a response's.

    Attributes:
        lower: Makes the response and its lower level.
        check: Evaluates the lower level's function once; an error if it reads tensors that would get no derivative.
        sizes: The number of variables, of inputs and of constants.
        checks_now: Whether to check at once, and not in the evaluation of the first reverse pass: that pass may be
            asked for a derivative in a tensor that is no input, and does not come here then.
    """

    lower: Lower
    check: Callable[[Params, Params, Params], None]
    sizes: tuple[int, int, int]
    checks_now: bool = False

    def attach(self, theta: Params, inputs: Params, constants: Params) -> list[Tensor]:
        """Return the best response, attached to the inputs and differentiable to any order that the response allows."""
        start = [t.detach() for t in theta]
        if _is_within_transform():
            return _apply(self, start, inputs, constants)
        forward_mode = _is_forward_mode()
        alone = self.checks_now or not any(i.requires_grad for i in inputs)  # no reverse pass need come here
        if forward_mode or (torch.is_grad_enabled() and alone):
            self.check(start, inputs, constants)
        if forward_mode:
            return _apply(self, start, inputs, constants)
        response, lower = self.lower(start, constants)
        with torch.no_grad():
            lower, taken = response.take_planned_steps(lower, start, [i.detach() for i in inputs])
        node = replace(self, lower=lambda theta, constants: (response, lower), check=_checked)
        return _apply(node, [t.detach() for t in taken], inputs, constants)

    def values(self, tensors: Params) -> list[Tensor]:
        """Return the variables, after the planned steps if there are any."""
        theta, inputs, constants = split(tensors, self.sizes)
        self.check(theta, inputs, constants)
        response, lower = self.lower(theta, constants)
        return [t.view_as(t) for t in response.take_planned_steps(lower, theta, [i.detach() for i in inputs])[1]]

    def pull_back(self, tensors: Params) -> list[Tensor | None]:
        """Map a cotangent on the best response to cotangents on the inputs.

        Args:
            tensors: The first variables, the best response, the inputs, the constants, and the cotangent.
        """
        count, more, rest = self.sizes
        start, theta, inputs, constants, cotangent = split(tensors, [count, count, more, rest, count])
        response, lower = self.lower(start, constants)
        with torch.no_grad():
            lower, _ = response.take_planned_steps(lower, [t.detach() for t in start], [i.detach() for i in inputs])
        return respond_back(response, lower, theta, inputs, cotangent)

    def filled_pull_back(self, tensors: Params) -> list[Tensor]:
        """Pull back; zeros for inputs that the best response does not depend on."""
        count, more, _ = self.sizes
        return algebra.zeros_for_none(self.pull_back(tensors), tensors[2 * count : 2 * count + more])

    def push_forward(self, tensors: Params) -> list[Tensor]:
        """Map tangents of the inputs to the tangent of the best response.

        Args:
            tensors: The first variables, the best response, the inputs, the constants, and the tangents of the inputs.
        """
        count, more, rest = self.sizes
        known, tangents = split(tensors, [2 * count + more + rest, more])
        # The pullback is linear in the cotangent. Its derivative in the cotangent is its transpose.
        cotangent = [torch.zeros_like(t).requires_grad_() for t in known[count : 2 * count]]
        pulled = self.pull_back([*known, *cotangent])
        return algebra.zeros_for_none(vjp(pulled, cotangent, tangents, create_graph=True), cotangent)


def _apply(node: Attachment, theta: Params, inputs: Params, constants: Params) -> list[Tensor]:
    return list(_BestResponse.apply(node, *theta, *inputs, *constants))  # type: ignore[no-untyped-call]


def _checked(theta: Params, inputs: Params, constants: Params) -> None:
    """Check nothing: the reverse pass evaluates the function."""


class _BestResponse(torch.autograd.Function):
    """``(theta, inputs, constants) -> theta*``."""

    @staticmethod
    def forward(node: Attachment, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(node.values(tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.node, *tensors = inputs
        count = ctx.node.sizes[0]
        # The outputs are saved, not the variables alone: in a second derivative they lead back to this node.
        saved = [*tensors[:count], *output, *tensors[count:]]
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, *cotangent: Tensor) -> tuple[Tensor | None, ...]:
        node: Attachment = ctx.node
        saved = ctx.saved_tensors

        def pull_back(*vector: Tensor) -> Sequence[Tensor | None]:
            if not is_transformed():
                return node.pull_back([*saved, *vector])
            found: tuple[Tensor, ...] = _Outside.apply(node.filled_pull_back, *saved, *vector)  # type: ignore[no-untyped-call]
            return found

        count, _, constants = node.sizes
        return (None, *[None] * count, *over_batch(pull_back, cotangent), *[None] * constants)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        node, saved = ctx.node, ctx.saved_tensors
        count, more, _ = node.sizes
        inputs = saved[2 * count : 2 * count + more]
        moving = algebra.zeros_for_none(tangents[count : count + more], inputs)
        return tuple(over_batch(partial(_Outside.apply, node.push_forward, *saved), moving))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        return _looped(_BestResponse, info, in_dims, arguments)


class _Outside(torch.autograd.Function):
    """A function of a list of tensors, evaluated outside all transforms at plain tensors.

    ``function`` returns tensors with a graph to its arguments. The derivatives of the node are nodes of the same class.
    """

    @staticmethod
    def forward(function: Callable[[Params], Sequence[Tensor]], *tensors: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            return tuple(output.detach() for output in function(_fresh([t.detach() for t in tensors])))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.function, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        pull_back = partial(_pulled, ctx.function, len(tensors))
        found = iter(over_batch(partial(_Outside.apply, pull_back, *tensors), cotangents))
        return (None, *(next(found) if is_continuous(t) else None for t in tensors))

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        tensors = ctx.saved_tensors
        push_forward = partial(_pushed, ctx.function, len(tensors))
        moving = [torch.zeros_like(t) if d is None else d for t, d in zip(tensors, tangents, strict=True)]
        varying = [d for t, d in zip(tensors, moving, strict=True) if is_continuous(t)]
        return tuple(over_batch(partial(_Outside.apply, push_forward, *tensors), varying))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        return _looped(_Outside, info, in_dims, arguments)


def is_continuous(tensor: Tensor) -> bool:
    """Return whether a tensor holds numbers that derivatives exist for."""
    return tensor.is_floating_point() or tensor.is_complex()


def _fresh(tensors: Params) -> list[Tensor]:
    fresh = iter(algebra.fresh([t for t in tensors if is_continuous(t)]))
    return [next(fresh) if is_continuous(t) else t for t in tensors]


def _pulled(function: Callable[[Params], Sequence[Tensor]], count: int, tensors: Params) -> list[Tensor]:
    """Map cotangents on the outputs of a function to cotangents on its arguments that are no integers."""
    arguments = _fresh(tensors[:count])
    varying = [a for a in arguments if is_continuous(a)]
    found = vjp(function(arguments), varying, tensors[count:], create_graph=True)
    return algebra.zeros_for_none(found, varying)


def _pushed(function: Callable[[Params], Sequence[Tensor]], count: int, tensors: Params) -> list[Tensor]:
    """Map tangents of the arguments that are no integers to tangents of the outputs, by two reverse passes."""
    arguments = _fresh(tensors[:count])
    outputs = function(arguments)
    cotangents = [torch.zeros_like(output).requires_grad_() for output in outputs]
    varying = [a for a in arguments if is_continuous(a)]
    pulled = vjp(outputs, varying, cotangents, create_graph=True)
    return algebra.zeros_for_none(vjp(pulled, cotangents, tensors[count:], create_graph=True), outputs)


def _looped(
    node: type[torch.autograd.Function], info: Any, in_dims: tuple[int | None, ...], arguments: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Evaluate a node for one entry of the batch after the other: solvers decide by values."""
    function, *tensors = arguments
    rows = [
        [t if dim is None else t.select(dim, index) for t, dim in zip(tensors, in_dims[1:], strict=True)]
        for index in range(info.batch_size)
    ]
    found = [node.apply(function, *row) for row in rows]  # type: ignore[no-untyped-call]
    stacked = tuple(torch.stack(parts) for parts in zip(*found, strict=True))
    return stacked, (0,) * len(stacked)
