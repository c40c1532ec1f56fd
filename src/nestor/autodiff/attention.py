r"""Attention on dual numbers, written out.

.. math:: S = \sigma Q K^T + M, \quad P = \mathrm{softmax}(S), \quad O = P V, \qquad
    \dot P = P \circ (\dot S - \overline{P \circ \dot S}), \quad \dot O = \dot P V + P \dot V

A bar is the sum over a row. Torch's forward mode takes the operation apart, and looks for rows that are wholly masked
by passes over all scores. Here one clamp of the sums does that.
"""

import math

import torch
from torch import Tensor

from nestor.autodiff.forward_mode import Dual


def attend(query: Dual, key: Dual, value: Dual, mask: Tensor | None, scale: float | None) -> Dual:
    """Return the attention of queries to keys and values; see ``torch.nn.functional.scaled_dot_product_attention``.

    Args:
        query: Of shape (..., queries, size).
        key: Of shape (..., keys, size).
        value: Of shape (..., keys, size of a value).
        mask: Added to the scores; or true where a query may attend. It has no tangent.
        scale: Multiplies the scores; None is one divided by the square root of the size.
    """
    count, size = query[0].shape[-2:]
    factor = 1 / math.sqrt(size) if scale is None else scale
    # The products with the keys, and with the values, are one for the value and its tangent.
    both = torch.cat([query[0] * factor, query[1] * factor], -2)
    products = both @ key[0].mT
    scores, changes = products[..., :count, :], products[..., count:, :] + both[..., :count, :] @ key[1].mT
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    largest = scores.amax(-1, keepdim=True).clamp_min_(torch.finfo(scores.dtype).min)
    powers = (scores - largest).exp_()
    # The largest power is one, so that the sum is below one only if a whole row is masked.
    weights = powers.div_(powers.sum(-1, keepdim=True).clamp_min_(1))
    changes = changes.mul_(weights)
    changes = torch.addcmul(changes, weights, changes.sum(-1, keepdim=True), value=-1)
    products = torch.cat([weights, changes], -2) @ value[0]
    # A copy: torch takes no view of a dual number that is a view itself and whose tangent is laid out otherwise.
    return products[..., :count, :].clone(), products[..., count:, :] + weights @ value[1]


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """Return the mask in which query i may attend to the keys up to i."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril()
