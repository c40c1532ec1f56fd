"""The check that a loss is a function of its arguments."""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Self

import torch
from torch import Tensor

from nestor.autodiff.instruments import uncounted
from nestor.autodiff.scope import Scope
from nestor.data.draws import Draw
from nestor.errors import NestorError, NotAFunctionError, note
from nestor.levels.level import Level
from nestor.levels.loss import LevelLoss
from nestor.vectors import Params, algebra

# Both evaluations run the same kernels, so they agree in every bit on most devices. In units of epsilon, of
# one gradient and of all together (a gradient may be rounding noise):
_TOLERANCE, _OF_ALL = 1e3, 10.0
# Relative displacement of the variables; entries that are zero move by its tenth.
_DISPLACEMENT = 1e-2
# Elements that are projected at once; of levels, and of their tensors, that are not displaced as a whole.
_PART, _LARGE, _LARGE_TENSOR = 2**20, 2**24, 2**16


def check_function(level: Level, draw: Draw) -> None:
    """Check that the loss of a level is a function of its batch, its random numbers, and the variables that it reads.

    The loss is evaluated and differentiated at a displaced point twice, on the same batch and with the same random
    numbers: once as responses do it, with other tensors in the modules, and once with the same values in the modules'
    own parameters. Afterwards parameters, ``.grad`` and buffers are exactly as before. With shards, the variables
    that the loss reads are gathered. Of several processes, each evaluates its own rows, and the result is that of this
    process alone.
    Levels with tasks are not checked, because no module contains their variables.

    Args:
        level: The level.
        draw: A batch of it.

    Raises:
        NotAFunctionError: If the two values or the two gradients differ.
    """
    loss = level.loss
    if loss.tasks is not None or not loss.in_modules:
        return
    names = [name for name in loss.slots if loss.variables[name]]
    whole = [value for name in names for value in _whole(loss, name)]
    loss = replace(loss, placements=None, variables={name: _in_modules(loss, name) for name in names})
    own = [p for name in names for p in loss.variables[name]]
    displaced = _displaced(whole)
    with uncounted(), torch.enable_grad(), ExitStack() as stack:
        for name, placement in (level.loss.placements or {}).items():
            stack.enter_context(placement.usable(loss.variables.get(name, ())))
        try:
            value, ours = _elsewhere(loss, names, displaced, draw)
        except NestorError:
            raise
        except Exception:
            # The displaced point may lie outside of the domain of the loss: its own evaluation reports real errors.
            return
        try:
            real_value, theirs = _in_place(loss, own, displaced, draw)
        except Exception as error:
            note(error, f"level {level.name!r}, loss {loss.where}, in the check at a first step of a level above")
            raise
    _compare(level, [_Projected.of(value)], [_Projected.of(real_value)], ["its value"])
    places = [(name, index) for name in names for index in range(len(loss.variables[name]))]
    _compare(level, ours, theirs, [f"its gradient in variable {index} of level {name!r}" for name, index in places])


def _whole(loss: LevelLoss, name: str) -> Params:
    """Return the values of the variables of a level."""
    held = loss.variables[name]
    return held if loss.placements is None else algebra.present(loss.placements[name].gather(held))


def _in_modules(loss: LevelLoss, name: str) -> Params:
    """Return the variables of a level as the modules contain them; with shards, these have no values."""
    if loss.placements is None:
        return loss.variables[name]
    return [loss.reader.get_parameter(aliases[0]) for aliases in loss.slots[name]]


def _displaced(tensors: Params) -> list[Tensor]:
    """Move every entry by a fixed pseudo-random relative amount that keeps its sign.

    Of a level with many millions of variables every second large tensor stays, so that no second copy of all is held.
    """
    generator = torch.Generator().manual_seed(0)
    is_large = algebra.size(tensors) >= _LARGE
    moved = []
    for index, tensor in enumerate(tensors):
        if is_large and index % 2 == 0 and tensor.numel() >= _LARGE_TENSOR:
            moved.append(tensor.detach())
            continue
        amount = (_DISPLACEMENT * torch.rand(tensor.shape, generator=generator)).to(tensor)
        moved.append(torch.where(tensor == 0, 0.1 * amount, tensor.detach() * (1 + amount)))
    return moved


