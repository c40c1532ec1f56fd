"""What no response differentiates correctly, as far as a program's declaration shows it: refused, with the remedy."""

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from nestor.autodiff.torch_private import hooks_of, is_compiled
from nestor.errors import UnsupportedError
from nestor.levels.level import Level
from nestor.levels.nesting import Nesting
from nestor.levels.signatures import location
from nestor.problem import Problem


@dataclass(frozen=True)
class Use:
    """How the levels above use a level.

    Attributes:
        responds: Whether a level above differentiates through its best response.
        twice: The level whose response differentiates the loss of this level twice; None if there is none.
    """

    responds: bool
    twice: Level | None


def refuse_problems(problems: Mapping[str, Problem]) -> None:
    """Refuse problems that no program can contain.

    Raises:
        UnsupportedError: For the first refusal that applies; the message says what to write instead.
    """
    for name, problem in problems.items():
        for refusal in OF_PROBLEMS:
            if (message := refusal(problem)) is not None:
                raise UnsupportedError(message, level=name, where=location(problem.loss))


def refuse(levels: Mapping[str, Level], nesting: Nesting) -> None:
    """Refuse levels that the responses of a program cannot differentiate, or that no response can.

    A program calls it when it is built, and an engine before the first step of a run, because hooks may be added later.

    Raises:
        UnsupportedError: For the first refusal that applies; the message says what to write instead.
    """
    responding = {lower for level in levels.values() for lower in level.lowers}
    twice = _twice_differentiated(levels, nesting, responding)
    for name, level in levels.items():
        use = Use(name in responding, twice.get(name))
        for refusal in OF_LEVELS:
            if (message := refusal(level, use)) is not None:
                raise UnsupportedError(message, level=name, where=level.loss.where)


def _twice_differentiated(levels: Mapping[str, Level], nesting: Nesting, responding: set[str]) -> dict[str, Level]:
    """For each level whose loss is differentiated twice, return the level whose response does it."""
    own = {name: levels[name] for name in levels if name in responding and levels[name].response.differentiates_twice}
    found = dict(own)
    for level in own.values() if nesting.nested else ():
        # The objective of the level contains the responses of its lowers, which are then differentiated as well.
        for name in nesting.below(level.name)[:-1]:
            response = levels[name].response
            if response.differentiable and not response.replays_steps:
                found.setdefault(name, level)
    return found


def wrapped_module(problem: Problem) -> str | None:
    """Refuse modules of which another library splits parameters or averages gradients among processes."""
    for kinds, runtime in (
        ((DistributedDataParallel,), "DataParallel()"),
        (_loaded("torch.distributed.fsdp", "FullyShardedDataParallel", "FSDPModule"), "FullySharded()"),
    ):
        for path, module in problem.module.named_modules():
            if isinstance(module, kinds):
                return (
                    f"{_module(path)} is wrapped: {type(module).__name__} averages or splits gradients in hooks of "
                    "loss.backward(), which no response calls. Give the level the plain module, and let the engine "
                    f"distribute it: Engine(program, runtime=nestor.{runtime})."
                )
    sharded = _loaded("torch.distributed.tensor", "DTensor")
    for name, parameter in problem.module.named_parameters():
        if isinstance(parameter, sharded):
            return (
                f"the parameter {name!r} is a DTensor, which other processes hold parts of. Give the level the module "
                "with plain tensors, and let the engine distribute it: Engine(program, runtime=nestor.FullySharded())."
            )
    return None


def lazy_module(problem: Problem) -> str | None:
    """Refuse modules whose parameters have no shape yet."""
    for path, module in problem.module.named_modules():
        if any(is_lazy(parameter) for parameter in module.parameters(recurse=False)):
            return (
                f"{_module(path)} ({type(module).__name__}) has parameters without a shape, which it gets at its first "
                "evaluation. Evaluate the module once before you make its optimizer and its Problem: module(batch)."
            )
    return None


def differentiable_optimizer(problem: Problem) -> str | None:
    """Refuse optimizers that torch lets step only tensors with a graph, not the parameters of a module."""
    groups = [] if problem.optimizer is None else problem.optimizer.param_groups
    if any(group.get("differentiable", False) for group in groups):
        return (
            f"{type(problem.optimizer).__name__}(differentiable=True) cannot step the parameters of a module. Leave it "
            "out: a response that differentiates steps takes them by a differentiable rule of its own."
        )
    return None


def scheduler_with_arguments(problem: Problem) -> str | None:
    """Refuse schedulers whose ``step`` needs an argument, which an engine does not have."""
    kind = type(problem.scheduler)
    parameters = list(inspect.signature(kind.step).parameters.values()) if issubclass(kind, LRScheduler) else []
    for needed in parameters[1:]:
        if needed.default is needed.empty and needed.kind not in (needed.VAR_POSITIONAL, needed.VAR_KEYWORD):
            return (
                f"the engine steps the scheduler after every optimizer step, but {kind.__name__}.step needs "
                f"{needed.name!r}. Leave out scheduler=..., and step it in a callback, with a validation's metric: "
                "class Plateau(nestor.callbacks.Callback), def on_validation(self, engine, metrics): "
                "scheduler.step(metrics['value'])."
            )
    return None


def hooked_variable(level: Level, use: Use) -> str | None:
    """Refuse hooks on variables: a response differentiates at other tensors, which have no hooks."""
    # With shards, the optimizer's parameters are not those of the module.
    own = dict(level.problem.module.named_parameters())
    for name, parameter in zip(level.names, level.stepping.parameters, strict=True):
        for method in (*hooks_of(parameter, Tensor), *hooks_of(own.get(name, parameter), Tensor)):
            return (
                f"the variable {name!r} has a hook ({method}). It would change gradients of the level's own steps, but "
                "not those of a response or of a replayed step, which are taken at other tensors. Remove the hook, and "
                "write what it does into the model (a mask: torch.nn.utils.parametrize) or into the step: "
                "Problem(update=...). To observe gradients, use a callback."
            )
    return None


