"""The derivatives of a level's steps that a run keeps for the levels above."""

from collections.abc import Sequence
from dataclasses import replace

from nestor.data.draws import Draw
from nestor.levels.evaluator import Evaluator
from nestor.levels.level import Level
from nestor.levels.pure_graph import pure_graph
from nestor.optim.history import HistoryBuilder
from nestor.optim.history_spec import HistorySpec
from nestor.optim.kept_graphs import may_keep
from nestor.optim.state import State


class KeptDerivatives:
    """Tells which derivatives of a level's steps are kept: graphs, and gradients in the variables of levels above.

    Args:
        level: The level.
        history: The builder of its history; None if its response needs none.
    """

    def __init__(self, level: Level, history: HistoryBuilder | None) -> None:
        self._level = level
        self._history = history

    @property
    def _spec(self) -> HistorySpec | None:
        return None if self._history is None else self._history.spec

    @property
    def graphs(self) -> bool | None:
        """Whether graphs of gradients are kept; None until it is known whether they are small."""
        return False if self._spec is None else self._spec.graphs

    @graphs.setter
    def graphs(self, kept: bool | None) -> None:
        if self._history is not None and self._history.spec.graphs is None and kept is not None:
            spec = self._history.spec
            self._history.spec = spec.with_graphs() if kept else replace(spec, graphs=False)

    @property
    def input_gradients(self) -> bool:
        """Whether the gradient in the variables of levels above is computed with the level's own."""
        spec = self._spec
        return spec is not None and spec.input_gradients and not self._level.lowers

    def may_have_graph(self, remaining: int) -> bool:
        """Return whether the next step may keep its graph.

        Args:
            remaining: Number of steps, with this one, until a level above steps.
        """
        spec = self._spec
        if spec is None or spec.graphs is False:
            return False
        # A response that looks at the last steps looks at those before a level above steps.
        if spec.window is not None and remaining > spec.window:
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
        spec = self._spec
        assert spec is not None
        _, size = pure_graph(evaluator, self._level, draws)
        self.graphs = size is not None and may_keep(size, state, spec.count(remaining))
