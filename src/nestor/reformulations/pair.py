"""A lower and an upper level that a reformulation rewrites: their losses at chosen modules, their batches."""

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from torch import Tensor

from nestor.data.random_numbers import Captured
from nestor.data.zipped import stream_of
from nestor.levels.signatures import Signature, read_loss
from nestor.optim.hyperparameters import tensors_in
from nestor.optim.stepper import copy_attributes
from nestor.problem import Problem, Reformulation
from nestor.responses import FirstOrder


@dataclass(frozen=True, eq=False)
class Pair:
    """A lower level, and the one level above that reads it.

    The losses that a reformulation writes take a batch ``(lower batch, upper batch, multiplier)``.

    Attributes:
        method: The reformulation.
        problems: The problems of the whole program, lowest first.
        lower: The lower level.
        upper: The upper level.
        lower_loss: The signature of the lower loss, with the name of the lower level.
        upper_loss: The signature of the upper loss, with the name of the upper level.
        copy_name: Name of the level that holds a copy of the lower level.
    """

    method: Reformulation
    problems: Mapping[str, Problem]
    lower: Problem
    upper: Problem
    lower_loss: Signature
    upper_loss: Signature
    copy_name: str

    @classmethod
    def of(cls, method: Reformulation, name: str, problems: Mapping[str, Problem]) -> Self:
        """Find the level above that reads level ``name``, which declares the reformulation ``method``.

        Raises:
            ValueError: If not exactly one level above reads the level, or another level has the name of the copy.
        """
        losses = {other: read_loss(other, problem, tuple(problems)) for other, problem in problems.items()}
        for other in losses.values():
            if other.takes_step:
                raise other.error(
                    f"reformulation={method.describe()} evaluates the losses of a level in the steps of others, so the "
                    "argument 'step' has no meaning. Put what depends on the step into the batch."
                )
        order = list(problems)
        readers = [other for other in order[order.index(name) + 1 :] if name in losses[other].levels]
        if len(readers) != 1:
            raise ValueError(
                f"Level {name!r} has reformulation={method.describe()}, which needs exactly one level above that reads "
                f"it; there are {len(readers)}{': ' if readers else ''}{', '.join(readers)}."
            )
        copy_name, (reader,) = f"{name}_value", readers
        if copy_name in problems:
            raise ValueError(f"The reformulation of level {name!r} needs the name {copy_name!r} for its copy.")
        return cls(method, problems, problems[name], problems[reader], losses[name], losses[reader], copy_name)

    def replaced(self, *, copied: dict[str, Any], lower: dict[str, Any], upper: dict[str, Any]) -> dict[str, Problem]:
        """Return the problems of the whole program, with a copy below the lower level and both levels changed.

        Args:
            copied: Fields of the copy that differ from the lower level.
            lower: Fields of the lower level to replace.
            upper: Fields of the upper level to replace.
        """
        solved: dict[str, Any] = {
            "response": FirstOrder(through_init=False, label=self.method.describe()),
            "reformulation": None,
            "reads": None,  # the losses of a reformulation name their levels
        }
        found: dict[str, Problem] = {}
        for name, problem in self.problems.items():
            if name == self.lower_loss.level:
                found[self.copy_name] = _duplicate(problem, **solved, **copied)
                found[name] = replace(problem, **solved, **lower)
            else:
                found[name] = replace(problem, reads=None, **upper) if name == self.upper_loss.level else problem
        return found

    def loss(self, function: Callable[..., Any], *more: str) -> Callable[..., Any]:
        """Make ``function(batch, modules)`` a loss that reads the levels of both losses, and ``more``."""
        return reading(function, [*self.lower_loss.levels, *self.upper_loss.levels, *more], takes_batch=True)

    def copied_loss(self, *, scaled: bool = False) -> Callable[..., Any]:
        """Write the lower loss for the copy of the lower level.

        Args:
            scaled: Whether to multiply the loss by the multiplier. The loss then takes the triples of
                :class:`PairedBatches`, else the batches of the lower level.
        """
        names = [self.copy_name if name == self.lower_loss.level else name for name in self.lower_loss.levels]

        def lower_loss(batch: Any, modules: Mapping[str, Any]) -> Any:
            if scaled:
                return batch[2] * self.evaluate_lower(batch, modules, self.copy_name)
            return self.evaluate_lower((batch, None, 1.0), modules, self.copy_name)

        return reading(lower_loss, names, takes_batch=scaled or self.lower_loss.takes_batch)

    def evaluate_lower(self, batch: Any, modules: Mapping[str, Any], at: str | None = None) -> Tensor:
        """Evaluate the lower loss, with the module of level ``at`` as the module of the lower level.

        All evaluations within one loss use the same random numbers: with dropout, the difference of the losses of two
        equal modules is zero.
        """
        names = self.lower_loss.levels
        given = {name: modules[at if at and name == self.lower_loss.level else name] for name in names}
        with Captured.now().replay():
            return _evaluate(self.lower, self.lower_loss, batch[0], given)

    def gap(self, batch: Any, modules: Mapping[str, Any]) -> Tensor:
        """Return the lower loss minus the lower loss of the copy."""
        return self.evaluate_lower(batch, modules) - self.evaluate_lower(batch, modules, self.copy_name)

    def evaluate_upper(self, batch: Any, modules: Mapping[str, Any]) -> Tensor:
        """Evaluate the upper loss."""
        given = {name: modules[name] for name in self.upper_loss.levels}
        return _evaluate(self.upper, self.upper_loss, batch[1], given)


