"""A level of a validated program: its links, its update rule, its loss, and its gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nestor.autodiff.derivatives import Derivatives
from nestor.errors import LossError, NonFiniteError
from nestor.levels.loss import LevelLoss
from nestor.optim.hyperparameters import Learned
from nestor.optim.per_task import ELEMENTWISE, PerTask
from nestor.optim.rules import copy_slot
from nestor.optim.state import State
from nestor.optim.update import OptimizerUpdate, Update
from nestor.problem import Problem
from nestor.responses import Response
from nestor.responses.unrolling.step import StepCompiler
from nestor.vectors import LOCAL, Params, VectorSpace, algebra


@dataclass(frozen=True)
class Links:
    """The levels that one level is linked to, by name, in the order of the program.

    Attributes:
        direct_reads: The levels whose variables its loss reads; usually the level itself is one of them.
        dependencies: The levels that its step depends on: those of ``direct_reads``, those that its update rule reads,
            those whose variables are hyperparameters of its optimizer, and the level of ``Problem(init=...)``.
        lower_levels: The levels below whose best responses its objective contains.
        upper_levels: The levels above on which its objective depends.
        peers: The levels that are neither above nor below it; their variables are constants for it.
        init_indices: For each of its variables, the index of the variable of the level ``Problem(init=...)`` that it
            starts from; empty without ``init``.
        noted_uppers: The levels among ``upper_levels`` whose variables are noted before they step, because the
            objective of one of their peers contains the response of this level.
    """

    direct_reads: tuple[str, ...]
    dependencies: tuple[str, ...]
    lower_levels: tuple[str, ...]
    upper_levels: tuple[str, ...]
    peers: tuple[str, ...]
    init_indices: tuple[int, ...]
    noted_uppers: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Stepping:
    """The update rule of one level.

    Attributes:
        level: Name of the level.
        where: Its loss, as ``name (file:line)``, for errors.
        optimizer: Its optimizer, if it has one.
        parameters: The parameters that the optimizer holds. They differ from the level's variables for a level with
            tasks, whose variables are stacked copies.
        update: The user's update rule, if it has one.
        clip_norm: Largest norm of the gradient; None does not clip.
        learned: Hyperparameters that are variables of levels above: ``(group, path) -> (level, index, entry)``.
        tasks: Whether the variables are stacked copies, one for each task.
        restarts: Whether the optimizer memory is cleared after each step of a level above (``Problem(init=...)``).
        space: The space of the level's vectors.
        compiler: Replays recorded steps by compiled graphs; None replays them eagerly.
    """

    level: str
    where: str
    optimizer: Optimizer | None
    parameters: tuple[nn.Parameter, ...]
    update: Update | None
    clip_norm: float | None
    learned: Learned
    tasks: bool
    restarts: bool
    space: VectorSpace = LOCAL
    compiler: StepCompiler | None = None

    def rule(self) -> Update:
        """Return the rule of the level's next step, with the current hyperparameters.

        Raises:
            LossError: If the level has no optimizer and no update.
        """
        if self.update is not None:
            return PerTask(self.update) if self.tasks else self.update
        if self.optimizer is None:
            raise LossError(
                "The level's response differentiates the level's optimizer steps, but the level has no optimizer: "
                "Problem(..., optimizer=...).",
                level=self.level,
                where=self.where,
            )
        rule = self._rule.now(self.optimizer)
        return PerTask(rule) if self.tasks and not rule.tasks else rule

    @cached_property
    def _rule(self) -> OptimizerUpdate:
        assert self.optimizer is not None
        stacked = self.tasks and type(self.optimizer) in ELEMENTWISE
        return OptimizerUpdate.of(
            self.optimizer, self.parameters, self.clip_norm, self.learned, tasks=stacked, space=self.space
        )

    @property
    def optimizer_has_memory(self) -> bool:
        """Whether the optimizer stores the memory of the level's steps; False for a user's rule and for tasks."""
        return self.optimizer is not None and not self.tasks

    def optimizer_slots(self, parameters: Params) -> list[Mapping[str, Any]]:
        """Return the optimizer's state, one mapping for each variable."""
        assert self.optimizer is not None
        return [self.optimizer.state.get(p, {}) for p in parameters]

    def first_state(self, parameters: Params) -> State:
        """Copy the state from which planned steps start."""
        if self.optimizer_has_memory and not self.restarts:
            slots: list[Mapping[str, Any]] = [copy_slot(slot) for slot in self.optimizer_slots(parameters)]
        else:
            slots = self.rule().first_slots(len(parameters))
        return State([p.detach().clone() for p in parameters], slots)


