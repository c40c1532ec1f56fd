"""A copy of what an optimizer step changes, for a step whose result is not finite."""

import copy
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.optim import Optimizer

from nestor.training.snapshot import load_optimizer, optimizer_dict
from nestor.vectors import Params, algebra


@dataclass(frozen=True)
class LastStep:
    """The variables of a level and the state of its optimizer before a step."""

    variables: list[Tensor]
    state: dict[str, Any]

    @classmethod
    def take(cls, optimizer: Optimizer, variables: Params) -> Self:
        """Copy variables and state."""
        return cls([v.detach().clone() for v in variables], copy.deepcopy(optimizer_dict(optimizer)))

    def restore(self, optimizer: Optimizer, variables: Params) -> None:
        """Copy them back, bitwise."""
        with torch.no_grad():
            algebra.copy_(variables, self.variables)
        load_optimizer(optimizer, self.state)
