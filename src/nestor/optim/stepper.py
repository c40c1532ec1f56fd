"""Copies of an optimizer that step other tensors, with all attributes that the optimizer's class has added."""

import copy
import functools
import inspect
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from nestor.vectors import Params, split

Slots: TypeAlias = Sequence[Mapping[str, Any]]
Groups: TypeAlias = Sequence[Mapping[str, Any]]

REMEDY = "write the update rule yourself: Problem(update=...), or nestor.optim.register_rule for its class"

# The key, in the memory of the first variable, of the numbers that a step has changed outside of the optimizer's state.
_MOVED = "numbers of the optimizer"


def is_of_torch(optimizer: Optimizer) -> bool:
    """Return whether the class of an optimizer is one of ``torch.optim``; these keep everything in their state."""
    return type(optimizer).__module__.startswith("torch.optim")


def copy_of(optimizer: Optimizer) -> Optimizer:
    """Copy an optimizer, with its attributes and without its hooks; parameters, state and attributes are shared.

    ``copy.copy`` loses the attributes: torch pickles defaults, state and parameter groups only.
    """
    new: Optimizer = object.__new__(type(optimizer))
    Optimizer.__setstate__(new, Optimizer.__getstate__(optimizer))
    for name, value in attributes_of(optimizer).items():
        setattr(new, name, value)
    return new


def stepper_of(optimizer: Optimizer, params: Params, slots: Slots, groups: Groups) -> Optimizer:
    """Copy an optimizer to step other parameters, with other state and hyperparameters.

    Its attributes are copied deeply, with the new parameters in place of the old ones: a step of the copy changes
    nothing of the optimizer.

    Raises:
        TypeError: If an attribute cannot be copied.
        ValueError: If the number of tensors differs from the number of the optimizer's parameters.
    """
    sizes = check_sizes(optimizer, params, slots)
    stepper: Optimizer = object.__new__(type(optimizer))
    Optimizer.__setstate__(stepper, Optimizer.__getstate__(optimizer))
    known = _known(optimizer, params)
    known[id(optimizer)] = stepper
    copy_attributes(optimizer, stepper, known)
    groups = [dict(group) for group in groups]
    for place, (given, now) in next((slot[_MOVED] for slot in slots if _MOVED in slot), {}).items():
        # A value that is not the one that the last step was given has been changed since, by a scheduler or by the
        # real step: it holds.
        if isinstance(place, str):
            if attributes_of(optimizer).get(place) == given:
                setattr(stepper, place, now)
        elif groups[place[0]].get(place[1]) == given:
            groups[place[0]][place[1]] = now
    stepper.param_groups = [
        {**group, "params": piece} for group, piece in zip(groups, split(params, sizes), strict=True)
    ]
    stepper.state = defaultdict(dict)
    for parameter, slot in zip(params, slots, strict=True):
        if kept := {key: value for key, value in slot.items() if key != _MOVED}:
            stepper.state[parameter] = kept
    return stepper


def copy_attributes(optimizer: Optimizer, other: Optimizer, known: dict[int, Any]) -> None:
    """Copy the attributes of an optimizer deeply to another one; ``known`` are copies by identity, as for deepcopy.

    Raises:
        TypeError: If an attribute cannot be copied.
    """
    for name, value in attributes_of(optimizer).items():
        try:
            setattr(other, name, copy.deepcopy(value, known))
        except Exception as error:
            raise TypeError(
                f"{type(optimizer).__name__} has an attribute {name!r} of type {type(value).__name__} that cannot be "
                f"copied ({error}), so its step is no function. Keep tensors in the optimizer's state, or {REMEDY}."
            ) from None


def take(stepper: Optimizer, optimizer: Optimizer) -> None:
    """Take the step of a copy.

    Raises:
        TypeError: If it draws random numbers.
    """
    # The method of the class: a scheduler replaces the method of the instance, to count its calls.
    step = type(optimizer).step
    if is_of_torch(optimizer):
        step(stepper)
        return
    before = torch.get_rng_state()
    step(stepper)
    if not torch.equal(before, torch.get_rng_state()):
        torch.set_rng_state(before)
        raise TypeError(
            f"the step of {type(optimizer).__name__} draws random numbers, and a replay of the step would draw others. "
            f"Draw them in the loss, or {REMEDY}."
        )


def slots_after(stepper: Optimizer, optimizer: Optimizer, params: Params, groups: Groups) -> list[dict[str, Any]]:
    """Return the memory after a step of a copy: its state, and the numbers that differ from those it was given.

    Args:
        stepper: The copy, after the step.
        optimizer: The optimizer.
        params: The parameters of the copy.
        groups: The hyperparameters that the copy was given.

    Raises:
        TypeError: If the step has changed something else, which no state contains.
    """
    slots = [dict(stepper.state.get(p, {})) for p in params]
    if is_of_torch(optimizer):
        return slots
    kind = type(optimizer).__name__
    own = {id(p) for p in params}
    if strange := [key for key in stepper.state if id(key) not in own]:
        raise TypeError(
            f"the step of {kind} keeps a state under {strange[0]!r}, which is no parameter, so a replay of the step "
            f"does not see it. Keep it in the state of a parameter or in param_groups, or {REMEDY}."
        )
    before: dict[Any, Any] = dict(attributes_of(optimizer))
    after: dict[Any, Any] = dict(attributes_of(stepper))
    for index, (given, group) in enumerate(zip(groups, stepper.param_groups, strict=True)):
        before |= {(index, key): value for key, value in given.items()}
        after |= {(index, key): value for key, value in group.items() if key != "params"}
    known = _known(optimizer, params)
    moved = {}
    for place, now in after.items():
        if place in before and _is_same(before[place], now, known):
            continue
        if not isinstance(now, int | float | str | None):
            name = f"its attribute {place!r}" if isinstance(place, str) else f"the hyperparameter {place[1]!r}"
            raise TypeError(
                f"the step of {kind} changes {name}, which is not in the optimizer's state, so a replay of the step "
                f"does not see it. Keep it in self.state[parameter], or {REMEDY}."
            )
        moved[place] = (before.get(place), now)
    if moved:
        slots[0][_MOVED] = moved
    return slots


