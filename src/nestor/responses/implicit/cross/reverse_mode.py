"""The cross derivative by double backward."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nestor.autodiff.grad import vjp
from nestor.autodiff.instruments import note_method
from nestor.autodiff.scope import Scope, enclosed
from nestor.responses.implicit.cross.cross_derivative import CrossDerivative
from nestor.responses.unrolling.trajectory import LowerLevel
from nestor.vectors import Params, algebra, split


@dataclass(frozen=True, kw_only=True)
class ReverseMode(CrossDerivative):
    r"""Differentiate :math:`\langle \nabla_\theta G(\theta, \lambda), v \rangle` with respect to :math:`\lambda`.

    Exact. It needs one forward, one gradient with a graph, and one more reverse pass. It is the fastest method for
    small levels, every operator supports it, and it is the only one for a level whose objective contains best
    responses.

    Example:
        >>> weight = torch.tensor(2.0, requires_grad=True)
        >>> response = nestor.Implicit(solver=nestor.DenseSolve(), cross=nestor.ReverseMode())
        >>> theta = nestor.best_response(lambda t, w: (t - w) ** 2, weight.detach(), weight, response)
        >>> torch.autograd.grad(theta, weight)
        (tensor(1.),)
    """

    def product(self, lower: LowerLevel, theta: Params, inputs: Params, vector: Params) -> list[Tensor | None]:
        """Multiply by double backward; see :class:`CrossDerivative`."""
        create_graph = torch.is_grad_enabled()
        note_method(lower.objective.name, "reverse over reverse")

        def mixed(point: Params, given: Params, direction: Params) -> list[Tensor | None]:
            gradient = lower.objective.gradient(point, given, point, create_graph=True)
            return vjp(gradient, given, direction, create_graph=create_graph)

        # At leaves: the derivative is partial, although theta may be a function of the inputs.
        if create_graph:
            sizes = [len(theta), len(inputs), len(vector)]
            return enclosed(lambda tensors: mixed(*split(tensors, sizes)), [*theta, *inputs, *vector])
        with Scope(twice=True), torch.enable_grad():
            return mixed(algebra.leaves(theta), algebra.leaves(inputs), vector)
