"""Custom functions with and without a second derivative."""

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

# The square of t: its backward has a second derivative only in the first.


class Square(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g * ctx.saved_tensors[0]


class Once(Square):
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g * ctx.saved_tensors[0]


class WithoutGradients(Square):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        with torch.no_grad():
            return 2 * g * ctx.saved_tensors[0]


class Outside(Square):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return torch.from_numpy(2 * g.detach().numpy() * ctx.saved_tensors[0].detach().numpy())


class Detached(Square):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g * ctx.saved_tensors[0].detach()


class OfTheOutput(Function):
    """An exponential saves its output; a rectifier saves what its derivative does not depend on smoothly."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.where(x > 0, x.exp(), 0.0)
        ctx.save_for_backward(x > 0, y)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        positive, y = ctx.saved_tensors
        return torch.where(positive, g * y, 0.0)


class Rounded(Function):
    """A straight-through estimator, whose derivative within bounds is defined to be one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.round()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * (ctx.saved_tensors[0].abs() < 2)


class InPlace(Square):
    """Overwrites what it has saved, as memory-saving kernels do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.clone())
        return x**2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        with torch.no_grad():
            return ctx.saved_tensors[0].mul_(2).mul_(g)


class Separate(Function):
    """The same with ``setup_context``, an integer output and a mapping rule."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        return x**2, x.sign().int()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Tensor) -> Tensor:
        return 2 * g * ctx.saved_tensors[0]


class SeparateOnce(Separate):
    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Tensor) -> Tensor:
        with torch.no_grad():
            return 2 * g * ctx.saved_tensors[0]


class Kept(Function):
    """Keeps a tensor as an attribute, which has no graph in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.twice = 2 * x
        return x**2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.twice


class Intermediate(Function):
    """Saves what its forward has computed beside its output: autograd knows no graph of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x, 2 * x)
        return x**2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[1]


class Fused(Function):
    """Computes its gradient in the forward, and scales it in place: a fused kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.gradients = {"of": [(2 * x).detach()]}
        return x**2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return ctx.gradients["of"][0].mul_(g)


class Elsewhere(Function):
    """Keeps its gradient as an array outside of the context."""

    kept: ClassVar[dict[int, np.ndarray]] = {}

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.number = len(Elsewhere.kept)
        Elsewhere.kept[ctx.number] = 2 * x.detach().numpy()
        return x**2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * torch.from_numpy(Elsewhere.kept[ctx.number])


class KeptConstant(Square):
    """Keeps constants, and a mask, which does not move smoothly."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.two, ctx.mask = torch.full_like(x, 2.0), (x > 0.5).to(x)
        return x**2 * ctx.mask

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return ctx.two * g * ctx.saved_tensors[0] * ctx.mask


@torch.library.custom_op("nestor_tests::square", mutates_args=())
def operator(x: Tensor) -> Tensor:
    return x**2


def _save(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


operator.register_autograd(lambda ctx, g: (2 * g * ctx.saved_tensors[0]).detach(), setup_context=_save)


def first_of(function: type[Function]) -> Callable[[Tensor], Tensor]:
    return lambda x: function.apply(x)[0]


GOOD: dict[str, Callable[[Tensor], Tensor]] = {
    "Square": Square.apply,
    "Separate": first_of(Separate),
    "KeptConstant": KeptConstant.apply,
}
BAD: dict[str, Callable[[Tensor], Tensor]] = {
    "Once": Once.apply,
    "WithoutGradients": WithoutGradients.apply,
    "Detached": Detached.apply,
    "Kept": Kept.apply,
    "Intermediate": Intermediate.apply,
    "Fused": Fused.apply,
    "Elsewhere": Elsewhere.apply,
    "Outside": Outside.apply,
    "SeparateOnce": first_of(SeparateOnce),
    "GeneratedBackward": operator,
}
