"""Kernels that can be differentiated twice."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from torch.backends import cuda as kernels

# Whether a kernel of scaled dot-product attention may be taken, and how to say so. The flags hold on every device.
_FUSED: tuple[tuple[Callable[[], bool], Callable[[bool], None]], ...] = (
    (kernels.flash_sdp_enabled, kernels.enable_flash_sdp),
    (kernels.mem_efficient_sdp_enabled, kernels.enable_mem_efficient_sdp),
    (kernels.cudnn_sdp_enabled, kernels.enable_cudnn_sdp),
)


class twice_differentiable:  # a context manager, used as one
    """Evaluate with kernels whose derivatives have derivatives.

    Torch's fused attention kernels have neither a double backward nor a forward-mode rule; inside this context
    attention runs on the math kernel. Written out, since it is entered at every evaluation of a response and
    ``torch.nn.attention.sdpa_kernel`` takes as long as a small loss.
    """

    def __enter__(self) -> None:
        """Turn the fused kernels off."""
        self._math: bool = kernels.math_sdp_enabled()  # type: ignore[no-untyped-call]
        self._before = [enabled() for enabled, _ in _FUSED]
        for _, enable in _FUSED:
            enable(False)
        kernels.enable_math_sdp(True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Turn on what was on."""
        for (_, enable), before in zip(_FUSED, self._before, strict=True):
            enable(before)
        kernels.enable_math_sdp(self._math)
