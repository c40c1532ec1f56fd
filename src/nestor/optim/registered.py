"""Update rules that a program registers for classes of optimizers, whose own steps cannot be differentiated."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from nestor.errors.options import typed
from nestor.optim.copied_step import step_of_copy
from nestor.optim.hyperparameters import as_numbers, tensors_in
from nestor.optim.rules import Rule, apply_rule, rule_of
from nestor.optim.stepper import Groups, Slots
from nestor.vectors import Params, split

_REGISTERED: dict[type[Optimizer], Rule] = {}

# Both steps compute the same formula, in another order of operations. Relative to the step, or to the state.
_TOLERANCE = 1e-2
# Among so many entries, one may differ.
_FEW = 20
# The finite difference of the check is central, in double precision: its error is about the square of the step.
_DIFFERENCE, _OF_DERIVATIVE = 1e-6, 1e-3
# The check of a rule takes the first entries of each dimension of a variable.
_ENTRIES = 4


@typed
def register_rule(kind: type[Optimizer], rule: Rule) -> None:
    r"""Tell nestor the update rule of a class of optimizers, so that responses can differentiate its steps.

    .. math:: (\theta_{t+1}, s_{t+1}) = \text{rule}(\theta_t, g_t, s_t; \eta)

    ``Unrolled``, ``SAMA``, learned hyperparameters and :func:`functional_step` need the derivative of a step. Many
    optimizers of other packages step under ``torch.no_grad()``, and have none. A run still takes the optimizer's own
    steps; the rule gives their derivative.

    The rule is compared with the optimizer: before the first step, the values and the derivative of two steps on a few
    entries of each variable (the derivative in double precision, against a finite difference); and the values of every
    step that is differentiated. The registration is valid for the whole process.

    Args:
        kind: The class. Its subclasses are other classes.
        rule: ``rule(parameter, gradient, slot, group) -> (parameter, slot)``, a differentiable function for one
            parameter that changes none of its arguments. ``slot`` is the optimizer's state of the parameter, empty
            before its first step. ``group`` holds the hyperparameters before the step; a learned one is a tensor of one
            number. The slot that is returned has the tensors that the optimizer's state has after the step. Numbers,
            of the state or of the hyperparameters, that the step changes (a counter) are those of the optimizer; they
            must not depend on the gradient.

    Raises:
        ValueError: If nestor has a closed form of the class's rule: SGD, Adam, AdamW, RMSprop and Adagrad.
        TypeError: If ``kind`` is no class of optimizers. Where a program is built, and in a step: if the rule differs
            from the optimizer's step.

    Example:
        >>> class Signed(torch.optim.Optimizer):
        ...     def __init__(self, params, lr):
        ...         super().__init__(params, {"lr": lr})
        ...     @torch.no_grad()
        ...     def step(self):
        ...         for group in self.param_groups:
        ...             for p in group["params"]:
        ...                 p.sub_(group["lr"] * p.grad.tanh())
        >>> def signed(parameter, gradient, slot, group):
        ...     return parameter - group["lr"] * gradient.tanh(), slot
        >>> nestor.optim.register_rule(Signed, signed)
        >>> weight = torch.tensor([0.0, 1.0], requires_grad=True)
        >>> optimizer = Signed([weight], lr=0.1)
        >>> (new,), state = nestor.optim.functional_step(optimizer, [weight], [weight], None)
        >>> torch.autograd.grad(new.sum(), weight)
        (tensor([0.9000, 0.9580]),)
    """
    if not (isinstance(kind, type) and issubclass(kind, Optimizer)):
        raise TypeError(f"register_rule(kind={kind!r}) must be a class of optimizers.")
    if not callable(rule):
        raise TypeError(f"register_rule(rule={rule!r}) must be a function.")
    if rule_of(object.__new__(kind)) is not None:
        raise ValueError(f"register_rule(kind={kind.__name__}): nestor has the rule of this class already.")
    _REGISTERED[kind] = rule


def registered_rule(optimizer: Optimizer) -> Rule | None:
    """Return the rule that is registered for the class of an optimizer; None if there is none."""
    return _REGISTERED.get(type(optimizer))


def registered_step(
    rule: Rule, optimizer: Optimizer, params: Params, grads: Sequence[Tensor | None], slots: Slots, groups: Groups
) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Take a step by a registered rule, and compare it with the step of the optimizer on copies.

    Raises:
        TypeError: If the two differ.
    """
    own, memory, numbers = step_of_copy(optimizer, params, grads, slots, [as_numbers(group) for group in groups])
    # A counter among the hyperparameters is the optimizer's; a learned hyperparameter stays a tensor.
    learned = [{path[0] for path, _ in tensors_in(group)} for group in groups]
    present = [
        {**now, **{key: group[key] for key in keys}} for now, group, keys in zip(numbers, groups, learned, strict=True)
    ]
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    rows = [group for group, size in zip(present, sizes, strict=True) for _ in range(size)]
    after, found = apply_rule(rule, params, grads, slots, rows)
    kind = type(optimizer).__name__
    pairs = [(ours, theirs, (theirs - p).abs()) for ours, theirs, p in zip(after, own, params, strict=True)]
    _compare(kind, "the variables", pairs)
    kept = []
    for slot, state in zip(found, memory, strict=True):
        if missing := [name for name in _tensors(state) if not isinstance(slot.get(name), Tensor)]:
            raise TypeError(_different(kind, f"returns no tensor {missing[0]!r}, which the optimizer's state has"))
        kept.append({name: slot[name] for name in _tensors(state)})
    for name in {name for slot in kept for name in slot}:
        states = [(slot[name], state[name]) for slot, state in zip(kept, memory, strict=True) if name in slot]
        _compare(kind, f"{name!r} of the state", [(ours, theirs, theirs.abs()) for ours, theirs in states])
    return after, [{**state, **slot} for state, slot in zip(memory, kept, strict=True)]


