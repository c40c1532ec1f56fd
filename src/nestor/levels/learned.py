"""What a level's optimizer means for the levels above: its step is differentiated, its hyperparameters are learned."""

from collections.abc import Mapping

from torch import Tensor
from torch.optim import Adagrad, SparseAdam

from nestor.errors import UnsupportedError
from nestor.levels.edges import Declared
from nestor.optim.functional_step import check_step
from nestor.optim.hyperparameters import Learned, Path, tensors_in


def learned_hyperparameters(level: Declared, levels: Mapping[str, Declared]) -> Learned:
    """Find the hyperparameters of the optimizer that are variables of levels above, and check its step.

    Raises:
        UnsupportedError: If a hyperparameter requires a gradient and is no variable of a level above, or one that the
            response does not differentiate; or if the response differentiates steps, and the optimizer's has no
            derivative.
    """
    optimizer, response = level.problem.optimizer, level.response
    if optimizer is None:
        return {}
    if isinstance(optimizer, SparseAdam):
        raise UnsupportedError(
            "SparseAdam takes sparse gradients only, and nestor makes every gradient dense. Use Adam; a module may "
            "keep sparse=True.",
            level=level.name,
            where=level.loss.location,
        )
    above = [other for other in levels.values() if other.index > level.index]
    variables = [(p, other.name, index) for other in above for index, p in enumerate(other.parameters.values())]
    learned = {}
    for group, options in enumerate(optimizer.param_groups):
        for path, value in tensors_in(options):
            if not value.requires_grad:
                continue
            if value.numel() != 1:
                raise _refused(level, path, f"is a tensor of {value.numel()} numbers")
            found = [(name, index, entry) for p, name, index in variables if (entry := _entry(value, p)) is not None]
            if not found:
                cause = f"is computed from other tensors ({value.grad_fn.name()})" if value.grad_fn is not None else ""
                raise _refused(level, path, cause or "requires a gradient but is no variable of a level above")
            if isinstance(optimizer, Adagrad) and path == ("initial_accumulator_value",):
                raise _refused(level, path, "is read when the optimizer is made, before any step")
            if path == ("momentum",) and not value.is_meta and value.item() == 0:
                raise _refused(level, path, "starts at zero, where torch keeps no momentum buffer")
            learned[group, path] = found[0]
    if learned and response.differentiable and not (response.differentiates_steps or response.replays_steps):
        ((_, path), (upper, *_)), *_ = learned.items()
        raise UnsupportedError(
            f"Its optimizer's {_show(path)} is a variable of level {upper!r}, and the response {response.describe()} "
            "does not contain the optimizer's step, so the derivative would be zero. Use response=nestor.Unrolled() "
            "or nestor.SAMA().",
            level=level.name,
            where=level.loss.location,
        )
    if response.differentiates_steps or response.replays_steps:
        try:
            check_step(optimizer, derivative=response.differentiates_steps)
        except TypeError as error:
            raise UnsupportedError(
                f"Level {level.name!r}: {response.describe()} takes the optimizer's steps again, but {error}",
                where=level.loss.location,
            ) from None
    return learned


def _entry(value: Tensor, variable: Tensor) -> int | None:
    """Return which entry of a variable a tensor of one number is, in the same memory; None if it is none."""
    if value is variable:
        return 0
    if value.untyped_storage().data_ptr() != variable.untyped_storage().data_ptr() or not variable.is_contiguous():
        return None
    entry = int(value.storage_offset() - variable.storage_offset())
    return entry if 0 <= entry < variable.numel() and value.dtype == variable.dtype else None


def _refused(level: Declared, path: Path, cause: str) -> UnsupportedError:
    name = path[0]
    return UnsupportedError(
        f"Its optimizer's {_show(path)} {cause}, so no derivative reaches it. A variable, or one entry of it, can be "
        f"learned as it is: v = nestor.Variable(...), {name}=v.value in the optimizer, and a level of its own, "
        "listed later: Program(..., v=nestor.Problem(v, ...)). For a function of a variable (softplus, exp), "
        "write the step in place of the optimizer, Problem(update=update):\n"
        "    def update(params, grads, state, v):  # v: the module of the level above\n"
        "        return [p - softplus(v()) * g for p, g in zip(params, grads)], state",
        level=level.name,
        where=level.loss.location,
    )


def _show(path: Path) -> str:
    return path[0] if len(path) == 1 else f"{path[0]}[{path[1]}]"
