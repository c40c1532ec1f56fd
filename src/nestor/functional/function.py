"""A function of nested structures of tensors as a pure function of flat lists."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nestor.autodiff.instruments import count_forward, uncounted
from nestor.autodiff.second_derivatives import (
    NOT_A_DERIVATIVE,
    Move,
    custom_functions,
    is_derivative,
    without_second_derivative,
)
from nestor.data.random_numbers import Captured
from nestor.errors import NestorWarning, UnsupportedError
from nestor.functional.closure import Watch, leaves_read, may_read, unsupported
from nestor.functional.module import ModuleFunction
from nestor.functional.node import is_continuous, is_transformed
from nestor.vectors import Params, Tree, algebra, flatten, unflatten


class PureFunction:
    """A user's function of ``(theta, inputs)``, or a module, as a function of flat lists of real tensors.

    Every evaluation draws the same random numbers. The function may read only tensors among its arguments if they
    require gradients: others would get none. The first evaluation searches its graph for them.

    The parameters of a module are inputs. A complex tensor is given by its real and imaginary parts.

    Args:
        caller: The public function, for errors.
        name: Name of the function, for counters.
        function: ``function(theta, inputs)``.
        theta: The variables.
        inputs: What the variables depend on.

    Attributes:
        variables: The tensors of ``theta``, as given.
        arguments: The tensors of ``theta``; those of ``inputs``, and of the module, that may have a derivative; the
            others, which are constants: integers, booleans, and those that require no gradient.
        only_once: Makers of errors for a function that cannot be differentiated twice, after its first evaluation.

    Raises:
        TypeError: If ``theta`` or ``inputs`` holds anything but tensors, or ``theta`` one of integers.
        ValueError: If ``theta`` has no tensor.
    """

    def __init__(self, caller: str, name: str, function: Callable[..., Any], theta: Tree, inputs: Tree) -> None:
        self._caller, self._name, self._given = caller, name, function
        self._call = ModuleFunction(function) if isinstance(function, nn.Module) else function
        whole: Any = [inputs, self._call.tensors] if isinstance(self._call, ModuleFunction) else inputs
        self._structures = theta, whole
        self.variables, self._leaves = flatten(theta, "theta"), flatten(whole, "inputs")
        if not self.variables:
            raise ValueError("theta was given without a tensor: there is nothing to differentiate.")
        if fixed := [t.dtype for t in self.variables if not is_continuous(t)]:
            raise TypeError(
                f"theta holds a tensor of {fixed[0]}, which has no derivative. Give floating point numbers."
            )
        # Under a transform of torch.func, a tensor may be differentiated though it does not require a gradient.
        anyway = is_transformed()
        self._varies = [is_continuous(t) and (t.requires_grad or anyway) for t in self._leaves]
        varying = [t for t, varies in zip(self._leaves, self._varies, strict=True) if varies]
        constants = [t for t, varies in zip(self._leaves, self._varies, strict=True) if not varies]
        self.arguments = real(self.variables), real(varying), constants
        self._randomness = Captured.now()
        self._is_checked = False
        self.only_once: list[Callable[[], Exception]] = []

    @property
    def sizes(self) -> tuple[int, int, int]:
        """The number of variables, of inputs and of constants."""
        theta, inputs, constants = self.arguments
        return len(theta), len(inputs), len(constants)

    def __call__(self, theta: Params, inputs: Params, constants: Params) -> Any:
        """Evaluate the function.

        Raises:
            UnsupportedError: If the function reads other tensors that require gradients.
        """
        value = self._evaluate(theta, inputs, constants)
        if torch.is_grad_enabled() and not self._is_checked:
            arguments = [*theta, *inputs]
            read = leaves_read(_tensors(value), arguments)
            if read:
                # A leaf that the function makes itself (for a derivative in its points) is another one each time.
                again = {id(t) for t in leaves_read(_tensors(self._evaluate(theta, inputs, constants)), arguments)}
                read = [t for t in read if id(t) in again]
            if read:
                raise unsupported(self._caller, self._given, read)
            self._is_checked = True
            self._inspect(_tensors(value), theta, inputs, constants)
        return value

    def _inspect(self, roots: Sequence[Tensor], theta: Params, inputs: Params, constants: Params) -> None:
        """Note what has no second derivative; warn if the gradient is no derivative."""

        def evaluate(move: Move) -> tuple[list[Tensor], list[Tensor]]:
            leaves = move([t.detach() for t in (*theta, *inputs)])
            with uncounted():
                return _tensors(self._evaluate(leaves[: len(theta)], leaves[len(theta) :], constants)), leaves

        messages = without_second_derivative(roots, evaluate)
        self.only_once += [partial(UnsupportedError, f"{self._caller}: {message}") for message in messages]
        is_scalar = len(roots) == 1 and roots[0].numel() == 1
        if is_scalar and any(f.is_users for f in custom_functions(roots)) and not is_derivative(evaluate):
            warnings.warn(f"{self._caller}: {NOT_A_DERIVATIVE}", NestorWarning, stacklevel=2)

    @property
    def may_read_others(self) -> bool:
        """Whether the function can reach a tensor that requires a gradient and is none of a module's parameters."""
        return self._call is self._given and may_read(self._given)

    def check(self, theta: Params, inputs: Params, constants: Params) -> None:
        """Evaluate the function once, if it was not yet, to find other tensors that it reads and that have derivatives.

        Raises:
            UnsupportedError: If there are any, among those of transforms of torch.func and forward mode as well.
        """
        if self._is_checked:
            return
        watch = Watch()
        try:
            with torch.enable_grad(), watch:
                for value in _tensors(self(algebra.leaves(theta), algebra.leaves(inputs), constants)):
                    value.view_as(value)  # a value that the function returns as it is
        except RuntimeError:
            if not watch.found:
                raise
        if watch.found:
            raise unsupported(self._caller, self._given, watch.found[:1])

    def _evaluate(self, theta: Params, inputs: Params, constants: Params) -> Any:
        variables = [_like(value, t) for value, t in zip(theta, self.variables, strict=True)]
        varying, fixed = iter(inputs), iter(constants)
        leaves = [
            _like(next(varying), t) if varies else next(fixed)
            for t, varies in zip(self._leaves, self._varies, strict=True)
        ]
        with self._randomness.replay():
            count_forward(self._name)
            return self._call(*map(unflatten, self._structures, (variables, leaves)))

    def result(self, theta: Params) -> Any:
        """Build the structure of ``theta`` from flat real tensors."""
        return unflatten(self._structures[0], [_like(v, t) for v, t in zip(theta, self.variables, strict=True)])


def real(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Replace complex tensors by their real and imaginary parts, along a last dimension."""
    return [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in tensors]


def _like(value: Tensor, tensor: Tensor) -> Tensor:
    """Return the complex tensor of real and imaginary parts, if ``tensor`` is complex."""
    return torch.view_as_complex(value.contiguous()) if tensor.is_complex() else value


def _tensors(value: Any) -> list[Tensor]:
    """List the tensors of a result; nothing for a result that the caller will refuse."""
    try:
        return flatten(value)
    except TypeError:
        return []
