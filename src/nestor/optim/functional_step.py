"""One differentiable step of any torch optimizer."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import ASGD, Optimizer, Rprop

from nestor.autodiff.forward_mode import is_tracked
from nestor.errors import UnsupportedError
from nestor.errors.options import typed
from nestor.optim.copied_step import step_of_copy
from nestor.optim.hyperparameters import as_scalars, is_learned, replaced, tensors_in
from nestor.optim.registered import check_registered, registered_rule, registered_step
from nestor.optim.rules import apply_rule, copy_slot, optimizer_groups, rule_of
from nestor.optim.steppable import Hyperparameter, Steppable, Stepping, UntrackedError
from nestor.optim.stepper import (
    REMEDY,
    Slots,
    check_attributes,
    check_sizes,
    is_of_torch,
    slots_after,
    stepper_of,
    take,
)
from nestor.vectors import Params

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

    SGD, Adam, AdamW, RMSprop and Adagrad are computed in closed form. Any other optimizer runs its own step
    (``differentiable=True``) on a copy with all its attributes; numbers that the step changes, such as a counter, are
    part of the returned state. All options are supported: momentum, Nesterov, dampening, amsgrad, centered,
    maximize, weight decay, parameter groups. The result is differentiable, to any order, in ``params``, ``grads``,
    ``state`` and every hyperparameter that is a tensor of one number with ``requires_grad``, also inside a tuple
    (``betas``). If all gradients so far are zero, the
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
        TypeError: If the optimizer has no differentiable step: LBFGS, SparseAdam, Adafactor, Muon, or one that computes
            under ``no_grad`` or with ``.data``, and none is registered (:func:`register_rule`); or if its step changes
            an attribute that is no number.
        ValueError: If the number of tensors differs from the number of the optimizer's parameters.
        UnsupportedError: If a learned momentum is zero.

    Example:
        >>> weight, lr = torch.tensor([3.0], requires_grad=True), torch.tensor(0.1, requires_grad=True)
        >>> optimizer = torch.optim.SGD([weight], lr=lr)
        >>> loss = lambda w: (w**2).sum()
        >>> (gradient,) = torch.autograd.grad(loss(weight), weight, create_graph=True)
        >>> (new,), state = nestor.optim.functional_step(optimizer, [weight], [gradient], None)
        >>> torch.autograd.grad(loss(new), lr)  # -2 new * gradient = -2 * 2.4 * 6
        (tensor(-28.8000),)
    """
    _check_arguments(optimizer, params, grads, state, groups)
    check_differentiable(optimizer)
    groups = optimizer_groups(optimizer) if groups is None else _complete(optimizer, groups)
    slots: Slots = [{}] * len(params) if state is None else state
    sizes = check_sizes(optimizer, params, slots)
    learned = is_learned(groups)
    if learned:
        groups = [as_scalars(group, params[0]) for group in groups]
        _check_learned(optimizer, groups)
    rule = rule_of(optimizer)
    if rule is not None:
        rows = [group for group, size in zip(groups, sizes, strict=True) for _ in range(size)]
        return apply_rule(rule, params, grads, slots, rows)
    if (own := registered_rule(optimizer)) is not None:
        return registered_step(own, optimizer, params, grads, slots, groups)
    # With learned hyperparameters, torch's SGD changes the gradient in place: copy it.
    grads = [None if g is None else Steppable.copy_of(g) if learned else Steppable.view_of(g) for g in grads]
    new = [Steppable.copy_of(p) for p in params]
    for parameter, grad in zip(new, grads, strict=True):
        if parameter.requires_grad:
            parameter.retain_grad()  # a clone is no leaf, and torch warns about reading its .grad
        parameter.grad = grad
    groups = [{**group, **_OPTIONS} for group in groups]
    stepper = stepper_of(optimizer, new, [_wrap(slot) for slot in slots], [_learnable(group) for group in groups])
    _seed_learned_rates(stepper)
    stepper.defaults = {**optimizer.defaults, **_OPTIONS}
    try:
        with Stepping():
            take(stepper, optimizer)
    except UntrackedError as error:
        raise TypeError(
            f"{type(optimizer).__name__} {error}, so its step has no derivative. Use an optimizer of torch.optim, such "
            f"as SGD, Adam or AdamW, or {REMEDY}."
        ) from None
    after = slots_after(stepper, optimizer, new, groups)
    for parameter in new:
        parameter.grad = None
    return [_plain(p) for p in new], [_unwrap(slot) for slot in after]


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
    slots: Slots = [{}] * len(params) if state is None else state
    new, after, _ = step_of_copy(optimizer, params, grads, slots, groups)
    return new, after


