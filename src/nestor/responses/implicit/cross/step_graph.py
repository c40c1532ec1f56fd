"""The cross derivative from the graph of a step that the level has taken."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nestor.autodiff.grad import vjp
from nestor.autodiff.instruments import count_hvp, note_method
from nestor.optim.history_spec import HistorySpec
from nestor.responses.implicit.cross.cheapest import CheapestExact
from nestor.responses.implicit.cross.cross_derivative import CrossDerivative
from nestor.responses.unrolling.trajectory import LowerLevel
from nestor.vectors import Params


@dataclass(frozen=True, kw_only=True)
class ReusedGraph(CrossDerivative):
    r"""Differentiate the gradient that the lower level's last step has taken.

    .. math:: \frac{\partial}{\partial\lambda} \langle \nabla_\theta G(\theta_{T-1}, \lambda), v \rangle

    Exact, at the variables :math:`\theta_{T-1}` *before* the last step, on its batch and random numbers. The engine
    keeps the graph of the gradient of that step, so the product is one more reverse pass and no evaluation: for levels
    whose graph fits into memory beside a copy of their variables. The step itself costs a gradient with a graph.

    Where no graph is kept, the product is computed anew at the same point, by the cheapest exact method: for a module
    with BatchNorm, GroupNorm, InstanceNorm or recurrent layers, where that takes less time, for shards, compiled steps,
    a level whose objective contains best responses, and a resumed run until the next step. Outside an engine, and where
    the result is differentiated again, the point is the current one.

    Example:
        >>> low, top = nestor.Variable(torch.zeros(())), nestor.Variable(torch.zeros(()))
        >>> sgd = [torch.optim.SGD(variable.parameters(), lr=0.1) for variable in (low, top)]
        >>> reuse = nestor.Implicit(solver=nestor.Identity(), cross=nestor.ReusedGraph())  # T1T2(reuse=True)
        >>> fit = nestor.Problem(low, lambda low, top: (low() - top()) ** 2, optimizer=sgd[0], response=reuse)
        >>> program = nestor.Program(low=fit, top=nestor.Problem(top, lambda low: (low() - 1) ** 2, optimizer=sgd[1]))
        >>> metrics = nestor.Engine(program, seed=0).run(100)
        >>> print(f"{top().item():.1f}")  # the optimum is 1
        1.0
    """

    @property
    def history_spec(self) -> HistorySpec:
        """The graph of the last step, and the variables before it."""
        return HistorySpec(window=1, spacing=1, graphs=True, slots=False)

    def product(self, lower: LowerLevel, theta: Params, inputs: Params, vector: Params) -> list[Tensor | None]:
        """Multiply by one reverse pass; see :class:`CrossDerivative`."""
        trajectory = lower.trajectory
        if trajectory is None or trajectory.history.planned or not trajectory.history.states or torch.is_grad_enabled():
            return CheapestExact().product(lower, theta, inputs, vector)
        graph = trajectory.history.steps[-1].graph
        if graph is None or not graph.is_valid:
            # The function of the step: with the buffers and the constants that the step has read.
            then = replace(lower, objective=trajectory.steps[-1].objective)
            point = trajectory.last_state().params
            return CheapestExact().product(then, point, inputs, vector)
        given = [tensor for name in trajectory.layout.by_level(inputs) for tensor in graph.inputs[name]]
        count_hvp(lower.objective.name)
        note_method(lower.objective.name, "graph of the last step")
        with graph.scope:
            return vjp(graph.gradient, given, vector, retain_graph=True)
