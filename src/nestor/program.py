"""The multilevel program: a validated graph, pure mathematics, no loop."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nestor.autodiff.attention import attention_math_kernel
from nestor.autodiff.counters import count_gradient
from nestor.autodiff.precision import Precision
from nestor.autodiff.randomness import Captured
from nestor.errors import LossError, NestorError
from nestor.explain.explain import Explanation, explain, mermaid
from nestor.levels.gradient import Gradient, diagnose, present, reads_finite
from nestor.levels.graph import build
from nestor.levels.level import Draw, Level, Value
from nestor.levels.moment import Buffers, Moment, Moments, ahead
from nestor.levels.nesting import BestResponse, Exact, Frozen, Nesting, Solves
from nestor.problem import Problem
from nestor.reformulations import reformulate
from nestor.responses import Response
from nestor.responses.lower_level import differentiate
from nestor.responses.unrolling.trajectory import StepGraph
from nestor.vectors import algebra
from nestor.vectors.algebra import Params

NESTINGS: Mapping[str, type[Nesting]] = {"exact": Exact, "frozen": Frozen}


class Program:
    r"""Nested optimization problems, lowest level first.

    .. math:: \text{objective}_k(\theta_k, \text{uppers}) =
        \text{loss}_k(\theta_k, \text{uppers}, \{\theta_l^*(\theta_k, \text{uppers})\}_{l \in \text{lowers}(k)}), \qquad
        \theta_l^* = \arg\min_\theta \text{objective}_l

    The graph is read from the losses: their arguments, after the batch, are names of levels. A level that reads a level
    listed earlier uses its best response; one that reads a level listed later is constrained by it.

    Args:
        nesting: ``"exact"``: the objective of a level contains the responses of its lowers, so hypergradients are right
            at any depth. ``"frozen"``: levels in between are constants; cheaper, linear in depth, an approximation.
        **problems: The levels by name, lowest first.

    Raises:
        TypeError: If a level is no :class:`Problem`.
        ValueError: If the program is not well formed; the message names the level, its loss, the cause and the remedy.
    """

    def __init__(self, *, nesting: str = "exact", **problems: Problem) -> None:
        if isinstance(nesting, Problem):
            raise ValueError("A level cannot be called 'nesting': that is the option of Program. Choose another name.")
        if nesting not in NESTINGS:
            raise ValueError(f"Program(nesting={nesting!r}) must be one of {', '.join(map(repr, NESTINGS))}.")
        self.levels: dict[str, Level] = build(reformulate(problems))
        self.nesting = nesting
        self._nesting = NESTINGS[nesting](self.levels)
        self._average: Callable[[Sequence[Tensor]], list[Tensor]] | None = None

    def lowers(self, name: str) -> tuple[str, ...]:
        """Name the levels below whose best responses the objective of ``name`` contains, lowest first."""
        return self._level(name).lowers

    def uppers(self, name: str) -> tuple[str, ...]:
        """Name the levels above on which the objective of ``name`` depends, lowest first."""
        return self._level(name).uppers

    def objective(self, name: str, batches: Mapping[str, Any] | None = None) -> Tensor:
        """Evaluate the objective of a level, with the best responses of its lowers inside.

        Args:
            name: The level.
            batches: One batch for the level and each level below it that takes one, by level name.

        Returns:
            A scalar, attached to the level's own parameters and differentiable to any order (attention runs on the math
            kernel). Every evaluation sees the random numbers that follow the generators' present state, and leaves that
            state, buffers and parameters as they are.

        Raises:
            ValueError: If the level is unknown or a batch is missing.
            LossError: If a loss is not a scalar.
        """
        level = self._level(name)
        moments = self._moments(level, batches)
        live = self._nesting.respond(level, {name: level.parameters}, moments)
        with attention_math_kernel():
            return level.pure_value(moments[name].draws[0], live)

    def hypergradient(self, name: str, batches: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
        r"""Differentiate the objective of a level totally: direct term plus the terms through the best responses.

        .. math:: \frac{d}{d\theta_k} \text{objective}_k = \frac{\partial \text{loss}_k}{\partial\theta_k}
            + \sum_l \Big(\frac{d\theta_l^*}{d\theta_k}\Big)^T \frac{\partial \text{loss}_k}{\partial\theta_l^*}

        The current iterates of the levels below are taken as their best responses. No parameter, buffer, ``.grad``,
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
        level = self._level(name)
        with torch.enable_grad():
            gradient = self.gradient(level, self._moments(level, batches), statistics=False)
        if not reads_finite(gradient):
            raise diagnose(level, gradient)
        values = algebra.zeros_for_none(gradient.values, level.parameters)
        if level.placements is not None:
            values = [v for v in level.placements[name].whole(values) if v is not None]
        return dict(zip(level.names, values, strict=True))

    def reach(self, level: Level, moments: Moments, solves: Solves | None) -> list[BestResponse]:
        """Return the best responses that the objective of a level contains, each to be pulled back once."""
        return self._nesting.reach(level, moments, solves) if level.lowers else []

    def gradient(
        self,
        level: Level,
        moments: Moments,
        *,
        statistics: bool = True,
        buffers: list[Buffers] | None = None,
        solves: Solves | None = None,
        inputs: bool = False,
    ) -> Gradient:
        """Compute the (hyper)gradient of a level on its draws, averaged over them; gradients must be enabled.

        Args:
            level: The level.
            moments: The level and the levels below it: their batches, and the steps that led to their variables.
            statistics: Whether buffers of the level's own modules move, as in a training step.
            buffers: Receives the values of the buffers before each batch.
            solves: What is kept from one linear solve of each level below to the next; None keeps nothing.
            inputs: Whether the gradient in the variables of levels above is wanted too, by the same backward.
        """
        below = self.reach(level, moments, solves)
        # The loss is differentiated in the variables of the levels below as if they were its own, one batch after the
        # other; its graph is gone before the first response is evaluated, and the responses see the sum of the
        # cotangents of all batches.
        live: dict[str, Params] = {level.name: level.parameters}
        replaced: dict[str, Params] = {} if level.bound else dict(level.constants)
        for response in below:
            lower = response.follower.level
            if lower.name in level.reads:
                live[lower.name] = lower.parameters
                if response.values is not lower.parameters:
                    live[lower.name] = replaced[lower.name] = algebra.leaves(response.values)
        above = {name: self.levels[name].parameters for name in level.uppers} if inputs else {}
        wrt: Params = level.parameters
        if below or above:
            wrt = [t for tensors in (*live.values(), *above.values()) for t in tensors]

        def evaluate(draw: Draw) -> Value:
            if buffers is not None:
                buffers.append(level.buffer_values())
            return level.step_value(draw, replaced) if statistics else Value(level.pure_value(draw, live), {})

        mean, metrics, total = self.direct(level, moments[level.name].draws, evaluate, wrt)
        own: list[Tensor | None] = total
        cotangents: dict[str, list[Tensor | None]] = {}
        upwards: dict[str, list[Tensor | None]] = {}
        if below or above:
            own, *sent = algebra.split(total, [len(tensors) for tensors in (*live.values(), *above.values())])
            del total  # a response may let go of its cotangent
            upwards = dict(zip(above, sent[len(live) - 1 :], strict=True))
            cotangents = dict(zip(list(live)[1:], sent, strict=False))
            own = self.pull_back(level, below, own, cotangents)
        if self._average is not None:
            mean, metrics = self._agreed(mean, metrics)
        norm = _norm(own, mean)
        return Gradient(mean, metrics, own, norm, cotangents, upwards)

    def direct(
        self,
        level: Level,
        draws: Sequence[Draw],
        evaluate: Callable[[Draw], Value],
        wrt: Params,
        *,
        create_graph: bool = False,
    ) -> tuple[Tensor, Mapping[str, Any], list[Tensor | None]]:
        """Differentiate the loss alone, averaged over batches, one after the other; the responses are constants.

        Returns:
            The loss, detached (for a level with tasks their mean), the metrics of the last batch, and the derivatives.
        """
        total: list[Tensor | None] = []
        losses: list[Tensor] = []
        metrics: Mapping[str, Any] = {}
        for draw in draws:
            loss, metrics = evaluate(draw)
            losses.append(loss.detach() if level.problem.tasks is None else loss.detach() / level.problem.tasks)
            grads = self._differentiate(level, loss, wrt, create_graph=create_graph)
            total = grads if len(draws) == 1 else algebra.accumulate(total or [None] * len(wrt), grads, 1 / len(draws))
            del loss, grads
        return losses[0] if len(losses) == 1 else torch.stack(losses).mean(), metrics, total

    def gradient_with_graph(self, level: Level, draws: Sequence[Draw], theta: Params) -> tuple[Gradient, StepGraph]:
        """Compute the gradient of a level without lowers, and keep its graph for the levels above.

        Args:
            level: The level; its modules have no buffers.
            draws: Its batches.
            theta: Copies of its variables, which its optimizer will not change.
        """
        theta = algebra.leaves(theta)
        given = {name: algebra.leaves(self.levels[name].parameters) for name in level.uppers}
        with attention_math_kernel():
            mean, metrics, total = self.direct(
                level,
                draws,
                lambda draw: level.step_value(draw, {**given, level.name: theta}),
                theta,
                create_graph=True,
            )
        values = [None if g is None else g.detach() for g in total]
        if self._average is not None:
            mean, metrics = self._agreed(mean, metrics)
        norm = _norm(values, mean)
        return Gradient(mean, metrics, values, norm, {}), StepGraph(theta, given, total)

    def _agreed(self, loss: Tensor, metrics: Mapping[str, Any]) -> tuple[Tensor, Mapping[str, Any]]:
        """Average loss and metrics over processes, so that all of them see the same numbers, NaN included."""
        assert self._average is not None
        values = {
            key: torch.as_tensor(value, device=loss.device).reshape(()).to(loss.dtype) for key, value in metrics.items()
        }
        averaged = self._average([loss.detach(), *values.values()])
        return averaged[0], dict(zip(values, averaged[1:], strict=True))

    def _differentiate(
        self, level: Level, loss: Tensor, wrt: Sequence[Tensor], *, create_graph: bool = False
    ) -> list[Tensor | None]:
        if not loss.requires_grad:
            raise LossError(
                f"The loss does not depend on the variables of {level.name!r} or of a level below: it has no graph. Is "
                "it computed under no_grad, detached, or from .item() or numpy values?",
                level=level.name,
                where=level.where,
            )
        count_gradient(level.name)
        return differentiate(loss, wrt, level.loss_scale, create_graph=create_graph)

    def pull_back(
        self,
        level: Level,
        below: Sequence[BestResponse],
        own: list[Tensor | None],
        cotangents: Mapping[str, list[Tensor | None]],
    ) -> list[Tensor | None]:
        """Add what comes through the responses to the level's ``own`` gradient: in reverse, each one once.

        A response may replace its cotangent by its norm, which is all that errors tell of it.
        """
        sent = {level.name: own, **cotangents}
        for response in reversed(below):
            cotangent = sent.pop(response.follower.level.name, [])
            if all(c is None for c in cotangent):
                continue
            try:
                found = response.pull_back(cotangent)
            except NestorError as error:
                error.add_note(f"While differentiating the objective of level {level.name!r}, loss {level.where}.")
                raise
            for name, grads in found.items():
                sent[name] = algebra.accumulate(sent[name], grads) if name in sent else grads
        return sent[level.name]

    def with_responses(self, responses: Mapping[str, Response]) -> Program:
        """Return a program with other responses for some levels, by name; modules, losses and variables are shared."""
        for name in responses:
            self._level(name)
        levels = {
            name: replace(level, response=responses.get(name, level.response)) for name, level in self.levels.items()
        }
        return self.with_levels(levels)

    def with_levels(
        self, levels: dict[str, Level], average: Callable[[Sequence[Tensor]], list[Tensor]] | None = None
    ) -> Program:
        """Return the program with other levels; a runtime also says how to average over processes."""
        other = copy.copy(self)
        other.levels = levels
        other._nesting = type(self._nesting)(levels)
        other._average = average or self._average
        return other

    def with_precisions(self, precisions: Mapping[str, str]) -> Program:
        """Return the program with the losses of some levels in ``"bf16"``, ``"fp16"`` or ``"fp32"``."""
        if all(precision == "fp32" for precision in precisions.values()):
            return self
        levels = {}
        for name, level in self.levels.items():
            device = level.parameters[0].device
            precision = Precision.of(precisions.get(name, "fp32"), device)
            if precision is None and any(precisions.get(below) == "fp16" for below in self.below(name)):
                precision = Precision.above_scaled(device)
            levels[name] = replace(level, precision=precision)
        return self.with_levels(levels)

    def explain(self, batches: Mapping[str, Any] | None = None) -> Explanation:
        """Tabulate the program: levels, sizes, what reads what, responses, and what one update of each level costs.

        Args:
            batches: One batch for each level that takes one, by level name: the memory of the updates is foreseen too,
                by running them on tensors without numbers; see :class:`Memory`.

        Raises:
            ValueError: If a batch is missing.
            NestorError: If the memory cannot be foreseen, since something looks at numbers.
        """
        return explain(self, batches)

    def to_mermaid(self) -> str:
        """Draw the graph in mermaid's language: an edge from each level to those that read it."""
        return mermaid(self)

    def __repr__(self) -> str:
        levels = ", ".join(f"{name}={algebra.size(level.parameters):,}" for name, level in self.levels.items())
        return f"Program({levels}, nesting={self.nesting!r})"

    def _level(self, name: str) -> Level:
        if name not in self.levels:
            raise ValueError(f"The program has no level {name!r}; its levels are {', '.join(map(repr, self.levels))}.")
        return self.levels[name]

    def _moments(self, level: Level, batches: Mapping[str, Any] | None) -> Moments:
        """The present moment of the level and the levels below it, on given batches; steps lie ahead."""
        batches = {} if batches is None else batches
        for name in batches:
            self._level(name)
        randomness = Captured.now()
        moments: dict[str, Moment] = {}
        for name in self.below(level.name):
            needed = self.levels[name]
            if needed.takes_batch and name not in batches:
                wanted = [other for other in self.below(level.name) if self.levels[other].takes_batch]
                raise ValueError(
                    f"The objective of level {level.name!r} needs a batch of level {name!r}: "
                    f"batches={{{', '.join(f'{other!r}: ...' for other in wanted)}}}."
                )
            draws = (Draw(batches.get(name), randomness),)
            below = {other: moments[other] for other in self.below(name)[:-1]}
            moments[name] = Moment(draws) if needed is level else ahead(needed, draws, below)
        return moments

    def below(self, name: str) -> list[str]:
        """Name the level and all levels that its objective evaluates, lowest first."""
        return self._nesting.below(name)

    def read_once(self) -> set[str]:
        """Name the large levels that one other level alone evaluates: what it sends to them may be used up."""
        readers = Counter(lower for name in self.levels for lower in self.below(name)[:-1])
        return {name for name, count in readers.items() if count == 1 and self.levels[name].is_large}


def _norm(values: Sequence[Tensor | None], like: Tensor) -> Tensor:
    found = present(values)
    return algebra.norm(found) if found else torch.zeros_like(like)
