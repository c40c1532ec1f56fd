"""Optimizer steps as functions.

Example:
    >>> weight = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> sgd = torch.optim.SGD([weight], lr=0.1)
    >>> (new,), state = nestor.optim.functional_step(sgd, [weight], [weight], None)
    >>> torch.autograd.grad(new.sum(), weight)  # the derivative of weight - 0.1 weight
    (tensor([0.9000, 0.9000]),)
"""

from nestor.optim.functional_step import functional_step, optimizer_state
from nestor.optim.registered import register_rule

__all__ = ["functional_step", "optimizer_state", "register_rule"]