def _evaluate(problem: Problem, signature: Signature, batch: Any, modules: Mapping[str, Any]) -> Tensor:
    given = {argument: modules[level] for argument, level in signature.arguments.items()}
    result = problem.loss(batch, **given) if signature.takes_batch else problem.loss(**given)
    value: Tensor = result["loss"] if isinstance(result, Mapping) else result
    return value


def reading(function: Callable[..., Any], names: Iterable[str], *, takes_batch: bool) -> Callable[..., Any]:
    """Make ``function(batch, modules)`` a loss whose arguments are the given levels."""

    def loss(*batch: Any, **modules: Any) -> Any:
        return function(batch[0] if takes_batch else None, modules)

    parameters = [inspect.Parameter("batch", inspect.Parameter.POSITIONAL_ONLY)] if takes_batch else []
    parameters += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in dict.fromkeys(names)]
    loss.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    loss.__qualname__ = function.__qualname__.replace(".<locals>", "")
    return loss


@dataclass(frozen=True)
class PairedBatches:
    """Endless batches ``(lower batch, upper batch, multiplier)`` of two levels.

    Attributes:
        lower: Data of the lower level; None gives None as its batch.
        upper: Data of the upper level; None gives None as its batch.
        multiplier: Returns the multiplier after a number of upper steps.
        draws: Batches drawn between two upper steps.
    """

    lower: Any
    upper: Any
    multiplier: Callable[[int], float]
    draws: int = 1

    def __iter__(self) -> Iterator[tuple[Any, Any, float]]:
        """Start with the first batch of both levels. Either data is restarted when it ends."""
        streams = [None if data is None else stream_of(data, "reformulated") for data in (self.lower, self.upper)]
        count = 0
        while True:
            batches = [None if stream is None else stream.draw() for stream in streams]
            yield batches[0], batches[1], self.multiplier(count // self.draws)
            count += 1


def _duplicate(problem: Problem, **changes: Any) -> Problem:
    """Copy a problem with its module, optimizer, scheduler and variables; ``changes`` are fields to replace."""
    groups = problem.optimizer.param_groups if problem.optimizer is not None else ()
    # Learned hyperparameters stay the variables of the levels above.
    known: dict[int, Any] = {id(tensor): tensor for group in groups for _, tensor in tensors_in(group)}
    module, optimizer, scheduler, variables = copy.deepcopy(
        (problem.module, problem.optimizer, problem.scheduler, problem.variables), known
    )
    if problem.optimizer is not None and optimizer is not None:
        copy_attributes(problem.optimizer, optimizer, known)
    return replace(problem, module=module, optimizer=optimizer, scheduler=scheduler, variables=variables, **changes)