@typed
def optimizer_state(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Copy the optimizer's current state, in the form that :func:`functional_step` accepts.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> adam = torch.optim.Adam([weight], lr=0.1)
        >>> weight.grad = torch.ones(1)
        >>> adam.step()
        >>> state = nestor.optim.optimizer_state(adam)
        >>> (new,), state = nestor.optim.functional_step(adam, [weight.detach()], [torch.ones(1)], state)
        >>> new
        tensor([0.8000])
    """
    return [copy_slot(optimizer.state.get(p, {})) for group in optimizer.param_groups for p in group["params"]]


def check_differentiable(optimizer: Optimizer) -> None:
    """Check that an optimizer of torch has a differentiable step.

    Raises:
        TypeError: If it has none.
    """
    known = "differentiable" in optimizer.defaults or registered_rule(optimizer) is not None
    if is_of_torch(optimizer) and not known:
        raise TypeError(
            f"{type(optimizer).__name__} has no differentiable step (it has no 'differentiable' option in torch). Use "
            f"an optimizer with that option, such as SGD, Adam, AdamW, RMSprop or Adagrad, or {REMEDY}."
        )


def check_step(optimizer: Optimizer, *, derivative: bool) -> None:
    """Check that the step of an optimizer is a function, and with ``derivative`` a differentiable one.

    The step of an optimizer that is not one of torch is taken on copies, on gradients of ones; nothing changes.

    Raises:
        TypeError: If it is not.
    """
    if derivative:
        check_differentiable(optimizer)
    check_attributes(optimizer)
    rule = registered_rule(optimizer) if derivative else None
    if rule is None and is_of_torch(optimizer):
        return
    params = [p.detach().clone().requires_grad_() for group in optimizer.param_groups for p in group["params"]]
    grads = [torch.ones_like(p).requires_grad_() for p in params]
    kind = type(optimizer).__name__
    try:
        if rule is not None:
            check_registered(rule, optimizer)
        with torch.enable_grad():
            plain, _ = plain_step(optimizer, params, grads, optimizer_state(optimizer))
            found = plain
            if derivative:
                found, _ = functional_step(optimizer, params, grads, optimizer_state(optimizer))
    except TypeError:
        raise
    except Exception as error:
        raise TypeError(f"a step of {kind} on copies of its parameters fails ({error}): {REMEDY}.") from error
    if not all(torch.allclose(p, q, rtol=1e-4, equal_nan=True) for p, q in zip(plain, found, strict=True)):
        raise TypeError(f"the step of {kind} with differentiable=True differs from its step without: {REMEDY}.")


def is_elementwise(optimizer: Optimizer) -> bool:
    """Return whether a first step on one half of every parameter equals that half of the step on the whole."""
    params = [p.detach().flatten() for group in optimizer.param_groups for p in group["params"]]
    grads = [torch.arange(1.0, p.numel() + 1, dtype=p.dtype, device=p.device).sin() for p in params]
    like = [p for group in optimizer.param_groups for p in group["params"]]
    whole, _ = plain_step(
        optimizer,
        [p.view_as(q) for p, q in zip(params, like, strict=True)],
        [g.view_as(q) for g, q in zip(grads, like, strict=True)],
        None,
    )
    half, _ = plain_step(
        optimizer, [p[: (len(p) + 1) // 2] for p in params], [g[: (len(g) + 1) // 2] for g in grads], None
    )
    return all(torch.allclose(w.flatten()[: len(h)], h, equal_nan=True) for w, h in zip(whole, half, strict=True))


_OPTIONS = {"differentiable": True, "foreach": False, "fused": None, "capturable": False}


def _complete(optimizer: Optimizer, groups: Groups) -> list[dict[str, Any]]:
    return [{**own, **changed} for own, changed in zip(optimizer_groups(optimizer), groups, strict=True)]


def _check_learned(optimizer: Optimizer, groups: Groups) -> None:
    for group in groups:
        momentum = group.get("momentum")
        if isinstance(momentum, Tensor) and is_tracked(momentum) and momentum.item() == 0:
            raise UnsupportedError(
                f"{type(optimizer).__name__} has a learned momentum that is zero. Torch keeps no momentum buffer then, "
                f"so the derivative is not known. Start from a small positive number, or {REMEDY}."
            )


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


def _wrap(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: Steppable.copy_of(v) if isinstance(v, Tensor) else copy.copy(v) for key, v in values.items()}


def _learnable(group: Mapping[str, Any]) -> dict[str, Any]:
    """Copy a parameter group, with learned hyperparameters that torch's code treats as numbers other than zero."""
    return replaced(group, {path: Hyperparameter.copy_of(value) for path, value in tensors_in(group)})


def _unwrap(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _plain(value) for key, value in values.items()}


def _plain(value: Any) -> Any:
    return value.plain() if isinstance(value, Steppable) else value
