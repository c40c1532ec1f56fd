"""Cross derivatives by differences of gradients."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nestor.autodiff.instruments import is_compiling, note_method
from nestor.autodiff.scalar import where
from nestor.autodiff.scope import enclosed
from nestor.errors.options import check_options
from nestor.optim.history_spec import HistorySpec
from nestor.responses.implicit.cross.cross_derivative import CrossDerivative
from nestor.responses.unrolling.trajectory import LowerLevel
from nestor.responses.work import Work
from nestor.solvers.scaling import accurate_norm
from nestor.vectors import Params, algebra, split


@dataclass(frozen=True, kw_only=True)
class CentralDifference(CrossDerivative):
    r"""Difference two gradients at perturbed copies of the lower variables.

    .. math:: \frac{\partial^2 G}{\partial\lambda\,\partial\theta} v \approx
        \frac{\nabla_\lambda G(\theta + \varepsilon v, \lambda) - \nabla_\lambda G(\theta - \varepsilon v, \lambda)}
        {2 \varepsilon}, \qquad \varepsilon = \frac{\text{rel\_step}}{\lVert v \rVert}

    It needs two forwards and two gradients, no second derivative of any operator, and works with any attention kernel.
    For a large level, both points reuse one buffer; in an engine that buffer is the cotangent's, which is overwritten.
    Both evaluations use the same random numbers. The error is of second order in ``rel_step``, plus rounding errors
    over ``rel_step``.

    It does **not** respect ``detach()``: a value that the loss detaches (``weights(losses.detach())`` in
    Meta-Weight-Net) moves with the perturbed variables too, so the result is the mixed derivative of the loss
    *without* the ``detach``. Use :class:`ForwardMode` or :class:`ReverseMode` there.

    Args:
        rel_step: Length of the perturbation :math:`\varepsilon \lVert v \rVert`, in units of the parameters.

    Raises:
        ValueError: If ``rel_step`` is not positive and finite.

    Reference: Liu, Simonyan, Yang, DARTS, ICLR 2019, equation 8.

    Example:
        >>> weight = torch.tensor(2.0, requires_grad=True)
        >>> response = nestor.Implicit(solver=nestor.DenseSolve(), cross=nestor.CentralDifference(rel_step=0.01))
        >>> theta = nestor.best_response(lambda t, w: (t - w) ** 2, weight.detach(), weight, response)
        >>> (slope,) = torch.autograd.grad(theta, weight)
        >>> print(f"{slope:.3f}")
        1.000
    """

    work: ClassVar[Work] = Work(gradients=2, passes=1)
    differentiates_twice: ClassVar[bool] = False
    tolerance: ClassVar[float] = 0.01
    rel_step: float = 1e-2

    def __post_init__(self) -> None:
        check_options(self, positive=["rel_step"])

    def product(self, lower: LowerLevel, theta: Params, inputs: Params, vector: Params) -> list[Tensor | None]:
        """Multiply by a central difference; see :class:`CrossDerivative`."""
        create_graph = torch.is_grad_enabled()
        note_method(lower.objective.name, "central difference")
        eps = self._eps(lower, vector)
        with torch.enable_grad():
            if create_graph:
                above, below = [_gradient(lower, moved(theta, side, vector), inputs) for side in (eps, -eps)]
            elif algebra.is_large(theta) and not is_compiling():
                above, below = _shared_gradients(lower, theta, eps, algebra.leaves(inputs), vector)
            else:
                given, gradient = algebra.leaves(inputs), lower.objective.gradient
                points = [moved(theta, side, vector) for side in (eps, -eps)]
                above, below = [gradient(point, given, given, create_graph=False) for point in points]
            factor = 0.5 / eps
            return [
                None if plus is None or minus is None else (plus - minus) * factor
                for plus, minus in zip(above, below, strict=True)
            ]

    def _eps(self, lower: LowerLevel, vector: Params) -> float | Tensor:
        length = accurate_norm(lower.space, vector)
        # For a zero vector, any step gives the correct product, which is zero.
        return self.rel_step / where(length == 0, 1.0, length)


def _gradient(lower: LowerLevel, theta: Params, inputs: Params) -> list[Tensor | None]:
    """Differentiate with respect to the inputs at one of the two points, with a graph to both arguments."""

    def gradient(tensors: list[Tensor]) -> list[Tensor | None]:
        point, given = split(tensors, [len(theta), len(inputs)])
        return lower.objective.gradient(point, given, given, create_graph=True)

    return enclosed(gradient, [*theta, *inputs])


def _shared_gradients(
    lower: LowerLevel, theta: Params, eps: float | Tensor, inputs: Params, vector: Params
) -> list[list[Tensor | None]]:
    """Differentiate with respect to the inputs at both points of a large level.

    The points share their memory, because allocating one more vector is slow.
    """
    point = moved(theta, eps, vector, may_overwrite=lower.may_overwrite)
    above = lower.objective.gradient(point, inputs, inputs, create_graph=False)
    # A gradient may share the memory of the point, which is overwritten next.
    held = [id(p.untyped_storage()) for p in point]
    above = [g.clone() if g is not None and id(g.untyped_storage()) in held else g for g in above]
    algebra.reflect_(point, theta)
    return [above, lower.objective.gradient(point, inputs, inputs, create_graph=False)]


def moved(theta: Params, eps: float | Tensor, vector: Params, *, may_overwrite: bool = False) -> list[Tensor]:
    """Return ``theta + eps * vector``, which requires gradients: some losses read the flag to choose what they decay.

    With ``may_overwrite``, each entry of the vector is freed after use.
    """
    if may_overwrite and algebra.is_large(theta):
        parts = zip(theta, algebra.consume(vector, may_overwrite=True), strict=True)
        return [algebra.axpy(eps, [v], [t])[0].requires_grad_() for t, v in parts]
    return [p.requires_grad_() for p in algebra.axpy(eps, vector, theta)]


@dataclass(frozen=True, kw_only=True)
class ReusedDifference(CentralDifference):
    r"""Difference a gradient at a perturbed point and the gradient of the lower level's last step.

    .. math:: \frac{\partial^2 G}{\partial\lambda\,\partial\theta} v \approx
        \frac{\nabla_\lambda G(\theta_{T-1} + \varepsilon v, \lambda) - \nabla_\lambda G(\theta_{T-1}, \lambda)}
        {\varepsilon}, \qquad \varepsilon = \frac{\text{rel\_step}}{\lVert v \rVert}

    The reverse pass of the lower step also computes the gradient with respect to the upper variables, on the same batch
    and random numbers. One more forward and gradient are therefore enough. Compared with :class:`CentralDifference`,
    the error is of first order in ``rel_step``, and the derivative is evaluated at the variables *before* the last
    step, of which a copy is stored. Outside an engine, and for a level whose objective contains best responses, the
    central difference is used.

    Args:
        rel_step: Length of the perturbation, in units of the parameters.

    Raises:
        ValueError: If ``rel_step`` is not positive and finite.

    Example:
        >>> low, top = nestor.Variable(torch.zeros(())), nestor.Variable(torch.zeros(()))
        >>> sgd = [torch.optim.SGD(variable.parameters(), lr=0.1) for variable in (low, top)]
        >>> reuse = nestor.Implicit(solver=nestor.Identity(), cross=nestor.ReusedDifference())
        >>> fit = nestor.Problem(low, lambda low, top: (low() - top()) ** 2, optimizer=sgd[0], response=reuse)
        >>> program = nestor.Program(low=fit, top=nestor.Problem(top, lambda low: (low() - 1) ** 2, optimizer=sgd[1]))
        >>> metrics = nestor.Engine(program, seed=0).run(100)
        >>> print(f"{top().item():.1f}")  # the optimum is 1
        1.0
    """

    tolerance: ClassVar[float] = 0.1  # its error is of first order

    @property
    def history_spec(self) -> HistorySpec:
        """The variables before the last step, and its gradient with respect to the upper variables."""
        return HistorySpec(window=1, spacing=1, input_gradients=True, slots=False)

    def product(self, lower: LowerLevel, theta: Params, inputs: Params, vector: Params) -> list[Tensor | None]:
        """Multiply by a forward difference; see :class:`CrossDerivative`."""
        trajectory = lower.trajectory
        base = trajectory.input_gradient if trajectory is not None else ()
        if trajectory is None or not base or torch.is_grad_enabled():
            return super().product(lower, theta, inputs, vector)
        note_method(lower.objective.name, "difference to the last step")
        eps = self._eps(lower, vector)
        point = moved(trajectory.last_state().params, eps, vector, may_overwrite=lower.may_overwrite)
        leaves = algebra.leaves(inputs)
        # The function of the step: with the buffers and the constants that the step has read.
        objective = trajectory.steps[-1].objective
        with torch.enable_grad():
            there = objective.gradient(point, leaves, leaves, create_graph=False)
        return [None if t is None or b is None else (t - b) / eps for t, b in zip(there, base, strict=True)]
