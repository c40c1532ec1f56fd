"""The declaration of one level, and of a method that replaces declarations by others."""

from __future__ import annotations

import reprlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.optim import LBFGS, Adafactor, Muon, Optimizer, SparseAdam
from torch.optim.lr_scheduler import LRScheduler

from nestor.autodiff.precision import check_precision
from nestor.data.zipped import loaders_of
from nestor.errors.options import check_options
from nestor.optim.stepper import check_whole
from nestor.responses import Response

Loss: TypeAlias = Callable[..., Tensor | Mapping[str, Any]]


@dataclass(frozen=True, eq=False)
class Problem:
    """One level of a program: the variables that minimize a loss, and the data of the loss.

    A problem holds no run-time state; an :class:`Engine` runs it.

    Args:
        module: The module whose parameters are optimized; :class:`Variable` wraps a bare tensor. Levels may share a
            module if their variables are disjoint.
        loss: ``loss(batch, level, ...)``: a function, bound method, ``functools.partial``, module or other callable.
            The first argument is the batch; a loss of a level without ``data`` may omit it. Every other argument is the
            name of a level and receives the module of that level, except ``step``: it receives the number of optimizer
            steps that this level took before the present one, an int. Warm-ups and schedules are functions of it, and a
            replayed step gets its own number; a counter outside of the loss would have moved on. In
            ``Program.hypergradient`` the steps begin at 0, and a look-ahead counts its steps. Returns a scalar, or a
            mapping with the scalar ``"loss"`` and metrics. Frozen parameters and modules of a closure may move in the
            run (a teacher that a callback or the loss updates): each replayed step sees the values that it saw.
        variables: The parameters to optimize. By default those of the optimizer; without an optimizer, all parameters
            of the module that require a gradient.
        optimizer: Steps the variables; an :class:`Engine` needs it.
        data: Iterable of batches, restarted when it ends; None if the loss takes no batch. A tuple of loaders, such as
            ``(labeled, unlabeled)``, is drawn from in parallel: the batch is the tuple of one batch of each, and each
            loader restarts on its own. A tuple of batches (tensors, tuples, mappings) is a data set, like a list.
        response: How levels above differentiate through the best response of this level; None means ``T1T2()``.
        scheduler: Learning-rate schedule, stepped after every optimizer step.
        unroll_steps: Optimizer steps between two steps of the levels above.
        warmup_steps: Optimizer steps of this level before the first step of the levels above.
        accumulate: Batches per optimizer step; their gradients are averaged.
        clip_norm: Largest Euclidean norm of the (hyper)gradient; a longer one is scaled down to it.
        update: ``update(params, grads, state, level, ...) -> (params, state)``, a differentiable step that replaces the
            optimizer. ``params`` and ``grads`` are lists in the order of the variables. ``state`` is None at the first
            step, then the mapping (or list of mappings) that the previous step returned. Further arguments are names of
            levels above and receive their modules (learned learning rates, learned optimizers, Meta-SGD), or ``step``.
            For a level with ``tasks`` it is called for one task after the other, with the tensors of that task.
        init: Name of a level above. After every step of a level above, the variables of this level are reset to the
            variables of that level, and the optimizer state is cleared (MAML). Variables are matched by name, so a
            level that adapts a head can start from a level that holds the whole network; if the names differ, they are
            matched by position.
        tasks: Number of copies of the level that are trained at once, one for each task. The variables are stacked
            along a leading dimension. Every loss that reads the level is mapped over the tasks by ``torch.vmap``, and
            the tensors of its batches need a leading task dimension. The objective of this level is the sum over tasks;
            the objective of a level above is the mean. Each copy starts from the parameters of the module. The buffers
            of the module do not change. :meth:`Program.copies` returns the copies as modules.
        vectorize: Whether the losses that read a level with ``tasks`` are mapped. False evaluates them for one task
            after the other, which every operation supports (recurrent layers, ``.item()``, activation checkpointing)
            and which takes longer. A loss that cannot be mapped, or that has another value or gradient if mapped, is
            evaluated in this way by itself, with a warning. Each task draws its own random numbers in both ways.
        reads: Maps arguments of the loss to names of levels, ``{"argument": "level"}``, so that one function is the
            loss of several levels. An argument that is not listed is the name of a level. The loss must have every
            argument that is listed.
        precision: ``"bf16"``, ``"fp16"`` or ``"fp32"`` for the loss of this level; None means the engine's.
        reformulation: A method that replaces the optimality condition of this level by a term in the losses
            (``F2SA()``, ``PBGD()``, ``BOME()``); the level's best response is then not differentiated.

    Raises:
        TypeError: If ``module`` is no ``nn.Module``, ``loss`` is not callable, ``data`` cannot be iterated or mixes
            loaders and batches, ``optimizer`` is a wrapper of another one (Accelerate's), or another argument has the
            wrong type.
        ValueError: If a number is out of range, or the entries of a tuple ``data`` may be loaders or batches.

    Example:
        >>> x, y = torch.randn(8, 3), torch.randn(8)
        >>> net = torch.nn.Linear(3, 1)
        >>> problem = nestor.Problem(
        ...     net,
        ...     lambda batch, net: (net(batch[0]).squeeze(1) - batch[1]).square().mean(),
        ...     data=[(x, y)],
        ...     optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        ...     unroll_steps=5,
        ... )
        >>> metrics = nestor.Engine(nestor.Program(net=problem), seed=0).run(10)
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
    vectorize: bool = True
    reads: Mapping[str, str] | None = None
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
        for name, kind, expected in (
            ("data", Iterable, "an iterable of batches"),
            ("optimizer", Optimizer, "a torch.optim.Optimizer"),
            ("scheduler", LRScheduler, "an LRScheduler"),
            ("response", Response, "a Response such as T1T2()"),
            ("reformulation", Reformulation, "a Reformulation such as F2SA()"),
        ):
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                hint = ": call it" if callable(value) else ""
                raise TypeError(
                    f"Problem({name}=...) must be {expected}, got {type(value).__name__} {reprlib.repr(value)}{hint}."
                )
            if value is not None and self.update is not None and name in ("optimizer", "scheduler"):
                raise ValueError(f"Problem takes update=... or {name}=..., not both: the update is the step.")
        if self.optimizer is not None:
            check_whole(self.optimizer)
        if self.update is not None and not callable(self.update):
            raise TypeError(f"Problem(update=...) must be callable, got {type(self.update).__name__}.")
        check_options(self, counts=["unroll_steps", "accumulate", "tasks"], positive=["clip_norm"])
        if self.warmup_steps < 0:
            raise ValueError(f"Problem(warmup_steps={self.warmup_steps!r}) must be an integer of at least 0.")
        if not isinstance(self.vectorize, bool):
            raise TypeError(f"Problem(vectorize={self.vectorize!r}) must be True or False.")
        if not self.vectorize and self.tasks is None:
            raise ValueError("Problem(vectorize=False) evaluates tasks one after the other: give tasks=n.")
        _check_reads(self.reads)
        loaders_of(self.data)
        check_precision(self.precision)
        if self.tasks is not None and isinstance(self.optimizer, LBFGS | Muon | Adafactor | SparseAdam):
            raise ValueError(
                f"Problem(tasks={self.tasks}) stacks the variables of the tasks, so the optimizer must work element by "
                f"element; {type(self.optimizer).__name__} does not. Use SGD or Adam."
            )
        if self.variables is not None:
            object.__setattr__(self, "variables", tuple(self.variables))
            for variable in self.variables:
                if not isinstance(variable, nn.Parameter):
                    raise TypeError(f"Problem(variables=...) must hold parameters, got {type(variable).__name__}.")


def _check_reads(reads: Any) -> None:
    if reads is None:
        return
    if not isinstance(reads, Mapping) or not all(isinstance(name, str) for pair in reads.items() for name in pair):
        raise TypeError(
            'Problem(reads=...) must map arguments of the loss to names of levels, such as {"model": "student"}, got '
            f"{reprlib.repr(reads)}."
        )


class Reformulation(ABC):
    r"""A method that replaces "the lower level is at its minimum" by a term in the losses; first derivatives only.

    .. math:: \min_{\lambda,\theta} F(\lambda, \theta) \quad\text{s.t.}\quad
        q(\lambda, \theta) = G(\lambda, \theta) - \min_z G(\lambda, z) \le 0

    A subclass is a frozen dataclass whose fields are the options. ``Problem(..., reformulation=...)`` declares it for a
    lower level. The program then has other losses for that level and for the one level above that reads it. It may also
    have one more level, ``<name>_value``: a copy of the lower level that minimizes ``G`` alone.

    Example:
        >>> isinstance(nestor.F2SA(), nestor.Reformulation), isinstance(nestor.BOME(), nestor.Reformulation)
        (True, True)
        >>> nestor.F2SA(multiplier=2.0).describe()
        'F2SA(multiplier=2 + 0.1 a step)'
    """

    @abstractmethod
    def rewrite(self, name: str, problems: Mapping[str, Problem]) -> dict[str, Problem]:
        """Return the problems of the whole program after the reformulation, lowest first.

        Args:
            name: The lower level that declares the reformulation.
            problems: The problems of the whole program, lowest first. No problem that is returned in place of
                ``problems[name]`` may declare a reformulation.

        Raises:
            ValueError: If the method cannot rewrite the level.
        """

    @abstractmethod
    def describe(self) -> str:
        """Name the method and its options in a few words, for tables."""


def reformulate(problems: Mapping[str, Problem]) -> Mapping[str, Problem]:
    """Apply every reformulation that a problem declares, lowest level first."""
    for name, problem in problems.items():
        if problem.reformulation is not None:
            problems = problem.reformulation.rewrite(name, problems)
    return problems
