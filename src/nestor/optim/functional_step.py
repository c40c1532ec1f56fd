"""One differentiable step of any torch optimizer."""

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import ASGD, Optimizer, Rprop

from nestor.errors import typed
from nestor.optim.rules import apply_rule, copy_slot, optimizer_groups, rule_of
from nestor.optim.steppable import DoublePowers, Steppable
from nestor.vectors import Params, split

OptimizerState: TypeAlias = Sequence[Mapping[str, Any]]
"""The state of an optimizer, one mapping for each parameter, in the order of its ``param_groups``."""

Groups: TypeAlias = Sequence[Mapping[str, Any]]
"""Hyperparameters, one mapping for each of the optimizer's ``param_groups``."""


def functional_step(
    optimizer: Optimizer,
    params: Params,
    grads: Sequence[Tensor | None],
    state: OptimizerState | None,
    *,
    groups: Groups | None = None,
) -> tuple[list[Tensor], list[dict[str, Any]]]:
    r"""Take one step of a ``torch.optim`` optimizer as a pure, differentiable function.

    .. math:: (\theta_{t+1}, s_{t+1}) = \text{Step}(\theta_t, g_t, s_t; \eta)

    SGD, Adam, AdamW, RMSprop and Adagrad are computed in closed form. Any other optimizer runs torch's own step
    (``differentiable=True``) on copies. All options are supported: momentum, Nesterov, dampening, amsgrad, centered,
    maximize, weight decay, parameter groups. The result is differentiable, to any order, in ``params``, ``grads``,
    ``state`` and every hyperparameter that is a tensor with ``requires_grad``. If all gradients so far are zero, the
    derivative of the square root at zero is set to zero, its one-sided limit within the step.

    Args:
        optimizer: Determines the rule and the hyperparameters. Its parameters, state and options do not change.
        params: The parameters, in the order of ``optimizer.param_groups``; the optimizer's own are not read.
        grads: One gradient for each parameter; None leaves the parameter unchanged, as in torch.
        state: None at the first step, then the state that the last step returned. :func:`optimizer_state` returns the
            optimizer's current state.
        groups: Hyperparameters that replace the optimizer's, one mapping for each parameter group. Missing names keep
            the optimizer's values.

    Returns:
        The new parameters and the new state.

    Raises:
        TypeError: If the optimizer has no differentiable step: LBFGS, SparseAdam, Adafactor, Muon, or one that updates
            under ``no_grad``.
        ValueError: If the number of tensors differs from the number of the optimizer's parameters.

    Example:
        >>> lr = torch.tensor(0.1, requires_grad=True)
        >>> optimizer = torch.optim.SGD([weight], lr=lr)
        >>> (gradient,) = torch.autograd.grad(loss(weight), weight, create_graph=True)
        >>> (new,), state = nestor.optim.functional_step(optimizer, [weight], [gradient], None)
        >>> torch.autograd.grad(loss(new), lr)
    """
    _check_arguments(optimizer, params, grads, state, groups)
    check_differentiable(optimizer)
    groups = optimizer_groups(optimizer) if groups is None else _complete(optimizer, groups)
    rule = rule_of(optimizer, groups)
    if rule is not None:
        slots: OptimizerState = [{}] * len(params) if state is None else state
        sizes = _check_sizes(optimizer, params, slots)
        rows = [group for group, size in zip(groups, sizes, strict=True) for _ in range(size)]
        return apply_rule(rule, params, grads, slots, rows)
    learned = any(_is_learned(value) for group in groups for value in group.values())
    # With learned hyperparameters, torch's SGD changes the gradient in place: copy it.
    grads = [None if g is None else Steppable.copy_of(g) if learned else Steppable.view_of(g) for g in grads]
    new = [Steppable.copy_of(p) for p in params]
    for parameter, grad in zip(new, grads, strict=len(new) == len(grads)):
        if parameter.requires_grad:
            parameter.retain_grad()  # a clone is no leaf, and torch warns about reading its .grad
        parameter.grad = grad
    wrapped = [_wrap(slot) for slot in state] if state is not None else [{} for _ in new]
    groups = [_wrap({**group, **_OPTIONS}) for group in groups]
    stepper = _stepper(optimizer, new, wrapped, groups)
    _seed_learned_rates(stepper)
    stepper.defaults = {**optimizer.defaults, **_OPTIONS}
    # The method of the class: a scheduler replaces the method of the instance, to count its calls.
    with DoublePowers():
        type(optimizer).step(stepper)
    _check_attached(optimizer, new, params, grads)
    for parameter in new:
        parameter.grad = None
    return [_plain(p) for p in new], [_unwrap(stepper.state[p]) for p in new]


def _check_arguments(optimizer: object, params: object, grads: object, state: object, groups: object) -> None:
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"functional_step(optimizer=...) must be an Optimizer, got {type(optimizer).__name__}.")
    for name, value, kind, of in (
        ("params", params, Tensor, "tensors"),
        ("grads", grads, Tensor | None, "tensors, None for a parameter without a gradient"),
        ("state", state, Mapping, "mappings, one for each parameter, or None"),
        ("groups", groups, Mapping, "mappings, one for each parameter group, or None"),
    ):
        if value is None and kind is Mapping:
            continue
        if not isinstance(value, list | tuple) or not all(isinstance(entry, kind) for entry in value):
            raise TypeError(f"functional_step({name}=...) must be a list of {of}, got {type(value).__name__}.")
        held = [group["params"] for group in optimizer.param_groups]
        count, what = (len(held), "groups") if name == "groups" else (sum(map(len, held)), "parameters")
        if len(value) != count:
            raise ValueError(
                f"{type(optimizer).__name__} holds {count} {what}, and the step was given {len(value)} in {name}. "
                "Pass one of each for every parameter of the optimizer; of groups, one for every parameter group."
            )


