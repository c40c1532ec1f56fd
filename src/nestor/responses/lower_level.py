"""The level that a response differentiates through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from nestor.errors import NestorError
from nestor.responses.lower_objective import LowerObjective
from nestor.responses.unrolling.trajectory import Trajectory
from nestor.solvers import SolveState
from nestor.vectors.algebra import Params
from nestor.vectors.space import LOCAL, VectorSpace


@dataclass(frozen=True)
class LowerLevel:
    """What a response knows of the level that it differentiates through.

    Args:
        objective: The level's objective on the batches of its last step.
        trajectory: The steps that led to its variables, or that it is about to take; None if they are not known.
        init_indices: For each variable, the place among the inputs of the tensor that it started from
            (``Problem(init=...)``); None if it started from no input.
        solve: What is kept from one linear solve to the next; None keeps nothing.
        space: The space of its vectors.
        may_overwrite: Whether the pullback may overwrite its cotangent and the gradients in the trajectory's history:
            nothing else reads them.
    """

    objective: LowerObjective
    trajectory: Trajectory | None = None
    init_indices: Sequence[int] | None = None
    solve: SolveState | None = None
    space: VectorSpace = LOCAL
    may_overwrite: bool = False

    @property
    def name(self) -> str:
        """Name of the level."""
        return self.objective.name

    def needed_trajectory(self, response: str) -> Trajectory:
        """Return the trajectory, for a response that differentiates the level's steps.

        Raises:
            NestorError: If no steps are known.
        """
        if self.trajectory is None:
            raise NestorError(
                f"{response} needs the level's optimizer steps, and none are known. In a program, give the level an "
                "optimizer; with best_response, pass optimizer=torch.optim.SGD([theta], lr=...).",
                level=self.name,
            )
        return self.trajectory

    def with_steps_taken(self, response: str, theta: Params, inputs: Params) -> tuple[LowerLevel, Params]:
        """Take all planned steps without a graph; return the level after them and its variables."""
        trajectory = self.needed_trajectory(response)
        if not trajectory.history.planned:
            return self, theta
        taken = trajectory.with_steps(trajectory.history.steps, trajectory.history.states)
        return replace(self, trajectory=taken), trajectory.end(inputs)
