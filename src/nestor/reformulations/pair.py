"""The interface of a reformulation: other problems in the place of a lower and an upper one."""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from nestor.autodiff.randomness import Captured
from nestor.data.stream import Stream
from nestor.problem import Problem
from nestor.responses import FirstOrder
from nestor.responses.lower_level import LowerLevel
from nestor.vectors.algebra import Params


class Reformulation(ABC):
    r"""Replaces "the lower level is at its minimum" by a term in the losses; first derivatives only.

    .. math:: \min_{\lambda,\theta} F(\lambda, \theta) \quad\text{s.t.}\quad
        q(\lambda, \theta) = G(\lambda, \theta) - \min_z G(\lambda, z) \le 0

    A frozen dataclass whose fields are the options. ``Problem(..., reformulation=...)`` declares it for a lower level;
    the program then has other losses for that level and for the one level above that reads it, and may have one more
    level, ``<name>_value``, a copy that minimises ``G`` alone. Each draws the batches of both and its multiplier:
    ``program.hypergradient(name, {name: (lower batch, upper batch, multiplier)})``.
    """

    @abstractmethod
    def rewrite(self, name: str, lower: Problem, upper_name: str, upper: Problem, pair: Pair) -> dict[str, Problem]:
        """Return the problems that take the places of ``lower`` and ``upper``, lowest first.

        Args:
            name: The lower level's.
            lower: The lower level.
            upper_name: The upper level's.
            upper: The one level above that reads it.
            pair: Their losses, as functions.
        """

    @abstractmethod
    def describe(self) -> str:
        """Name the method and its options in a few words, for tables."""


@dataclass(frozen=True, kw_only=True)
class Reformulated(FirstOrder):
    """The response of a reformulated level: a constant, since the losses say the rest."""

    by: Reformulation

    def pull_back(self, lower: LowerLevel, theta: Params, inputs: Params, cotangent: Params) -> list[Tensor | None]:
        """Nothing comes through, not even to a level that it starts from."""
        return [None] * len(inputs)

    def describe(self) -> str:
        """Name the reformulation."""
        return self.by.describe()


@dataclass(frozen=True)
class Pair:
    """The losses of a lower and an upper level, as functions of the modules that either reads.

    Attributes:
        lower: Name of the lower level.
        inner: The lower loss.
        outer: The upper loss.
        inner_reads: The levels that the lower loss reads.
        outer_reads: The levels that the upper loss reads.
        inner_takes_batch: Whether the lower loss takes a batch.
    """

    lower: str
    inner: Callable[..., Tensor]
    outer: Callable[..., Tensor]
    inner_reads: tuple[str, ...]
    outer_reads: tuple[str, ...]
    inner_takes_batch: bool

    def loss(self, function: Callable[..., Any], *more: str) -> Callable[..., Any]:
        """Make ``function(batch, modules)`` a loss that reads the levels of both losses, and ``more``."""
        return reading(function, dict.fromkeys([*self.inner_reads, *self.outer_reads, *more]), takes_batch=True)

    def inner_of(self, copy_name: str, *, scaled: bool = False) -> Callable[..., Any]:
        """Write the lower loss of a copy of the level; ``scaled`` by the multiplier, on batches that hold it."""
        names = [copy_name if name == self.lower else name for name in self.inner_reads]

        def inner_loss(batch: Any, modules: Mapping[str, Any]) -> Tensor:
            return self.evaluate_inner((batch, None, 1.0), modules, copy_name)

        def scaled_loss(batch: Any, modules: Mapping[str, Any]) -> Tensor:
            multiplier: float = batch[2]
            return multiplier * self.evaluate_inner(batch, modules, copy_name)

        if scaled:
            return reading(scaled_loss, names, takes_batch=True)
        return reading(inner_loss, names, takes_batch=self.inner_takes_batch)

    def evaluate_inner(self, batch: Any, modules: Mapping[str, Any], place: str | None = None) -> Tensor:
        """Evaluate the lower loss, with the module of another level in the lower level's place.

        Every evaluation within one loss sees the same random numbers.
        """
        given = {name: modules[place or name] if name == self.lower else modules[name] for name in self.inner_reads}
        with Captured.now().replay():
            return self.inner(batch[0], given)

    def evaluate_outer(self, batch: Any, modules: Mapping[str, Any]) -> Tensor:
        """Evaluate the upper loss."""
        return self.outer(batch[1], {name: modules[name] for name in self.outer_reads})


