"""Forward mode: dual numbers, and a mode in which a loss treats them as tensors that require gradients."""

import functools
import warnings
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nestor.autodiff.torch_private import apply_grad_mode, are_tangents_enabled, enable_tangents


class DualMode(TorchFunctionMode):
    """Makes operations treat tensors with tangents like tensors that require gradients, without a graph.

    - ``torch.no_grad()`` inside a loss disables tangents, as it disables gradients.
    - ``requires_grad`` is true for a tensor with a tangent: some losses read it to choose which parameters they decay.
    - A batch that is not contiguous is copied before it is multiplied by a matrix. Without the copy, torch multiplies
      row by row if the matrix does not require gradients, which takes six times as long.
    """

    def __enter__(self) -> Any:
        """Save whether tangents are enabled."""
        self._tangents_before = are_tangents_enabled()
        self._changes: list[bool] = []
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        """Restore the flag of tangents. An error or a checkpoint may have left a ``no_grad`` context open."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        enable_tangents(self._tangents_before)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func == REQUIRES_GRAD:
            return func(*args) or _has_tangent(args[0])
        if func in _PRODUCTS:
            dense: dict[int, Tensor] = {}  # one copy per tensor: attention compares its arguments by identity
            args = tuple(dense.setdefault(id(a), a.contiguous()) if _is_batch(a) else a for a in args)
        args, kwargs = apply_grad_mode(func, args, kwargs or {}, self._changes)
        return func(*args, **kwargs)


def is_tracked(number: Tensor) -> bool:
    """Return whether a derivative is taken with respect to a tensor, in reverse or in forward mode."""
    return number.requires_grad or _has_tangent(number)


def _has_tangent(number: Tensor) -> bool:
    before = are_tangents_enabled()
    enable_tangents(True)  # inside torch.no_grad torch would not return the tangent
    found: Tensor | None = forward_ad.unpack_dual(number).tangent  # type: ignore[no-untyped-call]
    enable_tangents(before)
    return found is not None


def _is_batch(argument: Any) -> bool:
    return isinstance(argument, Tensor) and argument.dim() > 2


_PRODUCTS = (F.linear, F.multi_head_attention_forward)
# The getter of requires_grad, as __torch_function__ receives it.
REQUIRES_GRAD = torch.Tensor.requires_grad.__get__  # type: ignore[attr-defined]


@functools.cache
def load_rules() -> None:
    """Make torch load its forward-mode rules, and suppress the deprecation warnings that this import raises."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", DeprecationWarning)
        dual(torch.zeros(()), torch.zeros(()))


def dual(primal: Tensor, direction: Tensor) -> Tensor:
    """Return ``primal`` with the tangent ``direction``."""
    made: Tensor = forward_ad.make_dual(primal, direction)  # type: ignore[no-untyped-call]
    return made


def tangent(number: Tensor) -> Tensor:
    """Return the tangent, zero for a tensor that has none."""
    found: Tensor | None = forward_ad.unpack_dual(number).tangent  # type: ignore[no-untyped-call]
    return torch.zeros_like(number) if found is None else found.detach()


def primal(number: Tensor) -> Tensor:
    """Return the value without the tangent."""
    found: Tensor = forward_ad.unpack_dual(number).primal  # type: ignore[no-untyped-call]
    return found.detach()
