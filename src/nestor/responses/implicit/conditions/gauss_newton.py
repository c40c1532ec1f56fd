"""The generalized Gauss-Newton matrix."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from nestor.autodiff.grad import accumulate, vjp
from nestor.autodiff.instruments import count_hvp
from nestor.errors import SolverError
from nestor.responses.implicit.conditions.linearization import Linearization
from nestor.responses.implicit.conditions.stationarity import Curvature
from nestor.vectors import Params

# The cuts of ``outputs`` in the losses under evaluation, innermost last. If the list is empty, it makes no cut.
_cuts: list[list[tuple[Tensor, Tensor]]] = []


def outputs(tensor: Tensor) -> Tensor:
    """Mark a model's outputs inside a loss, for :class:`GaussNewton`.

    :class:`GaussNewton` differentiates the model before the mark and the loss after it separately. Nothing else depends
    on the mark.

    Args:
        tensor: The outputs of the model; any shape.

    Returns:
        The tensor itself; while :class:`GaussNewton` evaluates the loss, a leaf with the same values.

    Example:
        >>> net, x, y = torch.nn.Linear(3, 2), torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 0])
        >>> def loss(net):
        ...     return torch.nn.functional.cross_entropy(nestor.outputs(net(x)), y)
        >>> loss(net) == torch.nn.functional.cross_entropy(net(x), y)  # the mark changes no value
        tensor(True)
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"outputs(tensor=...) must be a Tensor, got {type(tensor).__name__}.")
    if not _cuts:
        return tensor
    leaf = tensor.detach().requires_grad_()
    _cuts[-1].append((tensor, leaf))
    return leaf


def outputs_cut_off() -> list[Tensor]:
    """Return the outputs at which the loss under evaluation is cut; they have the graph of the model."""
    return [tensor for tensor, _ in _cuts[-1]] if _cuts else []


@contextmanager
def _cutting() -> Iterator[list[tuple[Tensor, Tensor]]]:
    cut: list[tuple[Tensor, Tensor]] = []
    _cuts.append(cut)
    try:
        yield cut
    finally:
        _cuts.pop()


@dataclass(frozen=True, kw_only=True)
class GaussNewton(Curvature):
    r"""The generalized Gauss-Newton matrix: the Hessian without the curvature of the model.

    .. math:: G(\theta) = \ell(z(\theta), \theta), \qquad
        A = J^T \frac{\partial^2 \ell}{\partial z^2} J + \frac{\partial^2 \ell}{\partial\theta^2}\Big|_z, \qquad
        J = \frac{\partial z}{\partial\theta}

    ``A`` is positive semi-definite for losses that are convex in the outputs ``z`` and regularizers that are convex in
    the variables, for any model: conjugate gradients do not break down. It equals the Hessian for a linear model and
    where the loss is zero. Mark the outputs by :func:`nestor.outputs` inside the loss. The mixed product of the
    response remains exact.

    Reference: Schraudolph, Fast curvature matrix-vector products for second-order gradient descent, Neural Computation
    14(7), 2002.

    Example:
        >>> x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([[2.0], [4.0]])
        >>> loss = lambda w, decay: (nestor.outputs(x @ w) - y).square().sum() + decay * w.square().sum()
        >>> decay, w = torch.tensor(10.0, requires_grad=True), torch.tensor([[10 / 15]])  # the minimum
        >>> response = nestor.Implicit(condition=nestor.Stationarity(curvature=nestor.GaussNewton()))
        >>> best = nestor.best_response(loss, w, decay, response)
        >>> torch.autograd.grad(best.sum(), decay)  # of 10 / (5 + decay)
        (tensor(-0.0444),)
    """

    def operator(self, hessian: Linearization) -> Linearization:
        """Return the operator; nothing is evaluated yet."""
        return _GaussNewtonMatrix(*hessian.point)


@dataclass(frozen=True)
class _Piece:
    """One micro-batch, cut at the outputs.

    Attributes:
        outputs: The outputs, with a graph to the variables.
        leaves: Leaves with the values of the outputs, which the loss reads.
        probes: Leaves ``u``, zero, like the outputs.
        pulled: ``J^T u``, with a graph to ``u``.
        slopes: The gradient of the loss with respect to ``leaves``, with a graph.
        direct: The gradient of the loss with respect to the variables at fixed outputs, with a graph.
    """

    outputs: list[Tensor]
    leaves: list[Tensor]
    probes: list[Tensor]
    pulled: list[Tensor | None]
    slopes: list[Tensor | None]
    direct: list[Tensor | None]


class _GaussNewtonMatrix(Linearization):
    has_batched_product = False

    @cached_property
    def _pieces(self) -> list[_Piece]:
        """Evaluate every term once, cut at the outputs."""
        pieces = []
        inputs = [i.detach() for i in self._inputs]
        for term in self.lower.objective.terms:
            with torch.enable_grad():
                with _cutting() as cut:
                    value = term(self._theta, inputs)
                self.lower.objective.check_twice()
                if not cut:
                    raise SolverError(
                        "GaussNewton found no marked outputs in the lower loss, which separate the model from the "
                        "loss. Mark the model's outputs: F.cross_entropy(nestor.outputs(net(x)), y)."
                    )
                # The reverse pass evaluates the levels below, whose outputs are not cut.
                ends, leaves = [o for o, _ in cut], [leaf for _, leaf in cut]
                grads = torch.autograd.grad(value, [*leaves, *self._theta], create_graph=True, allow_unused=True)
                # J v is the derivative of J^T u in u: the transpose of a linear map, by two reverse passes.
                probes = [torch.zeros_like(o).requires_grad_() for o in ends]
                pulled = vjp(ends, self._theta, probes, create_graph=True)
            pieces.append(_Piece(ends, leaves, probes, pulled, list(grads[: len(cut)]), list(grads[len(cut) :])))
        return pieces

    def apply(self, vector: Params) -> list[Tensor]:
        """Compute ``J v``, multiply by the curvature of the loss, pull back; add the curvature of the regularizer."""
        count_hvp(self.lower.objective.name)
        total: list[Tensor | None] = [None] * len(vector)
        with self.scope:
            for piece in self._pieces:
                pushed = vjp(piece.pulled, piece.probes, vector, retain_graph=True)
                curved = vjp(piece.slopes, piece.leaves, pushed, retain_graph=True)
                model = vjp(piece.outputs, self._theta, curved, retain_graph=True)
                regular = vjp(piece.direct, self._theta, vector, retain_graph=True)
                total = accumulate(total, model, 1 / len(self._pieces))
                total = accumulate(total, regular, 1 / len(self._pieces))
        return self._damped(total, vector)