def hooked_module(level: Level, use: Use) -> str | None:
    """Refuse backward hooks of modules: a gradient that they change is the gradient of no loss."""
    for path, module in level.problem.module.named_modules():
        for method in hooks_of(module, nn.Module):
            return f"{_module(path)} has a backward hook ({method}). {HOOKS_OF_MODULES}"
    return None


HOOKS_OF_MODULES = (
    "A gradient that such a hook changes is no derivative of the loss, so responses would disagree. Remove the hook, "
    "and write what it does into the model as a torch.autograd.Function. To observe gradients, use a callback."
)


def hooked_optimizer(level: Level, use: Use) -> str | None:
    """Refuse step hooks of an optimizer whose steps a response takes again, or which is never stepped itself."""
    response, optimizer = level.response, level.stepping.optimizer
    for method in hooks_of(optimizer, Optimizer) if optimizer is not None else ():
        if level.stepping.tasks:
            return f"the optimizer has a hook ({method}), which does not run for stacked tasks. {_HOOKED_STEP}"
        if use.responds and (response.differentiates_steps or response.replays_steps):
            return (
                f"the optimizer has a hook ({method}), and {response.describe()} differentiates steps without it. "
                f"{_HOOKED_STEP} Or choose a response that does not differentiate steps, such as T1T2()."
            )
    return None


_HOOKED_STEP = (
    "Write what the hook does into the step: Problem(update=...); for gradients, Problem(clip_norm=...); for bounds, "
    "torch.nn.utils.parametrize."
)


def compiled_module(level: Level, use: Use) -> str | None:
    """Refuse compiled code in a loss that is differentiated twice: it has no second derivative."""
    if use.twice is None:
        return None
    found = next(_compiled(level), None)
    return found and f"{found} is compiled by torch.compile. {without_second_derivative(use.twice)}"


def without_second_derivative(level: Level) -> str:
    """Say what to write instead of compiled code, for the response of a level."""
    return (
        f"{level.response.describe()} of level {level.name!r} needs second derivatives, which compiled code does not "
        "have (in forward mode, they would be zero). Give the level the module itself and let the engine compile whole "
        "steps, Engine(program, compile=True), or use a response with first derivatives only, FiniteDifference()."
    )


def changing_embedding(level: Level, use: Use) -> str | None:
    """Refuse embeddings that rescale their own weights whenever they are evaluated."""
    variables = {id(parameter) for parameter in level.stepping.parameters}
    for path, module in level.problem.module.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
            weight = dict(module.named_parameters(recurse=False)).get("weight")
            if id(weight) in variables:
                return (
                    f"{_module(path)} is an {type(module).__name__}(max_norm={module.max_norm}), which rescales its "
                    "weight in place whenever it is evaluated, responses included. Leave out max_norm, and scale the "
                    "rows that are looked up: e * (max_norm / e.norm(dim=-1, keepdim=True)).clamp(max=1)."
                )
    return None


def scaled_embedding(level: Level, use: Use) -> str | None:
    """Refuse embeddings whose gradient is not that of the loss."""
    variables = {id(parameter) for parameter in level.stepping.parameters}
    for path, module in level.problem.module.named_modules() if use.responds else ():
        is_scaled = isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.scale_grad_by_freq
        if is_scaled and id(dict(module.named_parameters(recurse=False)).get("weight")) in variables:
            return (
                f"{_module(path)} is an {type(module).__name__}(scale_grad_by_freq=True), which divides the gradient "
                "of each row by the number of its look-ups: no loss has that gradient, so no response can "
                "differentiate it, and torch's second derivative is another one. Leave out scale_grad_by_freq; to "
                "scale steps, write Problem(update=...)."
            )
    return None


Refusal: TypeAlias = Callable[[Level, Use], str | None]
"""Returns why a level is refused and what to write instead, or None."""

OF_PROBLEMS: tuple[Callable[[Problem], str | None], ...] = (
    lazy_module,
    wrapped_module,
    differentiable_optimizer,
    scheduler_with_arguments,
)
OF_LEVELS: tuple[Refusal, ...] = (
    hooked_variable,
    hooked_module,
    hooked_optimizer,
    compiled_module,
    changing_embedding,
    scaled_embedding,
)


def _module(path: str) -> str:
    return f"the submodule {path!r}" if path else "the module"


def _loaded(module: str, *names: str) -> tuple[type, ...]:
    """Return classes of a part of torch that is slow to import; none of their objects exist before it is imported."""
    loaded = sys.modules.get(module)
    return () if loaded is None else tuple(vars(loaded)[name] for name in names if name in vars(loaded))


def _compiled(level: Level) -> Iterator[str]:
    """Name what is compiled among the loss and the modules that it reads."""
    loss: Any = level.problem.loss
    while isinstance(loss, partial):
        loss = loss.func
    if inspect.isfunction(loss) and is_compiled(loss):
        yield "the loss"
    modules = [("", loss)] if isinstance(loss, nn.Module) else []
    for path, module in (*modules, *level.loss.reader.named_modules()):
        forwards = (vars(module).get("forward"), type(module).forward)
        if is_compiled(module) or any(inspect.isfunction(f) and is_compiled(f) for f in forwards):
            yield _module(path.removeprefix("level_"))