@dataclass(frozen=True)
class _Projected:
    """A tensor, projected on two random vectors: two copies of all gradients would not fit beside a large level.

    Attributes:
        length: Its norm.
        projections: Its products with the vectors, which depend on its size only. Those of a difference are as large as
            the norm of the difference.
        eps: The rounding error of its dtype.
    """

    length: float = 0.0
    projections: tuple[float, float] = (0.0, 0.0)
    eps: float = 0.0

    @classmethod
    def of(cls, tensor: Tensor) -> Self:
        dense = tensor.detach().to_dense()
        flat = (torch.view_as_real(dense) if dense.is_complex() else dense).flatten()
        generator = torch.Generator().manual_seed(len(flat))
        one, other = 0.0, 0.0
        for part in torch.split(flat, _PART):
            vector = torch.randn(len(part), generator=generator, dtype=torch.float64).to(part.device)
            values = part.double()
            one += float(torch.dot(values, vector))
            other += float(torch.dot(values, vector.flip(0)))
        return cls(float(torch.linalg.vector_norm(flat)), (one, other), torch.finfo(flat.dtype).eps)


def _projected_gradients(value: Tensor, leaves: Params) -> list[_Projected]:
    """Differentiate with respect to leaves; each gradient is freed when it has been projected."""
    found = [_Projected()] * len(leaves)
    live = [(index, leaf) for index, leaf in enumerate(leaves) if leaf.requires_grad]

    def project(index: int, leaf: Tensor) -> None:
        if leaf.grad is not None:
            found[index] = _Projected.of(leaf.grad)
            leaf.grad = None

    hooks = [
        leaf.register_post_accumulate_grad_hook(partial(project, index))  # type: ignore[no-untyped-call]
        for index, leaf in live
    ]
    try:
        # ``backward`` also calls what ``autograd.grad`` does not: hooks after the accumulation of a gradient.
        value.backward(inputs=[leaf for _, leaf in live])  # type: ignore[no-untyped-call]
    finally:
        for hook in hooks:
            hook.remove()
    for index, leaf in live:
        project(index, leaf)  # a Function may have stored a gradient itself
    return found


def _elsewhere(loss: LevelLoss, names: Sequence[str], displaced: Params, draw: Draw) -> tuple[Tensor, list[_Projected]]:
    leaves = algebra.leaves(displaced)
    values = iter(leaves)
    tensors = {name: [next(values) for _ in loss.variables[name]] for name in names}
    with Scope():
        value = loss.pure_value(draw, tensors)
        return value.detach(), _projected_gradients(value, leaves)


def _in_place(loss: LevelLoss, own: Params, displaced: Params, draw: Draw) -> tuple[Tensor, list[_Projected]]:
    with _values_replaced(own, displaced), Scope():
        value = loss.pure_value(draw, None)
        return value.detach(), _projected_gradients(value, own)


@contextmanager
def _values_replaced(parameters: Params, values: Params) -> Iterator[None]:
    """Replace the values of parameters, and set their ``.grad`` to None, inside the context."""
    # ``.data`` leaves the version counters alone: graphs that contain these parameters stay valid.
    saved = [(p, p.data, p.grad) for p in parameters]
    try:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data, parameter.grad = value, None
        yield
    finally:
        for parameter, data, gradient in saved:
            parameter.data, parameter.grad = data, gradient


def _compare(level: Level, found: Sequence[_Projected], real: Sequence[_Projected], names: Sequence[str]) -> None:
    lengths = [a.length + b.length for a, b in zip(found, real, strict=True)]
    whole = math.hypot(*lengths)
    for a, b, length, name in zip(found, real, lengths, names, strict=True):
        apart = [abs(x - y) for x, y in zip(a.projections, b.projections, strict=True)]
        difference, eps = max(*apart, abs(a.length - b.length)), max(a.eps, b.eps)
        if math.isfinite(whole) and difference > eps * (_TOLERANCE * length + _OF_ALL * whole):
            raise NotAFunctionError(
                f"The loss is no function of its arguments. It was evaluated twice at one point, on one batch and with "
                f"one state of torch's random numbers: with other tensors in the modules, and with the same values in "
                f"the modules' own parameters. {name[0].upper()}{name[1:]} differs by {difference / length:.2g} of its "
                "size, so responses would differentiate another function. The usual reasons: random numbers of a "
                "generator of its own; a hook on a parameter; a parameter that the loss reads from outside of its "
                "arguments, or a copy of one that it keeps; a counter or another state that each call changes. "
                "Engine(check=False) turns this check off.",
                level=level.name,
                where=level.loss.where,
            )
