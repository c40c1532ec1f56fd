"""Attention kernels whose derivatives have derivatives."""

from __future__ import annotations

from types import TracebackType

from nestor.autodiff.torch_private import restore_attention, use_math_attention


class attention_math_kernel:  # a context manager, named like a function
    """Evaluate scaled dot-product attention with the math kernel.

    Torch's fused kernels have neither a double backward nor a forward-mode rule. Every evaluation of a response enters
    this context, so it is a class: a generator takes longer.
    """

    def __enter__(self) -> None:
        """Disable the fused kernels."""
        self._before = use_math_attention()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Enable the kernels that were enabled before."""
        restore_attention(self._before)
