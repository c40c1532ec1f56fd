"""The guard of replays: a replayed step must be the step that the run has taken."""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from nestor.autodiff.instruments import uncounted
from nestor.autodiff.torch_private import foreach_norm, foreach_sub
from nestor.errors import ReplayError
from nestor.vectors import LOCAL, Params, VectorSpace

# Rounding errors of the sum of variables and step are relative to the variables; those of other kernels for the
# gradient are relative to the step. In units of epsilon:
_OF_STEP, _OF_VARIABLES = 1e3, 4.0
# How far a difference that came from rounding alone may grow before the replay is examined again.
_MARGIN = 10.0
# Of so many steps whose graphs were kept, the gradient of one is evaluated again.
_KEPT = 16

Compared: TypeAlias = tuple[int, Tensor, float]
"""Number of a step; norms of the tensors of the difference, then of the variables; the rounding unit."""


class ReplayGuard:
    """Compares replayed steps of one level with the states that the run has recorded.

    A replay for a derivative evaluates the gradient with a graph, so that attention, for example, runs on other kernels
    than in the step. If the replayed variables differ by more than rounding, the step is replayed once more by the
    rule and the kernels of the run, without a graph. If that differs too, the step depends on something that the
    history does not contain.

    Args:
        level: Name of the level, for the error.
        where: Its loss, as ``name (file:line)``.
        space: The space of its variables. All processes that hold shards of them compare the norms of whole vectors.
        loose: Whether a replay computes gradients by other operations than the step did: those that contain best
            responses, where an iterative solve amplifies rounding errors, and those of compiled steps.
        differs: Returns whether replays differ from the steps by design; nothing is compared then.
    """

    def __init__(
        self,
        level: str,
        where: str,
        *,
        space: VectorSpace = LOCAL,
        loose: bool = False,
        differs: Callable[[], bool] = lambda: False,
    ) -> None:
        self._level, self._where, self._space, self._loose, self._differs = level, where, space, loose, differs
        self._compared: list[Compared] = []
        self._unexamined = _KEPT
        self._allowed = 1.0  # in units of the bound; larger once a difference came from other kernels alone

    def is_due(self, count: int) -> bool:
        """Return whether the gradient of the first of ``count`` steps with kept graphs must be evaluated again.

        It is at the first sweep of a run, then for one step in sixteen or more.
        """
        self._unexamined += count
        if self._unexamined < _KEPT:
            return False
        self._unexamined = 0
        return True

    def compare(self, number: int, after: Params, recorded: Params) -> None:
        """Compare the variables after a replayed step with the recorded ones; :meth:`verify` reads the result.

        Args:
            number: Number of the step among the recorded steps, from 0.
            after: The variables after the replayed step.
            recorded: The variables after the step that was taken.
        """
        # On a device, a comparison of bits would wait for it; with shards, it would have to be one of all processes.
        at_once = recorded[0].device.type == "cpu" and self._space is LOCAL
        if at_once and all(torch.equal(ours, theirs) for ours, theirs in zip(after, recorded, strict=True)):
            return
        eps = torch.finfo(recorded[0].dtype).eps
        with torch.no_grad():
            difference = foreach_sub(list(after), list(recorded))
            if self._space is LOCAL:
                norms = torch.stack(foreach_norm([*difference, *recorded]))
            else:
                norms = torch.stack([self._space.norm(difference), self._space.norm(recorded)])
        self._compared.append((number, norms, 0.01 * eps**0.5 if self._loose else eps))

    def verify(self, exact: Callable[[int], tuple[Params, Params, Params]]) -> None:
        """Raise an error if a compared step is not the step that was taken.

        Args:
            exact: Replays the step of a number by the rule and the kernels of the run. It returns the variables before
                the step, those after the replay, and the recorded ones.

        Raises:
            ReplayError: If a replayed step differs from the one that was taken.
        """
        compared, self._compared = self._compared, []
        if not compared or self._differs():
            return
        norms = torch.stack([norms for _, norms, _ in compared]).reshape(len(compared), 2, -1)
        found = torch.linalg.vector_norm(norms, dim=2).tolist()
        excess = [_excess(d, _OF_VARIABLES * v, eps) for (d, v), (_, _, eps) in zip(found, compared, strict=True)]
        worst = max(range(len(excess)), key=excess.__getitem__)
        if excess[worst] <= self._allowed:
            return
        number, _, eps = compared[worst]
        with uncounted():
            before, after, recorded = exact(number)
        distance, length, size = (self._norm(*pair) for pair in ((after, recorded), (recorded, before), (recorded,)))
        is_other = _excess(distance, _OF_STEP * length + _OF_VARIABLES * size, eps) > 1.0
        if is_other and self._is_deterministic(after, lambda: exact(number)[1]):
            raise self._error(
                number, f"{distance / length:.2g} of its length" if length else f"{distance:.2g} (0 was taken)"
            )
        self._allowed = _MARGIN * excess[worst]

    def _is_deterministic(self, after: Params, again: Callable[[], Params]) -> bool:
        """Return whether the same step gives the same bits once more; kernels of accelerators may not."""
        return after[0].device.type == "cpu" or self._norm(after, again()) == 0.0

    def _norm(self, vector: Params, other: Params | None = None) -> float:
        """Return the norm of a vector, or of the difference of two."""
        with torch.no_grad():
            return float(self._space.norm(list(vector) if other is None else foreach_sub(list(vector), list(other))))

    def _error(self, number: int, difference: str) -> ReplayError:
        return ReplayError(
            f"The replay of optimizer step {number + 1} since a level above last stepped differs from the step that "
            f"was taken, by {difference}. The hypergradient would be that of another step. The step "
            "depends on something that is not recorded: random numbers of a generator of its own, a hook of a "
            "parameter or of the optimizer, an attribute of the optimizer, variables that a callback changes "
            "(a projection), or a tensor or a counter that the loss reads and that changes along the run. Draw random "
            "numbers from torch's default generators; write a projection into the update rule, Problem(update=...); "
            "give what changes a level of its own, a buffer, or the argument `step` of the loss. Engine(check=False) "
            "turns this check off.",
            level=self._level,
            where=self._where,
        )


def _excess(difference: float, explained: float, eps: float) -> float:
    """Return a difference in units of what rounding explains; 0 if it is not a number."""
    found = difference / (eps * explained + 1e-300)
    return found if found == found else 0.0
