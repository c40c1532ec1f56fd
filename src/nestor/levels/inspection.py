"""The first evaluation of a loss is inspected: its graph, and the variables that it may have changed."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

from nestor.autodiff.custom_functions import CustomFunction
from nestor.autodiff.instruments import is_tracing, uncounted
from nestor.autodiff.scope import Scope
from nestor.autodiff.second_derivatives import (
    NOT_A_DERIVATIVE,
    Evaluate,
    Move,
    custom_functions,
    is_derivative,
    without_second_derivative,
)
from nestor.autodiff.torch_private import tensor_slot
from nestor.data.containers import fresh, is_changed, put_back
from nestor.data.draws import Draw
from nestor.data.random_numbers import Captured
from nestor.errors import NestorWarning, NotAFunctionError, UnsupportedError
from nestor.levels.evaluation_watch import EvaluationWatch
from nestor.levels.keepers import BatchKeeper, ModeKeeper, Modes
from nestor.levels.level import Level
from nestor.levels.reader import replacements
from nestor.levels.refusals import HOOKS_OF_MODULES
from nestor.responses.implicit.conditions.gauss_newton import outputs_cut_off
from nestor.vectors import split


def inspect_next(level: Level) -> None:
    """Inspect the next evaluation of a level's loss; after it, evaluations are as fast as before.

    Evaluations without a complete graph (in forward mode, without gradients) do not count. The evaluation raises

    - :class:`UnsupportedError` if the graph contains reentrant checkpointing, a backward hook of a module, or a custom
      function whose backward stores gradients in ``.grad``,
    - :class:`NotAFunctionError` if it has changed a variable in place; the variable is restored.

    A loss that changes the mode of a module, or takes entries out of its batch, is wrapped, so that both are the same
    after each of its evaluations.
    It warns if a response differentiates the level, whose loss looks up the padding row of an embedding that moves.
    Custom functions without a second derivative and compiled code are noted in ``reader.only_once``, whose errors are
    raised when a response differentiates the loss twice.
    """
    reader = level.loss.reader
    (function,) = reader.function
    reader.only_once.clear()
    reader.function = (_Inspected(function.function if isinstance(function, _Inspected) else function, level),)
    if level.loss.tasks is not None:
        level.loss.tasks.inspects = True


class _Inspected:
    """A loss whose next evaluation is inspected.

    Args:
        function: The loss.
        level: Its level.
    """

    def __init__(self, function: Callable[..., Any], level: Level) -> None:
        self.function = function
        self._level = level
        self._is_first, self._is_inspected = True, False
        self._padding_left = _PADDING if level.links.upper_levels else 0

    def __call__(self, *batch: Any, **modules: Any) -> Any:
        """Evaluate the loss, and inspect the evaluation unless it is a trace."""
        if is_tracing():
            return self.function(*batch, **modules)
        tasks = self._level.loss.tasks
        if tasks is not None and not tasks.is_alone:  # inside vmap, tensors do not show their graph
            return self._evaluate(batch, modules)
        draw = Draw(fresh(batch[0]) if batch else None, Captured.now(), modules.get("step", 0))
        with EvaluationWatch() as watch:
            result = self._evaluate(batch, modules)
        value = result.get("loss") if isinstance(result, Mapping) else result
        if isinstance(value, Tensor) and value.grad_fn is not None and not self._has_duals():
            self._look(value, watch, draw)
        return result

    def _look(self, value: Tensor, watch: EvaluationWatch, draw: Draw) -> None:
        """Inspect a complete graph once, and its look-ups until one of them is that of padding."""
        loss = self._level.loss
        loss.reader.function = (self.function,)
        if not self._is_inspected:
            self._is_inspected = True
            self._inspect([value, *outputs_cut_off()], watch, partial(self._again, draw))
        self._padding_left -= 1
        if self._padding_left > 0 and watch.pads_later and loss.tasks is None:
            loss.reader.function = (self,)
        if self._padding_left >= 0:
            self._warn_of_padding(watch, value)

    def _warn_of_padding(self, watch: EvaluationWatch, value: Tensor) -> None:
        for row in watch.moving_rows(value):
            warnings.warn(
                f"Level {self._level.name!r}, loss {self._level.loss.where}: the loss looks up row {row} of an "
                f"embedding with padding_idx={row}, and tied weights or a penalty move this row. torch leaves the "
                "derivative of these look-ups out, so the hypergradient takes them as constants, as if they were "
                "detached: it is not that of the trained network. Multiply the embeddings by a mask of the indices "
                "that are no padding, or leave out padding_idx.",
                NestorWarning,
                stacklevel=2,
            )

    def _has_duals(self) -> bool:
        """Return whether the loss is evaluated in forward mode, in which its graph is not complete.

        An operation without a forward-mode rule may return a value without a tangent: the variables tell.
        """
        loss = self._level.loss
        present = (
            _present(loss.reader, names, own)
            for level, slots in loss.slots.items()
            for names, own in zip(slots, loss.variables[level], strict=True)
        )
        return any(forward_ad.unpack_dual(p).tangent is not None for p in present)  # type: ignore[no-untyped-call]

    def _again(self, draw: Draw, move: Move) -> tuple[list[Tensor], list[Tensor]]:
        """Evaluate the loss of the same batch at other values of all variables; return its roots and its leaves."""
        loss = self._level.loss
        sizes = [len(slots) for slots in loss.slots.values()]
        with uncounted(), torch.enable_grad(), Scope():
            present = [
                _present(loss.reader, names, own) if loss.tasks is not None else own
                for level, slots in loss.slots.items()
                for names, own in zip(slots, loss.variables[level], strict=True)
            ]
            leaves = move([p.detach() for p in present])
            moved = dict(zip(loss.slots, split(leaves, sizes), strict=True))
            if loss.tasks is None:
                return [loss.pure_value(draw, moved), *outputs_cut_off()], leaves
            copies = {name: value.clone() for name, (owner, key) in loss.buffers if (value := owner[key]) is not None}
            with draw.randomness.replay(loss.reader.watch):
                result = loss.reader.call(
                    (draw.batch,) if loss.takes_batch else (), {**replacements(moved, loss.slots), **copies}, draw.step
                )
            return [result["loss"] if isinstance(result, Mapping) else result, *outputs_cut_off()], leaves

    def _evaluate(self, batch: Sequence[Any], modules: Mapping[str, Any]) -> Any:
        """Evaluate the loss; the first time, compare the variables, the modes and the batch before and after."""
        if not self._is_first:
            return self.function(*batch, **modules)
        modes, kept = Modes(self._level.loss.reader), fresh(batch)
        try:
            result = self._compared(batch, modules)
        except BaseException:
            modes.restore()
            raise
        self._is_first = False
        if is_changed(batch, kept):
            put_back(batch[0], kept[0])
            self.function = BatchKeeper(self.function)
        if modes.have_changed:
            modes.restore()
            self.function = ModeKeeper(self.function, self._level.loss.reader)
        return result

    def _compared(self, batch: Sequence[Any], modules: Mapping[str, Any]) -> Any:
        """Evaluate the loss, and compare the variables before and after, as the modules contain them."""
        loss = self._level.loss
        before = [
            ((*names, level)[0].removeprefix("level_"), p, p.detach().clone())
            for level, slots in loss.slots.items()
            for names, own in zip(slots, loss.variables[level], strict=True)
            for p in (_present(loss.reader, names, own) if loss.tasks is None else own,)
        ]
        result = self.function(*batch, **modules)
        changed = [name for name, p, old in before if _differ(p, old)]
        if changed:
            with torch.no_grad():
                for _, parameter, old in before:
                    if parameter.is_leaf:
                        parameter.copy_(old)
            raise self._error(
                f"An evaluation of the loss changes variables in place ({', '.join(changed)}): two evaluations differ, "
                "and a response would move the level. The variables are restored. Compute the changed values in the "
                "forward (torch.nn.utils.parametrize), or change the variables in Problem(update=...).",
                NotAFunctionError,
            )
        return result

    def _inspect(self, roots: Sequence[Tensor], watch: EvaluationWatch, evaluate: Evaluate) -> None:
        """Look at every node of the graph, and try the backward of each custom function once."""
        functions = custom_functions(roots)
        for function in functions:
            self._refuse(function)
        self._level.loss.reader.only_once += [
            partial(self._error, message) for message in without_second_derivative(roots, evaluate)
        ]
        has_own = watch.has_hooks or any(function.is_users for function in functions)
        if has_own and self._level.links.upper_levels and not is_derivative(evaluate):
            where = f"Level {self._level.name!r}, loss {self._level.loss.where}"
            warnings.warn(f"{where}: {NOT_A_DERIVATIVE}", NestorWarning, stacklevel=2)

    def _refuse(self, function: CustomFunction) -> None:
        name = function.kind.__name__
        if name == "CheckpointFunction":
            raise self._error(REENTRANT)
        if name == "BackwardHookFunction":
            raise self._error(f"A module that the loss evaluates has a backward hook. {HOOKS_OF_MODULES}")
        if function.is_users and function.stores_gradients(self._level.loss.reader.parameters()):
            raise self._error(
                f"The backward of the custom function {name} stores gradients in .grad of parameters, where only "
                "loss.backward() finds them: the parameters would not be trained. Pass the parameters to the "
                "function as arguments, and return their gradients."
            )

    def _error(self, message: str, kind: type[Any] = UnsupportedError) -> Exception:
        error: Exception = kind(message, level=self._level.name, where=self._level.loss.where)
        return error


# Evaluations that look for padding among the indices, as long as there is none.
_PADDING = 20

REENTRANT = (
    "The loss uses torch.utils.checkpoint with use_reentrant=True, which hides the parameters of the block: only "
    "loss.backward() finds them, so the block would not be trained. Write checkpoint(..., use_reentrant=False); for "
    'Hugging Face: gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False}).'
)


def _present(reader: nn.Module, names: Sequence[str], own: Tensor) -> Tensor:
    """Return the tensor that a module contains in place of a variable: itself, a copy, or what was gathered."""
    if not names:
        return own
    slots, key = tensor_slot(reader, names[0])
    found: Tensor = slots[key]
    return found


def _differ(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors of one shape differ; NaN equals NaN."""
    return not torch.equal(a, b) and bool(((a != b) & ((a == a) | (b == b))).any())