@dataclass(frozen=True, eq=False)
class Level:
    """One level of a program.

    Attributes:
        name: Its name.
        index: Its position in the program, lowest first.
        problem: The declaration.
        names: The names of its variables in ``module.named_parameters()``.
        parameters: Its variables: parameters of the module, stacks of copies (tasks), shards, or placeholders.
        links: The levels that it reads and depends on.
        loss: Evaluates its loss.
        stepping: Its update rule.
        response: How the levels above differentiate through it.
    """

    name: str
    index: int
    problem: Problem
    names: tuple[str, ...]
    parameters: Params
    links: Links
    loss: LevelLoss
    stepping: Stepping
    response: Response

    @property
    def lowers(self) -> tuple[str, ...]:
        """The levels below whose best responses its objective contains, in the program's order."""
        return self.links.lower_levels

    @property
    def uppers(self) -> tuple[str, ...]:
        """The levels above on which its objective depends, in the program's order."""
        return self.links.upper_levels

    @property
    def peers(self) -> tuple[str, ...]:
        """The levels that are neither above nor below it, in the program's order."""
        return self.links.peers

    @property
    def space(self) -> VectorSpace:
        """The space of vectors like its variables."""
        return self.stepping.space

    @property
    def takes_step(self) -> bool:
        """Whether its loss or its update rule has the argument ``step``."""
        return self.loss.reader.takes_step or (self.stepping.update is not None and self.stepping.update.takes_step)

    @cached_property
    def is_large(self) -> bool:
        """Whether the variables are so large that operations should avoid a temporary copy of them."""
        return algebra.is_large(self.parameters)

    @cached_property
    def derivatives(self) -> Derivatives:
        """What is known about the derivatives of its loss."""
        return Derivatives(self.loss.where)

    def copies(self) -> list[Tensor]:
        """Copy its current variables."""
        return [p.detach().clone() for p in self.parameters]

    def norm(self, values: Sequence[Tensor | None], like: Tensor) -> Tensor:
        """Return the Euclidean norm of a vector like its variables; a zero like the scalar ``like`` if all are None."""
        found = algebra.present(values)
        return self.stepping.space.norm(found) if found else torch.zeros_like(like)

    def gather(self, values: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return whole vectors for this process's shards of them."""
        placements = self.loss.placements
        return list(values) if placements is None else placements[self.name].gather(values)

    def shard(self, values: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return this process's shards of whole vectors."""
        placements = self.loss.placements
        return list(values) if placements is None else placements[self.name].shard(values)


class Gradient(NamedTuple):
    """The (hyper)gradient of one level, and values that its evaluation has computed.

    Attributes:
        loss: The objective's value, detached; for a level with tasks, the mean over the tasks.
        metrics: The metrics that the loss returned for the last batch.
        values: One gradient for each variable; None for a variable that the objective does not depend on.
        norm: Euclidean norm of the values.
        inputs: The gradient with respect to the variables of levels above, by level name, if it was requested.
        cotangents: The derivative of the loss with respect to the best response of each lower level; None means zero.
    """

    loss: Tensor
    metrics: Mapping[str, Any]
    values: list[Tensor | None]
    norm: Tensor
    cotangents: Mapping[str, Sequence[Tensor | None]]
    inputs: Mapping[str, list[Tensor | None]] = MappingProxyType({})

    def scalars(self, space: VectorSpace) -> Gradient:
        """Return the scalars that :func:`diagnose` reads: loss and norm, and norms in place of the cotangents."""
        norms = {name: [space.norm(found)] for name, c in self.cotangents.items() if (found := algebra.present(c))}
        return Gradient(self.loss, {}, [], self.norm, norms)


def is_finite(gradient: Gradient) -> Tensor:
    """Return whether the loss and every gradient are finite, as a boolean tensor, without synchronization."""
    return torch.isfinite(gradient.loss + gradient.norm)


def reads_finite(gradient: Gradient) -> bool:
    """Return whether the loss and every gradient are finite; waits for the device."""
    return math.isfinite(gradient.loss) and math.isfinite(gradient.norm)


def diagnose(level: Level, gradient: Gradient) -> NonFiniteError:
    """Return an error that names the source of the first number that is not finite."""
    space = level.space
    gradient = gradient.scalars(space)
    if not bool(torch.isfinite(gradient.loss)):
        cause = (
            f"The loss is {gradient.loss.item()}. Look for a logarithm or a division by zero, an overflow, too large a "
            "learning rate, or a bad batch."
        )
    elif broken := [
        n for n, c in gradient.cotangents.items() if not bool(torch.isfinite(space.norm(algebra.present(c))))
    ]:
        cause = (
            f"The cotangent of the loss on the best response of {broken[0]!r} is not finite, though the loss is "
            f"{gradient.loss.item():.3g}: a derivative is infinite (sqrt or log at zero?)."
        )
    elif gradient.cotangents:
        cause = (
            f"The hypergradient is not finite, though the loss and its cotangents are: the response of "
            f"{', '.join(map(repr, gradient.cotangents))} overflowed. Its lower loss may have an infinite second "
            "derivative, or the solve diverged: add damping, or try T1T2()."
        )
    else:
        cause = f"The gradient is not finite, though the loss is {gradient.loss.item():.3g} (sqrt or log at zero?)."
    return NonFiniteError(f"{cause} Parameters are as before the step.", level=level.name, where=level.loss.where)
