"""Calls a function with other tensors in the modules that it reads."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from nestor.autodiff.scope import Scope, Slot, is_twice, place
from nestor.autodiff.torch_private import layer_slot, tensor_slot
from nestor.autodiff.weight_norm import normalizes_weights, with_elementary_norms
from nestor.data.random_numbers import Watch
from nestor.errors import LossError
from nestor.levels.constants import Constants, constant_slots
from nestor.vectors import Params


class Reader(nn.Module):
    """Contains the modules that a function reads, and calls the function with other tensors in the modules.

    The modules have prefixed names, because a level may be called ``forward`` or ``module``.

    Args:
        function: The function.
        modules: The modules that it reads, by the names of its arguments.
        takes_step: Whether it has the argument ``step``.

    Attributes:
        function: The function, in a tuple: one that is a module must not become a part of the reader.
        only_once: Makers of errors for a function that cannot be differentiated twice.
        takes_step: Whether the function has the argument ``step``, the number of steps that the level took before.
        watch: Notices whether the function draws random numbers outside of torch.
        constants: The tensors that it reads and that are variables or buffers of no level; None if there are none.
    """

    def __init__(
        self, function: Callable[..., Any], modules: Mapping[str, nn.Module], *, takes_step: bool = False
    ) -> None:
        super().__init__()
        self.takes_step = takes_step
        self.watch = Watch()
        self.constants: Constants | None = None
        self.function = (function,)
        self.only_once: list[Callable[[], Exception]] = []
        self._arguments: dict[str, Any] = dict(modules)
        self._slots: dict[str, Slot] = {}
        for name, module in modules.items():
            self.add_module(f"level_{name}", module)
        self._normalizes = normalizes_weights(self)
        # Layers and parameters with their slots, and whether they are trained.
        layers = [(layer_slot(self, path), path, layer) for path, layer in self.named_modules() if path]
        tensors = [(tensor_slot(self, path), path, p) for path, p in self.named_parameters(remove_duplicate=False)]
        self._held = [(*slot, path, part, _is_trained(part)) for slot, path, part in (*layers, *tensors)]

    def check_modules(self) -> None:
        """Raise a LossError if a trained layer or parameter was replaced or frozen, or another one unfrozen."""
        changed: dict[str, list[str]] = {}
        for held, key, path, part, was_trained in self._held:
            now = held.get(key)
            if now is part and (not isinstance(part, Tensor) or part.requires_grad is was_trained):
                continue
            if now is part or was_trained or _is_trained(now):  # else a teacher was replaced
                change = "replaced" if now is not part else "frozen" if was_trained else "unfrozen"
                level, _, inside = path.removeprefix("level_").partition(".")
                changed.setdefault(change, []).append(f"{inside!r} of level {level!r}")
        if changed:
            found = "; ".join(f"{change}: {', '.join(names)}" for change, names in changed.items())
            raise LossError(
                f"The modules were changed after the program was built, which trains the parameters that they had then "
                f"({found}). Freeze, prune, parametrize and replace layers before, or build a new Program of the same "
                "modules. A loss must leave requires_grad alone: each level is differentiated in its own variables."
            )

    def call(self, arguments: Sequence[Any], tensors: Mapping[str, Tensor], step: int) -> Any:
        """Call the function with other tensors as named parameters and buffers.

        The tensors stay in the modules until the innermost :class:`~nestor.autodiff.scope.Scope` exits; without a
        scope, until the function returns. Slots are cached: a lookup by name takes as long as a small loss.
        """
        function = self.function[0]
        if self._normalizes and is_twice():
            function = with_elementary_norms(function)
        slots = self._slots
        more = {**self._arguments, "step": step} if self.takes_step else self._arguments
        if not tensors:
            return function(*arguments, **more)
        placed = [(slots.get(name) or self._slot(name), tensor) for name, tensor in tensors.items()]
        if place(placed):
            return function(*arguments, **more)
        with Scope():
            place(placed)
            return function(*arguments, **more)

    def _slot(self, name: str) -> Slot:
        return self._slots.setdefault(name, tensor_slot(self, name))

    def aliases(self, parameters: Iterable[nn.Parameter]) -> list[tuple[str, ...]]:
        """List the names of each parameter within the reader; none if no module of the reader contains it.

        A parameter of several modules (tied weights) has a name in each. A module that is reachable by several paths
        is named once: replacing the same slot twice would lose the slot's own tensor.
        """
        names: dict[int, list[str]] = {}
        for prefix, module in self.named_modules():
            for name, parameter in module.named_parameters(prefix, recurse=False, remove_duplicate=False):
                names.setdefault(id(parameter), []).append(name)
        return [tuple(names.get(id(parameter), ())) for parameter in parameters]

    def buffer_slots(self, owners: Collection[nn.Module] | None = None) -> list[tuple[str, Slot]]:
        """List the buffers of all modules that are read, or of those among ``owners``, by name in the reader."""
        return [
            (name, self._slot(name))
            for prefix, module in self.named_modules()
            if owners is None or module in owners
            for attribute, _ in module.named_buffers(recurse=False, remove_duplicate=False)
            for name in (f"{prefix}.{attribute}",)
        ]

    def watch_constants(self, level: str, owned: Collection[int], variables: Params) -> None:
        """Find the constants of the function.

        Args:
            level: The level that evaluates the function.
            owned: The identities of the parameters that are variables of levels.
            variables: The variables of the level.
        """
        if slots := constant_slots(self, self.function[0], owned):
            self._slots |= slots
            self.constants = Constants(level, list(slots.items()), variables)


def replacements(replaced: Mapping[str, Params], slots: Mapping[str, Sequence[tuple[str, ...]]]) -> dict[str, Tensor]:
    """Name the tensors of some levels by their slots in a reader; a tied tensor has several names."""
    named = {}
    for level, values in replaced.items():
        for value, names in zip(values, slots.get(level, ()), strict=False):
            for name in names:
                named[name] = value
    return named


def _is_trained(part: Any) -> bool:
    """Return whether a parameter, or one of a layer, requires a gradient."""
    parameters = part.parameters() if isinstance(part, nn.Module) else [part]
    return any(isinstance(p, Tensor) and p.requires_grad for p in parameters)