def check_registered(rule: Rule, optimizer: Optimizer) -> None:
    """Compare two steps by a registered rule with two of the optimizer: their values, and their derivative.

    The steps are taken on copies of a few entries of each parameter, in double precision, from an empty state.

    Raises:
        TypeError: If they differ, or if a number that the step changes depends on the gradient.
    """
    held = [p for group in optimizer.param_groups for p in group["params"]]
    params = [_few(p).double() if p.is_floating_point() else _few(p) for p in held]
    groups = [
        as_numbers({key: value for key, value in group.items() if key != "params"}) for group in optimizer.param_groups
    ]
    # Two draws: the sign of a sum near zero may change between the two sides of a difference.
    wrong = [found for seed in range(2) if (found := _wrong_slope(rule, optimizer, params, groups, seed)) is not None]
    if len(wrong) == 2:
        raise TypeError(_different(type(optimizer).__name__, wrong[0]))


def _wrong_slope(rule: Rule, optimizer: Optimizer, params: Params, groups: Groups, seed: int) -> str | None:
    """Compare the derivatives of two steps in the variables and in either gradient; return what differs.

    Raises:
        TypeError: If the values differ, the rule has no graph, or a number that the step changes depends on the
            gradient.
    """
    draws, kind = torch.Generator().manual_seed(seed), type(optimizer).__name__

    def noise() -> list[Tensor]:
        return [torch.randn(p.shape, generator=draws, dtype=torch.float64).to(p) for p in params]

    def by_optimizer(theta: Params, gradient: Params, state: Slots) -> tuple[list[Tensor], Slots]:
        return step_of_copy(optimizer, theta, gradient, state, groups)[:2]

    def by_rule(theta: Params, gradient: Params, state: Slots) -> tuple[list[Tensor], Slots]:
        return registered_step(rule, optimizer, theta, gradient, state, groups)

    def steps(step: Any, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Slots]:
        theta, *grads = split(tensors, [len(params)] * 3)
        state: Slots = [{} for _ in params]
        for gradient in grads:
            theta, state = step(theta, gradient, state)
        return theta, state

    point, weights = [*params, *noise(), *noise()], noise()
    parts = [slice(place * len(params), (place + 1) * len(params)) for place in range(3)]
    directions, expected = [], []
    for part in parts:
        direction, sides = noise(), []
        for sign in (1, -1):
            shifted = list(point)
            shifted[part] = [p + sign * _DIFFERENCE * d for p, d in zip(point[part], direction, strict=True)]
            after, memory = steps(by_optimizer, shifted)
            # How far the steps go, which is small beside the variables themselves.
            sides.append(([a - s for a, s in zip(after, shifted, strict=False)], memory))
        (ahead, numbers), (behind, others) = sides
        if any(_numbers(one) != _numbers(two) for one, two in zip(numbers, others, strict=True)):
            raise TypeError(
                f"the step of {kind} changes numbers (of its state or its hyperparameters) that depend on the gradient,"
                " and a registered rule has no derivative of these. Keep them in tensors of the state."
            )
        directions.append(direction)
        expected.append([(a - b) * w / (2 * _DIFFERENCE) for a, b, w in zip(ahead, behind, weights, strict=True)])
    leaves = [p.detach().requires_grad_() for p in point]
    with torch.enable_grad():
        after, _ = steps(by_rule, leaves)
        if not any(a.requires_grad for a in after):
            raise TypeError(_different(kind, "gives variables without a graph"))
        value = torch.stack([((a - s) * w).sum() for a, s, w in zip(after, leaves, weights, strict=False)]).sum()
        found = torch.autograd.grad(value, leaves, allow_unused=True)
    names = ("the variables", "the gradient of a step", "the gradient of the next step")
    for part, direction, differences, name in zip(parts, directions, expected, names, strict=True):
        slope = sum(float((g * d).sum()) for g, d in zip(found[part], direction, strict=True) if g is not None)
        total, size = sum(float(d.sum()) for d in differences), sum(float(d.abs().sum()) for d in differences)
        if not abs(slope - total) <= _OF_DERIVATIVE * max(size, abs(slope)) + 1e-9:
            return f"has the slope {slope:.4g} in {name}, where a finite difference of the steps has {total:.4g}"
    return None


