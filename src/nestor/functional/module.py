"""A module as a function of its parameters and buffers."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from nestor.autodiff.scope import Scope, place
from nestor.autodiff.torch_private import tensor_slot
from nestor.vectors import Tree


class ModuleFunction:
    """The function ``(theta, [inputs, tensors])`` that calls a module with other parameters and buffers.

    The tensors that the module contains are the same after the call. Within a
    :class:`~nestor.autodiff.scope.Scope`, they are replaced until the scope exits.

    Args:
        module: The module, called as ``module(theta, inputs)``.

    Attributes:
        tensors: The parameters that it contains now, and copies of its buffers.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._buffers = [buffer for _, buffer in module.named_buffers()]
        copied = {id(buffer): buffer.detach().clone() for buffer in self._buffers}
        # A tensor with several names is one input.
        named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
        distinct = {id(tensor): copied.get(id(tensor), tensor) for _, tensor in named}
        order = {key: index for index, key in enumerate(distinct)}
        self.tensors: list[Tensor] = list(distinct.values())
        self._slots = [(tensor_slot(module, name), order[id(tensor)], id(tensor) in copied) for name, tensor in named]

    def __call__(self, theta: Tree, given: Sequence[Any]) -> Any:
        """Call the module with the given tensors; buffers are copied, because the module may change them."""
        inputs, tensors = given
        values = {index: tensors[index].clone() if fixed else tensors[index] for _, index, fixed in self._slots}
        placed = [(slot, values[index]) for slot, index, _ in self._slots]
        if place(placed):
            return self._module(theta, inputs)
        with Scope():
            place(placed)
            return self._module(theta, inputs)
