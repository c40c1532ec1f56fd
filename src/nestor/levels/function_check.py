"""The check that a loss is a function of its arguments."""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from nestor.autodiff.grad import grad
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
            value, grads = _elsewhere(loss, names, displaced, draw)
        except NestorError:
            raise
        except Exception:
            # The displaced point may lie outside of the domain of the loss: its own evaluation reports real errors.
            return
        try:
            real_value, real_grads = _in_place(loss, own, displaced, draw)
        except Exception as error:
            note(error, f"level {level.name!r}, loss {loss.where}, in the check at a first step of a level above")
            raise
    _compare(level, [value], [real_value], ["its value"])
    places = [(name, index) for name in names for index in range(len(loss.variables[name]))]
    ours, theirs = algebra.zeros_for_none(grads, displaced), algebra.zeros_for_none(real_grads, displaced)
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
    """Move every entry by a fixed pseudo-random relative amount that keeps its sign."""
    generator = torch.Generator().manual_seed(0)
    moved = []
    for tensor in tensors:
        amount = (_DISPLACEMENT * torch.rand(tensor.shape, generator=generator)).to(tensor)
        moved.append(torch.where(tensor == 0, 0.1 * amount, tensor.detach() * (1 + amount)))
    return moved


def _elsewhere(
    loss: LevelLoss, names: Sequence[str], displaced: Params, draw: Draw
) -> tuple[Tensor, list[Tensor | None]]:
    leaves = algebra.leaves(displaced)
    values = iter(leaves)
    tensors = {name: [next(values) for _ in loss.variables[name]] for name in names}
    with Scope():
        value = loss.pure_value(draw, tensors)
        return value.detach(), grad([value], leaves)


def _in_place(loss: LevelLoss, own: Params, displaced: Params, draw: Draw) -> tuple[Tensor, list[Tensor | None]]:
    with _values_replaced(own, displaced), Scope():
        value = loss.pure_value(draw, None)
        # ``backward`` also calls what ``autograd.grad`` does not: hooks after the accumulation of a gradient.
        value.backward(inputs=[p for p in own if p.requires_grad])  # type: ignore[no-untyped-call]
        return value.detach(), [p.grad for p in own]


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


def _compare(level: Level, found: Params, real: Params, names: Sequence[str]) -> None:
    pairs = [(a.detach().to_dense(), b.detach().to_dense()) for a, b in zip(found, real, strict=True)]
    lengths = [float(torch.linalg.vector_norm(a) + torch.linalg.vector_norm(b)) for a, b in pairs]
    whole = math.hypot(*lengths)
    for (a, b), length, name in zip(pairs, lengths, names, strict=True):
        difference, eps = float(torch.linalg.vector_norm(a - b)), torch.finfo(a.dtype).eps
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
