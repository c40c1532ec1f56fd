"""The multilevel program: validated levels, their objectives and hypergradients."""

import copy
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from nestor.explain.explain import Explanation, explain
from nestor.explain.mermaid import mermaid
from nestor.levels.build import build
from nestor.levels.evaluator import Evaluator
from nestor.levels.level import Level, diagnose, reads_finite
from nestor.levels.nesting import Nesting
from nestor.levels.nestings import Exact, Frozen
from nestor.levels.planning import planned_histories
from nestor.problem import Problem
from nestor.responses import Response
from nestor.vectors import algebra

NESTINGS: Mapping[str, type[Nesting]] = {"exact": Exact, "frozen": Frozen}


class Program:
    r"""Nested optimization problems, lowest level first.

    .. math:: \text{objective}_k(\theta_k, \text{uppers}) =
        \text{loss}_k(\theta_k, \text{uppers}, \{\theta_l^*(\theta_k, \text{uppers})\}_{l \in \text{lowers}(k)}), \qquad
        \theta_l^* = \arg\min_\theta \text{objective}_l

    The losses determine the graph: their arguments after the batch are names of levels. A level that reads a level
    listed earlier uses the best response of that level. A level that reads a level listed later depends on its
    variables.

    Args:
        nesting: ``"exact"``: the objective of a level contains the responses of its lowers, so hypergradients are
            correct at any depth. ``"frozen"``: levels in between are constants, an approximation whose cost is linear
            in the depth.
        **problems: The levels by name, lowest first.

    Attributes:
        nesting: ``"exact"`` or ``"frozen"``.
        evaluator: Evaluates its objectives and hypergradients.

    Raises:
        TypeError: If a level is no :class:`Problem`.
        ValueError: If the program is not well formed; the message names the level, its loss, the cause and the remedy.
    """

    def __init__(self, *, nesting: str = "exact", **problems: Problem) -> None:
        if isinstance(nesting, Problem):
            raise ValueError("A level cannot be called 'nesting': that is the option of Program. Choose another name.")
        if not isinstance(nesting, str) or nesting not in NESTINGS:
            raise ValueError(f"Program(nesting={nesting!r}) must be one of {', '.join(map(repr, NESTINGS))}.")
        levels = build(problems)
        self.nesting = nesting
        self.evaluator = Evaluator(levels, NESTINGS[nesting](levels))

    @property
    def levels(self) -> Mapping[str, Level]:
        """The levels by name, lowest first."""
        return self.evaluator.levels

    def lowers(self, name: str) -> tuple[str, ...]:
        """Name the levels below whose best responses the objective of ``name`` contains, lowest first."""
        return self.evaluator.level(name).lowers

    def uppers(self, name: str) -> tuple[str, ...]:
        """Name the levels above on which the objective of ``name`` depends, lowest first."""
        return self.evaluator.level(name).uppers

    def objective(self, name: str, batches: Mapping[str, Any] | None = None) -> Tensor:
        """Evaluate the objective of a level, with the best responses of its lowers inside.

        Args:
            name: The level.
            batches: One batch for the level and each level below it that takes one, by level name.

        Returns:
            A scalar with a graph to the level's own parameters, differentiable to any order (attention runs on the math
            kernel). Every evaluation uses the random numbers that follow the generators' current state. It does not
            change that state, buffers or parameters.

        Raises:
            ValueError: If the level is unknown or a batch is missing.
            LossError: If a loss is not a scalar.
        """
        level = self.evaluator.level(name)
        return self.evaluator.objective(level, planned_histories(self.evaluator, level, batches))

    def hypergradient(self, name: str, batches: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
        r"""Differentiate the objective of a level totally: direct term plus the terms through the best responses.

        .. math:: \frac{d}{d\theta_k} \text{objective}_k = \frac{\partial \text{loss}_k}{\partial\theta_k}
            + \sum_l \Big(\frac{d\theta_l^*}{d\theta_k}\Big)^T \frac{\partial \text{loss}_k}{\partial\theta_l^*}

        The current iterates of the levels below are used as their best responses. No parameter, buffer, ``.grad``,
        optimizer state or random generator changes.

        Args:
            name: The level.
            batches: One batch for the level and each level below it that takes one, by level name.

        Returns:
            The derivative by parameter name (as in ``module.named_parameters()``), variables only; zeros for a variable
            that the objective does not depend on.

        Raises:
            ValueError: If the level is unknown or a batch is missing.
            NestorError: If a loss is not a differentiable scalar, a value is not finite, or a solve fails.
        """
        level = self.evaluator.level(name)
        with torch.enable_grad():
            histories = planned_histories(self.evaluator, level, batches)
            gradient = self.evaluator.gradient(level, histories, statistics=False)
        if not reads_finite(gradient):
            raise diagnose(level, gradient)
        values = level.gather(algebra.zeros_for_none(gradient.values, level.parameters))
        return {name: value for name, value in zip(level.names, values, strict=True) if value is not None}

    def with_evaluator(self, evaluator: Evaluator) -> Self:
        """Return the program with another evaluator; modules and losses are shared."""
        other = copy.copy(self)
        other.evaluator = evaluator
        return other

    def with_responses(self, responses: Mapping[str, Response]) -> Self:
        """Return the program with other responses for some levels, by name; modules and losses are shared."""
        return self.with_evaluator(self.evaluator.with_responses(responses))

    def explain(self, batches: Mapping[str, Any] | None = None) -> Explanation:
        """Tabulate the program: levels, sizes, dependencies, responses, and the cost of one update of each level.

        Args:
            batches: One batch for each level that takes one, by level name. With batches, the updates run on tensors
                without values, and the table also contains their memory; see :class:`Memory`.

        Raises:
            ValueError: If a batch is missing.
            NestorError: If the memory cannot be computed in advance, because a loss or a solver reads values.
        """
        return explain(self.evaluator, batches)

    def to_mermaid(self) -> str:
        """Draw the graph in mermaid's language: an edge from each level to those that read it."""
        return mermaid(self.evaluator.levels)

    def __repr__(self) -> str:
        levels = ", ".join(f"{name}={algebra.size(level.parameters):,}" for name, level in self.levels.items())
        return f"Program({levels}, nesting={self.nesting!r})"
