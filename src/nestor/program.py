"""The multilevel program: validated levels, their objectives and hypergradients."""

import copy
from collections.abc import Mapping
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from nestor.explain.explain import Explanation, explain
from nestor.explain.mermaid import mermaid
from nestor.explain.svg import svg
from nestor.levels.adaptation import adapted
from nestor.levels.build import build
from nestor.levels.copies import copies_of_tasks
from nestor.levels.evaluator import Evaluator
from nestor.levels.inspection import inspect_next
from nestor.levels.level import Level, diagnose, reads_finite
from nestor.levels.nesting import Nesting
from nestor.levels.nestings import Exact, Frozen
from nestor.levels.peers import warn_of_coupled_peers
from nestor.levels.planning import planned_histories
from nestor.levels.refusals import refuse
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
    variables. Two levels are peers if neither reads the other, directly or through a chain of levels listed between
    them: each takes the variables of the other as constants. An argument that a loss does not use still declares a
    dependence.

    Args:
        nesting: ``"exact"``: the objective of a level contains the responses of its lowers, so hypergradients are
            correct at any depth. ``"frozen"``: levels in between are constants, an approximation whose cost is linear
            in the depth.
        **problems: The levels by name, lowest first.

    Attributes:
        nesting: ``"exact"`` or ``"frozen"``.

    Raises:
        TypeError: If a level is no :class:`Problem`.
        ValueError: If the program is not well formed; the message names the level, its loss, the cause and the remedy.
        UnsupportedError: If it contains something that no response, or not the one chosen, differentiates correctly:
            hooks, wrapped or compiled modules, modules that change their own parameters.

    Example:
        >>> low, top = nestor.Variable(torch.tensor(2.0)), nestor.Variable(torch.tensor(2.0))
        >>> program = nestor.Program(
        ...     low=nestor.Problem(low, lambda low, top: (low() - top()) ** 2, response=nestor.Implicit()),
        ...     top=nestor.Problem(top, lambda low: low() ** 3),
        ... )
        >>> program.lowers("top"), program.uppers("low")
        (('low',), ('top',))
        >>> program.hypergradient("top")  # 3 top^2, through the best response low = top
        {'value': tensor(12.)}
    """

    def __init__(self, *, nesting: str = "exact", **problems: Problem) -> None:
        if isinstance(nesting, Problem):
            raise ValueError("A level cannot be called 'nesting': that is the option of Program. Choose another name.")
        if not isinstance(nesting, str) or nesting not in NESTINGS:
            raise ValueError(f"Program(nesting={nesting!r}) must be one of {', '.join(map(repr, NESTINGS))}.")
        levels = build(problems)
        self.nesting = nesting
        self._evaluator = Evaluator(levels, NESTINGS[nesting](levels))
        warn_of_coupled_peers(levels, self._evaluator.below)
        refuse(levels, self._evaluator.nesting)
        for level in levels.values():
            inspect_next(level)

    @property
    def levels(self) -> Mapping[str, Level]:
        """The levels by name, lowest first."""
        return self._evaluator.levels

    def lowers(self, name: str) -> tuple[str, ...]:
        """Name the levels below whose best responses the objective of ``name`` contains, lowest first."""
        return self._evaluator.level(name).lowers

    def uppers(self, name: str) -> tuple[str, ...]:
        """Name the levels above on which the objective of ``name`` depends, lowest first."""
        return self._evaluator.level(name).uppers

    def peers(self, name: str) -> tuple[str, ...]:
        """Name the levels that are neither above nor below ``name``, in the order of the program.

        Peers take each other's variables as constants: two uppers of one lower that do not read each other, for
        example. Both step when their own lowers are ready.
        """
        return self._evaluator.level(name).peers

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
        level = self._evaluator.level(name)
        return self._evaluator.objective(level, planned_histories(self._evaluator, level, batches))

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
        level = self._evaluator.level(name)
        with torch.enable_grad():
            histories = planned_histories(self._evaluator, level, batches)
            gradient = self._evaluator.gradient(level, histories, statistics=False)
        if not reads_finite(gradient):
            raise diagnose(level, gradient)
        values = level.gather(algebra.zeros_for_none(gradient.values, level.parameters))
        return {name: value for name, value in zip(level.names, values, strict=True) if value is not None}

    def copies(self, level: str) -> list[nn.Module]:
        """Return the copies of a level with tasks: one module for each task, in the order of the tasks.

        A copy is called, and its attributes are read, as the level's module; calling the list maps over the tasks, on
        tensors with a leading dimension of tasks. The parameters are views of the level's stacked variables, so they
        follow a run; they require no gradient, and writing into one changes the variables of that task. The buffers are
        copies of the module's buffers.

        Args:
            level: The level; its problem has ``tasks=...``.

        Raises:
            ValueError: If the level is unknown or has no tasks.

        Example:
            >>> net = torch.nn.Linear(2, 1)
            >>> level = nestor.Problem(net, lambda batch, fast: fast(batch).square().mean(), tasks=3)
            >>> program, inputs = nestor.Program(fast=level), torch.randn(3, 5, 2)
            >>> one_by_one = [model(x) for model, x in zip(program.copies("fast"), inputs)]
            >>> torch.allclose(program.copies("fast")(inputs), torch.stack(one_by_one))
            True
        """
        return copies_of_tasks(self._evaluator.level(level))

    def adapt(self, level: str, batch: Any, steps: int | None = None) -> nn.Module:
        """Adapt a fresh copy of a level to a task that the program has not seen (meta-test).

        The copy starts from the variables of the level's ``init``, or else from those in its own module, and with an
        empty optimizer state. It takes steps of the level's own rule (optimizer or update, with the current and the
        learned hyperparameters, clipping) on one batch. Modules keep their modes; every step draws random numbers that
        follow from the generators' current state. Nothing of the program changes: no parameter, buffer, optimizer
        state or generator.

        Args:
            level: The level, one without lowers.
            batch: A batch of the level; for a level with ``tasks``, that of one task, without the dimension of tasks.
            steps: Number of steps; None takes the level's ``unroll_steps``.

        Returns:
            A copy of the level's module with parameters and buffers of its own.

        Raises:
            ValueError: If the level is unknown, has lowers or no optimizer, or ``steps`` is no integer of at least 0.
            NonFiniteError: If a loss or a gradient is not finite.

        Example:
            >>> net = torch.nn.Linear(2, 1)
            >>> loss = lambda batch, fast: (fast(batch[0]) - batch[1]).square().mean()
            >>> level = nestor.Problem(net, loss, optimizer=torch.optim.SGD(net.parameters(), lr=0.1), unroll_steps=20)
            >>> support = torch.eye(2), torch.tensor([[1.0], [2.0]])
            >>> model = nestor.Program(fast=level).adapt("fast", support)
            >>> bool(loss(support, model) < loss(support, net))  # the program has not changed
            True
        """
        return adapted(self._evaluator, self._evaluator.level(level), batch, steps)

    def with_responses(self, responses: Mapping[str, Response]) -> Self:
        """Return the program with other responses for some levels, by name; modules and losses are shared.

        Raises:
            UnsupportedError: If a response cannot differentiate its level; see :class:`Program`.
        """
        evaluator = self._evaluator.with_responses(responses)
        refuse(evaluator.levels, evaluator.nesting)
        return with_evaluator(self, evaluator)

    def explain(self, batches: Mapping[str, Any] | None = None, *, seconds: bool = False) -> Explanation:
        """Tabulate the program: levels, sizes, dependencies, responses, and the cost of one update of each level.

        Args:
            batches: One batch for each level that takes one, by level name. With batches, the updates run on tensors
                without values, and the table also contains their memory; see :class:`Memory`.
            seconds: Whether each loss is also evaluated and differentiated on its batch a few times. The time of an
                update is then the sum of the counted evaluations times the measured seconds of each: an iterative
                solver counts with its maximum number of steps, the optimizer's own step and the work around the
                evaluations are not contained.

        Raises:
            ValueError: If a batch is missing, or ``seconds`` is set without batches.
            NestorError: If the memory cannot be computed in advance, because a loss or a solver reads values.
        """
        return explain(self._evaluator, batches, seconds=seconds)

    def to_mermaid(self) -> str:
        """Draw the graph in mermaid's language: an edge from each level to those that read it."""
        return mermaid(self._evaluator.levels)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        """Return the texts from which a notebook chooses: the graph of the program as SVG, or one line."""
        graph = svg(self._evaluator.levels)
        return {"text/plain": repr(self), "text/html": graph, "image/svg+xml": graph}

    def __repr__(self) -> str:
        levels = ", ".join(f"{name}={algebra.size(level.parameters):,}" for name, level in self.levels.items())
        return f"Program({levels}, nesting={self.nesting!r})"


P = TypeVar("P", bound=Program)


def evaluator_of(program: Program) -> Evaluator:
    """Return what evaluates the objectives and hypergradients of a program."""
    return program._evaluator


def with_evaluator(program: P, evaluator: Evaluator) -> P:
    """Return the program with another evaluator; modules and losses are shared."""
    other = copy.copy(program)
    other._evaluator = evaluator
    return other
