"""The derivatives of a level's steps that a run keeps for the levels above."""

from collections.abc import Sequence

from nestor.data.draws import Draw
from nestor.levels.evaluator import Evaluator
from nestor.levels.level import Level
from nestor.levels.pure_graph import pure_graph
from nestor.optim.history_spec import HistorySpec
from nestor.optim.kept_graphs import may_keep
from nestor.optim.state import State


class KeptDerivatives:
    """Tells which derivatives of a level's steps are kept: graphs, and gradients in the variables of levels above.

    Args:
        level: The level.
        spec: The history that its response needs; None if it needs none.

    Attributes:
        graphs: Whether graphs of gradients are kept; None until it is known whether they are small.
    """

    def __init__(self, level: Level, spec: HistorySpec | None) -> None:
        self.graphs: bool | None = False if spec is None else spec.graphs
        self._level = level
        self._spec = spec

    @property
    def input_gradients(self) -> bool:
        """Whether the gradient in the variables of levels above is computed with the level's own."""
        return self._spec is not None and self._spec.input_gradients and not self._level.lowers

    def may_have_graph(self, remaining: int) -> bool:
        """Return whether the next step may keep its graph.

        Args:
            remaining: Number of steps, with this one, until a level above steps.
        """
        if self._spec is None or self.graphs is False:
            return False
        # A response that looks at the last steps looks at those before a level above steps.
        if self._spec.window is not None and remaining > self._spec.window:
            return False
        loss = self._level.loss
        moves = loss.reader.constants is not None and loss.reader.constants.moving
        return not self._level.lowers and not moves and loss.placements is None

    def decide_graphs(self, evaluator: Evaluator, draws: Sequence[Draw], state: State, remaining: int) -> None:
        """Decide whether the graphs of all steps from the next one on are kept.

        Args:
            evaluator: Evaluates the loss, to measure one graph.
            draws: The batches of the next step.
            state: The variables and the optimizer's memory.
            remaining: Number of steps, with the next one, until a level above steps.
        """
        assert self._spec is not None
        _, size = pure_graph(evaluator, self._level, draws)
        self.graphs = size is not None and may_keep(size, state, self._spec.count(remaining))
