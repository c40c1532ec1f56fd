"""Kernels that can be differentiated twice."""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch.nn.attention import SDPBackend, sdpa_kernel


def twice_differentiable() -> AbstractContextManager[None]:
    """Evaluate with kernels whose derivatives have derivatives.

    Torch's fused attention kernels have neither a double backward nor a forward-mode rule; inside this context
    attention runs on the math kernel.
    """
    context: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH)
    return context
