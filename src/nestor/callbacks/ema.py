"""An exponential moving average of the variables of a run."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from nestor.autodiff.torch_private import foreach_lerp_
from nestor.errors.options import check_options, typed
from nestor.levels.copies import copies_of_tasks
from nestor.levels.level import Level
from nestor.training.callback import Callback
from nestor.training.run import Run
from nestor.vectors import Params, algebra


class EMA(Callback):
    r"""Average the variables of levels along the run, with exponentially decreasing weights.

    The average starts with the variables :math:`x_1` at the first update. The update number :math:`n + 1` is

    .. math:: a_{n+1} = d_n\, a_n + (1 - d_n)\, x_{n+1}, \qquad a_1 = x_1,

    where :math:`d_n` is ``decay``, or the smaller one of ``decay`` and :math:`(1 + n) / (10 + n)` with ``warmup``. The
    run itself does not change. A level that has not stepped since the last update is not updated. Averages of half
    precision variables are in single precision. With ``FullySharded`` each process averages its shards.

    Args:
        decay: The weight of the past; at least 0 and below 1.
        levels: The names of the levels to average, or one name; None averages all.
        every: Engine steps between two updates. A compiled run takes the steps in between at once.
        warmup: Whether the decay begins small, so that the first variables are soon forgotten.
        buffers: Whether the modules' buffers of floating-point numbers (BatchNorm's statistics) are averaged too.
            Otherwise the averaged modules have the present buffers.
        validate: Whether validations evaluate the averaged variables. The variables of the run come back when the
            callback's own ``on_validation`` is called: list ``BestWeights`` before it to keep the averaged ones.

    Raises:
        ValueError: If ``decay`` or ``every`` is out of range; in the run, if there is no such level.

    Example:
        >>> import torch, nestor
        >>> net = nestor.Variable(torch.ones(2))
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.25)
        >>> program = nestor.Program(net=nestor.Problem(net, lambda net: net().square().sum(), optimizer=sgd))
        >>> ema = nestor.callbacks.EMA(decay=0.5)
        >>> metrics = nestor.Engine(program, callbacks=[ema], seed=0).run(2)
        >>> ema.module("net").value.tolist()
        [0.375, 0.375]
    """

    @typed
    def __init__(
        self,
        decay: float = 0.999,
        *,
        levels: str | Sequence[str] | None = None,
        every: int = 1,
        warmup: bool = False,
        buffers: bool = False,
        validate: bool = False,
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(
                f"EMA(decay={decay!r}) must be at least 0 and below 1: 0.999 averages about 1,000 updates."
            )
        self.decay, self.every, self.warmup, self.buffers, self.validate = decay, every, warmup, buffers, validate
        check_options(self, counts=["every"])
        self.levels = [levels] if isinstance(levels, str) else levels
        self._averages: dict[str, Average] = {}
        self._loaded: dict[str, Any] = {}
        self._run: Run | None = None

    def is_due(self, engine: Run, step: int) -> bool:
        return step % self.every == 0

    def on_start(self, engine: Run) -> None:
        if unknown := [name for name in self.levels or () if name not in engine.states]:
            raise ValueError(f"EMA(levels={unknown!r}): the levels of the program are {', '.join(engine.states)}.")
        self._run = engine
        for name, state in engine.states.items():
            if (self.levels is None or name in self.levels) and name not in self._averages:
                self._averages[name] = Average(state.level, self.buffers)
        self._take_loaded()

    def on_step(self, engine: Run) -> None:
        self._update(engine)

    def _update(self, engine: Run) -> None:
        if engine.step % self.every:
            return
        for name, average in self._averages.items():
            steps = engine.states[name].steps
            if steps != average.steps:
                count = average.updates
                average.update(min(self.decay, (1 + count) / (10 + count)) if self.warmup else self.decay)
                average.steps = steps

    def before_validation(self, engine: Run) -> None:
        self._update(engine)  # on_step comes after the validation
        if self.validate:
            for average in self._averages.values():
                average.swap_in()

    def on_validation(self, engine: Run, metrics: dict[str, float]) -> None:
        self._swap_out()

    def on_end(self, engine: Run, error: BaseException | None) -> None:
        self._swap_out()  # the validation may have raised

    def state_dict(self) -> dict[str, Any]:
        return {name: average.state_dict() for name, average in self._averages.items()} or self._loaded

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._loaded = dict(state)
        if self._averages:
            self._take_loaded()

    def module(self, level: str) -> nn.Module:
        """Return a copy of the module of a level, with the averaged variables of all levels that share the module.

        With several processes, all processes must call this method.

        Raises:
            ValueError: If the level is not averaged, or has tasks.
            RuntimeError: If no step was averaged yet.
        """
        own = self._average(level).level.problem
        if own.tasks is not None:
            raise ValueError(f"Level {level!r} has {own.tasks} copies of its module: EMA.copies({level!r}).")
        assert self._run is not None
        with self._run.runtime.whole_modules():
            module = copy.deepcopy(own.module)
        with torch.no_grad():
            for average in self._averages.values():
                if average.level.problem.module is own.module and average.updates:
                    average.write(dict(module.named_parameters()), dict(module.named_buffers()))
        return module

    def copies(self, level: str) -> list[nn.Module]:
        """Return the modules of a level with tasks, one for each task, with averaged variables.

        Raises:
            ValueError: If the level is not averaged, or has no tasks.
            RuntimeError: If no step was averaged yet.
        """
        average = self._average(level)
        with self.in_modules():
            return copy.deepcopy(list(copies_of_tasks(average.level)))

    @contextmanager
    def in_modules(self) -> Iterator[None]:
        """Return a context in which the variables of the run are the averages; then they come back, bitwise.

        With several processes, all processes must enter the context.
        """
        with nullcontext() if self._run is None else self._run.runtime.as_in_a_run():
            for average in self._averages.values():
                average.swap_in()
            try:
                yield
            finally:
                self._swap_out()

    def apply(self, engine: Run) -> None:
        """Copy the averages into the variables of a run, and the averaged buffers into its modules.

        With several processes, all processes must call this method. Optimizers keep their memory.

        Raises:
            RuntimeError: If no step was averaged yet.
        """
        for name in self._averages:
            self._average(name)
        with engine.runtime.whole_modules():
            for name, average in self._averages.items():
                level = engine.states[name].level
                if level.problem.tasks is None:
                    module = level.problem.module
                    average.write(dict(module.named_parameters()), dict(module.named_buffers()))
        for name, average in self._averages.items():
            if engine.states[name].level.problem.tasks is not None:
                with torch.no_grad():
                    algebra.copy_(engine.states[name].level.parameters, average.values)

    def _average(self, level: str) -> "Average":
        if level not in self._averages and self._run is not None:
            raise ValueError(f"EMA averages the levels {', '.join(self._averages)}, not {level!r}.")
        if level not in self._averages or not self._averages[level].updates:
            raise RuntimeError(
                f"EMA has averaged no step of level {level!r} yet. Give the callback to Engine(callbacks=...) and run."
            )
        return self._averages[level]

    def _take_loaded(self) -> None:
        for name, average in self._averages.items():
            if name in self._loaded:
                average.load_state_dict(self._loaded[name])
        self._loaded = {}

    def _swap_out(self) -> None:
        for average in self._averages.values():
            average.swap_out()


class Average:
    """The average of one level's variables and buffers.

    Args:
        level: The level.
        with_buffers: Whether the buffers of its module are averaged.

    Attributes:
        values: The averages, one for each variable (a shard, with ``FullySharded``).
        buffers: The averages of the buffers, by name.
        updates: Number of updates.
        steps: The number of steps of the level at the last update.
    """

    def __init__(self, level: Level, with_buffers: bool) -> None:
        self.level = level
        self.values: list[Tensor] = []
        self.buffers: dict[str, Tensor] = {}
        self.updates = self.steps = 0
        self._with_buffers = with_buffers
        self._held: tuple[Params, dict[str, Tensor]] | None = None

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Move the averages towards the present values; the first update copies them."""
        values, buffers = _precise(self.level.parameters), self._float_buffers()
        if not self.updates:
            self.values = [value.clone() for value in values]
            self.buffers = {name: buffer.clone() for name, buffer in buffers.items()}
        else:
            foreach_lerp_(self.values, values, 1 - decay)
            for name, buffer in buffers.items():
                self.buffers[name].lerp_(buffer, 1 - decay)
        self.updates += 1

    @torch.no_grad()
    def swap_in(self) -> None:
        """Copy the averages into the variables and buffers, whose values are kept for :meth:`swap_out`."""
        if self.updates and self._held is None:
            buffers = self._float_buffers()
            self._held = self.level.copies(), {name: buffer.clone() for name, buffer in buffers.items()}
            self._put(self.values, self.buffers)

    @torch.no_grad()
    def swap_out(self) -> None:
        """Copy the values that were kept back, bitwise."""
        if self._held is not None:
            self._put(*self._held)
            self._held = None

    def _put(self, values: Params, buffers: dict[str, Tensor]) -> None:
        for parameter, value in zip(self.level.parameters, values, strict=True):
            parameter.copy_(value)
        for name, buffer in self._float_buffers().items():
            buffer.copy_(buffers[name])

    @torch.no_grad()
    def write(self, parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> None:
        """Copy whole averages into named parameters and buffers."""
        for name, value in zip(self.level.names, self.level.gather(self.values), strict=True):
            assert value is not None
            parameters[name].copy_(value)
        for name, value in self.buffers.items():
            buffers[name].copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """Return whole averages and the counters."""
        values = algebra.present(self.level.gather(self.values)) if self.updates else []
        return {"values": values, "buffers": dict(self.buffers), "updates": self.updates, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned; the tensors are copied."""
        device = self.level.parameters[0].device
        found = self.level.shard(state["values"]) if state["updates"] else []
        self.values = [value.to(device, copy=True) for value in algebra.present(found)]
        self.buffers = {name: value.to(device, copy=True) for name, value in state["buffers"].items()}
        self.updates, self.steps = state["updates"], state["steps"]

    def _float_buffers(self) -> dict[str, Tensor]:
        if not self._with_buffers:
            return {}
        named = self.level.problem.module.named_buffers()
        return {name: buffer for name, buffer in named if buffer.is_floating_point()}


def _precise(values: Params) -> list[Tensor]:
    """Return the values without graphs, those in half precision in single precision."""
    return [v.detach().float() if v.dtype in (torch.float16, torch.bfloat16) else v.detach() for v in values]
