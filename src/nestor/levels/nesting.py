"""How the best responses of several levels are composed."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import ClassVar, NamedTuple, Self, TypeAlias

import torch
from torch import Tensor

from nestor.autodiff.objective import Objective, Term
from nestor.data.draws import Draw
from nestor.levels.level import Level
from nestor.optim.history import Buffers, Histories
from nestor.responses import attach, respond_back, take_planned
from nestor.responses.unrolling.trajectory import LowerLevel, Trajectory
from nestor.solvers import SolveState
from nestor.vectors import InputLayout, Params, algebra

NOTHING: Mapping[str, Params] = MappingProxyType({})

Solves: TypeAlias = dict[str, SolveState]
"""The state of the linear solve of each level below, by name."""


class LowerNode(NamedTuple):
    """A level that responds, and its inputs.

    Attributes:
        level: The level.
        layout: The levels that it responds to.
        init_indices: For each variable, the index of the input from which it starts (``Problem(init=...)``); None if
            the variables start from no input.
    """

    level: Level
    layout: InputLayout
    init_indices: Sequence[int] | None

    @classmethod
    def of(cls, level: Level, layout: InputLayout) -> Self:
        """Find the inputs from which the variables of the level start."""
        init = level.problem.init
        if init is None or init not in layout.sizes:
            return cls(level, layout, None)
        names = list(layout.sizes)
        before = sum(layout.sizes[name] for name in names[: names.index(init)])
        return cls(level, layout, [before + place for place in level.links.init_indices])


class BestResponse(NamedTuple):
    """The best response of a level, to be pulled back once.

    Attributes:
        node: The level, and the levels that it responds to.
        lower: The level, in the form that a response differentiates.
        values: Its variables, which are used as the best response.
        inputs: The tensors that it responds to, without graphs.
    """

    node: LowerNode
    lower: LowerLevel
    values: Params
    inputs: Params

    def pull_back(self, cotangent: list[Tensor | None]) -> dict[str, list[Tensor | None]]:
        """Map a cotangent on the response to cotangents on the inputs, by level name; None means zero.

        If the response may overwrite the cotangent, the list ``cotangent`` contains only its norm afterwards.
        """
        theta = [v.detach() for v in self.values]
        with torch.set_grad_enabled(False):  # half the time of torch.no_grad()
            vector = algebra.zeros_for_none(cotangent, theta)
            if self.lower.may_overwrite:
                cotangent[:] = [self.lower.space.norm(vector)]
            found = respond_back(self.node.level.response, self.lower, theta, self.inputs, vector)
        return self.node.layout.by_level(found)


class Nesting(ABC):
    """Builds the best responses that an objective contains."""

    name: ClassVar[str]
    """Its name as an option of ``Program``."""
    nested: ClassVar[bool]
    """Whether the objective of a lower level contains the responses of its own lowers."""

    def __init__(self, levels: Mapping[str, Level]) -> None:
        self.levels = levels
        self._below: dict[str, list[str]] = {}
        self._orders: dict[tuple[str, ...], list[LowerNode]] = {}

    def order(self, level: Level, differentiable: Iterable[str]) -> list[LowerNode]:
        """List the levels below ``level`` in the order in which they respond, and what each responds to.

        Args:
            level: The level whose objective is built.
            differentiable: Names of the levels whose variables are not constants: ``level``, and levels above.
        """
        key = (level.name, *differentiable)
        if key not in self._orders:
            self._orders[key] = [
                LowerNode.of(lower, InputLayout({name: len(self.levels[name].parameters) for name in names}))
                for lower, names in self._order(level, key[1:])
            ]
        return self._orders[key]

    def below(self, name: str) -> list[str]:
        """Name the level and all levels that its objective evaluates, lowest first."""
        if name not in self._below:
            found, frontier = {name}, [name]
            while frontier:
                new = [lower for lower in self.levels[frontier.pop()].lowers if lower not in found]
                found.update(new)
                frontier.extend(new)
            self._below[name] = [level for level in self.levels if level in found]
        return self._below[name]

    @abstractmethod
    def _order(self, level: Level, differentiable: Sequence[str]) -> list[tuple[Level, tuple[str, ...]]]: ...

    def attach(
        self, level: Level, tensors: Mapping[str, Params], histories: Histories, held: Mapping[str, Params] = NOTHING
    ) -> dict[str, Params]:
        """Return ``tensors`` with the best responses of the levels below ``level`` added, as nodes of the graph.

        Args:
            level: The level whose objective is built.
            tensors: The variables of ``level`` and of levels above, by level name; all others are constants.
            histories: The batches and steps of the levels below.
            held: Noted variables of levels above that are constants.
        """
        known = dict(tensors)
        for node in self.order(level, tensors):
            inputs = [t for name in node.layout.sizes for t in known[name]]
            lower, theta = self._lower_level(node, histories, held)
            known[node.level.name] = attach(node.level.response, lower, theta, inputs)
        return known

    def responses(
        self, level: Level, histories: Histories, solves: Solves | None, owned: Iterable[str]
    ) -> list[BestResponse]:
        """Return the best responses of the levels below ``level``, in the order in which they respond.

        For a first derivative, they replace the graph of :meth:`attach`: each response is pulled back separately, and
        its memory is freed before the next pullback.

        Args:
            level: The level whose objective is built.
            histories: The batches and steps of the levels below.
            solves: The state of the linear solve of each level below, for the next solve; None stores no state.
            owned: Names of the levels whose cotangents and histories have no other reader.
        """
        known: dict[str, Params] = {level.name: level.parameters}
        found = []
        for node in self.order(level, (level.name,)):
            name = node.level.name
            inputs = [t.detach() for upper in node.layout.sizes for t in known[upper]]
            solve = None
            if solves is not None:
                solve = solves.get(name) or solves.setdefault(name, SolveState())
            lower, theta = self._lower_level(node, histories, NOTHING, solve, may_overwrite=name in owned)
            if lower.trajectory is not None:
                with torch.no_grad():
                    lower, theta = take_planned(node.level.response, lower, theta, inputs)
            known[name] = theta
            found.append(BestResponse(node, lower, theta, inputs))
        return found

    def _lower_level(
        self,
        node: LowerNode,
        histories: Histories,
        held: Mapping[str, Params],
        solve: SolveState | None = None,
        *,
        may_overwrite: bool = False,
    ) -> tuple[LowerLevel, Params]:
        """Return the level as a function of its inputs, and its variables.

        A level above that is no input is a constant. If it has stepped since the level's last steps, a replay of these
        steps takes the values that they have used, and so does the present objective if the constant is a peer of the
        level whose objective is built: all peers differentiate the same steps. The level's own notes have precedence
        over ``held``, the notes of the level above that replays its steps.
        """
        level = node.level
        history = histories[level.name]
        nested = self.nested and bool(level.links.lower_levels)
        moved = {n: v for n, v in history.uppers.items() if n not in node.layout.sizes} if history.uppers else NOTHING

        def objective(
            draws: Sequence[Draw], below: Histories, buffers: Sequence[Buffers], held: Mapping[str, Params]
        ) -> Objective:
            if level.links.lower_levels:
                terms = self._terms(node, draws, below, buffers, held)
            else:
                terms = self._loss_terms(node, draws, buffers, held)
            only_once = level.loss.reader.only_once
            return Objective(level.name, terms, nested, level.loss.scale, only_once, level.derivatives)

        trajectory = None
        if history.steps:
            if then := {**held, **moved}:
                steps = [replace(record, held={**then, **record.held}) for record in history.steps]
                history = history._replace(steps=steps)
            trajectory = Trajectory(
                history,
                lambda record: objective(record.draws, record.below, record.buffers, record.held),
                node.layout,
                node.init_indices,
                None if nested else level.stepping.compiler,
                is_alone=level.loss.placements is None,
            )
        noted = {n: v for n, v in moved.items() if n in level.links.noted_uppers} if moved else NOTHING
        present = objective(history.draws, histories, (), {**held, **noted})
        lower = LowerLevel(present, trajectory, node.init_indices, solve, level.stepping.space, may_overwrite)
        return lower, level.parameters if history.values is None else history.values

    @abstractmethod
    def _terms(
        self,
        node: LowerNode,
        draws: Sequence[Draw],
        below: Histories,
        buffers: Sequence[Buffers],
        held: Mapping[str, Params],
    ) -> tuple[Term, ...]:
        """Return the objective of a level with lowers on given batches, as terms in its variables and inputs."""

    def _loss_terms(
        self, node: LowerNode, draws: Sequence[Draw], buffers: Sequence[Buffers], constants: Mapping[str, Params]
    ) -> tuple[Term, ...]:
        """Return the loss of a level, as one term for each batch."""

        def term(draw: Draw, values: Buffers | None) -> Term:
            def value(theta: Params, inputs: Params) -> Tensor:
                tensors = {**constants, node.level.name: theta, **node.layout.by_level(inputs)}
                return node.level.loss.pure_value(draw, tensors, values)

            return value

        noted: Sequence[Buffers | None] = buffers or [None] * len(draws)
        return tuple(map(term, draws, noted))


def constants_of(histories: Histories) -> dict[str, Params]:
    """Return the variables that histories have recorded, by level name."""
    return {name: history.values for name, history in histories.items() if history.values is not None}
