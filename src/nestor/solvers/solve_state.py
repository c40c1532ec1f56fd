"""What is kept from one linear solve of a level to the next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nestor.solvers.linear_solver import Solution
from nestor.vectors.algebra import Params, VectorSpace


@dataclass
class SolveState:
    """The last solve of one level for one level above it; the engine owns and checkpoints it.

    Attributes:
        value: The last solution, to start from; empty before the first solve.
        memory: What the solver may use again.
        stats: What the last solve reported.
    """

    value: Params = field(default_factory=list)
    memory: list[Tensor] = field(default_factory=list)
    stats: Mapping[str, Tensor] = field(default_factory=dict)

    def update(self, space: VectorSpace, solution: Solution, *, keep_value: bool) -> None:
        """Take over a solution; one that is not finite is forgotten, and so is the value of a truncated one."""
        self.stats = solution.stats
        if not keep_value and not solution.memory:
            return
        finite = torch.isfinite(space.norm(solution.value))
        # A solve that meets negative curvature has no solution to come closer to: corrections of a truncated one add
        # up without bound.
        start = finite if solution.truncated is None else finite & ~solution.truncated
        if finite.device.type == "cpu":
            self.value = solution.value if keep_value and bool(start) else []
            self.memory = solution.memory if bool(finite) else []
        else:
            # Decided on the device, where nothing waits: zero is where a solve without a start begins.
            self.value = [torch.where(start, v, 0.0) for v in solution.value] if keep_value else []
            self.memory = solution.memory
