"""The graph of a step's gradient, built without side effects: its size decides whether the graphs of a run are kept."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nestor.autodiff.graph_size import with_graph_size
from nestor.autodiff.instruments import uncounted
from nestor.autodiff.scope import Scope
from nestor.data.containers import tensors
from nestor.data.draws import Draw
from nestor.levels.evaluator import Evaluator
from nestor.levels.level import Level
from nestor.levels.loss import Value
from nestor.optim.history import GradientGraph
from nestor.vectors import algebra


def pure_graph(evaluator: Evaluator, level: Level, draws: Sequence[Draw]) -> tuple[GradientGraph, int | None]:
    """Build a graph like that of :meth:`Evaluator.gradient_with_graph`, and count the bytes that keep it.

    Args:
        evaluator: The evaluator.
        level: The level.
        draws: Its batches.

    Returns:
        The graph; the bytes of the gradient and of its graph, or None if the graph cannot be observed.
    """

    def leaves(name: str) -> list[Tensor]:
        return algebra.leaves(evaluator.levels[name].parameters)

    def build() -> GradientGraph:
        variables = {name: leaves(name) for name in level.loss.slots}
        theta = variables.get(level.name) or leaves(level.name)
        inputs = {name: variables.get(name) or leaves(name) for name in level.uppers}

        def evaluate(draw: Draw) -> Value:
            return level.loss.pure_value(draw, variables), {}

        with Scope(twice=True) as scope, torch.enable_grad():
            loss, _, total = evaluator.differentiate(level, draws, evaluate, theta, create_graph=True, scoped=False)
        return GradientGraph(theta, inputs, total, loss, scope)

    def held() -> list[Tensor]:
        variables = [tensor for name in level.loss.slots for tensor in evaluator.levels[name].parameters]
        return [*variables, *level.parameters, *(tensor for draw in draws for tensor in tensors(draw.batch))]

    with uncounted():
        graph, size = with_graph_size(build, held)
    return graph, None if size is None else size + sum(g.nbytes for g in graph.gradient if g is not None)
