"""The guard of replays: a replayed step must be the step that the run has taken."""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from nestor.autodiff.instruments import uncounted
from nestor.autodiff.torch_private import foreach_norm, foreach_sub
from nestor.errors import ReplayError
from nestor.optim.state import State, memory_keys
from nestor.vectors import LOCAL, Params, VectorSpace

# Rounding errors of the sum of variables and step are relative to the variables; those of other kernels for the
# gradient are relative to the step. In units of epsilon:
_OF_STEP, _OF_VARIABLES = 1e3, 4.0
# How far a difference that came from rounding alone may grow before the replay is examined again.
_MARGIN = 10.0
# At least so many entries of each tensor of the optimizer's memory are compared, or all.
_SAMPLED = 256
# Of so many steps whose graphs were kept, the gradient of one is evaluated again.
_KEPT = 16

Part: TypeAlias = str | None
"""A part of a state: the variables (None), or the tensors of the optimizer's memory under a key."""


class Compared(NamedTuple):
    """A comparison that was not equal in all bits.

    Attributes:
        number: Number of the step.
        part: What was compared.
        norms: The norms of the tensors of the difference, then those of the recorded tensors.
        eps: The rounding unit.
    """

    number: int
    part: Part
    norms: Tensor
    eps: float


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
        # In units of the bound; larger once a difference came from other kernels alone.
        self._allowed: dict[Part, float] = {}

    def is_due(self, count: int) -> bool:
        """Return whether the gradient of the first of ``count`` steps with kept graphs must be evaluated again.

        It is at the first sweep of a run, then for one step in sixteen or more.
        """
        self._unexamined += count
        if self._unexamined < _KEPT:
            return False
        self._unexamined = 0
        return True

    def compare(self, number: int, after: State, recorded: State) -> None:
        """Compare the state after a replayed step with the recorded one; :meth:`verify` reads the result.

        Args:
            number: Number of the step among the recorded steps, from 0.
            after: The state after the replayed step.
            recorded: The state after the step that was taken; without memory, the variables alone are compared.
        """
        # On a device, a comparison of bits would wait for it; with shards, it would have to be one of all processes.
        at_once = recorded.params[0].device.type == "cpu" and self._space is LOCAL
        for part, (ours, theirs) in _parts(after, recorded, whole=self._space is LOCAL).items():
            if not at_once or not all(map(torch.equal if part is None else _has_equal_sample, ours, theirs)):
                eps = torch.finfo(theirs[0].dtype).eps
                norms = self._norms(ours, theirs)
                self._compared.append(Compared(number, part, norms, 0.01 * eps**0.5 if self._loose else eps))

    def _norms(self, ours: Params, theirs: Params) -> Tensor:
        with torch.no_grad():
            difference = foreach_sub(list(ours), list(theirs))
            if self._space is LOCAL:
                return torch.stack(foreach_norm([*difference, *theirs]))
            return torch.stack([self._space.norm(difference), self._space.norm(theirs)])

    def verify(self, exact: Callable[[int], tuple[State, State, State]]) -> None:
        """Raise an error if a compared step is not the step that was taken.

        Args:
            exact: Replays the step of a number by the rule and the kernels of the run. It returns the state before the
                step, that after the replay, and the recorded one.

        Raises:
            ReplayError: If a replayed step differs from the one that was taken.
        """
        compared, self._compared = self._compared, []
        if not compared or self._differs():
            return
        norms = [torch.linalg.vector_norm(c.norms.reshape(2, -1), dim=1) for c in compared]
        found = torch.stack([n.to(torch.float64) for n in norms]).tolist()
        excess = [_excess(d, _OF_VARIABLES * v, c.eps) for (d, v), c in zip(found, compared, strict=True)]
        for part in dict.fromkeys(c.part for c in compared):
            mine = [index for index, c in enumerate(compared) if c.part == part]
            worst = max(mine, key=excess.__getitem__)
            if excess[worst] > self._allowed.get(part, 1.0):
                self._examine(compared[worst], exact)
                self._allowed[part] = _MARGIN * excess[worst]

    def _examine(self, compared: Compared, exact: Callable[[int], tuple[State, State, State]]) -> None:
        """Replay a step exactly, and raise an error if it differs by more than rounding."""
        number, part, _, eps = compared

        def replay() -> tuple[Params, Params, Params]:
            with uncounted():
                before, after, recorded = exact(number)
            ours, theirs = _parts(after, recorded, whole=self._space is LOCAL)[part]
            # Memory that the step has created did not exist before it.
            start = _parts(after, before, whole=self._space is LOCAL).get(part)
            return [torch.zeros_like(t) for t in theirs] if start is None else start[1], ours, theirs

        before, after, recorded = replay()
        distance, length, size = (self._norm(*pair) for pair in ((after, recorded), (recorded, before), (recorded,)))
        is_other = _excess(distance, _OF_STEP * length + _OF_VARIABLES * size, eps) > 1.0
        if is_other and self._is_deterministic(after, lambda: replay()[1]):
            by = f"{distance / length:.2g} of its length" if length else f"{distance:.2g} (0 was taken)"
            raise self._error(number, part, by)

    def _is_deterministic(self, after: Params, again: Callable[[], Params]) -> bool:
        """Return whether the same step gives the same bits once more; kernels of accelerators may not."""
        return after[0].device.type == "cpu" or self._norm(after, again()) == 0.0

    def _norm(self, vector: Params, other: Params | None = None) -> float:
        """Return the norm of a vector, or of the difference of two."""
        with torch.no_grad():
            return float(self._space.norm(list(vector) if other is None else foreach_sub(list(vector), list(other))))

    def _error(self, number: int, part: Part, difference: str) -> ReplayError:
        of_memory = "" if part is None else f"in the optimizer's memory {part!r}, "
        return ReplayError(
            f"The replay of optimizer step {number + 1} since a level above last stepped differs from the step that "
            f"was taken, {of_memory}by {difference}. The hypergradient would be that of another step. The step "
            "depends on something that is not recorded: random numbers of a generator of its own, a hook of a "
            "parameter or of the optimizer, an attribute of the optimizer, variables or the optimizer's memory that a "
            "callback changes (a projection, a reset), or a tensor or a counter that the loss reads and that changes "
            "along the run. Draw random numbers from torch's default generators; write a projection or a reset into "
            "the update rule, Problem(update=...); give what changes a level of its own, a buffer, or the argument "
            "`step` of the loss. Engine(check=False) turns this check off.",
            level=self._level,
            where=self._where,
        )


