"""The choice of the exact method."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nestor.autodiff.instruments import is_compiling, is_tracing, uncounted
from nestor.responses.implicit.cross.cross_derivative import CrossDerivative
from nestor.responses.implicit.cross.forward_mode import ForwardMode, reverse_over_forward
from nestor.responses.implicit.cross.reverse_mode import ReverseMode
from nestor.responses.unrolling.trajectory import LowerLevel
from nestor.vectors import Params, algebra

FORWARD_MODE_FROM = 100_000
"""The number of variables from which forward mode is used for every loss that it can differentiate."""


@dataclass(frozen=True, kw_only=True)
class CheapestExact(CrossDerivative):
    """The exact method that is the cheapest for the level: forward mode, or reverse mode.

    Reverse mode computes the gradient with a graph and differentiates it: as much work as two steps of training.
    Forward mode computes tangents with the values, and has a fixed cost for each operation. The choice is a rule, so it
    is the same in every process and in a resumed run:

    - :class:`ReverseMode` for an objective that contains best responses;
    - :class:`ForwardMode` for a level of at least 100,000 variables;
    - :class:`ForwardMode` for a smaller level whose weights are used at several positions of a sample (convolutions,
      recurrent layers, attention, linear layers along a sequence) if reverse over forward is possible: operations do
      most of the work there, not the code around them;
    - :class:`ReverseMode` for everything else.

    Measured on one thread, in time of an iteration of Meta-Weight-Net divided by that with a central difference: see
    ``docs/benchmarks.md``.
    """

    def product(self, lower: LowerLevel, theta: Params, inputs: Params, vector: Params) -> list[Tensor | None]:
        """Multiply by the cheapest exact method; see :class:`CrossDerivative`."""
        return self.choose(lower, theta, inputs, vector).product(lower, theta, inputs, vector)

    def choose(self, lower: LowerLevel, theta: Params, inputs: Params, vector: Params) -> CrossDerivative:
        """Return the method for a level. The operations of its loss are observed once, in one more evaluation."""
        if lower.objective.nested or torch.is_grad_enabled():
            return ReverseMode()
        if algebra.size(theta) >= FORWARD_MODE_FROM:
            return ForwardMode()
        known = lower.objective.derivatives
        pays = known.forward_pays
        if pays is None:
            with uncounted():
                pays = _shares_weights(lower, theta, inputs, vector)
            if not is_tracing() or is_compiling():
                known.forward_pays = pays
        return ForwardMode() if pays else ReverseMode()


def _shares_weights(lower: LowerLevel, theta: Params, inputs: Params, vector: Params) -> bool:
    """Return whether weights are used at several positions of a sample, in an objective that is separable."""
    positions = _Positions()
    with contextlib.suppress(Exception), positions:  # what the loss cannot do, its own evaluation says
        reverse_over_forward(lower, theta, inputs, vector)
        return positions.are_several
    return False


class _Positions(TorchFunctionMode):
    """Observes whether an operation uses its weights at several positions of a sample."""

    are_several: bool = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _SHARING or (func in _PRODUCTS and any(isinstance(a, Tensor) and a.dim() > 2 for a in args)):
            self.are_several = True
        return func(*args, **(kwargs or {}))


_PRODUCTS = (F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.einsum)
_SHARING = (
    *(F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
    *(torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu),
    *(F.multi_head_attention_forward, F.scaled_dot_product_attention),
)
