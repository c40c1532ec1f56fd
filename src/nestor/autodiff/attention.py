"""Kernels that can be differentiated twice."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from torch import _C as kernels

# What torch.backends.cuda calls: its functions take as long again.
# Whether a kernel of scaled dot-product attention may be taken, and how to say so. The flags hold on every device.
_FUSED: tuple[tuple[Callable[[], bool], Callable[[bool], None]], ...] = (
    (kernels._get_flash_sdp_enabled, kernels._set_sdp_use_flash),
    (kernels._get_mem_efficient_sdp_enabled, kernels._set_sdp_use_mem_efficient),
    (kernels._get_cudnn_sdp_enabled, kernels._set_sdp_use_cudnn),
)


class twice_differentiable:  # a context manager, used as one
    """Evaluate with kernels whose derivatives have derivatives.

    Torch's fused attention kernels have neither a double backward nor a forward-mode rule; inside this context
    attention runs on the math kernel. Written out, since it is entered at every evaluation of a response and
    ``torch.nn.attention.sdpa_kernel`` takes as long as a small loss.
    """

    def __enter__(self) -> None:
        """Turn the fused kernels off."""
        self._math = kernels._get_math_sdp_enabled()
        self._before = [enabled() for enabled, _ in _FUSED]
        for _, enable in _FUSED:
            enable(False)
        kernels._set_sdp_use_math(True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Turn on what was on."""
        for (_, enable), before in zip(_FUSED, self._before, strict=True):
            enable(before)
        kernels._set_sdp_use_math(self._math)