def _parts(after: State, recorded: State, *, whole: bool) -> dict[Part, tuple[list[Tensor], list[Tensor]]]:
    """Pair the tensors of two states: the variables, and the memory under each key of both.

    Where variables are shards, the space has norms of vectors like them: memory of other shapes is left out.
    """
    found: dict[Part, tuple[list[Tensor], list[Tensor]]] = {None: (list(after.params), list(recorded.params))}
    if len(after.slots) == len(recorded.slots):
        for ours, theirs in zip(after.slots, recorded.slots, strict=True):
            for key in set(memory_keys(ours)).intersection(memory_keys(theirs)):
                pair = found.setdefault(key, ([], []))
                pair[0].append(ours[key])
                pair[1].append(theirs[key])
    shapes = [p.shape for p in after.params]
    return {part: pair for part, pair in found.items() if whole or [t.shape for t in pair[0]] == shapes}


def _has_equal_sample(ours: Tensor, theirs: Tensor) -> bool:
    """Return whether evenly spaced entries are equal: all of them would have to be read from RAM."""
    if ours.is_contiguous() and theirs.is_contiguous():
        spacing = max(1, ours.numel() // _SAMPLED)
        ours, theirs = ours.view(-1)[::spacing], theirs.view(-1)[::spacing]
    return torch.equal(ours, theirs)


def _excess(difference: float, explained: float, eps: float) -> float:
    """Return a difference in units of what rounding explains; 0 if it is not a number."""
    found = difference / (eps * explained + 1e-300)
    return found if found == found else 0.0
