"""What an evaluation does that its graph does not show: look-ups of a padding row, and hooks."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class EvaluationWatch(TorchFunctionMode):
    """Notes the embeddings with a padding row that are evaluated in the ``with`` block, and hooks.

    Attributes:
        pads_later: Whether there were such embeddings, and no index was that of the padding row.
        has_hooks: Whether a hook was registered on a tensor, which may change its gradient.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pads_later = self.has_hooks = False
        self._found: list[tuple[Tensor, Tensor, int, Tensor]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.has_hooks |= func is Tensor.register_hook
        if func is F.embedding:
            self._note_lookup(result, *args, **(kwargs or {}))
        return result

    def _note_lookup(
        self, result: Tensor, input: Tensor, weight: Tensor, padding_idx: int | None = None, *args: Any, **kwargs: Any
    ) -> None:
        if padding_idx is None or not result.requires_grad:
            return
        row = padding_idx % weight.shape[0]
        is_padding = input == row
        if bool(is_padding.any()):
            self._found.append((result, weight, row, is_padding))
        self.pads_later = not self._found

    def moving_rows(self, loss: Tensor) -> Iterator[int]:
        """Yield the padding rows whose look-ups change the loss, and which have a gradient from elsewhere.

        The gradient of a look-up leaves the padding row out. Tied weights and penalties move the row all the same.
        """
        for result, weight, row, is_padding in self._found:
            of_lookups, of_weight = torch.autograd.grad(loss, [result, weight], retain_graph=True, allow_unused=True)
            if of_lookups is None or of_weight is None:
                continue
            if bool(of_lookups[is_padding].any()) and bool(of_weight[row].any()):
                yield row