def reading(function: Callable[..., Any], names: Iterable[str], *, takes_batch: bool) -> Callable[..., Any]:
    """Make ``function(batch, modules)`` a loss whose arguments are the given levels."""

    def loss(*batch: Any, **modules: Any) -> Any:
        return function(batch[0] if takes_batch else None, modules)

    parameters = [inspect.Parameter("batch", inspect.Parameter.POSITIONAL_ONLY)] if takes_batch else []
    parameters += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
    loss.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    loss.__qualname__ = function.__qualname__.replace(".<locals>", "")
    return loss


@dataclass(frozen=True)
class Paired:
    """Batches of two levels and a multiplier, as ``(lower batch, upper batch, multiplier)``, without an end.

    Attributes:
        lower: Data of the lower level.
        upper: Data of the upper level.
        multiplier: From the number of upper steps to the multiplier.
        draws: Batches drawn between two upper steps.
    """

    lower: Any
    upper: Any
    multiplier: Callable[[int], float]
    draws: int = 1

    def __iter__(self) -> Iterator[tuple[Any, Any, float]]:
        """Start both from their beginnings; each is started again when it ends."""
        streams = [None if data is None else Stream(data, "reformulated") for data in (self.lower, self.upper)]
        count = 0
        while True:
            batches = [None if stream is None else stream.draw() for stream in streams]
            yield batches[0], batches[1], self.multiplier(count // self.draws)
            count += 1


def duplicate(problem: Problem, **changes: Any) -> Problem:
    """Copy a problem with its module, optimizer and scheduler."""
    module, optimizer, scheduler, variables = copy.deepcopy(
        (problem.module, problem.optimizer, problem.scheduler, problem.variables)
    )
    return replace(problem, module=module, optimizer=optimizer, scheduler=scheduler, variables=variables, **changes)


def reformulate(problems: Mapping[str, Problem]) -> dict[str, Problem]:
    """Rewrite the problems that ask for it.

    Raises:
        ValueError: If a level that asks for a reformulation is not read by exactly one level above.
    """
    result = dict(problems)
    for name, lower in problems.items():
        if lower.reformulation is None:
            continue
        order = list(result)
        readers = [other for other in order[order.index(name) + 1 :] if name in _arguments(result[other], result)]
        if len(readers) != 1:
            raise ValueError(
                f"Level {name!r} has reformulation={lower.reformulation.describe()}, which needs exactly one level "
                f"above that reads it; there are {len(readers)}{': ' if readers else ''}{', '.join(readers)}."
            )
        upper_name = readers[0]
        upper = result[upper_name]
        pair = Pair(
            name,
            _callable(lower, result),
            _callable(upper, result),
            _arguments(lower, result),
            _arguments(upper, result),
            takes_batch(lower, result),
        )
        if f"{name}_value" in result:
            raise ValueError(f"The reformulation of level {name!r} needs the name '{name}_value' for its copy.")
        rewritten = lower.reformulation.rewrite(name, lower, upper_name, upper, pair)
        renewed: dict[str, Problem] = {}
        for other in order:
            if other == name:
                renewed.update({key: value for key, value in rewritten.items() if key != upper_name})
            else:
                renewed[other] = rewritten[upper_name] if other == upper_name else result[other]
        result = renewed
    return result


def takes_batch(problem: Problem, problems: Mapping[str, Problem]) -> bool:
    """Whether the first argument of the loss is a batch."""
    first = next(iter(inspect.signature(problem.loss).parameters.values()), None)
    named = first is not None and first.name not in problems and first.default is first.empty
    return problem.data is not None or named


def _arguments(problem: Problem, problems: Mapping[str, Problem]) -> tuple[str, ...]:
    return tuple(name for name in inspect.signature(problem.loss).parameters if name in problems)


def _callable(problem: Problem, problems: Mapping[str, Problem]) -> Callable[..., Tensor]:
    batched = takes_batch(problem, problems)

    def call(batch: Any, modules: Mapping[str, Any]) -> Tensor:
        result = problem.loss(batch, **modules) if batched else problem.loss(**modules)
        value: Tensor = result["loss"] if isinstance(result, Mapping) else result
        return value

    return call
