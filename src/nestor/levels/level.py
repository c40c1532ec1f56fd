"""A level of a validated program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from nestor.levels.links import Links
from nestor.levels.loss import LevelLoss
from nestor.levels.stepping import Stepping
from nestor.problem import Problem
from nestor.responses import Response
from nestor.vectors import algebra
from nestor.vectors.algebra import Params
from nestor.vectors.space import VectorSpace


@dataclass(frozen=True, eq=False)
class Level:
    """One level of a program.

    Attributes:
        name: Its name.
        index: Its place in the program, lowest first.
        problem: The declaration.
        names: The names of its variables in ``module.named_parameters()``.
        links: The levels that it reads and depends on.
        loss: Evaluates its loss.
        stepping: How it steps.
        response: How the levels above differentiate through it.
    """

    name: str
    index: int
    problem: Problem
    names: tuple[str, ...]
    links: Links
    loss: LevelLoss
    stepping: Stepping
    response: Response

    @property
    def parameters(self) -> Params:
        """Its variables: parameters of the module, stacks of copies (tasks), shards, or placeholders."""
        return self.loss.variables[self.name]

    @property
    def lowers(self) -> tuple[str, ...]:
        """The levels below whose best responses its objective contains, in the program's order."""
        return self.links.lower_levels

    @property
    def uppers(self) -> tuple[str, ...]:
        """The levels above on which its objective depends, in the program's order."""
        return self.links.upper_levels

    @property
    def space(self) -> VectorSpace:
        """The space of vectors like its variables."""
        return self.stepping.space

    @cached_property
    def is_large(self) -> bool:
        """Whether the memory of one more vector like its variables is worth saving."""
        return algebra.is_large(self.parameters)

    def copies(self) -> list[Tensor]:
        """Copy its present variables."""
        return [p.detach().clone() for p in self.parameters]

    def norm(self, values: Sequence[Tensor | None], like: Tensor) -> Tensor:
        """Return the Euclidean norm of a vector like its variables: a scalar ``like`` another one."""
        found = algebra.present(values)
        return self.space.norm(found) if found else torch.zeros_like(like)

    def gather(self, values: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return whole vectors for vectors like the variables that this process holds."""
        placements = self.loss.placements
        return list(values) if placements is None else placements[self.name].gather(values)

    def shard(self, values: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return what this process holds of whole vectors."""
        placements = self.loss.placements
        return list(values) if placements is None else placements[self.name].shard(values)
