"""Forward mode: dual numbers, and a mode in which a loss treats them as tensors that require gradients."""

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nestor.autodiff.grad import grad
from nestor.autodiff.torch_private import apply_grad_mode, are_tangents_enabled, enable_tangents

Dual: TypeAlias = tuple[Tensor, Tensor]
"""A value and its tangent."""


class DualMode(TorchFunctionMode):
    """Makes operations treat tensors with tangents like tensors that require gradients, without a graph.

    - ``torch.no_grad()`` inside a loss disables tangents, as it disables gradients.
    - ``requires_grad`` is true for a tensor with a tangent: some losses read it to choose which parameters they decay.
    - A batch that is not contiguous is copied before it is multiplied by a matrix. Without the copy, torch multiplies
      row by row if the matrix does not require gradients, which takes six times as long.
    - A lookup of ``padding_idx`` is a constant, as it is in reverse mode: torch masks the gradient but not the tangent.
    - ``mse_loss`` gets tangents for both arguments: torch's rule for its mean fails if only one has a tangent.
    - An LSTM runs on the kernel that has a rule.
    - Operations whose rule in torch is wrong (``cholesky_inverse``, products by ``scatter_reduce``) raise an error.
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
            return func(*args) or has_tangent(args[0])
        if func in _PRODUCTS:
            dense: dict[int, Tensor] = {}  # one copy per tensor: attention compares its arguments by identity
            args = tuple(dense.setdefault(id(a), a.contiguous()) if _is_batch(a) else a for a in args)
        args, kwargs = apply_grad_mode(func, args, kwargs or {}, self._changes)
        return _RULES.get(func, func)(*args, **kwargs)


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Look up rows; those of ``padding_idx`` have neither a tangent nor a graph, and no gradient is sparse."""
    rows = F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq)
    if padding_idx is None:
        return rows
    is_padding = (input == padding_idx % len(weight)).unsqueeze(-1)
    return torch.where(is_padding, rows.detach(), rows)


def _mse_loss(input: Tensor, target: Tensor, *args: Any, **options: Any) -> Tensor:
    if are_tangents_enabled() and has_tangent(input) != has_tangent(target):
        input, target = _with_tangent(input), _with_tangent(target)
    return F.mse_loss(input, target, *args, **options)


def _with_tangent(number: Tensor) -> Tensor:
    if has_tangent(number) or not number.is_floating_point():
        return number
    number = number.contiguous()  # an expanded tensor cannot get a tangent
    return dual(number, torch.zeros_like(number))


def _lstm(*args: Any) -> Any:
    """Run an LSTM by the kernel of torch that has a forward-mode rule."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a flag that is set and restored too
        with torch.backends.mkldnn.flags(enabled=False):
            return torch.lstm(*args)


def _wrong(*args: Any, **options: Any) -> Tensor:
    raise NotImplementedError("torch's forward-mode rule of cholesky_inverse is wrong")


def _scatter_reduce(*args: Any, **options: Any) -> Tensor:
    if "prod" in (*args[4:5], options.get("reduce")):
        raise NotImplementedError("torch's forward-mode rule of scatter_reduce is wrong for products")
    return torch.scatter_reduce(*args, **options)


def is_tracked(number: Tensor) -> bool:
    """Return whether a derivative is taken with respect to a tensor, in reverse or in forward mode."""
    return number.requires_grad or has_tangent(number)


def has_tangent(number: Tensor) -> bool:
    """Return whether the tensor has a tangent, inside ``torch.no_grad`` too."""
    before = are_tangents_enabled()
    enable_tangents(True)  # inside torch.no_grad torch would not return the tangent
    found: Tensor | None = forward_ad.unpack_dual(number).tangent  # type: ignore[no-untyped-call]
    enable_tangents(before)
    return found is not None


def _is_batch(argument: Any) -> bool:
    return isinstance(argument, Tensor) and argument.dim() > 2


_PRODUCTS = (F.linear, F.multi_head_attention_forward)
_RULES: Mapping[Any, Callable[..., Tensor]] = {
    F.embedding: _embedding,
    F.mse_loss: _mse_loss,
    torch.lstm: _lstm,
    torch.cholesky_inverse: _wrong,
    Tensor.cholesky_inverse: _wrong,
    torch.scatter_reduce: _scatter_reduce,
    Tensor.scatter_reduce: _scatter_reduce,
}
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


def dual_gradient(value: Tensor, wrt: Sequence[Tensor], loss_scale: Tensor | None) -> list[Tensor | None]:
    """Differentiate a scalar that has a tangent; the derivatives have tangents.

    Torch promises that a derivative can be differentiated again only if it is computed with ``create_graph=True``:
    otherwise it reads factors without tangents (``torch.linalg.solve``) or calls fused kernels without a forward-mode
    rule (``silu``). The graph is made here too, but it saves no tensor.
    """
    scaled = value if loss_scale is None else value * loss_scale
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: None, lambda nothing: nothing):
        grads = grad([scaled], wrt, create_graph=True, retain_graph=False)
    return grads if loss_scale is None else [None if g is None else g / loss_scale for g in grads]


def primal(number: Tensor) -> Tensor:
    """Return the value without the tangent."""
    found: Tensor = forward_ad.unpack_dual(number).primal  # type: ignore[no-untyped-call]
    return found.detach()