def plain_step(
    optimizer: Optimizer,
    params: Params,
    grads: Sequence[Tensor | None],
    state: OptimizerState | None,
    *,
    groups: Groups | None = None,
) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Take the step of :func:`functional_step` without a derivative, bitwise as ``optimizer.step()``, on copies."""
    groups = optimizer_groups(optimizer) if groups is None else _complete(optimizer, groups)
    with torch.no_grad():
        new = [p.detach().clone() for p in params]
        for parameter, grad in zip(new, grads, strict=True):
            parameter.grad = None if grad is None else grad.detach()
        slots = [copy_slot(slot) for slot in state] if state is not None else [{} for _ in new]
        stepper = _stepper(optimizer, new, slots, groups)
        type(optimizer).step(stepper)
        for parameter in new:
            parameter.grad = None
        return new, [dict(stepper.state[p]) for p in new]


@typed
def optimizer_state(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Copy the optimizer's current state, in the form that :func:`functional_step` accepts."""
    return [copy_slot(optimizer.state.get(p, {})) for group in optimizer.param_groups for p in group["params"]]


def check_differentiable(optimizer: Optimizer) -> None:
    """Check that an optimizer of torch has a differentiable step.

    Raises:
        TypeError: If it has none.
    """
    kind = type(optimizer)
    if kind.__module__.startswith("torch.optim") and "differentiable" not in optimizer.defaults:
        raise TypeError(
            f"{kind.__name__} has no differentiable step (it has no 'differentiable' option in torch). Use an "
            "optimizer with that option, such as SGD, Adam, AdamW, RMSprop or Adagrad, or write the update rule "
            "yourself: Problem(update=...)."
        )


_OPTIONS = {"differentiable": True, "foreach": False, "fused": None, "capturable": False}


def _stepper(
    optimizer: Optimizer, params: Params, slots: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]
) -> Optimizer:
    """Return a copy of the optimizer with other parameters, state and hyperparameters."""
    sizes = _check_sizes(optimizer, params, slots)
    stepper = copy.copy(optimizer)  # without the user's hooks, which run for the real steps only
    pieces = split(params, sizes)
    stepper.param_groups = [{**group, "params": piece} for group, piece in zip(groups, pieces, strict=True)]
    stepper.state = defaultdict(dict)
    for parameter, slot in zip(params, slots, strict=True):
        if slot:
            stepper.state[parameter] = dict(slot)
    return stepper


def _check_sizes(optimizer: Optimizer, params: Params, slots: Sequence[Mapping[str, Any]]) -> list[int]:
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    if not sum(sizes) == len(params) == len(slots):
        raise ValueError(
            f"{type(optimizer).__name__} holds {sum(sizes)} parameters, and the step was given {len(params)} "
            f"parameters and {len(slots)} states. Pass one of each for every parameter of the optimizer."
        )
    return sizes


def _complete(optimizer: Optimizer, groups: Groups) -> list[dict[str, Any]]:
    return [{**own, **changed} for own, changed in zip(optimizer_groups(optimizer), groups, strict=True)]


def _is_learned(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _seed_learned_rates(stepper: Optimizer) -> None:
    """Initialize the states that depend on a learned rate, which torch would read as a single-precision number."""
    if not isinstance(stepper, ASGD | Rprop):
        return
    for group in stepper.param_groups:
        for parameter in group["params"] if isinstance(group["lr"], Tensor) else ():
            if parameter.grad is not None and not stepper.state[parameter]:
                zeros, zero = torch.zeros_like(parameter), torch.zeros(())
                stepper.state[parameter] = (
                    {"step": zero, "eta": group["lr"].clone(), "mu": zero + 1, "ax": zeros}
                    if isinstance(stepper, ASGD)
                    else {"step": zero, "prev": zeros, "step_size": zeros + group["lr"]}
                )


def _check_attached(optimizer: Optimizer, new: Params, old: Params, grads: Sequence[Tensor | None]) -> None:
    """Raise an error if the optimizer has changed a parameter under ``no_grad``."""
    if not torch.is_grad_enabled():
        return
    for after, before, grad in zip(new, old, grads, strict=True):
        if grad is None or not (grad.requires_grad or before.requires_grad):
            continue
        untouched = type(after.grad_fn).__name__ in ("CloneBackward0", "NoneType")
        if untouched and not torch.equal(after, before):
            raise TypeError(
                f"{type(optimizer).__name__} changes its parameters under no_grad and ignores differentiable=True, so "
                "its step has no derivative. Use an optimizer of torch.optim, such as SGD, Adam or AdamW, or write the "
                "update rule yourself: Problem(update=...)."
            )


def _wrap(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: Steppable.copy_of(v) if isinstance(v, Tensor) else copy.copy(v) for key, v in values.items()}


def _unwrap(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _plain(value) for key, value in values.items()}


def _plain(value: Any) -> Any:
    return value.plain() if isinstance(value, Steppable) else value
