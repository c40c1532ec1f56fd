"""Evaluates the objectives of a program's levels and their hypergradients."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice
from typing import Any, Self, TypeAlias

import torch
from torch import Tensor

from nestor.autodiff.grad import accumulate
from nestor.autodiff.precision import Precision
from nestor.autodiff.scope import Scope, enclosed
from nestor.data.containers import tensors
from nestor.data.draws import Draw
from nestor.levels.hypergradient import loss_gradient, pull_back
from nestor.levels.level import Gradient, Level
from nestor.levels.loss import Value
from nestor.levels.nesting import BestResponse, Nesting, Solves
from nestor.optim.history import Buffers, GradientGraph, Histories
from nestor.responses import Response
from nestor.vectors import Params, algebra

Direct: TypeAlias = tuple[Tensor, Mapping[str, Any], list[Tensor | None]]
"""The loss of a level, its metrics, and its derivatives with the best responses as constants."""


@dataclass(frozen=True, eq=False)
class Evaluator:
    """Computes the objectives and the hypergradients of a program at the current variables.

    Attributes:
        levels: The levels by name, lowest first.
        nesting: How their best responses are composed.
        average: Averages scalars over processes; None in one process.
    """

    levels: Mapping[str, Level]
    nesting: Nesting
    average: Callable[[Sequence[Tensor]], list[Tensor]] | None = None

    def level(self, name: str) -> Level:
        """Return a level.

        Raises:
            ValueError: If there is none of that name.
        """
        if name not in self.levels:
            raise ValueError(f"The program has no level {name!r}; its levels are {', '.join(map(repr, self.levels))}.")
        return self.levels[name]

    def below(self, name: str) -> list[str]:
        """Name the level and all levels that its objective evaluates, lowest first."""
        return self.nesting.below(name)

    def objective(self, level: Level, histories: Histories) -> Tensor:
        """Evaluate the objective of a level, with a graph to its variables."""

        def value(tensors: list[Tensor]) -> list[Tensor]:
            known = self.nesting.attach(level, {level.name: tensors}, histories)
            return [level.loss.pure_value(histories[level.name].draws[0], known)]

        (found,) = enclosed(value, level.parameters)
        assert found is not None
        return found

    def gradient(
        self,
        level: Level,
        histories: Histories,
        *,
        statistics: bool = True,
        buffers: list[Buffers] | None = None,
        solves: Solves | None = None,
        input_gradients: bool = False,
        exclusive: bool = False,
        direct: Callable[[Sequence[BestResponse]], Direct | None] | None = None,
    ) -> Gradient:
        """Compute the (hyper)gradient of a level on its draws, averaged over them; gradients must be enabled.

        Args:
            level: The level.
            histories: The batches and steps of the level and the levels below it.
            statistics: Whether the loss updates buffers of the level's own modules, as in a training step.
            buffers: The values of the buffers before each batch are appended to this list.
            solves: The state of the linear solve of each level below, for the next solve; None stores no state.
            input_gradients: Whether the same reverse pass computes the gradient with respect to the variables of levels
                above.
            exclusive: Whether only the levels of the program read ``histories``. A response may then overwrite its
                cotangent, and the gradients in the history of a large level that no other level evaluates.
            direct: Computes the direct part. If it is None or returns None, this method computes the direct part.
        """
        owned = self.single_reader_levels if exclusive else ()
        below = self.nesting.responses(level, histories, solves, owned) if level.links.lower_levels else []
        found = direct(below) if direct is not None else None
        loss, metrics, total = found or self._direct(
            level, histories[level.name].draws, below, statistics, buffers, input_gradients
        )
        own: list[Tensor | None] = total
        cotangents: dict[str, list[Tensor | None]] = {}
        above: dict[str, list[Tensor | None]] = {}
        if below or input_gradients:
            rest = iter(total)
            own = list(islice(rest, len(level.parameters)))
            for response in below:
                lower = response.node.level
                if lower.name in level.loss.slots:
                    cotangents[lower.name] = list(islice(rest, len(lower.parameters)))
            for name in level.links.upper_levels if input_gradients else ():
                above[name] = list(islice(rest, len(self.levels[name].parameters)))
            del total, rest  # a response may free its cotangent
            own, share = pull_back(level, below, own, cotangents)
        if self.average is not None:
            loss, metrics = self._averaged(loss, metrics)
        if below:
            metrics = {**metrics, "indirect_share": share}
        return Gradient(loss, metrics, own, level.norm(own, loss), cotangents, above)

    def _direct(
        self,
        level: Level,
        draws: Sequence[Draw],
        below: Sequence[BestResponse],
        statistics: bool,
        buffers: list[Buffers] | None,
        input_gradients: bool,
    ) -> Direct:
        # The loss is differentiated with respect to its own variables and those of the levels below, one batch after
        # the other. Its graph is freed before the first response is evaluated. Each response gets the sum of the
        # cotangents of all batches.
        variables: dict[str, Params] = {level.name: level.parameters}
        replaced: dict[str, Params] = {}
        for response in below:
            lower = response.node.level
            if lower.name in level.loss.slots:
                variables[lower.name] = lower.parameters
                if response.values is not lower.parameters:
                    variables[lower.name] = replaced[lower.name] = algebra.leaves(response.values)
        wrt = [*level.parameters]
        for name in variables:
            if name != level.name:
                wrt += variables[name]
        for name in level.links.upper_levels if input_gradients else ():
            wrt += self.levels[name].parameters

        if statistics:
            evaluate = partial(level.loss.step_value, replaced=replaced, noted=buffers)
            scoped = bool(replaced) or level.loss.places_tensors
            return self.differentiate(level, draws, evaluate, wrt, scoped=scoped)
        return self.differentiate(level, draws, lambda draw: (level.loss.pure_value(draw, variables), {}), wrt)

    def differentiate(
        self,
        level: Level,
        draws: Sequence[Draw],
        evaluate: Callable[[Draw], Value],
        wrt: Params,
        *,
        create_graph: bool = False,
        scoped: bool = True,
    ) -> Direct:
        """Differentiate the loss of a level alone, averaged over batches, one after the other.

        Args:
            level: The level.
            draws: Its batches.
            evaluate: Evaluates the loss on a batch.
            wrt: The tensors to differentiate with respect to.
            create_graph: Whether the derivatives are differentiated again, in the caller's scope.
            scoped: Whether each evaluation has a scope of its own: none if the modules contain the tensors at which the
                loss is evaluated, or if the caller has entered a scope.

        Returns:
            The loss, detached (for a level with tasks their mean), the metrics of the last batch, and the derivatives.
        """

        def at(draw: Draw) -> Direct:
            loss, metrics = evaluate(draw)
            grads = loss_gradient(level, loss, wrt, create_graph=create_graph)
            return loss.detach() if level.problem.tasks is None else loss.detach() / level.problem.tasks, metrics, grads

        def in_scope(draw: Draw) -> Direct:
            with Scope():
                return at(draw)

        one = in_scope if scoped else at
        if len(draws) == 1:
            return one(draws[0])
        total: list[Tensor | None] = [None] * len(wrt)
        losses: list[Tensor] = []
        metrics: Mapping[str, Any] = {}
        for draw in draws:
            loss, metrics, grads = one(draw)
            losses.append(loss)
            total = accumulate(total, grads, 1 / len(draws))
            del grads
        return torch.stack(losses).mean(), metrics, total

    def gradient_with_graph(
        self, level: Level, draws: Sequence[Draw], theta: Params, noted: list[Buffers] | None = None
    ) -> tuple[Gradient, GradientGraph]:
        """Compute the gradient of a level without lowers, and keep its graph for the levels above.

        Args:
            level: The level.
            draws: Its batches.
            theta: Copies of its variables, which its optimizer will not change.
            noted: The values of its buffers and constants before each batch are appended to this list.
        """
        constants = level.loss.reader.constants
        has_moved = bool if constants is None else constants.since()  # bool() is False: without constants none moves
        theta = algebra.leaves(theta)
        inputs = {name: algebra.leaves(self.levels[name].parameters) for name in level.links.upper_levels}

        def evaluate(draw: Draw) -> Value:
            return level.loss.step_value(draw, {**inputs, level.name: theta}, noted, keeps_graph=True)

        with Scope(twice=True) as scope:
            loss, metrics, total = self.differentiate(level, draws, evaluate, theta, create_graph=True, scoped=False)
        if self.average is not None:
            loss, metrics = self._averaged(loss, metrics)
        values = [None if g is None else g.detach() for g in total]
        data = [tensor for draw in draws for tensor in tensors(draw.batch)]
        kept = GradientGraph(theta, inputs, total, loss * (level.problem.tasks or 1), scope, has_moved, data)
        return Gradient(loss, metrics, values, level.norm(values, loss), {}), kept

    def _averaged(self, loss: Tensor, metrics: Mapping[str, Any]) -> tuple[Tensor, Mapping[str, Any]]:
        """Average loss and metrics over processes, so that every process has the same numbers, including NaN."""
        assert self.average is not None
        values = {
            key: torch.as_tensor(value, device=loss.device).reshape(()).to(loss.dtype) for key, value in metrics.items()
        }
        averaged = self.average([loss.detach(), *values.values()])
        return averaged[0], dict(zip(values, averaged[1:], strict=True))

    @cached_property
    def single_reader_levels(self) -> Collection[str]:
        """The large levels that exactly one other level evaluates."""
        readers = Counter(lower for name in self.levels for lower in self.below(name)[:-1])
        return {name for name, count in readers.items() if count == 1 and self.levels[name].is_large}

    def with_levels(
        self, levels: Mapping[str, Level], average: Callable[[Sequence[Tensor]], list[Tensor]] | None = None
    ) -> Self:
        """Return an evaluator of other levels; ``average`` averages scalars over processes."""
        return replace(self, levels=levels, nesting=type(self.nesting)(levels), average=average or self.average)

    def with_responses(self, responses: Mapping[str, Response]) -> Self:
        """Return an evaluator with other responses for some levels; modules, losses and variables are shared."""
        for name in responses:
            self.level(name)
        return self.with_levels(
            {name: replace(level, response=responses.get(name, level.response)) for name, level in self.levels.items()}
        )

    def with_precisions(self, precisions: Mapping[str, str]) -> Self:
        """Return an evaluator whose losses run in ``"bf16"``, ``"fp16"`` or ``"fp32"``, by level name."""
        if all(precision == "fp32" for precision in precisions.values()):
            return self
        levels = {}
        for name, level in self.levels.items():
            device = level.parameters[0].device
            precision = Precision.of(precisions.get(name, "fp32"), device)
            if precision is None and any(precisions.get(below) == "fp16" for below in self.below(name)):
                precision = Precision.above_scaled(device)
            levels[name] = replace(level, loss=replace(level.loss, precision=precision))
        return self.with_levels(levels)

    def with_variables(self, tensors: Mapping[str, Sequence[Tensor]]) -> Self:
        """Return an evaluator with placeholders for the variables."""
        return self.with_levels(
            {
                name: replace(
                    level,
                    parameters=tensors[name],
                    loss=replace(level.loss, variables=tensors, in_modules=False),
                )
                for name, level in self.levels.items()
            }
        )