def _few(parameter: Tensor) -> Tensor:
    found = parameter.detach()
    for dim in range(found.dim()):
        found = found.narrow(dim, 0, min(_ENTRIES, found.shape[dim]))
    return found.clone()


def _tensors(values: Mapping[str, Any]) -> dict[str, Tensor]:
    return {key: value for key, value in values.items() if isinstance(value, Tensor)}


def _numbers(slot: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in slot.items() if not isinstance(value, Tensor)}


def _compare(kind: str, what: str, pairs: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Compare tensors entry by entry; each pair comes with the size that the difference is relative to.

    A rule may round in another order, and a sign of a sum near zero is then another one: few entries may differ.
    """
    wrong, entries = 0, 0
    for ours, theirs, size in pairs:
        if ours.shape != theirs.shape:
            raise TypeError(_different(kind, f"gives {what} the shape {tuple(ours.shape)}, not {tuple(theirs.shape)}"))
        eps = torch.finfo(theirs.dtype).eps if theirs.is_floating_point() or theirs.is_complex() else 0.0
        bound = _TOLERANCE * size + 16 * eps * theirs.abs().amax().clamp(min=1e-30) if theirs.numel() else size
        wrong += int((~((ours.detach() - theirs).abs() <= bound) & ~(ours.isnan() & theirs.isnan())).sum())
        entries += theirs.numel()
    if wrong > entries // 100 + (entries >= _FEW):
        raise TypeError(_different(kind, f"gives {what} other values than the step, in {wrong} of {entries} entries"))


def _different(kind: str, how: str) -> str:
    return (
        f"the rule that is registered for {kind} {how}. Give nestor.optim.register_rule({kind}, rule) the function "
        "that the step computes."
    )
