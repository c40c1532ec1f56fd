"""The declaration of one level."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor, nn
from torch.optim import LBFGS, Adafactor, Muon, Optimizer, SparseAdam
from torch.optim.lr_scheduler import LRScheduler

from nestor.autodiff.precision import check_precision
from nestor.responses import Response

if TYPE_CHECKING:
    from nestor.reformulations import Reformulation

Loss: TypeAlias = Callable[..., Tensor | Mapping[str, Any]]


@dataclass(frozen=True, eq=False)
class Problem:
    """One level of a program: whose variables minimise which loss, on which data.

    A declaration without run-time state; an :class:`Engine` runs it.

    Args:
        module: The module whose parameters are optimized; a bare tensor is wrapped by :class:`Variable`. Levels may
            share a module if their variables are disjoint.
        loss: ``loss(batch, level, ...)``, a function, bound method, ``functools.partial`` or other callable. Its first
            argument is the batch (absent if ``data`` is None); every other argument is the name of a level and receives
            that level's module. Returns a scalar, or a mapping with the scalar ``"loss"`` and metrics.
        variables: The parameters to optimize; by default those of the optimizer, or else all of the module that require
            a gradient.
        optimizer: Steps the variables; an :class:`Engine` needs it.
        data: Iterable of batches, started again when it ends; None if the loss takes no batch.
        response: How levels above differentiate through this level's best response; None is ``T1T2()``.
        scheduler: Learning-rate schedule, stepped after every optimizer step.
        unroll_steps: Optimizer steps between two steps of the levels above.
        warmup_steps: Optimizer steps of this level before the levels above may step.
        accumulate: Batches per optimizer step; gradients are averaged.
        clip_norm: Largest Euclidean norm of the (hyper)gradient; a longer one is scaled down.
        update: ``update(params, grads, state, level, ...) -> (params, state)``, a differentiable step in place of an
            optimizer's: ``params`` and ``grads`` are lists in the order of the variables, ``state`` is None at first,
            then the mapping (or list of mappings) that came back; further arguments are names of levels above and
            receive their modules (learned learning rates, learned optimizers, Meta-SGD).
        init: Name of a level above whose variables this level's start from after every step of a level above, with
            an optimizer that starts anew (MAML). They are matched by name, so a level that adapts a head can start from
            a level that holds the whole network; or, if the names differ, by position.
        tasks: Run so many copies of the level at once, one a task: its variables are stacked along a leading dimension,
            and every loss that reads it is mapped over the tasks by ``torch.vmap``, with batches whose tensors have a
            leading task dimension. The level's own objective is the sum over tasks, that of a level above the mean.
            The module's own parameters are where the copies start; its buffers do not move.
        precision: ``"bf16"``, ``"fp16"`` or ``"fp32"`` for this level's loss; None is the engine's.
        reformulation: Replace this level's optimality by a term in the losses (``F2SA()``, ``PBGD()``, ``BOME()``)
            instead of differentiating through its best response.

    Raises:
        TypeError: If ``module`` is no ``nn.Module``, ``loss`` is not callable, or ``data`` cannot be iterated.
        ValueError: If a number is out of range.
    """

    module: nn.Module
    loss: Loss
    _: KW_ONLY
    variables: Iterable[nn.Parameter] | None = None
    optimizer: Optimizer | None = None
    data: Iterable[Any] | None = None
    response: Response | None = None
    scheduler: LRScheduler | None = None
    unroll_steps: int = 1
    warmup_steps: int = 0
    accumulate: int = 1
    clip_norm: float | None = None
    update: Callable[..., Any] | None = None
    init: str | None = None
    tasks: int | None = None
    reformulation: Reformulation | None = None
    precision: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.module, nn.Module):
            raise TypeError(
                f"Problem(module=...) must be an nn.Module, got {type(self.module).__name__}. "
                "Wrap a bare tensor or parameter: nestor.Variable(tensor)."
            )
        if not callable(self.loss):
            raise TypeError(f"Problem(loss=...) must be callable, got {type(self.loss).__name__}.")
        if self.data is not None and not isinstance(self.data, Iterable):
            raise TypeError(f"Problem(data=...) must be an iterable of batches, got {type(self.data).__name__}.")
        if self.optimizer is not None and not isinstance(self.optimizer, Optimizer):
            raise TypeError(
                f"Problem(optimizer=...) must be a torch.optim.Optimizer, got {type(self.optimizer).__name__}."
            )
        if self.scheduler is not None and not isinstance(self.scheduler, LRScheduler):
            raise TypeError(f"Problem(scheduler=...) must be an LRScheduler, got {type(self.scheduler).__name__}.")
        if self.response is not None and not isinstance(self.response, Response):
            raise TypeError(
                f"Problem(response=...) must be a Response such as T1T2(), got {self.response!r}"
                f"{': call it' if isinstance(self.response, type) or callable(self.response) else ''}."
            )
        if self.update is not None:
            if not callable(self.update):
                raise TypeError(f"Problem(update=...) must be callable, got {type(self.update).__name__}.")
            for name, other in (("optimizer", self.optimizer), ("scheduler", self.scheduler)):
                if other is not None:
                    raise ValueError(f"Problem takes update=... or {name}=..., not both: the update is the step.")
        for name, least in (("unroll_steps", 1), ("warmup_steps", 0), ("accumulate", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"Problem({name}={value!r}) must be an integer of at least {least}.")
        check_precision(self.precision)
        if self.tasks is not None and (not isinstance(self.tasks, int) or self.tasks < 1):
            raise ValueError(f"Problem(tasks={self.tasks!r}) must be a positive integer.")
        if self.tasks is not None and isinstance(self.optimizer, LBFGS | Muon | Adafactor | SparseAdam):
            raise ValueError(
                f"Problem(tasks={self.tasks}) steps the tasks' variables stacked, so the optimizer must work element "
                f"by element; {type(self.optimizer).__name__} does not. Take SGD or Adam."
            )
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"Problem(clip_norm={self.clip_norm}) must be positive; None does not clip.")
        if self.variables is not None:
            object.__setattr__(self, "variables", tuple(self.variables))
