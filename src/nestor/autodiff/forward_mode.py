"""Forward mode: dual numbers, and what makes a loss treat them as tensors that require gradients."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class DualMode(TorchFunctionMode):
    """Lets numbers that carry tangents pass for tensors that require gradients, without the memory of a graph.

    ``torch.no_grad()`` inside a loss stops tangents, as it stops gradients; ``requires_grad``, by which losses choose
    what they decay, is true; and a product with a matrix is one product, as it is with a matrix that requires gradients
    (torch repeats one that does not for every row of a batch that is not contiguous: six times as slow).
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch._C._set_grad_enabled:
            torch._C._set_fwd_grad_enabled(args[0])
        elif func == REQUIRES_GRAD:
            return func(*args) or forward_ad.unpack_dual(args[0]).tangent is not None  # type: ignore[no-untyped-call]
        elif func in _PRODUCTS:
            dense: dict[int, Tensor] = {}  # attention looks whether two of its arguments are one
            args = tuple(dense.setdefault(id(a), a.contiguous()) if _is_batch(a) else a for a in args)
        return func(*args, **(kwargs or {}))


def _is_batch(argument: Any) -> bool:
    return isinstance(argument, Tensor) and argument.dim() > 2


_PRODUCTS = (F.linear, F.multi_head_attention_forward)
# Reads a tensor's requires_grad.
REQUIRES_GRAD = torch.Tensor.requires_grad.__get__  # type: ignore[attr-defined]


@functools.cache
def load_rules() -> None:
    """Let torch load its forward-mode rules, which warn of torch's own deprecations, before anything is computed."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", DeprecationWarning)
        dual(torch.zeros(()), torch.zeros(()))


def dual(primal: Tensor, direction: Tensor) -> Tensor:
    """Make a dual number."""
    made: Tensor = forward_ad.make_dual(primal, direction)  # type: ignore[no-untyped-call]
    return made


def tangent(number: Tensor) -> Tensor:
    """Read the tangent of a number, zero if it is not dual."""
    found: Tensor | None = forward_ad.unpack_dual(number).tangent  # type: ignore[no-untyped-call]
    return torch.zeros_like(number) if found is None else found.detach()


def primal(number: Tensor) -> Tensor:
    """Read the value of a number without its tangent."""
    found: Tensor = forward_ad.unpack_dual(number).primal  # type: ignore[no-untyped-call]
    return found.detach()
