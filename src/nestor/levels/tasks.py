"""The evaluation of a loss that reads levels with tasks: for all tasks at once, or for one task after the other."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from nestor.autodiff.grad import grad
from nestor.autodiff.instruments import is_tracing
from nestor.autodiff.scope import Scope, is_twice
from nestor.autodiff.torch_private import tree_map
from nestor.autodiff.vmap import Map, Mapped, NotStackedError, One, looped, vectorized
from nestor.data.random_numbers import Captured, untouched
from nestor.errors import LossError, NestorError, NestorWarning


@dataclass(eq=False)
class Tasks:
    """The tasks of one level.

    Attributes:
        level: Name of the level.
        count: Number of tasks.
        vectorize: Whether a loss that reads the level is evaluated for all tasks at once. It becomes False when a loss
            was found that cannot be; the losses that are evaluated for the first time after that are not tried.
    """

    level: str
    count: int
    vectorize: bool


class TaskMap:
    """Evaluates a loss for each task of the levels that it reads.

    The first evaluation with a gradient chooses how, for good: the two ways draw random numbers in different orders,
    and a replayed step must draw those of the step. The loss and its gradient are evaluated in both ways, unless they
    draw random numbers or run in half precision. If the mapped evaluation raises an error or has another result, tasks
    are evaluated one after the other, with a warning. An error that the loss raises for one task alone is its own, and
    is raised.

    Args:
        level: Name of the level whose loss it is.
        where: The loss, as ``name (file:line)``.
        tasks: The tasks of the levels that the loss reads, all of the same number.
        convolves: Whether a module contains convolutions: on a CPU vectorized ones are slower (1.15 x).

    Attributes:
        levels: Names of the levels with tasks.
        count: Number of tasks.
        in_turn: Whether tasks are evaluated one after the other; None before the first evaluation with a gradient.
        inspects: Whether the first task is evaluated alone before the next evaluation with a gradient, and its graph
            inspected.
        is_alone: Whether it is being evaluated.
    """

    def __init__(self, level: str, where: str, tasks: Sequence[Tasks], *, convolves: bool) -> None:
        self.levels = [found.level for found in tasks]
        self.count = tasks[0].count
        self.in_turn: bool | None = None if all(found.vectorize for found in tasks) else True
        self.inspects = self.is_alone = False
        self._level, self._where, self._tasks, self._convolves = level, where, tasks, convolves

    def evaluate(self, one: One, batch: Any, stacked: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> Mapped:
        """Evaluate the loss for all tasks; the arguments are those of :func:`vectorized`.

        Raises:
            LossError: If the batch has no dimension of tasks, or the loss cannot be mapped though it could before.
        """
        try:
            tensors = (*stacked.values(), *shared.values())
            is_first = (self.in_turn is None or self.inspects) and not is_tracing()
            if is_first and any(t.requires_grad for t in tensors):
                if self.inspects:
                    self._inspect(one, batch, stacked, shared)
                if self.in_turn is None:
                    self.in_turn = self._choose(one, batch, stacked, shared)
            if self.in_turn:
                return looped(one, batch, stacked, self.count, shared)
            return self._vectorized(one, batch, stacked, shared)
        except NotStackedError as error:
            raise LossError(
                f"The loss could not be mapped over {self.count} tasks ({error}). Every tensor of the batch needs a "
                "leading dimension of that size, and a batch may contain only tensors, in tuples, lists and dicts.",
                level=self._level,
                where=self._where,
            ) from None

    def _inspect(self, one: One, batch: Any, stacked: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> None:
        """Evaluate the first task alone: inside vmap, tensors do not show their graph."""
        self.inspects = False
        leaves = {id(tensor): _leaf(tensor[:1]) for tensor in stacked.values()}
        leaves |= {id(tensor): _leaf(tensor) for tensor in shared.values()}
        first, common = ({name: leaves[id(t)] for name, t in tensors.items()} for tensors in (stacked, shared))
        rows = tree_map(lambda leaf: leaf[:1] if isinstance(leaf, Tensor) and leaf.dim() else leaf, batch)
        with untouched(), torch.enable_grad(), Scope():
            self.is_alone = True
            try:
                looped(one, rows, first, 1, common)
            finally:
                self.is_alone = False

    def _vectorized(self, one: One, batch: Any, stacked: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> Mapped:
        try:
            return vectorized(one, batch, stacked, self.count, shared)
        except (NotStackedError, NestorError):
            raise
        except Exception as error:
            failure = error
        found = looped(one, batch, stacked, self.count, shared)  # an error of the loss itself is raised here
        if self.in_turn is None:
            self.in_turn = self._in_turn_because(_first_line(failure))
            return found
        raise LossError(
            f"The loss cannot be mapped over the tasks of level {self.levels[0]!r} in this evaluation "
            f"({_first_line(failure)}), though it could before. Write Problem(..., vectorize=False) for that level, "
            "which evaluates tasks one after the other.",
            level=self._level,
            where=self._where,
        ) from failure

    def _choose(self, one: One, batch: Any, stacked: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> bool:
        """Return whether to evaluate one task after the other; warn if only that is right."""
        on_cpu = all(tensor.device.type == "cpu" for tensor in stacked.values())
        if not all(found.vectorize for found in self._tasks) or (self._convolves and on_cpu):
            return True

        def derivatives(way: Map) -> list[Tensor | None]:
            return _derivatives(way, one, batch, stacked, self.count, shared)

        failure: Exception | None = None
        mapped: list[Tensor | None] = []
        with untouched(), torch.enable_grad():
            start = Captured.now()
            try:
                mapped = derivatives(vectorized)
            except NotStackedError:
                raise
            except Exception as error:
                failure = error
            # Other random numbers, or products in half precision, differ for other reasons.
            device = next(iter(stacked.values())).device.type
            if failure is None and (_has_moved(start) or torch.is_autocast_enabled(device)):
                return False
            start.restore()
            alone = derivatives(looped)  # an error of the loss itself is raised here
        if failure is not None:
            return self._in_turn_because(_first_line(failure))
        if _agree(mapped, alone):
            return False
        return self._in_turn_because("torch.vmap gives another value or another derivative than each task alone")

    def _in_turn_because(self, reason: str) -> bool:
        for tasks in self._tasks:
            tasks.vectorize = False
        levels = " and ".join(map(repr, self.levels))
        warnings.warn(
            f"Level {levels}: tasks are evaluated one after the other, because the loss {self._where} of level "
            f"{self._level!r} cannot be mapped over tasks ({reason}). The result is right, and takes longer. Write "
            "Problem(..., vectorize=False) to silence this.",
            NestorWarning,
            stacklevel=2,
        )
        return True


def _leaf(tensor: Tensor) -> Tensor:
    """Copy a tensor without its graph and without a tangent."""
    value = forward_ad.unpack_dual(tensor).primal  # type: ignore[no-untyped-call]
    copy: Tensor = value.detach().clone()
    return copy.requires_grad_(tensor.requires_grad)


def _derivatives(
    way: Map,
    one: One,
    batch: Any,
    stacked: Mapping[str, Tensor],
    count: int,
    shared: Mapping[str, Tensor],
) -> list[Tensor | None]:
    """Return the losses of all tasks, then the gradient of their sum."""
    leaves = {id(t): t.detach().clone().requires_grad_(t.requires_grad) for t in (*stacked.values(), *shared.values())}
    with Scope(twice=is_twice()):
        losses, _ = way(
            one,
            batch,
            {name: leaves[id(t)] for name, t in stacked.items()},
            count,
            {name: leaves[id(t)] for name, t in shared.items()},
        )
        wrt = [leaf for leaf in leaves.values() if leaf.requires_grad]
        found = grad([losses.sum()], wrt) if losses.requires_grad else []
    return [losses.detach(), *found]


def _agree(mapped: Sequence[Tensor | None], alone: Sequence[Tensor | None]) -> bool:
    """Return whether two evaluations differ by rounding errors only.

    A gradient that is zero up to rounding, such as that of a bias before BatchNorm, is compared with the largest one.
    """
    scale = max(float(_finite(t).abs().max()) for t in alone if t is not None and t.numel())
    for one, other in zip(mapped, alone, strict=True):
        known = other if other is not None else one
        if known is None or not known.numel():
            continue
        epsilon = torch.finfo(known.dtype).eps
        first, second = (torch.zeros_like(known) if t is None else t for t in (one, other))
        difference = float(_finite(first - second).abs().max())
        if difference > epsilon**0.5 * float(_finite(second).abs().max()) + 1e3 * epsilon * scale:
            return False
    return True


def _finite(tensor: Tensor) -> Tensor:
    return torch.nan_to_num(tensor, nan=0.0, posinf=0.0, neginf=0.0)


def _has_moved(start: Captured) -> bool:
    """Return whether random numbers were drawn."""
    now = Captured.now()
    pairs = zip((now.cpu, *now.accelerators), (start.cpu, *start.accelerators), strict=True)
    return not all(torch.equal(*pair) for pair in pairs)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__