def check_sizes(optimizer: Optimizer, params: Params, slots: Slots) -> list[int]:
    """Return the number of parameters of each group; raise ValueError if other numbers of tensors are given."""
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    if not sum(sizes) == len(params) == len(slots):
        raise ValueError(
            f"{type(optimizer).__name__} holds {sum(sizes)} parameters, and the step was given {len(params)} "
            f"parameters and {len(slots)} states. Pass one of each for every parameter of the optimizer."
        )
    return sizes


def check_attributes(optimizer: Optimizer) -> None:
    """Check that no attribute of an optimizer replaces its step, or holds a tensor that is learned.

    Raises:
        TypeError: If one does.
    """
    kind = type(optimizer)
    # A scheduler replaces the step by a wrapper of the same function, to count its calls.
    if inspect.unwrap(optimizer.step) is not inspect.unwrap(kind.step):
        raise TypeError(
            f"the step of this {kind.__name__} has been replaced on the instance, and only the step of the class is "
            f"differentiated. Override step in a subclass, or {REMEDY}."
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, value in attributes_of(optimizer).items():
        if any(isinstance(part, Tensor) and part.requires_grad for part in _parts(value, set(held))):
            raise TypeError(
                f"{kind.__name__} has an attribute {name!r} that requires a gradient, and only parameters, gradients, "
                f"state and param_groups are differentiated. Make it an entry of param_groups, or {REMEDY}."
            )


def check_whole(optimizer: Optimizer) -> None:
    """Check that an optimizer has what ``torch.optim.Optimizer`` gives it, and is no wrapper that pretends to be one.

    Raises:
        TypeError: If it has not, with the optimizer inside if there is one.
    """
    # A copy of an optimizer has fewer attributes than the constructor sets.
    missing = vars(copy.deepcopy(torch.optim.SGD([torch.zeros(1)]))).keys() - vars(optimizer).keys()
    if not missing:
        return
    kind = type(optimizer).__name__
    inside = next((name for name, value in vars(optimizer).items() if isinstance(value, Optimizer)), None)
    remedy = (
        f"It wraps the optimizer that it holds in its attribute {inside!r}: pass that one, optimizer.{inside}"
        if inside is not None
        else "Call super().__init__(params, defaults) in its constructor"
    )
    raise TypeError(
        f"{kind} is no whole torch.optim.Optimizer: it has no {min(missing)!r}, which Optimizer.__init__ sets. "
        f"{remedy}."
    )


def attributes_of(optimizer: Optimizer) -> dict[str, Any]:
    """Return the attributes that the class of an optimizer has added to those of ``torch.optim.Optimizer``."""
    if is_of_torch(optimizer):
        return {}
    state: Any = object.__getstate__(optimizer)  # of the instance; the class may override it
    named, slotted = state if isinstance(state, tuple) else (state, {})
    return {key: value for key, value in {**named, **slotted}.items() if key not in _torch_names()}


@functools.cache
def _torch_names() -> frozenset[str]:
    """List the attributes that torch itself gives to an optimizer with a scheduler."""
    optimizer = torch.optim.SGD([torch.zeros(1)])
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    optimizer.step()
    return frozenset(vars(optimizer))


def _known(optimizer: Optimizer, params: Params) -> dict[int, Any]:
    """Map the identity of each parameter of an optimizer to the parameter that replaces it."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    return {id(p): q for p, q in zip(held, params, strict=True)}


def _is_same(old: Any, new: Any, known: Mapping[int, Any]) -> bool:
    """Return whether two objects hold equal values, apart from the parameters that were replaced."""
    if old is new:
        return True
    one, two = list(_parts(old, set(known))), list(_parts(new, {id(q) for q in known.values()}))
    return len(one) == len(two) and all(map(_is_equal, one, two))


def _is_equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a.as_subclass(Tensor), b.as_subclass(Tensor).to(a.dtype))
    same = a == b
    return same if isinstance(same, bool) else bool(same.all())  # numpy's arrays compare entry by entry


def _parts(value: Any, seen: set[int]) -> Iterator[Any]:
    """Iterate over the tensors, numbers and other values that an object holds; functions hold none."""
    if id(value) in seen or isinstance(value, _FUNCTIONS):
        return
    if isinstance(value, Tensor | int | float | complex | str | bytes | set | frozenset | None):
        yield value
    elif isinstance(value, torch.Generator):
        yield value.get_state()
    else:
        seen.add(id(value))
        for part in _children(value):
            if part is value:
                yield part
            else:
                yield from _parts(part, seen)


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return [part for pair in value.items() for part in pair]
    if isinstance(value, Sequence):
        return value
    try:
        state = object.__getstate__(value)
    except TypeError:  # an object of C, such as a lock
        return ()
    if state is not None:
        return state if isinstance(state, tuple) else (state,)
    # Without attributes: an array of numpy, for example, can be compared; other objects have nothing to compare.
    return () if "__eq__" not in {name for kind in type(value).__mro__[:-1] for name in vars(kind)} else (value,)


_FUNCTIONS = (type, FunctionType, MethodType, BuiltinFunctionType, ModuleType, functools.partial)
